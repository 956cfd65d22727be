"""What a student trains on: batches from a set that may be growing, or from a generator that is trained beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from raydfkd.config.registry import Registry
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
    snapshot_images: int
    """Images that the batch was drawn from; of a live source all that it has made."""


def in_this_process(snapshot: Snapshot | None) -> Snapshot | None:
    """Agreement among one."""
    return snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes that train one student together, as each of them sees them."""

    rank: int = 0
    """Of this process."""
    size: int = 1
    """Number of processes."""
    agree: Callable[[Snapshot | None], Snapshot | None] = in_this_process
    """Makes all ranks use rank 0's snapshot; called by the thread that trains."""


class LiveGenerator(Protocol):
    """A generator that is trained against the student whose batches it makes."""

    def reseed(self, seed: int) -> None:
        """Draw from ``seed`` on."""

    def update(self) -> object:
        """Make a step of the generator."""

    def sample(self, count: int) -> SyntheticBatch:
        """Draw ``count`` images."""

    def state_dict(self) -> dict[str, Any]:
        """What training goes on from."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What the engine supplies to a source."""

    transfer_set: TransferSet
    """Where the images are, or those that a live source keeps."""
    units: Collection[str]
    """The units to train on; only their commits are read."""
    planned_images: int
    """Images of all of them."""
    steps: int
    """Steps that the student will make."""
    batch_size: int
    """Images per step over all ranks."""
    seed: int
    """Of the order."""
    ranks: Ranks = field(default_factory=Ranks)
    """Who trains."""
    epochs: EpochLog | None = None
    """Where rank 0 notes and looks up how epochs began; unless given, a source that goes on chooses anew."""
    pin_memory: bool = False
    """Whether batches are made in memory that a CUDA device can copy from by itself."""
    generator: Callable[[int], LiveGenerator] | None = None
    """Makes the generator of a live source, to be trained for so many steps against the student; None where nobody
    can."""


class BatchSource(Protocol):
    """An endless stream of batches that can be resumed."""

    is_live: ClassVar[bool]
    """Whether the source makes its images itself, so that there is no plan of units."""

    def __iter__(self) -> Iterator[StudentBatch]:
        """Batches from where the source stands."""

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as plain data and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there again: the same batches follow."""

    def start_over(self) -> None:
        """Look for images anew, after a phase that has made some; on every rank alike."""

    def finish(self) -> None:
        """Called after the last step."""


SOURCES: Registry[BatchSource] = Registry(
    "source", ["raydfkd.data.set_source", "raydfkd.data.live_source"], member="state_dict"
)
