"""The objective of synthesis: a weighted sum of terms, each of which sees a candidate batch and its observations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from raydfkd.config.registry import Registry
from raydfkd.config.schema import Ramp, TermSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Need, Observation, Tap

BESIDE_TEACHER = MappingProxyType({Need.STUDENT: "the student", Need.LATENTS: "latents"})
"""Needs that something else than the teacher has to meet, and what they are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One candidate batch as every term sees it: N images, K classes."""

    images: Tensor
    """[N, C, H, W], nominal units (``images.pixels``), differentiable."""
    targets: Tensor | None
    """[N] labels or [N, K] soft targets; None for unconditional methods."""
    teacher: Observation
    """The teacher's answer to the images."""
    observe: Callable[[Tensor], Observation]
    """The teacher again, for terms that make a second view of their own, in nominal units too."""
    student: Observation | None = None
    """The student's answer, where a term needs it and there is a student."""
    latents: Tensor | None = None
    """[N, Z], where the images were generated."""
    seen: Tensor | None = None
    """The images as the teacher takes them, in its units."""
    groups: int = 1
    """Equal, contiguous parts of the batch: one a class, where images have a class."""
    class_statistics: Sequence[LayerMoments] = ()
    """Stored moments [K, C] of each class in each layer, where pictures of each were measured."""
    progress: float = 1.0
    """Share of the optimisation's steps that are made, from 0 to 1."""
    compiled: bool = False
    """Whether terms of the package compile what they compute of the images; the teacher is compiled then too."""


class Term(nn.Module):
    """A loss: a scalar that is a mean over images, so that its weight does not depend on the batch size.

    A subclass declares what it ``needs``; a recipe whose pipeline cannot offer that fails when it is loaded.
    ``takes_mixed_targets`` says that those may be shares of the classes [N, K], where augmentations mix images.
    ``is_per_image`` says that the value is a mean of one number an image, so that doubling the batch changes nothing.

    A term may remember what was kept, see ``commit``. A unit begins with the term as it was built, so that its images
    follow from its request alone; buffers and extra state (``get_extra_state``) survive an interruption of the unit.

    One that has parameters has them trained along with the images, to lower the objective; see ``prepare``.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    needs_targets: bool = False
    takes_mixed_targets: bool = False
    is_per_image: bool = True

    @property
    def taps(self) -> frozenset[Tap]:
        """Reads of this instance; narrower or other than ``needs`` where options decide, such as a ``Layer``."""
        return self.needs

    @property
    def remembers(self) -> bool:
        """Whether it wants to be told of batches that are kept."""
        return type(self).commit is not Term.commit

    def prepare(self, seen: Observation) -> None:
        """Make parameters and buffers whose sizes follow from the teacher's; nothing by default.

        ``seen`` is the teacher's answer to two random images; it comes once, before any other. The first values must
        not depend on it or on torch's global random numbers.

        Raises:
            RecipeError: the teacher has not what the term reads.
        """

    def forward(self, view: View) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def commit(self, view: View) -> None:
        """Take note of a batch that was kept, once for each (memory banks); nothing by default.

        ``view`` is of the images as they are stored, without gradients, all of them one group.
        """


TERMS: Registry[Term] = Registry(
    "term",
    [
        "raydfkd.losses.outputs",
        "raydfkd.losses.moments",
        "raydfkd.losses.priors",
        "raydfkd.losses.diversity",
        "raydfkd.losses.disagreement",
        "raydfkd.losses.increment",
        "raydfkd.losses.attention",
        "raydfkd.losses.contrast",
    ],
    member="needs_targets",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveValue:
    """Value of an objective: ``total`` to differentiate, ``parts`` (unweighted, detached) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """Weighted sum of named terms; a weight may change over the steps."""

    def __init__(self, terms: Sequence[tuple[str, float | Ramp, Term]]) -> None:
        super().__init__()
        self._weights = {name: weight for name, weight, _ in terms}
        self._fresh: tuple[nn.ModuleList, ...] = ()  # in a tuple, so that it is not registered
        self._terms = nn.ModuleList([term for _, _, term in terms])  # no ModuleDict, which refuses names such as a.b

    @property
    def needs(self) -> frozenset[Tap]:
        """Union over the terms; decides which taps are installed and whether a student is asked."""
        return frozenset().union(*(term.taps for term in self.terms.values()))

    @property
    def askers(self) -> dict[Tap, str]:
        """For each need the recipe's term that has it, as messages name it."""
        return {tap: f"synthesis.objective's {name}" for name, term in self.terms.items() for tap in term.taps}

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name."""
        return {name: cast("Term", term) for name, term in zip(self._weights, self._terms, strict=True)}

    def forward(self, view: View) -> ObjectiveValue:
        """Evaluate every term on ``view``; those about the student rest where there is none yet."""
        parts = {
            name: term(view)
            for name, term in self.terms.items()
            if view.student is not None or Need.STUDENT not in term.taps
        }
        weights = {
            name: weight.at(view.progress) if isinstance(weight, Ramp) else weight
            for name, weight in self._weights.items()
        }
        total = sum((weights[name] * part for name, part in parts.items()), start=view.images.new_zeros(()))
        return ObjectiveValue(total=total, parts={name: part.detach() for name, part in parts.items()})

    @property
    def looks_first(self) -> bool:
        """Whether a term wants to see what the teacher answers before anything is made."""
        return any(type(term).prepare is not Term.prepare for term in self.terms.values())

    def prepare(self, seen: Observation) -> None:
        """Show every term the teacher's answer to two random images."""
        for term in self.terms.values():
            term.prepare(seen)

    def parameter_groups(self, **options: Any) -> list[dict[str, Any]]:
        """What the terms have to train, as groups with ``options`` for an optimiser; none where there is nothing."""
        parameters = list(self.parameters())
        return [{"params": parameters, **options}] if parameters else []

    def begin(self) -> None:
        """Forget what the terms have noted: all of them are again as they were the first time."""
        self._fresh = self._fresh or (copy.deepcopy(self._terms),)
        self._terms = copy.deepcopy(self._fresh[0])

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from ``state``, an earlier ``state_dict()``, on ``device``; buffers may have grown until then."""
        for path, module in self.named_modules():
            for name in module._buffers:
                saved = state.get(f"{path}.{name}")
                if saved is not None:
                    module._buffers[name] = torch.empty_like(saved, device=device)
        self.load_state_dict(state)

    def label_reader(self, *, takes_mixed: bool) -> str | None:
        """The term that reads labels, if there is one: one that takes those of mixed images, or does not."""
        for name, term in self.terms.items():
            takes = term.takes_mixed_targets and Need.CLASS_MOMENTS not in term.taps
            if (term.needs_targets or Need.CLASS_MOMENTS in term.taps) and takes == takes_mixed:
                return f"the term {name}"
        return None

    @property
    def remembers(self) -> bool:
        """Whether a term wants to be told of batches that are kept."""
        return any(term.remembers for term in self.terms.values())

    def commit(self, view: View) -> None:
        """Tell every term that the batch of ``view`` was kept."""
        for term in self.terms.values():
            if term.remembers:
                term.commit(view)


def build_objective(
    specs: Sequence[TermSpec],
    *,
    has_targets: bool,
    offers: Set[Need] = frozenset(),
    absent: Mapping[Need, str] = MappingProxyType({}),
) -> Objective:
    """Build the objective of a recipe.

    Args:
        specs: its terms.
        has_targets: whether images have labels or soft targets.
        offers: those of ``BESIDE_TEACHER`` that the rest of the pipeline offers.
        absent: why it does not offer the others, and what would; continues "competition needs the student".

    Raises:
        RecipeError: unknown term or option, or a term that needs what is not on offer.
    """
    terms = []
    for where, spec, term in _built(specs):
        if term.needs_targets and not has_targets:
            raise RecipeError(f"{where}: {spec.term} needs targets, but targets is none; use `targets: balanced`")
        for need, name in BESIDE_TEACHER.items():
            if need in term.taps and need not in offers:
                raise RecipeError(f"{where}: {spec.term} needs {name}, {absent.get(need, 'which nothing offers here')}")
        terms.append((spec.name, spec.weight, term))
    return Objective(terms)


def needs_of(specs: Sequence[TermSpec]) -> frozenset[Tap]:
    """Everything that the terms of a recipe read, whether or not it is on offer."""
    return frozenset().union(*(term.taps for _, _, term in _built(specs)))


def terms_that_need(need: Need) -> list[str]:
    """Names of the registered terms that need it, for messages."""
    return [name for name in TERMS.names() if need in getattr(TERMS.get(name, where=name), "needs", ())]


def _built(specs: Sequence[TermSpec]) -> Iterator[tuple[str, TermSpec, Term]]:
    for index, spec in enumerate(specs):
        where = f"synthesis.objective[{index}]"
        yield where, spec, TERMS.build(spec.term, spec.options, where=where)
