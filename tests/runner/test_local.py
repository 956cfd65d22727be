from __future__ import annotations

import io
import uuid
from dataclasses import replace

import pytest
import torch
from faulty import PLANS, Faults
from rich.console import Console
from toy import (
    SYNTHESIZERS_UNDER_TEST,
    distill_here,
    fresh_student_of,
    quiet_events,
    run_here,
    synthesize_here,
    toy_recipe,
)

from raydfkd.checkpoints import checkpoint_bytes
from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.sink import ParquetSink
from raydfkd.distillation.training import StudentCheckpoint, StudentTraining, outdated
from raydfkd.errors import RunError
from raydfkd.job import Job, open_job
from raydfkd.report.metrics import MetricsLog, read_metrics
from raydfkd.runner.events import Events, MetricsWriter
from raydfkd.runner.progress import Display
from raydfkd.store import retry
from raydfkd.store.errors import DamagedError, OutageError, StoreError
from raydfkd.synthesis.synthesizer import SYNTHESIZERS
from raydfkd.synthesis.worker import SynthesisWorker


class Grey:
    """Grey images at once, but for the classes in ``broken``, whose units fail half-way."""

    broken: frozenset[int] = frozenset()

    def __init__(self, setting):
        self._shape = setting.space.shape

    def produce(self, request, log, hook):
        for label in request.classes:
            if label in Grey.broken:
                raise RuntimeError(f"class {label} cannot be made")
            yield SyntheticBatch(
                images=torch.full((request.images_per_class, *self._shape), 100 + label, dtype=torch.uint8),
                labels=torch.full((request.images_per_class,), label),
                teacher_logits=torch.zeros(request.images_per_class, 4).half(),
                objective=1.0,
            )


@pytest.fixture
def break_classes(monkeypatch):
    """Registers ``grey`` and chooses the classes at which it fails."""
    monkeypatch.setitem(SYNTHESIZERS._factories, "grey", Grey)
    return lambda *labels: monkeypatch.setattr(Grey, "broken", frozenset(labels))


def grey_job(folder, *overrides):
    return open_job(toy_recipe(folder, ["synthesis={synthesizer: grey, objective: [one_hot]}", *overrides]))


def synthesize(job, folder):
    return synthesize_here(job, quiet_events(folder))


def events(folder, kind):
    return [entry for entry in read_metrics(folder / "metrics.jsonl") if entry["event"] == kind]


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_run_commits_every_unit_closes_the_set_and_trains_a_student(tmp_path, synthesizer):
    job = open_job(toy_recipe(tmp_path, synthesizer=synthesizer))
    outcome, state = run_here(job, quiet_events(tmp_path))
    assert (outcome.attempted, outcome.given_up) == (4, ())
    assert set(job.snapshot().units) == job.unit_ids
    assert job.snapshot().images == job.planned_images == 24
    assert job.is_closed
    rows = [job.transfer_set.read(part) for commit in job.snapshot().commits for part in commit.parts]
    assert torch.cat([part.labels for part in rows]).bincount().tolist() == [6, 6, 6, 6]
    fresh = fresh_student_of(job).state_dict()
    assert state.keys() == fresh.keys()
    assert any(not torch.equal(state[name], fresh[name]) for name in fresh)
    assert all(value.isfinite().all() for value in state.values())


def test_unit_that_is_found_damaged_while_others_are_made_is_made_again_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHESIZERS._factories, "grey", Grey)
    job, made = grey_job(tmp_path), []
    run = SynthesisWorker.run

    def then_damage_the_first(self, unit, attempt):
        made.append(run(self, unit, attempt))
        if len(made) == 2:
            path = made[0].parts[0].path
            job.transfer_set.store.put(path, b"damaged")
            job.transfer_set.mark_damaged(made[0], DamagedError(job.transfer_set.store.uri, path, "is damaged"))
        return made[-1]

    monkeypatch.setattr(SynthesisWorker, "run", then_damage_the_first)
    outcome = synthesize(job, tmp_path)
    assert outcome.attempted == 5
    assert made[-1].unit == made[0].unit
    assert set(job.snapshot().commits) == set(made[1:])
    assert all(verdict.damage is None for verdict in job.transfer_set.verify())


def test_metrics_tell_of_every_unit_and_step(tmp_path):
    job = open_job(toy_recipe(tmp_path))
    run_here(job, quiet_events(tmp_path))
    assert {entry["unit"] for entry in events(tmp_path, "unit")} == job.unit_ids
    assert {entry["unit"] for entry in events(tmp_path, "objective")} == job.unit_ids
    assert [entry["step"] for entry in events(tmp_path, "student")] == [1, 2, 3, 4, 5, 6]


def test_set_and_student_follow_from_the_recipe_alone(tmp_path):
    found = []
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        job = open_job(toy_recipe(tmp_path / name))
        _, state = run_here(job, quiet_events(tmp_path / name))
        found.append((job.transfer_set.content_digest(), state))
    (digest, state), (other_digest, other_state) = found
    assert digest == other_digest
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_unit_that_always_fails_is_given_up_at_the_third_attempt_and_the_others_go_on(tmp_path, break_classes):
    break_classes(1)
    job = grey_job(tmp_path)
    outcome = synthesize(job, tmp_path)
    failing = {unit.id for unit in job.units if 1 in unit.request.classes}
    assert {failure.unit for failure in outcome.given_up} == failing
    assert {(failure.attempt, failure.error) for failure in outcome.given_up} == {
        (3, "RuntimeError: class 1 cannot be made")
    }
    assert set(job.snapshot().units) == job.unit_ids - failing
    assert outcome.attempted == 2 + 3 * 2
    assert job.is_closed


def test_failed_attempts_leave_no_part_behind(tmp_path, break_classes):
    break_classes(1)
    job = grey_job(tmp_path, "transfer_set.part_rows=1")
    synthesize(job, tmp_path)
    committed = [part.path for commit in job.snapshot().commits for part in commit.parts]
    assert job.transfer_set.store.list("parts") == sorted(committed)


def test_every_failure_is_recorded(tmp_path, break_classes):
    break_classes(3)
    job = grey_job(tmp_path, "transfer_set.images_per_class=3", "runtime.max_attempts=2")
    synthesize(job, tmp_path)
    recorded = [(entry["unit"], entry["attempt"], entry["error"]) for entry in events(tmp_path, "failure")]
    error = "RuntimeError: class 3 cannot be made"
    assert recorded == [("r000-c0002-0003", 1, error), ("r000-c0002-0003", 2, error)]
    assert [entry["final"] for entry in events(tmp_path, "failure")] == [False, True]


def test_failure_is_said_to_be_tried_again_until_the_unit_is_given_up(tmp_path, break_classes):
    break_classes(3)
    job = grey_job(tmp_path, "transfer_set.images_per_class=3", "runtime.max_attempts=2")
    said = io.StringIO()
    metrics = MetricsWriter(MetricsLog(tmp_path / "metrics.jsonl", fresh=True))
    synthesize_here(job, Events(metrics, Display(Console(file=said))))
    failures = [line for line in said.getvalue().splitlines() if "failed" in line]
    assert [line.partition("; ")[2] for line in failures] == ["will be tried again", "given up"]
    assert "r000-c0002-0003" in failures[0]


def test_student_is_trained_on_what_there_is_when_units_were_given_up(tmp_path, break_classes):
    break_classes(1)
    job = grey_job(tmp_path, "distill.source={kind: growing, wait_for: 24}")
    run_here(job, quiet_events(tmp_path))
    assert {entry["snapshot_images"] for entry in events(tmp_path, "student")} == {12}


def test_run_again_works_only_on_what_is_missing(tmp_path, break_classes):
    break_classes(1)
    job = grey_job(tmp_path)
    synthesize(job, tmp_path)
    before = job.snapshot().commits
    break_classes()
    outcome = synthesize(job, tmp_path)
    assert (outcome.attempted, outcome.given_up) == (2, ())
    assert set(job.snapshot().units) == job.unit_ids
    assert set(before) < set(job.snapshot().commits)
    assert synthesize(job, tmp_path).attempted == 0


def test_longer_plan_goes_on_from_a_shorter_one(tmp_path, break_classes):
    break_classes()
    shorter = grey_job(tmp_path, "transfer_set.images_per_class=3")
    synthesize(shorter, tmp_path)
    longer = grey_job(tmp_path, "transfer_set.images_per_class=9")
    assert synthesize(longer, tmp_path).attempted == 4
    assert set(shorter.snapshot().commits) < set(longer.snapshot().commits)
    assert longer.snapshot().images == 36


def test_interrupted_synthesis_keeps_what_was_committed_and_leaves_the_set_open(tmp_path, break_classes, monkeypatch):
    break_classes()
    job = grey_job(tmp_path)
    run, done = SynthesisWorker.run, []

    def interrupted(self, unit, attempt=1):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.id)
        return run(self, unit, attempt)

    monkeypatch.setattr(SynthesisWorker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(job, tmp_path)
    assert set(job.snapshot().units) == set(done)
    assert not job.is_closed
    monkeypatch.setattr(SynthesisWorker, "run", run)
    assert synthesize(job, tmp_path).attempted == 2


def test_distillation_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    overrides = ["distill.steps=8", "distill.checkpoint_every=3"]
    whole = open_job(toy_recipe(tmp_path / "whole", overrides))
    _, expected = run_here(whole, quiet_events(tmp_path / "whole"))

    job = open_job(toy_recipe(tmp_path / "cut", overrides))
    synthesize(job, tmp_path / "cut")

    class Cut(StudentTraining):
        def __init__(self, job, teacher, phase, *, hooks, **others):
            def log(entry):
                if entry["step"] == 5:
                    raise KeyboardInterrupt
                hooks.on_log(entry)

            super().__init__(job, teacher, phase, hooks=replace(hooks, on_log=log), **others)

    monkeypatch.setattr("raydfkd.runner.local.StudentTraining", Cut)
    with pytest.raises(KeyboardInterrupt):
        distill_here(job, quiet_events(tmp_path / "cut"))
    monkeypatch.undo()
    state = distill_here(job, quiet_events(tmp_path / "cut"))
    assert [entry["step"] for entry in events(tmp_path / "cut", "student")] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_number_of_images_in_memory_does_not_grow_with_the_plan(tmp_path, break_classes, monkeypatch):
    break_classes()
    peaks = {}
    for images in (8, 32):
        held = []
        write = ParquetSink.write

        def watched(self, batch, write=write, held=held):
            write(self, batch)
            held.append(self.num_buffered)

        monkeypatch.setattr(ParquetSink, "write", watched)
        folder = tmp_path / str(images)
        sizes = [f"transfer_set.images_per_class={images}", "transfer_set.unit.images_per_class=8"]
        synthesize(grey_job(folder, *sizes, "transfer_set.part_rows=5"), folder)
        monkeypatch.setattr(ParquetSink, "write", write)
        peaks[images] = max(held)
    assert peaks[8] == peaks[32] < 5


@pytest.fixture
def faulty_job(tmp_path, break_classes, monkeypatch):
    """A job of grey images whose store can be taken away by switching its faults on, and those faults."""
    break_classes()
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(retry, "_ATTEMPTS", 2)
    plan = uuid.uuid4().hex
    faults = PLANS[plan] = Faults(timeout=1.0)
    faults.is_on = False
    place = [f"transfer_set.uri=faulty://{plan}/set", f"transfer_set.storage_options={{plan: {plan}}}"]
    return grey_job(tmp_path, *place, "runtime.max_attempts=1"), faults


class StoreGoesAndComes(Events):
    """Takes the store away after the first commit, and gives it back after the third attempt that it cost."""

    def __init__(self, faults, monkeypatch):
        super().__init__()
        self.said, self.failures, self.faults = [], [], faults
        run = SynthesisWorker.run

        def counted(worker, unit, attempt=1):
            try:
                return run(worker, unit, attempt)
            except OutageError:
                self.num_outages += 1
                faults.is_on = self.num_outages < 3
                raise

        self.num_outages = 0
        monkeypatch.setattr(SynthesisWorker, "run", counted)

    def say(self, topic, text):
        self.said.append(text)

    def committed(self, commit, *, running):
        self.faults.is_on = self.num_outages == 0

    def failed(self, failure, *, is_final):
        self.failures.append(failure)


def test_outage_of_the_store_costs_a_unit_no_attempt_and_is_said_once(faulty_job, monkeypatch):
    job, faults = faulty_job
    events = StoreGoesAndComes(faults, monkeypatch)
    outcome = synthesize_here(job, events)
    assert events.num_outages == 3
    assert (events.failures, outcome.given_up) == ([], ())
    assert set(job.snapshot().units) == job.unit_ids
    assert ["going on as soon as it can" in text for text in events.said] == [True]


def test_store_that_is_away_when_all_seems_done_is_waited_for(faulty_job, monkeypatch):
    job, _ = faulty_job
    news, calls = Job.news, []

    def cut_off(job, *, at_once=False):
        calls.append(at_once)
        if len(calls) < 3:
            raise OutageError("s3://bucket/set/commits cannot be listed (timed out; tried again and again)")
        return news(job, at_once=at_once)

    monkeypatch.setattr(Job, "news", cut_off)
    assert synthesize_here(job, Events()).given_up == ()
    assert len(calls) == 3


def test_outage_that_lasts_ends_the_synthesis(faulty_job, monkeypatch):
    job, faults = faulty_job
    monkeypatch.setattr("raydfkd.runner.setbacks.OUTAGE_S", 0.0)
    events = StoreGoesAndComes(faults, monkeypatch)
    with pytest.raises(OutageError, match="tried again and again"):
        synthesize_here(job, events)
    assert events.num_outages == 2


def test_failure_that_is_the_same_for_every_unit_ends_the_run_after_a_few(tmp_path, monkeypatch):
    job = open_job(toy_recipe(tmp_path, ["transfer_set.images_per_class=30"]))
    tried = []

    def full(worker, unit, attempt):
        tried.append(unit.id)
        raise StoreError(f"/sets/a/parts/{unit.id}-{len(tried)}.parquet cannot be written (No space left on device)")

    monkeypatch.setattr("raydfkd.synthesis.worker.SynthesisWorker.run", full)
    with pytest.raises(RunError, match=r"5 units in a row failed alike .*\(No space left on device\)"):
        synthesize_here(job, Events())
    assert len(tried) == len(set(tried)) == 5 < len(job.units)


def saying(folder):
    """Events that keep what is said to the student's person, and the metrics."""
    events = quiet_events(folder)
    events.student_said = []
    events.say = lambda topic, text: events.student_said.append(text) if topic == "student" else None
    return events


SOURCES = ["growing", "snapshot", "{kind: growing, refresh_steps: 1}", "{kind: priority, refresh_steps: 2}"]


@pytest.mark.parametrize("source", SOURCES)
def test_student_of_an_incomplete_set_is_trained_anew_once_there_are_more_images(tmp_path, break_classes, source):
    settings = ["distill.checkpoint_every=2", f"distill.source={source}"]
    break_classes()
    _, expected = run_here(grey_job(tmp_path / "whole", *settings), quiet_events(tmp_path / "whole"))

    break_classes(1)
    job, folder = grey_job(tmp_path / "cut", *settings), tmp_path / "cut"
    _, short = run_here(job, quiet_events(folder))
    said = saying(folder)
    _, again = run_here(job, said)
    assert said.student_said == ["resumes at step 6"], "there is nothing more to see"
    assert all(torch.equal(again[name], short[name]) for name in short)

    break_classes()
    said = saying(folder)
    _, state = run_here(job, said)
    assert said.student_said == ["trains from the beginning: it has seen 12 of 24 images, and now there are 24"]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [entry["snapshot_images"] for entry in events(folder, "student")] == [12] * 6 + [24] * 6

    said = saying(folder)
    run_here(job, said)
    assert said.student_said == ["resumes at step 6"]


def test_student_that_was_interrupted_on_an_incomplete_set_goes_on_with_all_images(
    tmp_path, break_classes, monkeypatch
):
    break_classes(1)
    job = grey_job(tmp_path, "distill.steps=12", "distill.checkpoint_every=2", "distill.source=snapshot")
    save, saved = StudentCheckpoint.save, []

    def cut(checkpoint, state):
        save(checkpoint, state)
        saved.append(state)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StudentCheckpoint, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            run_here(job, quiet_events(tmp_path))
    break_classes()
    said = saying(tmp_path)
    run_here(job, said)
    assert said.student_said == ["resumes at step 4"]
    assert [entry["snapshot_images"] for entry in events(tmp_path, "student")][-1] == 24


@pytest.mark.parametrize(
    ("seen", "wanted", "is_closed", "says"),
    [
        (12, 24, True, "12 of 24 images, and now there are 24"),
        (12, 24, False, "12 of 24 images, and now there are 24"),
        (24, 24, True, None),
        (18, 18, True, None),  # a growing set's last epoch that began in time: as the recipe has it
        (24, 48, True, None),  # as many as there are
        (24, 48, False, "24 of 24 images; the others are being made"),
        (None, None, True, None),  # of an earlier version
    ],
)
def test_training_that_ended_is_outdated_where_the_set_has_or_will_have_more_than_it_should_have_seen(
    tmp_path, break_classes, seen, wanted, is_closed, says
):
    break_classes()
    job = grey_job(tmp_path)
    synthesize(job, tmp_path)
    if not is_closed:
        job.transfer_set.reopen(job.phases[-1].plan)
    known = {} if seen is None else {"snapshot_images": seen, "wanted_images": wanted}
    expected = None if says is None else f"trains from the beginning: it has seen {says}"
    assert outdated(job, {"trainer": {"step": 6, **known}}) == expected
    assert outdated(job, {"trainer": {"step": 5, **known}}) is None, "it has not ended"


def test_student_of_rounds_that_lacked_images_is_trained_anew(tmp_path, break_classes):
    objective = "synthesis.objective=[one_hot, {term: competition, weight: 1}]"
    settings = ["transfer_set.images_per_class=12", "rounds=2", objective]
    break_classes()
    _, expected = run_here(grey_job(tmp_path / "whole", *settings), quiet_events(tmp_path / "whole"))
    break_classes(3)
    job, folder = grey_job(tmp_path / "cut", *settings), tmp_path / "cut"
    run_here(job, quiet_events(folder))
    break_classes()
    said = saying(folder)
    _, state = run_here(job, said)
    assert said.student_said[0] == "trains from the beginning: it has seen 24 of 48 images, and now there are 36"
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage", ["cut off", "empty", "something else", "not all there"])
def test_damaged_checkpoint_of_a_student_is_set_aside_and_it_is_trained_from_the_beginning(tmp_path, caplog, damage):
    job = open_job(toy_recipe(tmp_path))
    _, expected = run_here(job, quiet_events(tmp_path))
    (path,) = (tmp_path / "run" / "train").glob("student-*.pt")
    content = path.read_bytes()
    wrong = {"cut off": content[:-100], "empty": b"", "something else": checkpoint_bytes({"step": 1}),
             "not all there": checkpoint_bytes({"student": {}, "trainer": {}})}[damage]  # fmt: skip
    path.write_bytes(wrong)
    said = saying(tmp_path)
    state = distill_here(job, said)
    assert said.student_said == []
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert path.with_name(f"{path.name}.damaged").read_bytes() == wrong
    assert StudentCheckpoint(job).load() is not None
    assert f"{path} is damaged" in caplog.text
    assert "trained from the beginning" in caplog.text
