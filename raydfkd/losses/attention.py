"""Terms that read the attention of vision transformers, where no BatchNorm says what images are like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from raydfkd.errors import RecipeError
from raydfkd.losses.objective import TERMS, Term, View
from raydfkd.networks.attention import Attention
from raydfkd.networks.observed import Need, Observation

BINS = 10
"""Places within a kernel's width to which similarities are shared out: entropies are exact to two thousandths."""
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2
"""Constants of SSIM for values in [0, 1]."""


@TERMS.register("patch_similarity_entropy")
class PatchSimilarityEntropy(Term):
    """Negative entropy of how alike patches are inside each block: low where some are alike and others are not.

    Cosine similarities of all pairs of patches, of their outputs of self-attention with all heads side by side, before
    the projection; class, distillation and register tokens are left out. Their density is estimated with Gaussian
    kernels, whose places lie a tenth of a width apart: each similarity is shared out between the two beside it. The
    differential entropy is a sum over a grid that is as fine as the kernels are wide and reaches four widths beyond
    [-1, 1], exact to two thousandths for a kernel on every pair. Nats, mean over images (windows count as images) and
    blocks; in about [-0.9, 1.6] for the default width, of which the upper end is a single value.

    Source: Li et al. 2022 (PSAQ-ViT). The released code averages the heads first, adds up blocks, counts each patch as
    its own neighbour, and reads the density, of width 0.01, at 10 points between the extremes of the batch: most pairs
    lie between these, where they have no gradient.

    Args:
        bandwidth: standard deviation of the kernels, in units of cosine similarity.
    """

    needs = frozenset({Need.ATTENTION})

    def __init__(self, *, bandwidth: float = 0.05) -> None:
        super().__init__()
        if not 0.005 <= bandwidth <= 1:
            raise ValueError(f"bandwidth is {bandwidth}; it must be from 0.005 to 1")
        self._bandwidth = bandwidth

    @override
    def forward(self, view: View) -> Tensor:
        return -_mean_over(view.teacher.attention, lambda block: self._entropy(_pair_cosines(block.patch_output)))

    def _entropy(self, values: Tensor) -> Tensor:
        """Differential entropy, in nats, of the density of ``values`` [R, M] in [-1, 1], a mean over rows."""
        reach = 1 + 4 * self._bandwidth
        grid = torch.linspace(-reach, reach, math.ceil(2 * reach / self._bandwidth) + 1).to(values)
        bins = torch.linspace(-1, 1, math.ceil(2 * BINS / self._bandwidth) + 1).to(values)
        kernels = torch.exp(-0.5 * ((grid - bins[:, None]) / self._bandwidth).square())
        density = _binned(values, len(bins)) @ kernels / (self._bandwidth * math.sqrt(2 * math.pi))
        return -(torch.xlogy(density, density.clamp_min(1e-30)).sum(1) * (grid[1] - grid[0])).mean()


@TERMS.register("head_similarity")
class HeadSimilarity(Term):
    """One minus the mean structural similarity of a block's heads: low where its heads look at the same patches.

    For each patch, SSIM of how two heads share out its attention over the patches, each scaled to [0, 1], over one
    window, the whole image; all of SSIM, with its luminance and its contrast and structure. Mean over pairs of heads,
    patches, images (windows count as images) and those blocks that have several heads; in [0, 2].

    Source: Choi et al. 2025 (MimiQ). There it is scores before the softmax, one minus the square of the similarity, and
    each head is compared with itself too.
    """

    needs = frozenset({Need.ATTENTION})

    @override
    def prepare(self, seen: Observation) -> None:
        if not _with_heads(seen):
            raise RecipeError("head_similarity compares heads, but each block of the teacher has a single one; drop it")

    @override
    def forward(self, view: View) -> Tensor:
        return 1 - _mean_over(_with_heads(view.teacher), lambda block: _head_ssim(block.patch_maps))


@TERMS.register("attention_entropy")
class AttentionEntropy(Term):
    """Negative entropy of how alike the attention of patches is: low where parts of the image attend to other parts.

    Cosine similarities of all pairs of patches, of how each shares its attention, averaged over heads, out over the
    patches; their entropy is that of a Gaussian of the same variance s2, 0.5 ln(2 pi e (s2 + 1e-8)). Nats, mean over
    images (windows count as images) and blocks; in [-0.73, 7.8].

    Source: Qian et al. 2026 (MaskAQ). The released code takes scores before the softmax, counts each patch as its own
    neighbour, and draws 64 patches.
    """

    needs = frozenset({Need.ATTENTION})

    @override
    def forward(self, view: View) -> Tensor:
        return -_mean_over(view.teacher.attention, lambda block: _gaussian_entropy(_pair_cosines(_shares(block))))


def _mean_over(blocks: Sequence[Attention], value: Callable[[Attention], Tensor]) -> Tensor:
    assert blocks, "attention is read where there is some"
    return torch.stack([value(block) for block in blocks]).mean()


def _with_heads(seen: Observation) -> list[Attention]:
    """The blocks that have several."""
    return [block for block in seen.attention if block.maps.shape[1] > 1]


def _shares(block: Attention) -> Tensor:
    return block.patch_maps.mean(1)


def _pair_cosines(vectors: Tensor) -> Tensor:
    """Cosine similarity of every two of P ``vectors`` [R, P, D]: [R, P (P - 1) / 2]."""
    unit = F.normalize(vectors, dim=2, eps=1e-8)
    rows, columns = torch.triu_indices(unit.shape[1], unit.shape[1], 1, device=unit.device)
    return (unit @ unit.transpose(1, 2))[:, rows, columns]


def _binned(values: Tensor, count: int) -> Tensor:
    """Share [R, B] of the ``values`` [R, M] at each of ``count`` places from -1 to 1, each value between its two.

    A kernel for every value itself would take fifty times as much memory, and four times a small teacher's whole step.
    """
    places = (values.clamp(-1, 1) + 1) * ((count - 1) / 2)
    left = places.detach().long().clamp_max(count - 2)
    share = places - left
    shares = values.new_zeros(len(values), count).scatter_add(1, left, 1 - share).scatter_add(1, left + 1, share)
    return shares / values.shape[1]


def _gaussian_entropy(values: Tensor) -> Tensor:
    """Entropy of a Gaussian with the variance of ``values`` [R, M], a mean over rows."""
    return 0.5 * (2 * math.pi * math.e * (values.var(1, correction=0) + 1e-8)).log().mean()


def _head_ssim(maps: Tensor) -> Tensor:
    """SSIM of the rows of ``maps`` [R, H, P, P] between every two heads, a mean."""
    low, high = maps.aminmax(dim=3, keepdim=True)
    rows = ((maps - low) / (high - low + 1e-6)).transpose(1, 2)  # [R, P, H, P]
    mean = rows.mean(3, keepdim=True)
    covariance = (rows - mean) @ (rows - mean).transpose(2, 3) / rows.shape[3]
    products = mean @ mean.transpose(2, 3)
    variance, square = (matrix.diagonal(dim1=2, dim2=3) for matrix in (covariance, products))
    luminance = (2 * products + _LUMINANCE) / (_sums(square) + _LUMINANCE)
    structure = (2 * covariance + _CONTRAST) / (_sums(variance) + _CONTRAST)
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    return (luminance * structure)[..., first, second].mean()


def _sums(x: Tensor) -> Tensor:
    """Sum of every two of the last axis: [..., H] to [..., H, H]."""
    return x[..., :, None] + x[..., None, :]
