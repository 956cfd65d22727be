"""Criteria that compare layers of student and teacher, named by their paths, and the connectors between them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.config.schema import NotNegative, PositiveFloat
from raydfkd.distillation.criteria import CRITERIA, Criterion
from raydfkd.networks.observed import Layer, Need, Observation, Tap

PENULTIMATE = "penultimate"
"""Name of the input of the linear layer that makes the logits, whatever its path is."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer of a network, by its path or as ``PENULTIMATE``."""

    path: str

    @property
    def tap(self) -> Tap:
        """The read that its output takes."""
        return Need.FEATURES if self.path == PENULTIMATE else Layer(self.path)

    def of(self, seen: Observation) -> Tensor:
        """Its output.

        Raises:
            ValueError: it was not called on the way to the answer.
        """
        output = seen.features if self.path == PENULTIMATE else seen.layers.get(self.path)
        if output is None:
            raise ValueError(f"the layer {self.path!r} takes no part in the network's answer; name one that does")
        return output


class FeatureCriterion(Criterion):
    """Compares the outputs of a layer of the student and one of the teacher, [N, C, H, W], [N, T, D] or [N, D].

    Args:
        student: path of the student's layer, such as layer2.1.bn2; ``penultimate`` is the input of the layer that makes
            the logits.
        teacher: the same of the teacher.
    """

    def __init__(self, *, student: str = PENULTIMATE, teacher: str = PENULTIMATE) -> None:
        self._student, self._teacher = Place(student), Place(teacher)

    @property
    @override
    def student_taps(self) -> frozenset[Tap]:
        return frozenset({self._student.tap})

    @property
    @override
    def teacher_taps(self) -> frozenset[Tap]:
        return frozenset({self._teacher.tap})

    @override
    def connector(self, student: Observation, teacher: Observation) -> nn.Module | None:
        self._refuse(self._student.of(student), self._teacher.of(teacher))
        return None

    def _refuse(self, student: Tensor, teacher: Tensor) -> None:
        """Raise a ValueError where outputs of such shapes cannot be compared."""

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        return self.compare(self._student.of(student), self._teacher.of(teacher))

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar to minimise, of the outputs of both layers for N images."""


class ConnectedCriterion(FeatureCriterion):
    """One that compares outputs element by element, for which the student's are brought to the teacher's width.

    That is done by a 1x1 convolution with BatchNorm, or a linear layer where there are no positions, which is trained
    along with the student and dropped in the end; where widths are the same there is nothing between. Of maps of two
    sizes the larger one is averaged down to the smaller one.
    """

    _connector: nn.Module | None = None

    @override
    def connector(self, student: Observation, teacher: Observation) -> nn.Module | None:
        ours, theirs = self._student.of(student), self._teacher.of(teacher)
        self._refuse(ours, theirs)
        axis = 1 if ours.ndim == 4 else -1
        width, wanted = ours.shape[axis], theirs.shape[axis]
        if width == wanted:
            return None
        if ours.ndim != 4:
            return nn.Linear(width, wanted)
        convolution = nn.Conv2d(width, wanted, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        return nn.Sequential(convolution, nn.BatchNorm2d(wanted))

    @override
    def _refuse(self, student: Tensor, teacher: Tensor) -> None:
        is_alike = student.ndim == teacher.ndim and 2 <= student.ndim <= 4
        if not is_alike or (student.ndim == 3 and student.shape[1] != teacher.shape[1]):
            raise ValueError(
                f"the student's {self._student.path} answers {_shape(student)} for each image and the teacher's "
                f"{self._teacher.path} {_shape(teacher)}, which cannot be connected; name two layers that answer maps, "
                "or two that answer vectors"
            )

    @override
    def attach(self, connector: nn.Module) -> None:
        self._connector = connector

    @override
    def __call__(self, student: Observation, teacher: Observation, labels: Tensor) -> Tensor:
        ours = self._student.of(student)
        if self._connector is not None:
            ours = self._connector(ours).float()
        return self.compare(*of_one_size(ours, self._teacher.of(teacher)))


def _shape(output: Tensor) -> str:
    return "x".join(map(str, output.shape[1:])) or "a number"


def of_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [N, C, H, W] of two sizes, each averaged down to the smaller height and width; others as they are."""
    if one.ndim != 4 or one.shape[2:] == other.shape[2:]:
        return one, other
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)


@CRITERIA.register("hint")
class Hint(ConnectedCriterion):
    """Mean squared difference of the outputs of two layers, over images and elements (Romero et al. 2015, FitNets).

    The student's are first brought to the teacher's width by a 1x1 convolution with BatchNorm, or by a linear layer,
    that is trained along and dropped in the end; the paper's regressor has neither normalisation nor 1x1 weights.

    Args:
        student: path of the student's layer; `penultimate` is the input of the layer that makes the logits.
        teacher: the same of the teacher.
    """

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)


@CRITERIA.register("activation_boundary")
class ActivationBoundary(ConnectedCriterion):
    """Squared hinge that wants each unit of the student on the teacher's side of zero, by a margin.

    Mean over images and units of max(0, margin - s)^2 where the teacher's t > 0, and of max(0, margin + s)^2 elsewhere,
    for outputs before the ReLU: name BatchNorm layers. Source: Heo et al. 2019. The released code sums over units, so
    that a weight there is one here times channels, height and width, and has the teacher in training mode, whose
    BatchNorm drifts; here it stays in eval mode. The student's outputs are brought to the teacher's width by a 1x1
    convolution with BatchNorm, or by a linear layer, that is trained along and dropped in the end.

    Args:
        student: path of the student's layer; `penultimate` is the input of the layer that makes the logits.
        teacher: the same of the teacher.
        margin: distance from zero from which on a unit on the right side costs nothing.
    """

    def __init__(self, *, student: str, teacher: str, margin: PositiveFloat = 1.0) -> None:
        super().__init__(student=student, teacher=teacher)
        self._margin = margin

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        side = torch.where(teacher > 0, 1.0, -1.0).to(student)
        return F.relu(self._margin - side * student).square().mean()


@CRITERIA.register("attention_transfer")
class AttentionTransfer(FeatureCriterion):
    """Mean squared difference of two layers' attention maps, over images and positions.

    A map is the sum of squares over the channels of [N, C, H, W], flattened and divided by its norm, so widths may
    differ; of maps of two sizes the larger one is averaged down first. In [0, 4 / positions]. Source: Zagoruyko &
    Komodakis 2017, and the student's step of ZSKT (Micaelli & Storkey 2019), there with weight 250; as in the released
    code of both the distance is squared and a mean, where the paper has the norm itself.

    Args:
        student: path of the student's layer, which answers maps.
        teacher: the same of the teacher.
    """

    def __init__(self, *, student: str, teacher: str) -> None:
        super().__init__(student=student, teacher=teacher)

    @override
    def _refuse(self, student: Tensor, teacher: Tensor) -> None:
        for place, output, role in ((self._student, student, "student"), (self._teacher, teacher, "teacher")):
            if output.ndim != 4:
                raise ValueError(
                    f"the {role}'s {place.path} answers {_shape(output)} for each image, which is no map; name a layer "
                    "that answers maps, such as a convolution"
                )

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        maps = of_one_size(*(output.square().sum(1, keepdim=True) for output in (student, teacher)))
        ours, theirs = (F.normalize(attention.flatten(1)) for attention in maps)
        return F.mse_loss(ours, theirs)


@CRITERIA.register("relational")
class Relational(FeatureCriterion):
    """Difference in how images lie to each other in two layers, by their distances and angles; widths may differ.

    Distances of all pairs of images, divided by their mean, and cosines of the angle at each image of all triplets are
    compared by Huber's loss with threshold 1; a mean over pairs and triplets of the batch, or of the part of it that a
    device sees at once. Memory grows with the third power of those images unless ``angle`` is 0. Source: Park et al.
    2019 (RKD); their weights for both together are 25 and 50. Here a pair of an image with itself is no pair, and
    triplets with the same image twice are none, where the released code averages their zeros too.

    Args:
        student: path of the student's layer; `penultimate` is the input of the layer that makes the logits.
        teacher: the same of the teacher.
        distance: weight of the distances.
        angle: weight of the angles.
    """

    def __init__(
        self,
        *,
        student: str = PENULTIMATE,
        teacher: str = PENULTIMATE,
        distance: NotNegative = 1.0,
        angle: NotNegative = 2.0,
    ) -> None:
        super().__init__(student=student, teacher=teacher)
        if not distance and not angle:
            raise ValueError("distance and angle are both 0, so nothing is compared; give one of them a weight")
        self._distance, self._angle = distance, angle

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = student.flatten(1), teacher.flatten(1)
        loss = 0 * ours.sum()
        if self._distance and len(ours) > 1:
            loss = loss + self._distance * F.smooth_l1_loss(_distances(ours), _distances(theirs))
        if self._angle and len(ours) > 2:
            loss = loss + self._angle * F.smooth_l1_loss(_angles(ours), _angles(theirs))
        return loss


def _distances(points: Tensor) -> Tensor:
    """Distances of all pairs of points [N, D], each once, divided by their mean."""
    distances = F.pdist(points)
    return distances / distances.mean().clamp_min(1e-12)


def _angles(points: Tensor) -> Tensor:
    """Cosines of the angles at every point between any two others."""
    count = len(points)
    directions = F.normalize(points[None] - points[:, None], dim=2)
    cosines = directions @ directions.transpose(1, 2)
    same = torch.eye(count, dtype=torch.bool, device=points.device)
    return cosines[~(same[:, :, None] | same[:, None, :] | same[None])]
