"""Terms that read the teacher's answer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.observed import Layer, Need, Tap


@TERMS.register("cross_entropy")
class CrossEntropy(Term):
    """Cross-entropy of the teacher's answer with the target class or soft target.

    Nats, mean over images; in [0, inf). Targets are labels [N] or distributions [N, K]; logits are divided by
    ``temperature`` first. Source: Yin et al. 2020 (labels), Nayak et al. 2019 (soft, tempered).

    Args:
        temperature: divides the logits.
    """

    needs_targets = True
    takes_mixed_targets = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self._temperature = temperature

    @override
    def forward(self, view: View) -> Tensor:
        assert view.targets is not None, "cross_entropy needs targets"
        return F.cross_entropy(view.teacher.logits / self._temperature, view.targets)


@TERMS.register("one_hot")
class OneHot(Term):
    """Cross-entropy of the teacher's answer with its own most likely class: low where the teacher is sure.

    Nats, mean over images; in [0, ln K]. No gradient flows through the choice of the class. Source: Chen et al.
    2019 (DAFL).
    """

    @override
    def forward(self, view: View) -> Tensor:
        logits = view.teacher.logits
        return F.cross_entropy(logits, logits.argmax(1))


@TERMS.register("class_balance")
class ClassBalance(Term):
    """Negative entropy of the teacher's mean answer over the batch: low where all classes occur equally.

    Nats; in [-ln K, 0]. Source: Chen et al. 2019 (DAFL); the released code takes logarithms to base 10, so its
    weights are 2.303 times ours.
    """

    is_per_image = False

    @override
    def forward(self, view: View) -> Tensor:
        mean = view.teacher.logits.softmax(1).mean(0)
        return (mean * mean.clamp_min(1e-12).log()).sum()


@TERMS.register("activation")
class Activation(Term):
    """Negative mean absolute feature: low where the last linear layer's input is strongly excited.

    Units of the features, mean over images and features [N, D]; in (-inf, 0]. Source: Chen et al. 2019 (DAFL). With
    ``layer`` the mean is over all numbers of that layer's output: Wang 2021 excites the first convolution, where the
    sum over an image's numbers is taken, so that the weight there is ours divided by their number.

    Args:
        layer: path of a layer of the teacher, or first_convolution; null for the last linear layer's input.
    """

    def __init__(self, *, layer: str | None = None) -> None:
        super().__init__()
        self._layer = layer

    @property
    def taps(self) -> frozenset[Tap]:
        """The features, or the layer's output."""
        return frozenset({Need.FEATURES if self._layer is None else Layer(self._layer)})

    @override
    def forward(self, view: View) -> Tensor:
        found = view.teacher.features if self._layer is None else view.teacher.layers[self._layer]
        assert found is not None, "activation needs features"
        return -found.abs().mean()
