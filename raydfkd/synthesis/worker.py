"""One worker: a recipe and a unit in, a commit out. Knows nothing of Ray."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from raydfkd.data.commits import Commit
from raydfkd.data.sink import ParquetSink
from raydfkd.data.transfer_set import TransferSet
from raydfkd.distill.published import PublishedStudent, PublishedStudents
from raydfkd.images import PixelRange
from raydfkd.losses.objective import TERMS, build_objective
from raydfkd.networks import build_network, load_weights
from raydfkd.observed import Need, ObservedNetwork
from raydfkd.recipe import Recipe
from raydfkd.registry import RecipeError
from raydfkd.schedule import WorkUnit, derive_seed
from raydfkd.synthesis.augment import build_augmentations
from raydfkd.synthesis.bookmark import Bookmark, Bookmarks
from raydfkd.synthesis.interlude import Interrupted
from raydfkd.synthesis.synthesizer import SYNTHESIZERS, Judge, Setting, StudentFeed, Synthesizer
from raydfkd.synthesis.targets import TARGETS

logger = logging.getLogger(__name__)


def pick_device(wanted: str) -> torch.device:
    """The device of this process: what the recipe says, or CUDA where there is some for ``auto``."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("runtime.device is 'cuda', but this machine has no CUDA device; use auto or cpu")
    return torch.device(wanted)


def load_teacher(recipe: Recipe) -> tuple[nn.Module, str]:
    """The recipe's teacher with its weights, and their SHA-256."""
    seed = derive_seed(recipe.seed, "teacher")
    teacher = build_network(recipe.teacher, recipe.teacher, where="teacher", seed=seed)
    return teacher, load_weights(teacher, recipe.teacher.weights, where="teacher.weights")


def asks_student(recipe: Recipe) -> bool:
    """Whether a term of the recipe's objective asks the student."""
    return any(
        Need.STUDENT in TERMS.get(term.term, where=f"synthesis.objective[{index}]").needs  # type: ignore[attr-defined]
        for index, term in enumerate(recipe.synthesis.objective)
    )


def digest_of(recipe: Recipe, weights_sha256: str) -> str:
    """Digest of all that the recipe's images depend on."""
    return recipe.digest(weights_sha256, is_against_student=asks_student(recipe))


def build_student(recipe: Recipe, students: PublishedStudents | None, device: torch.device) -> PublishedStudent | None:
    """The student for the objective, where a term asks it: one of ``students``, or a fresh one where there are none.

    Raises:
        RecipeError: it is asked where nobody trains it in time, or never where rounds are.
    """
    if not asks_student(recipe):
        if recipe.rounds > 1:
            raise RecipeError(
                f"rounds is {recipe.rounds}, but no term of synthesis.objective asks the student; add competition, "
                "logit_gap or decision_gap, or drop rounds"
            )
        return None
    if recipe.rounds == 1 and recipe.runtime.executor == "local":
        raise RecipeError(
            "synthesis.objective asks the student, but in one process it is trained after the synthesis; "
            "use rounds: 2 or more, or runtime.executor ray"
        )
    spec = recipe.synthesis
    seed = derive_seed(recipe.seed, "student")
    return PublishedStudent(
        build_network(recipe.student, recipe.teacher, where="student", seed=seed),
        students.newest if students is not None else lambda _: None,
        device=device,
        precision=getattr(torch, spec.precision),
        compiled=device.type == "cuda" if spec.compile == "auto" else spec.compile,
    )


def build_synthesizer(
    recipe: Recipe, teacher: nn.Module, device: torch.device, student: StudentFeed | None = None
) -> Synthesizer:
    """Put judge and synthesizer together as the recipe says, with the ``student`` that its objective may ask.

    Raises:
        RecipeError: anything in ``synthesis`` that is unknown, of the wrong type or does not suit the teacher.
    """
    spec = recipe.synthesis
    targets = TARGETS.build(spec.targets.kind, spec.targets.options, where="synthesis.targets")
    objective = build_objective(
        spec.objective,
        has_targets=targets.is_conditional,
        has_latents=spec.synthesizer == "generator",
        has_student=student is not None,
    ).to(device)
    observed = ObservedNetwork(
        teacher,
        taps=objective.needs,
        frozen=True,
        precision=getattr(torch, spec.precision),
        compiled=device.type == "cuda" if spec.compile == "auto" else spec.compile,
    ).to(device)
    pixels = PixelRange(recipe.teacher.image_space, device)
    setting = Setting(
        judge=Judge(teacher=observed, objective=objective, pixels=pixels, student=student),
        space=recipe.teacher.image_space,
        targets=targets,
        augment=build_augmentations(spec.augment, where="synthesis.augment"),
        device=device,
    )
    return SYNTHESIZERS.build(spec.synthesizer, spec.options, setting, where="synthesis")


class SynthesisWorker:
    """Works on one unit after another; everything expensive is built once.

    Args:
        recipe: what to make, and of which teacher.
        transfer_set: where it goes.
        device: to work on.
        should_stop: whether the unit in work is to be left, its state saved; asked between any two steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        transfer_set: TransferSet,
        *,
        device: torch.device,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        teacher, weights = load_teacher(recipe)
        digest = digest_of(recipe, weights)
        if digest != transfer_set.digest:
            raise RecipeError(
                f"teacher.weights is {recipe.teacher.weights!r}: not the weights that this run began with; "
                "restore them or use another run_dir"
            )
        self._threads = recipe.synthesis.threads
        self._checkpoint_every = recipe.runtime.checkpoint_every
        self._transfer_set = transfer_set
        self._should_stop = should_stop
        self._recipe = recipe
        self._students = PublishedStudents(transfer_set.store)
        self._student = build_student(recipe, self._students, device)
        self._synthesizer = build_synthesizer(recipe, teacher, device, self._student)

    def run(self, unit: WorkUnit, attempt: int = 1) -> Commit:
        """Make the images of ``unit`` and commit them, from where another attempt was interrupted if one was.

        On any error nothing of the attempt remains.

        Raises:
            Interrupted: ``should_stop`` said so; the unit's state is saved.
        """
        bookmark = Bookmark(self._transfer_set.store, unit, self._transfer_set.digest)
        self._meet_student(unit)
        work = self._resume(unit, attempt, bookmark.load())
        interlude = Bookmarks(
            bookmark,
            every=self._checkpoint_every,
            should_stop=self._should_stop,
            on_step=self._look_for_student,
            around=work.state_dict,
            saved=work.synthesizer_state,
        )
        try:
            with cpu_threads(self._threads):
                for batch in self._synthesizer.produce(unit.request, work.log, interlude):
                    work.sink.write(batch)
            commit = work.sink.commit(seconds=work.seconds, curve=work.curve)
        except Interrupted:
            work.sink.release()
            raise
        except BaseException:
            work.sink.abandon()
            bookmark.remove()  # for it may be what led here
            raise
        bookmark.remove()
        logger.info("unit %s committed: %d images, objective %.3f", unit.id, commit.images, commit.objective)
        return commit

    def _meet_student(self, unit: WorkUnit) -> None:
        """In rounds the student that the round before has trained, none in the first; else the newest one."""
        if self._student is None:
            return
        if self._recipe.rounds > 1:
            number = self._recipe.round_of(unit)
            version = self._recipe.steps_until(number - 1)
            self._student.follow(self._students.pinned(version) if number else None)
        self._student.refresh()

    def _look_for_student(self, steps: int) -> None:
        if (
            self._student is not None
            and self._recipe.rounds == 1
            and steps % self._recipe.synthesis.student_refresh == 0
        ):
            self._student.refresh()

    def _resume(self, unit: WorkUnit, attempt: int, state: Mapping[str, Any] | None) -> _Attempt:
        if state is not None:
            work = _Attempt(sink=self._transfer_set.open(unit, attempt=attempt))
            try:
                work.load_state_dict(state)
            except ValueError as error:
                logger.warning("unit %s begins anew: %s", unit.id, error)
                work.sink.abandon()
            else:
                logger.info("unit %s goes on from its saved state", unit.id)
                return work
        return _Attempt(sink=self._transfer_set.open(unit, attempt=attempt))


class _Attempt:
    """What there is of a unit beside the synthesizer."""

    def __init__(self, sink: ParquetSink) -> None:
        self.sink = sink
        self.curve: list[dict[str, float]] = []
        self.synthesizer_state: Mapping[str, Any] | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the images, that of interrupted attempts included."""
        return time.monotonic() - self._started

    def log(self, entry: Mapping[str, float]) -> None:
        self.curve.append(dict(entry))

    def state_dict(self, synthesizer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "synthesizer": dict(synthesizer),
            "sink": self.sink.state_dict(),
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sink.load_state_dict(state["sink"])
        self.synthesizer_state = state["synthesizer"]
        self.curve = list(state["curve"])
        self._started -= state["seconds"]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads: a different split of a sum is a different last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system after every operation.

    A training step on CPU allocates the same few megabytes over and over; without this each of them is mapped and
    cleared by the kernel again, which costs more than small convolutions do. Elsewhere than on glibc: no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
