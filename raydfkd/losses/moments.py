"""Matching the statistics that BatchNorm layers stored in training, or those that a few pictures have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Need, Tap


@TERMS.register("bn_moments")
class BatchNormMoments(Term):
    """Distance between a batch's BatchNorm input moments and the running statistics, over all BatchNorm layers.

    ``norm``: sum over layers of the L2 norms, over channels, of the differences of means and of variances (Yin et
    al. 2020, as released; grows with width and depth, so its weight is a matter of the architecture).
    ``squared``: sum over layers of the mean squared differences over channels (Luo et al. 2020, L2 form).
    ``kl``: mean over channels and layers of the Gaussian divergence KL(batch || stored), in nats (Luo et al. 2020);
    free of scale, so one weight serves every architecture.

    A scalar in [0, inf). With ``scope: class`` each class is matched by itself and the value is the mean over
    classes: a class then yields the same whoever shares its pack, as long as augmentations draw once for the whole
    batch (jitter and flip do).

    With `synthesis.statistics` the stored moments are those of a few real pictures, and the layers norm layers of any
    kind, or convolutions and hidden linear layers where there is none; kl is then the form to begin with.

    Args:
        form: norm, squared or kl.
        statistic: match the variance or the standard deviation (norm and squared).
        scope: moments of the whole batch, or of each class.
        first_layer_scale: factor on the first layer, which carries colour and brightness.
    """

    is_per_image = False

    def __init__(
        self,
        *,
        form: Literal["norm", "squared", "kl"] = "norm",
        statistic: Literal["var", "std"] = "var",
        scope: Literal["batch", "class"] = "batch",
        first_layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if form == "kl" and statistic == "std":
            raise ValueError("statistic is std, but the kl form has only one; drop statistic or use form norm")
        self._form = form
        self._statistic = statistic
        self._scope = scope
        self._first_layer_scale = first_layer_scale

    @property
    def taps(self) -> frozenset[Tap]:
        """Moments of the batch or of each class."""
        return frozenset({Need.CLASS_MOMENTS if self._scope == "class" else Need.MOMENTS})

    @override
    def forward(self, view: View) -> Tensor:
        assert view.teacher.moments, "bn_moments needs the moments of layers"
        layers = [layer.pooled() if self._scope == "batch" else layer for layer in view.teacher.moments]
        distances = self._distances(layers)
        total = distances.sum() + (self._first_layer_scale - 1) * distances[0]
        return total / len(layers) if self._form == "kl" else total

    def _distances(self, layers: Sequence[LayerMoments]) -> Tensor:
        """The distance of each of L layers [L], a mean over groups.

        The channels of all layers are worked on side by side: a GPU takes as long for one layer's few as for all.
        """
        mean, var = torch.cat([layer.mean for layer in layers], 1), torch.cat([layer.var for layer in layers], 1)
        running_mean = torch.cat([layer.running_mean for layer in layers])
        stored = torch.cat([layer.running_var for layer in layers])
        sums = _layer_of_channel(tuple(len(layer.running_var) for layer in layers), mean.device)
        means = sums / sums.sum(0)
        if self._form == "kl":
            floor = torch.cat([_floor(layer.running_var).expand_as(layer.running_var) for layer in layers])
            return _gaussian_kl(mean - running_mean, var + floor, stored + floor).mean(0) @ means
        if self._statistic == "std":
            var, stored = (var + 1e-8).sqrt(), (stored + 1e-8).sqrt()
        squares = torch.stack([mean - running_mean, var - stored]).square()
        if self._form == "squared":
            return (squares @ means).mean(1).sum(0)
        return (squares @ sums).clamp_min(1e-30).sqrt().mean(1).sum(0)  # the root of 0 has no finite gradient


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
