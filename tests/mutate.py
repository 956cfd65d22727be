"""Mutants of the code that decides what is in a set: each breaks one line, and its tests have to notice.

Run by hand, about an hour on two cores: ``python tests/mutate.py``, or with words of the lines to break, such as
``python tests/mutate.py sink.py quarantine``. A mutant whose line is not there any more is an error: write it anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    """A line of a module, what it becomes, and the tests of which one has to fail, as pytest takes them."""

    module: str
    line: str
    instead: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.module}: {' '.join(self.line.split())}  ->  {' '.join(self.instead.split())}"


SET, GC, SOURCES = "tests/data/test_transfer_set.py", "tests/data/test_garbage.py", "tests/data/test_sources.py"
RESUME, LOCAL, JOB = "tests/synthesis/test_resume.py", "tests/runner/test_local.py", "tests/test_job.py"
SHARDS, UNITS, SECURITY = "tests/data/test_shards.py", "tests/test_units.py", "tests/data/test_security.py"
PATIENCE, LOOKOUT = "tests/distributed/test_patience.py", "tests/distributed/test_lookout.py"
SHARING, POOL = "tests/distributed/test_sharing.py", "tests/distributed/test_pool.py"
BUFFER, VERSIONS = "tests/data/test_shuffle_buffer.py", "tests/data/test_student_versions.py"

MUTANTS = (
    # the log of commits
    Mutant(
        "data/commit_log.py",
        "for unit, generation in commits if generation == first_free",
        "for unit, generation in commits if generation <= first_free",
        SET,
    ),
    Mutant(
        "data/commit_log.py",
        "if winner is not None and not self._is_damaged(own.unit, generation):",
        "if winner is not None:",
        SET,
    ),
    Mutant("data/commit_log.py", "if recorded.parts != commit.parts:", "if False:", SET),
    Mutant(
        "data/commit_log.py", "winner = mine if is_first else self._fetch(own.unit, generation)", "winner = mine", SET
    ),
    Mutant("data/commit_log.py", "if (commit.unit, commit.generation) != (unit, generation):", "if False:", SET),
    Mutant("data/commit_log.py", "        self._check()\n", "", SET),
    Mutant("data/commit_log.py", "damaged=damaged - live.keys())", "damaged=damaged)", SET),
    # records
    Mutant(
        "data/commits.py",
        "if sum(part.rows for part in self.parts) != self.images:",
        "if False:",
        f"{SET} {SECURITY} tests/data",
    ),
    Mutant("data/commits.py", 'rf"^parts/{UNIT_ID}\\.parquet$"', 'r"^.*$"', SECURITY),
    # the set
    Mutant("data/transfer_set.py", "header is not None and header.digest != self.digest:", "False:", SET),
    Mutant("data/transfer_set.py", "if header.format != FORMAT:", "if False:", SET),
    Mutant("data/transfer_set.py", "if found != part.xxh3:", "if False:", SET),
    Mutant("data/transfer_set.py", "if len(rows) != part.rows:", "if False:", f"{SET} {SECURITY}"),
    Mutant("data/transfer_set.py", "return self._read_once(part)  # bytes", "raise  # bytes", SET),
    # the sink
    Mutant("data/sink.py", "has_lost = winner.parts != own.parts", "has_lost = False", f"{SET} {RESUME}"),
    Mutant("data/sink.py", "for path in set(self._inherited) -", "for path in set() -", RESUME),
    Mutant("data/sink.py", "- {part.path for part in winner.parts}:", "- set():", f"{RESUME} {SET}"),
    Mutant(
        "data/sink.py",
        "if not self._is_sealed:\n            self._discard()",
        "if True:\n            self._discard()",
        f"{SET} tests/data/test_storm.py",
    ),
    Mutant("data/sink.py", "if xxhash.xxh3_128_hexdigest(data) != part.xxh3:", "if False:", RESUME),
    Mutant("data/sink.py", "first_index=sum(part.rows for part in self._parts) +", "first_index=", f"{SET} {SHARDS}"),
    Mutant("data/sink.py", "        self._num_buffered = _count(self._buffer)\n", "", RESUME),
    # shards and shuffle
    Mutant("data/shards.py", "            row.update(label)\n", "", SHARDS),
    Mutant("data/shards.py", "if schema.equals(expected, check_metadata=True):", "if True:", f"{SHARDS} {SECURITY}"),
    Mutant(
        "data/shards.py", "if not 0 <= int(classes.min()) <= int(classes.max()) < form.classes:", "if False:", SHARDS
    ),
    Mutant("data/shards.py", "if 2 * count * form.classes > LOGITS_BYTES:", "if False:", SHARDS),
    Mutant("data/logits.py", "values.scatter(-1, classes, -math.inf)", "values", "tests/data/test_logits.py"),
    Mutant("data/logits.py", " - math.log(num_classes - k)", "", "tests/data/test_logits.py"),
    Mutant("data/shuffle_buffer.py", "            begin += len(copy)\n", "", BUFFER),
    Mutant("data/shuffle_buffer.py", "copy if len(copy) == len(rows) else", "copy if True else", BUFFER),
    Mutant("data/shuffle_buffer.py", "picked[begin:end] - first", "picked[begin:end]", BUFFER),
    # garbage
    Mutant("data/garbage.py", "for entry in by_unit[unit][0] if entry.path not in named]", "for entry in []]", GC),
    Mutant("data/garbage.py", "and _unit_of(_PART, entry) not in resumable", "", GC),
    Mutant("data/garbage.py", "if all(_is_old(e, latest) for e in entries)", "if True", GC),
    Mutant("data/garbage.py", "        commit = transfer_set.commit_of(unit)\n", "        commit = None\n", GC),
    # epochs and sources
    Mutant(
        "data/epochs.py",
        "return earlier or self._begun(",
        "return self._begun(",
        f"{SOURCES} tests/distillation/test_trainer.py",
    ),
    Mutant(
        "data/epochs.py", "return self._snapshot if self._is_closed or self", "return self._snapshot if self", SOURCES
    ),
    Mutant("data/epochs.py", "return self._planned_images if self._is_closed else", "return", SOURCES),
    Mutant("data/set_source.py", "self._num_unreadable += next(", "_ = next(", f"{SOURCES} tests/test_cli.py"),
    # student versions
    Mutant("data/student_versions.py", "for old in versions[: -self._keep]:", "for old in versions[: -1]:", VERSIONS),
    # units
    Mutant("units.py", "if failure.attempt >= self._max_attempts:", "if failure.attempt > self._max_attempts:", UNITS),
    Mutant("units.py", "if losses < self._max_losses:", "if losses <= self._max_losses:", UNITS),
    Mutant("units.py", "self._losses.pop(unit.id, None)\n        self._note", "self._note", UNITS),
    Mutant("units.py", 'derive_seed(seed, "repeat", repeat)', 'derive_seed(seed, "repeat")', UNITS),
    Mutant("units.py", "self._pending.move_to_end(unit.id, last=False)", "pass", UNITS),
    Mutant("units.py", "self._done.remove(unit.id)\n", "return\n", UNITS),
    # job
    Mutant("job.py", "for unit_id in news.damaged & self.unit_ids:", "for unit_id in ():", JOB),
    Mutant("job.py", "self.transfer_set.reopen(queue.plan)", "pass", f"{JOB} {LOCAL}"),
    Mutant("job.py", '"held_out": sorted(self.held_out), **', "**", JOB),
    Mutant("job.py", 'return {"transfer_set": self.digest, "held_out"', 'return {"held_out"', JOB),
    Mutant("job.py", "for unit in phase.units if unit.id not in self.held_out]", "for unit in phase.units]", JOB),
    Mutant("config/recipe.py", '            "classes": list(self.classes),\n', "", JOB),
    Mutant("config/recipe.py", '"images_per_class": self.transfer_set.images_per_class,\n            **', "**", JOB),
    Mutant("config/recipe.py", "            **self.transfer_set.stored_as(),\n", "", JOB),
    Mutant("config/schema.py", '{"logits"} if self.logits.top_k is None', '{"logits"} if True', f"{JOB} {RESUME}"),
    # saved states of units
    Mutant("synthesis/checkpoint.py", 'if state.get("digest") != self._digest:', "if False:", RESUME),
    Mutant("synthesis/worker.py", "(Interrupted, StoreError, KeyboardInterrupt, SystemExit)", "Interrupted", RESUME),
    Mutant("synthesis/worker.py", "            checkpoint.remove()  # for it may be what led here\n", "", RESUME),
    Mutant("synthesis/worker.py", 'f"{job.digest} {json.dumps(stored, sort_keys=True)}"', "job.digest", RESUME),
    Mutant("synthesis/worker.py", "            saved=work.synthesizer_state,\n", "            saved=None,\n", RESUME),
    # the student's training
    Mutant("checkpoints.py", "weights_only=True", "weights_only=False", "tests/test_checkpoints.py"),
    Mutant("distillation/training.py", "if phase is None or images >= state", "if True or images >= state", LOCAL),
    Mutant("runner/local.py", "            forget_epochs(job)\n", "", LOCAL),
    # setbacks, the pool and the training beside it
    Mutant("runner/setbacks.py", "if isinstance(error, OutageError):", "if False:", LOCAL),
    Mutant("runner/setbacks.py", "if queue.lasting_failure:", "if False:", LOCAL),
    Mutant("units.py", "                self._losses[unit_id] = 0\n", "                pass\n", UNITS),
    Mutant("units.py", "        self._alike.clear()\n", "", UNITS),
    Mutant("distributed/patience.py", "max(LEAST_S, self._times * self._longest_s)", "LEAST_S", PATIENCE),
    Mutant("distributed/patience.py", "self._longest_s > 0 and ", "", PATIENCE),
    Mutant("distributed/lookout.py", "time.monotonic() + LOOK_EVERY_S", "time.monotonic()", LOOKOUT),
    Mutant("distributed/lookout.py", "if queue.is_drained:  # whatever", "if False:  # whatever", LOOKOUT),
    Mutant("distributed/sharing.py", "elif now - self._was_at_work > STARVED_S:", "elif False:", SHARING),
    Mutant("distributed/sharing.py", "if self._pool.is_at_work or not self._training.is_waiting:", "if True:", SHARING),
    Mutant("distributed/pool.py", "self._cannot_go_on or not (self._calls or self._idle):", "True:", POOL),
    Mutant("distributed/pool.py", "self._cannot_go_on or not (self._calls or self._idle):", "False:", POOL),
    Mutant("distributed/pool.py", "                worker.is_silent = True\n", "", POOL),
    Mutant("distributed/pool.py", "range(num_workers - max(self._bounds.min, queue.num_open))", "range(0)", POOL),
    Mutant("distributed/pool.py", "min(self._bounds.max, queue.num_open) - num_workers", "self._bounds.max", POOL),
)


def mutated(mutant: Mutant) -> str:
    """The module with the mutant's line in it.

    Raises:
        ValueError: it does not have that line once.
    """
    text = (ROOT / "raydfkd" / mutant.module).read_text()
    if text.count(mutant.line) != 1:
        raise ValueError(f"its line is there {text.count(mutant.line)} times; write the mutant anew")
    return text.replace(mutant.line, mutant.instead)


def verdict(mutant: Mutant, folder: Path) -> str:
    """Whether one of its tests fails in a copy of the repository at ``folder``, and passes without the mutant there."""
    module = folder / "raydfkd" / mutant.module
    whole = module.read_text()
    try:
        module.write_text(mutated(mutant))
        failed = first_failure(folder, mutant.tests.split())
    except ValueError as error:
        return f"ERROR ({error})"
    except subprocess.TimeoutExpired:
        return "killed (by the clock)"
    finally:
        module.write_text(whole)
    if failed is None:
        return "SURVIVED"
    if first_failure(folder, [failed]) is not None:
        return f"ERROR ({failed} fails without the mutant too)"
    return f"killed by {failed}"


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """The first of ``tests`` that fails in the copy at ``folder``; None where all pass.

    Raises:
        ValueError: they cannot be run.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not cluster", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode and not lines:
        raise ValueError(done.stdout[-300:])
    return lines[0].partition(" ")[2].partition(" - ")[0] if lines else None


def main(words: list[str]) -> int:
    """Try the mutants that have one of ``words`` in their line, or all; returns how many were not killed."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "shared", "out")
        )
        for mutant in chosen:
            began = time.monotonic()
            verdicts.append(verdict(mutant, copy))
            sys.stdout.write(f"{time.monotonic() - began:5.0f} s  {verdicts[-1]}\n         {mutant.name}\n")
            sys.stdout.flush()
    num_killed = sum(found.startswith("killed") for found in verdicts)
    sys.stdout.write(f"{num_killed} of {len(chosen)} killed\n")
    return len(chosen) - num_killed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
