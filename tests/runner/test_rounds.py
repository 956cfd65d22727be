"""Synthesis and training in turns, each round's images against the student of the rounds before."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from toy import SYNTHESIZERS_UNDER_TEST, quiet_events, run_here, toy_recipe

from raydfkd.data.student_versions import StudentVersions
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.report.metrics import read_metrics
from raydfkd.runner import check as in_check
from raydfkd.synthesis.worker import SynthesisWorker

AGAINST_STUDENT = "synthesis.objective=[cross_entropy, {term: competition, weight: 5}]"
ROUNDS = (AGAINST_STUDENT, "rounds=2", "transfer_set.images_per_class=12", "distill.steps=7")


def job_in_rounds(folder, synthesizer="pixels", *settings):
    return open_job(toy_recipe(folder, [*ROUNDS, *settings], synthesizer=synthesizer))


def run(job, folder):
    return run_here(job, quiet_events(folder))


def student_entries(folder):
    return [entry for entry in read_metrics(folder / "metrics.jsonl") if entry["event"] == "student"]


def objective_entries(folder, unit):
    entries = read_metrics(folder / "metrics.jsonl")
    return [entry for entry in entries if entry["event"] == "objective" and entry["unit"] == unit]


def versions_in(job, commit):
    store = job.transfer_set.store
    tables = [pq.read_table(f"{store.uri}/{part.path}", columns=["student_version"]) for part in commit.parts]
    return {value for table in tables for value in table["student_version"].to_pylist()}


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_second_round_is_made_against_the_student_that_the_first_has_trained(tmp_path, synthesizer):
    job = job_in_rounds(tmp_path, synthesizer)
    outcome, student = run(job, tmp_path)
    assert (outcome.attempted, outcome.given_up) == (8, ())
    assert StudentVersions(job.transfer_set.store).versions() == [3, 7]
    for commit in job.snapshot().commits:
        expected = 3 if commit.unit >= "r002" else -1
        assert commit.student_version == expected
        assert versions_in(job, commit) == {expected}
        asked = ["competition" in entry for entry in objective_entries(tmp_path, commit.unit)]
        assert asked == [expected == 3] * len(asked) != []
    seen = {entry["step"]: entry["snapshot_images"] for entry in student_entries(tmp_path)}
    assert {seen[step] for step in (1, 2, 3)} == {24}
    assert {seen[step] for step in (4, 5, 6, 7)} == {48}
    newest = StudentVersions(job.transfer_set.store).state(7)
    assert all(torch.equal(newest[name], value) for name, value in student.items())


def test_set_in_rounds_is_the_same_each_time_and_the_student_changes_it(tmp_path):
    digests = []
    for name in ("one", "same", "other"):
        settings = ["student.options={widths: [3]}"] if name == "other" else []
        job = job_in_rounds(tmp_path / name, "pixels", *settings)
        run(job, tmp_path / name)
        digests.append((job.digest, job.snapshot().content_digest()))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
    assert digests[0][1] != digests[2][1]


def test_run_that_stops_anywhere_goes_on_to_the_same_set_and_student(tmp_path, monkeypatch):
    undisturbed = job_in_rounds(tmp_path / "undisturbed")
    _, expected = run(undisturbed, tmp_path / "undisturbed")
    job = job_in_rounds(tmp_path / "disturbed", "pixels", "distill.checkpoint_every=1")
    num_calls = 0

    def failing(original):
        def call(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls % 4 == 0:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(SynthesisWorker, "run", failing(SynthesisWorker.run))
    monkeypatch.setattr(StudentTraining, "state_dict", failing(StudentTraining.state_dict))
    num_stops = 0
    while True:
        try:
            _, student = run(job, tmp_path / "disturbed")
        except KeyboardInterrupt:
            num_stops += 1
        else:
            break
    assert num_stops >= 3
    assert job.snapshot().content_digest() == undisturbed.snapshot().content_digest()
    assert all(torch.equal(expected[name], value) for name, value in student.items())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["rounds=2", "transfer_set.images_per_class=12"], "no term of synthesis.objective asks the student"),
        ([AGAINST_STUDENT], "use rounds: 2 or more, or runtime.executor ray"),
        ([*ROUNDS, "rounds=3"], "rounds is 3, but there are 4 units of images of each class and 7 steps"),
        ([*ROUNDS, "rounds=4", "distill.steps=3"], "rounds is 4, but there are 4 units"),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_any_work(tmp_path, settings, problem):
    with pytest.raises(RecipeError, match=problem):
        in_check.check(toy_recipe(tmp_path, settings))


def test_student_that_is_only_logged_otherwise_does_not_change_the_digest(tmp_path):
    job = job_in_rounds(tmp_path / "one")
    assert job_in_rounds(tmp_path / "other", "pixels", "distill.log_every=3").digest == job.digest
    longer = job_in_rounds(tmp_path / "longer", "pixels", "transfer_set.images_per_class=24")
    assert longer.digest != job.digest


def test_each_phase_covers_all_classes_and_the_last_one_is_the_whole_job(tmp_path):
    job = job_in_rounds(tmp_path)
    first, last = job.phases
    assert last.units == job.units
    assert len(first.units) == len(job.units) // 2
    assert {label for unit in first.units for label in unit.request.classes} == set(range(4))
    assert (first.until_step, last.until_step) == (3, 7)
    assert (first.student_version, last.student_version) == (None, 3)
