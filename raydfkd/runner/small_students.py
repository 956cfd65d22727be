"""A small student for a teacher that was looked at, where the user has named none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from raydfkd.networks.build import NETWORKS, PRUNED_TEACHER, count_parameters
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.pruned import LAYERS
from raydfkd.networks.scout import Found

KEEP, KEEP_OF_NARROW = 0.5, 0.7
"""Shares of the teacher's channels that a pruned one keeps: a quarter of weights and work, and half of them."""
ENOUGH, FEWEST = 8, 4
"""Outputs of its first layer: with fewer it keeps the larger share, as of LeNet-5's six, and below that is none."""
MOST = 0.6
"""Of the teacher's weights, and of its work, that a pruned one has."""
MOST_WEIGHTS = 0.4
"""Of the teacher's."""
WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Channels of the first convolution."""
HIDDEN = (32, 64, 128, 256, 512)
"""Widths of the first layer where all are linear."""
MANY_STEPS = 600
"""With so many a deep student does better than two convolutions: 367 were too few, 793 enough (benchmarks.md)."""
FOR_TWO_POOLINGS = 16
"""Pixels of the shorter edge from which a small student pools twice."""
LARGE = 5
"""Edge of what a convolution sees of small images, in networks such as LeNet."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Networks that differ in their widths alone."""

    network: str
    widths: Sequence[tuple[int, ...]] = ()
    """From narrow to wide; none where there is but one such network."""
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = "any network will do"
    least_steps: int = 0
    """With fewer, a student that needs few does better."""

    def sections(self) -> list[dict[str, Any]]:
        """The section ``student`` of a recipe for each, from narrow to wide."""
        if not self.widths:
            return [{"network": self.network, "options": {**self.options}}]
        return [{"network": self.network, "options": {"widths": [*one], **self.options}} for one in self.widths]


def kind_for(found: Found, *, is_hurried: bool) -> Kind:
    """Networks of a kind that learns well of such a teacher in a short time (benchmarks.md).

    The teacher itself with half of its channels, or more where these are few, where they can be told apart and little
    work is left: no other begins with what the teacher knows. Else for small images a strided stack where the teacher
    is one, with normalisation of the same kind. Linear layers where the teacher has no convolutions: its answers depend
    on where things are. Else two convolutions that see as much as the teacher's first, and linear layers, with which a
    step takes little and few are enough; or, where images have the moments of the teacher's BatchNorm and there is
    time, a deeper stack that has it too.

    Args:
        found: of the teacher.
        is_hurried: whether there is time for few steps.
    """
    if (keep := _share_kept(found)) is not None:
        why = "begins with these channels' weights; any network will do"
        return Kind(network=PRUNED_TEACHER, options={"keep": keep}, why=why)
    if not found.is_small:
        return Kind(network="convnet", widths=_doubled(5))
    if found.is_strided and not found.has_attention:
        why = "strided as the teacher is; any network will do"
        return Kind(network="convnet", widths=_doubled(3), options={"norm": _norm_of(found)}, why=why)
    if not (found.has_convolutions or found.has_attention):
        widths = [(width, width // 2) for width in HIDDEN]
        why = "the teacher has no convolutions; linear layers learn more of it"
        return Kind(network="mlp", widths=widths, options={"size": found.space["size"]}, why=why)
    if found.has_moments and not is_hurried:
        return Kind(network="vgg_small", widths=_doubled(3), least_steps=MANY_STEPS)
    return _two_convolutions(found)


def _share_kept(found: Found) -> float | None:
    """Share of its channels with which the teacher is pruned; None where that leaves too few, or too much work."""
    for keep, least in ((KEEP, ENOUGH), (KEEP_OF_NARROW, FEWEST)):
        pruned = found.pruned(keep)
        if pruned is None or count_parameters(pruned) > MOST * found.parameters:
            return None
        if _first_width(pruned) >= least:
            work = forward_flops(pruned, (found.space["channels"], *found.edges))
            return keep if work <= MOST * found.flops() else None
    return None


def _first_width(network: nn.Module) -> int:
    """Outputs of the first layer."""
    layers = (module for module in network.modules() if isinstance(module, LAYERS))
    return int(next(layers).weight.shape[0])


def _two_convolutions(found: Found) -> Kind:
    sized = {"size": found.space["size"]}
    if min(found.edges) < FOR_TWO_POOLINGS:
        return Kind(network="plain_cnn", widths=_doubled(3), options={**sized, "pools": 1})
    if found.kernel >= LARGE and not found.has_attention:
        widths = [(width, 2 * width, 8 * width) for width in WIDTHS]
        return Kind(network="plain_cnn", widths=widths, options={**sized, "pools": 2, "kernel": LARGE})
    return Kind(network="plain_cnn", widths=_doubled(3), options={**sized, "pools": 2})


def largest_within(kind: Kind, found: Found) -> Mapping[str, Any]:
    """The section of the largest with its share of weights and a third of the teacher's work, or as much at most.

    Where none is so small, that of the smallest.
    """
    smallest, *larger = kind.sections()
    built = [(one, _built(one, found)) for one in larger]
    light = [(one, network) for one, network in built if count_parameters(network) <= MOST_WEIGHTS * found.parameters]
    works = [(one, forward_flops(network, (found.space["channels"], *found.edges))) for one, network in light]
    most = found.flops()
    for share in (1 / 3, 1):
        if fitting := [one for one, work in works if work <= share * most]:
            return fitting[-1]
    return smallest


def _built(section: Mapping[str, Any], found: Found) -> nn.Module:
    supplied = (found.section["classes"], found.space["channels"])
    return NETWORKS.build(section["network"], section["options"], *supplied, where="student.options")


def _doubled(depth: int) -> list[tuple[int, ...]]:
    """A layer has twice the channels of the one before, up to eight times the first's."""
    return [tuple(min(width << layer, 8 * width) for layer in range(depth)) for width in WIDTHS]


def _norm_of(found: Found) -> str:
    if found.has_moments:
        return "batch"
    return "group" if found.norms else "none"
