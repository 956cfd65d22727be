"""What is optimised: a weighted sum of terms, each of which sees a candidate batch and its observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from raydfkd.config.registry import Registry
from raydfkd.config.schema import TermSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Need, Observation, Tap


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One candidate batch as every term sees it: N images, K classes."""

    images: Tensor
    """[N, C, H, W], teacher-normalised, differentiable."""
    targets: Tensor | None
    """[N] labels or [N, K] soft targets; None for unconditional methods."""
    teacher: Observation
    """What the teacher says of the images."""
    observe: Callable[[Tensor], Observation]
    """The teacher again, for terms that make a second view of their own."""
    student: Observation | None = None
    """What the student says of the images, where a term needs it and there is one."""
    latents: Tensor | None = None
    """[N, Z], where the images were generated."""


class Term(nn.Module):
    """A loss: a scalar that is a mean over images, so that its weight does not depend on the batch size.

    A subclass declares what it ``needs``; a recipe whose pipeline cannot offer that fails when it is loaded.
    ``is_per_image`` says that the value is a mean of one number an image, so that doubling the batch changes nothing.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    needs_targets: ClassVar[bool] = False
    is_per_image: ClassVar[bool] = True

    @property
    def taps(self) -> frozenset[Tap]:
        """What this instance reads; narrower or other than ``needs`` where options decide, such as a ``Layer``."""
        return self.needs

    def forward(self, view: View) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def commit(self, view: View) -> None:
        """Take note of a batch that was kept (memory banks); nothing by default."""


TERMS: Registry[Term] = Registry(
    "term",
    ["raydfkd.losses.outputs", "raydfkd.losses.moments", "raydfkd.losses.priors", "raydfkd.losses.disagreement"],
    member="forward",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveValue:
    """Value of an objective: ``total`` to differentiate, ``parts`` (unweighted, detached) for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """Weighted sum of named terms."""

    def __init__(self, terms: Sequence[tuple[str, float, Term]]) -> None:
        super().__init__()
        self._weights = {name: weight for name, weight, _ in terms}
        self._terms = nn.ModuleDict({name: term for name, _, term in terms})

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
        return {name: term for name, term in self._terms.items() if isinstance(term, Term)}

    def forward(self, view: View) -> ObjectiveValue:
        """Evaluate every term on ``view``; those about the student rest where there is none yet."""
        parts = {
            name: term(view)
            for name, term in self.terms.items()
            if view.student is not None or Need.STUDENT not in term.taps
        }
        total = sum((self._weights[name] * part for name, part in parts.items()), start=view.images.new_zeros(()))
        return ObjectiveValue(total=total, parts={name: part.detach() for name, part in parts.items()})

    def commit(self, view: View) -> None:
        """Tell every term that the batch of ``view`` was kept."""
        for term in self.terms.values():
            term.commit(view)


def build_objective(specs: Sequence[TermSpec], *, has_targets: bool, has_latents: bool, has_student: bool) -> Objective:
    """Build the objective of a recipe; the flags say what the rest of the pipeline offers.

    Raises:
        RecipeError: unknown term or option, or a term that needs what is not on offer.
    """
    terms = []
    for index, spec in enumerate(specs):
        where = f"synthesis.objective[{index}]"
        term = TERMS.build(spec.term, spec.options, where=where)
        if term.needs_targets and not has_targets:
            raise RecipeError(f"{where}: {spec.term} needs targets, but targets is none; use `targets: balanced`")
        if Need.LATENTS in term.taps and not has_latents:
            raise RecipeError(f"{where}: {spec.term} needs latents, which only `synthesizer: generator` has")
        if Need.STUDENT in term.taps and not has_student:
            raise RecipeError(
                f"{where}: {spec.term} needs the student, but none is trained beside this synthesis; drop the term"
            )
        terms.append((spec.name, spec.weight, term))
    return Objective(terms)
