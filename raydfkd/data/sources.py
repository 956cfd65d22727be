"""Sources of a student's batches: a set that may be growing, or a generator that is trained beside the student."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from raydfkd.config.registry import Registry
from raydfkd.config.schema import PluginSpec
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import Snapshot
from raydfkd.data.epochs import EpochLog
from raydfkd.data.transfer_set import TransferSet


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentBatch:
    """One rank's share of a step."""

    images: Tensor
    """[N, C, H, W], uint8."""
    labels: Tensor
    """[N], int64."""
    teacher_logits: Tensor
    """[N, K], float16."""
    share: float = 1.0
    """This rank's images times the number of ranks over the step's images: with it, averaging the ranks' gradients
    gives the mean over images."""
    weights: Tensor | None = None
    """[N]: the weight of each image in the loss, 1 on average; None for 1 each."""
    view_seeds: Tensor | None = None
    """[N], int64: seeds of the views that ``teacher_logits`` are the answers to; None where those are of the images."""
    snapshot_images: int
    """Images that the batch was drawn from; of a live source all that it has made."""
    wanted_images: int = 0
    """Images that it should be drawn from: as many as the recipe wants by then, or all where none are to come."""


def in_this_process(snapshot: Snapshot | None) -> Snapshot | None:
    """Agreement of a single rank with itself: ``snapshot`` as it is."""
    return snapshot


def of_this_process(rows: Tensor) -> Tensor:
    """Rows of all ranks where there is a single one: ``rows`` as they are."""
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes that train one student together, as each of them sees them."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    agree: Callable[[Snapshot | None], Snapshot | None] = in_this_process
    """Makes all ranks use rank 0's snapshot; called by the thread that trains."""
    gather: Callable[[Tensor], Tensor] = of_this_process
    """Joins the rows of all ranks, in the order of the ranks; called by all of them at once, as ``agree`` is."""

    def count_of(self, total: int) -> int:
        """Images of this rank in a step of ``total`` images over all ranks."""
        return total * (self.rank + 1) // self.size - total * self.rank // self.size


class LiveGenerator(Protocol):
    """A generator that is trained against the student whose batches it makes."""

    def reseed(self, seed: int) -> None:
        """Draw from ``seed`` on."""

    def update(self) -> object:
        """Make a step of the generator."""

    def sample(self, count: int) -> SyntheticBatch:
        """Draw ``count`` images."""

    def state_dict(self) -> dict[str, Any]:
        """The state from which training resumes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The values that the engine supplies to a source."""

    transfer_set: TransferSet
    """Set that has the images, or takes those that a live source keeps."""
    units: Collection[str]
    """The units to train on; only their commits are read."""
    planned_images: int
    """Images of all of them."""
    plan: str
    """Names the plan that the set is closed for; units that are not trained on belong to it too."""
    image_bytes: int
    """Bytes of an image's pixels."""
    num_classes: int = 0
    """Classes of the teacher."""
    augment: Sequence[PluginSpec] = ()
    """Augmentations of the student's images."""
    ask: Callable[[Tensor, Tensor], Tensor] | None = None
    """The teacher's logits [N, K], float32 on the CPU, of views of images [N, C, H, W], uint8, named by seeds [N]; may
    be called on any thread."""
    steps: int
    """Steps that the student will make."""
    batch_size: int
    """Images per step over all ranks."""
    seed: int
    """Seed of the order."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that train the student."""
    epochs: EpochLog | None = None
    """Log in which rank 0 notes and looks up how epochs began; unless given, a source that resumes chooses again."""
    pin_memory: bool = False
    """Whether batches are made in memory that a CUDA device can copy from by itself."""
    generator: Callable[[int], LiveGenerator] | None = None
    """Makes the generator of a live source, to be trained for so many steps against the student; None where nobody
    can."""


class BatchSource(Protocol):
    """An endless stream of batches that can be resumed.

    One that has a ``note(losses)`` is told after each step how far the student's answers to the last batch were from
    the teacher's, [N]: KL(teacher || student) of each image in nats, on the CPU; on all ranks at once.
    """

    is_live: ClassVar[bool]
    """Whether the source makes its images itself, so that there is no plan of units."""

    def __iter__(self) -> Iterator[StudentBatch]:
        """Batches from where the source stands."""

    def state_dict(self) -> dict[str, Any]:
        """The source's position, as plain data and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to the position ``state``: the same batches follow."""

    def start_over(self) -> None:
        """Look for images again, after a phase that has made some; every rank does so at once."""

    def finish(self) -> None:
        """Finish the source's work after the last step."""


SOURCES: Registry[BatchSource] = Registry(
    "source",
    ["raydfkd.data.set_source", "raydfkd.data.priority_source", "raydfkd.data.view_source", "raydfkd.data.live_source"],
    member="state_dict",
)
