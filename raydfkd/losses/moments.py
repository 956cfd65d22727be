"""Matching the statistics that BatchNorm layers stored in training."""

from __future__ import annotations

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
        assert view.teacher.moments, "bn_moments needs BatchNorm layers"
        layers = [self._distance(layer) for layer in view.teacher.moments]
        layers[0] = layers[0] * self._first_layer_scale
        total = torch.stack(layers).sum()
        return total / len(layers) if self._form == "kl" else total

    def _distance(self, layer: LayerMoments) -> Tensor:
        if self._scope == "batch":
            layer = layer.pooled()
        if self._form == "kl":
            return _gaussian_kl(layer).mean()
        spread, stored = layer.var, layer.running_var
        if self._statistic == "std":
            spread, stored = (spread + 1e-8).sqrt(), (stored + 1e-8).sqrt()
        differences = (layer.mean - layer.running_mean, spread - stored)
        if self._form == "squared":
            return sum((difference.square().mean() for difference in differences), start=spread.new_zeros(()))
        return sum(
            (torch.linalg.vector_norm(difference, dim=1).mean() for difference in differences),
            start=spread.new_zeros(()),
        )


def _gaussian_kl(layer: LayerMoments) -> Tensor:
    """KL(N(mean, var) || N(running_mean, running_var)) [G, C] in nats.

    Both variances are raised by a thousandth of the median stored variance of the layer's live channels: those that
    training left dead have a stored variance of almost nothing, and would otherwise outweigh all others. Not of the
    mean, which a single loud channel raises until a collapse of the others costs nothing.
    """
    stored = layer.running_var
    is_live = stored > 1e-8 * stored.max()
    floor = 1e-3 * torch.where(is_live, stored, torch.nan).nanmedian().nan_to_num().clamp_min(1e-12)
    var, stored = layer.var + floor, layer.running_var + floor
    shift = (layer.mean - layer.running_mean).square()
    return 0.5 * ((stored / var).log() + (var + shift) / stored - 1)
