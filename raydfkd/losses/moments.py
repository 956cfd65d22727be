"""Matching the statistics that BatchNorm layers stored in training, or those that a few pictures have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.config.schema import BelowOne
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Need, Tap

_DIVERGENCES = ("kl", "reverse_kl")
_NEEDS = {"batch": Need.MOMENTS, "class": Need.CLASS_MOMENTS, "image": Need.IMAGE_MOMENTS}


@TERMS.register("bn_moments")
class BatchNormMoments(Term):
    """Distance between a batch's BatchNorm input moments and the running statistics, over all BatchNorm layers.

    ``norm``: sum over layers of the L2 norms, over channels, of the differences of means and of variances (Yin et
    al. 2020, as released; grows with width and depth, so its weight is a matter of the architecture).
    ``squared``: sum over layers of the mean squared differences over channels (Luo et al. 2020, L2 form).
    ``kl``: mean over channels and layers of the Gaussian divergence KL(batch || stored), in nats (Luo et al. 2020);
    free of scale, so one weight serves every architecture.
    ``reverse_kl``: the same of KL(stored || batch) (Haroush et al. 2020, The Knowledge Within), which grows without
    bound where a channel of the batch stops to vary. Unlike there, both directions add to both variances a thousandth
    of a layer's usual one, so that channels that training left dead count for little.

    A scalar in [0, inf). With ``scope: class`` each class is matched by itself and the value is the mean over
    classes: a class then yields the same whoever shares its pack, as long as augmentations draw once for the whole
    batch (jitter and flip do). With ``scope: image`` each image is, over its positions alone, and the value is the mean
    over images: with ``form: squared, statistic: std`` that is ZeroQ's (Cai et al. 2020), but for a mean over channels
    instead of a sum and the biased variance. A layer that gets one position an image has no variance then.

    With ``momentum`` a, what is compared is (1 - a) times the moments of the batch plus a times the average of those
    of kept batches, itself a running one with that momentum (Fang et al. 2022, FastDFKD): small batches then match
    together. The gradient is 1 - a times as large. Averaged are the moments of images as they are stored, bare of
    augmentations, in each unit anew; its first batch is compared alone.

    With `synthesis.statistics` the stored moments are those of a few real pictures, and the layers norm layers of any
    kind, or convolutions and hidden linear layers where there is none; kl is then the form to begin with.

    Args:
        form: norm, squared, kl or reverse_kl.
        statistic: match the variance or the standard deviation (norm and squared).
        scope: moments of the whole batch, of each class or of each image.
        momentum: share of earlier batches' moments in what is compared, 0 for none; scope batch.
        first_layer_scale: factor on the first layer, which carries colour and brightness.
    """

    average: Tensor
    """Running averages [2, C] of means and variances of kept batches; empty before the first one."""

    def __init__(
        self,
        *,
        form: Literal["norm", "squared", "kl", "reverse_kl"] = "norm",
        statistic: Literal["var", "std"] = "var",
        scope: Literal["batch", "class", "image"] = "batch",
        momentum: BelowOne = 0.0,
        first_layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if form in _DIVERGENCES and statistic == "std":
            raise ValueError(f"statistic is std, but the {form} form has only one; drop statistic or use form norm")
        if momentum and scope != "batch":
            raise ValueError(
                f"momentum is {momentum}, but scope is {scope} and averages are of whole batches; drop either"
            )
        self._form = form
        self._statistic = statistic
        self._scope = scope
        self._momentum = momentum
        self._first_layer_scale = first_layer_scale
        self.is_per_image = scope == "image"
        if momentum:
            self.register_buffer("average", torch.empty(2, 0))  # means and variances of all layers, once there are

    @property
    def taps(self) -> frozenset[Tap]:
        """Moments of the batch, of each class or of each image."""
        return frozenset({_NEEDS[self._scope]})

    @property
    @override
    def remembers(self) -> bool:
        return self._momentum > 0

    @override
    def commit(self, view: View) -> None:
        moments = torch.cat([torch.cat([layer.mean, layer.var]) for layer in _pooled(view, 1)], 1).detach()
        is_first = not self.average.numel()
        self.average = moments if is_first else self._momentum * self.average + (1 - self._momentum) * moments

    @override
    def forward(self, view: View) -> Tensor:
        assert view.teacher.moments, "bn_moments needs the moments of layers"
        layers = _pooled(view, {"batch": 1, "class": view.groups, "image": len(view.images)}[self._scope])
        if self._scope == "class" and view.class_statistics:
            layers = _beside_own(layers, view)
        distances = self._distances(layers)
        total = distances.sum() + (self._first_layer_scale - 1) * distances[0]
        return total / len(layers) if self._form in _DIVERGENCES else total

    def _distances(self, layers: Sequence[LayerMoments]) -> Tensor:
        """The distance of each of L layers [L], a mean over groups.

        The channels of all layers are worked on side by side: a GPU takes as long for one layer's few as for all.
        """
        mean, var = torch.cat([layer.mean for layer in layers], 1), torch.cat([layer.var for layer in layers], 1)
        if self._momentum and self.average.numel():
            mean, var = (
                (1 - self._momentum) * moment + self._momentum * average
                for moment, average in zip((mean, var), self.average, strict=True)
            )
        running_mean = torch.cat([layer.running_mean for layer in layers], -1)
        stored = torch.cat([layer.running_var for layer in layers], -1)
        sums = _layer_of_channel(tuple(layer.running_var.shape[-1] for layer in layers), mean.device)
        means = sums / sums.sum(0)
        if self._form in _DIVERGENCES:
            floor = torch.cat([_floor(layer.running_var).expand_as(layer.running_var) for layer in layers], -1)
            pair = (var + floor, stored + floor)
            divergence = _gaussian_kl(mean - running_mean, *(pair if self._form == "kl" else reversed(pair)))
            return divergence.mean(0) @ means
        if self._statistic == "std":
            var, stored = (var + 1e-8).sqrt(), (stored + 1e-8).sqrt()
        squares = torch.stack([mean - running_mean, var - stored]).square()
        if self._form == "squared":
            return (squares @ means).mean(1).sum(0)
        return (squares @ sums).clamp_min(1e-30).sqrt().mean(1).sum(0)  # the root of 0 has no finite gradient


def _pooled(view: View, groups: int) -> list[LayerMoments]:
    """The moments of each layer over ``groups`` parts of the batch."""
    return [layer.pooled(groups) for layer in view.teacher.moments]


def _beside_own(layers: Sequence[LayerMoments], view: View) -> list[LayerMoments]:
    """The layers with the statistics of each group's own class [G, C] in the place of those of all."""
    assert view.targets is not None, "groups are of classes"
    classes = view.targets.unflatten(0, (view.groups, -1))[:, 0]
    pairs = zip(layers, view.class_statistics, strict=True)
    return [
        replace(layer, running_mean=known.running_mean[classes], running_var=known.running_var[classes])
        for layer, known in pairs
    ]


@cache
def _layer_of_channel(channels: tuple[int, ...], device: torch.device) -> Tensor:
    """One-hot [sum of channels, L]: the layer of each channel; a product with it adds up what belongs to a layer."""
    layers = torch.eye(len(channels)).repeat_interleave(torch.tensor(channels), 0)
    return layers.to(device)


def _gaussian_kl(shift: Tensor, var: Tensor, stored: Tensor) -> Tensor:
    """KL(N(shift, var) || N(0, stored)) in nats, element by element."""
    return 0.5 * ((stored / var).log() + (var + shift.square()) / stored - 1)


def _floor(stored: Tensor) -> Tensor:
    """What is added to both variances of a layer: a thousandth of the median stored one of its live channels.

    Channels that training left dead have a stored variance of almost nothing, and would otherwise outweigh all others.
    Not of the mean, which a single loud channel raises until a collapse of the others costs nothing.
    """
    is_live = stored > 1e-8 * stored.max()
    return 1e-3 * torch.where(is_live, stored, torch.nan).nanmedian().nan_to_num().clamp_min(1e-12)
