"""What a recipe comes to: its plan, what is held out from training, and what names its images and its student."""

from __future__ import annotations

import pytest
from toy import quiet_events, run_here, synthesize_here, toy_recipe, training_of, worker_of

from raydfkd.distillation.training import note_training
from raydfkd.job import job_of, open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.report.metrics import read_metrics
from raydfkd.store.errors import DamagedError

SAME_STUDENT = [
    "distill.log_every=3",
    "distill.checkpoint_every=2",
    "distill.publish_every=2",
    "distill.threads=2",
    "distill.source.window_rows=64",
    "runtime.checkpoint_every=5",
    "runtime.max_attempts=9",
    "transfer_set.part_rows=7",
    "name=other",
]
ANOTHER_STUDENT = {
    "distill.steps=7": "distill.steps is 6 there and 7 here",
    "distill.batch_size=9": "distill.batch_size is 8 there and 9 here",
    "distill.criterion=soft_kl": "distill.criterion is ",
    "distill.optimizer.lr=0.5": "distill.optimizer.lr is 0.01 there and 0.5 here",
    "distill.source.wait_for=3": "distill.source.wait_for is not given there and 3 here",
    "distill.source=snapshot": "distill.source is ",
    "distill.holdout=0.5": "held_out is [] there and [",
    "distill.augment=[flip]": "distill.augment is [] there and ",
    "distill.teacher_logits=stored": 'distill.teacher_logits is "live" there and "stored" here',
    "distill.precision=bfloat16": 'distill.precision is "float32" there and "bfloat16" here',
    "student.options.widths=[3]": "student.options.widths is [4, 6] there and [3] here",
    "transfer_set.images_per_class=9": "images_per_class is 6 there and 9 here",
    "transfer_set.encoding=jpeg": "encoding",
    "transfer_set.logits={kind: top_k, k: 2}": "logits is not given there and ",
    "transfer_set.classes=[0, 1]": "classes is [0, 1, 2, 3] there and [0, 1] here",
    "synthesis.batch_size=2": "transfer_set is ",
    "seed=8": "transfer_set is ",
}


@pytest.mark.parametrize(
    ("holdout", "images_per_class", "held_out"),
    [(0.1, 6, 1), (0.1, 30, 1), (0.1, 60, 2), (0.5, 6, 1), (0.99, 9, 2), (0, 30, 0), (0.5, 3, 0)],
)
def test_last_repeats_are_held_out_whole_at_least_one_and_never_the_only_one(
    tmp_path, holdout, images_per_class, held_out
):
    job = open_job(
        toy_recipe(tmp_path, [f"distill.holdout={holdout}", f"transfer_set.images_per_class={images_per_class}"])
    )
    repeats = images_per_class // 3
    expected = {unit.id for unit in job.units if unit.repeat >= repeats - held_out}
    assert job.held_out == expected
    assert len(expected) == 2 * held_out


def test_nothing_is_held_out_where_real_images_judge(tmp_path):
    assert open_job(toy_recipe(tmp_path, ["distill.holdout=0.5"])).held_out
    recipe = toy_recipe(tmp_path, ["distill.holdout=0.5", "real_data=digits"])
    assert job_of(recipe, {}).held_out == frozenset()


@pytest.mark.parametrize("source", ["growing", "snapshot"])
def test_student_never_trains_on_what_is_held_out(tmp_path, source):
    job = open_job(toy_recipe(tmp_path, ["distill.holdout=0.1", f"distill.source={source}"]))
    run_here(job, quiet_events(tmp_path))
    entries = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["event"] == "student"]
    assert {entry["snapshot_images"] for entry in entries} == {12}
    assert job.snapshot().images == 24
    feed = training_of(job)._feed(None, training_of(job).trainer._device)
    assert set(feed.units) == job.unit_ids - job.held_out


def test_each_phase_leaves_out_what_is_held_out_of_the_whole_plan(tmp_path):
    overrides = [
        "synthesis.objective=[cross_entropy, {term: competition, weight: 5}]",
        "rounds=2",
        "transfer_set.images_per_class=12",
        "distill.holdout=0.25",
    ]
    job = open_job(toy_recipe(tmp_path, overrides))
    run_here(job, quiet_events(tmp_path))
    entries = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["event"] == "student"]
    assert [entry["snapshot_images"] for entry in entries] == [24, 24, 24, 36, 36, 36]


def test_run_of_a_shorter_plan_leaves_the_set_open_for_a_longer_one(tmp_path):
    short, long = (open_job(toy_recipe(tmp_path, [f"transfer_set.images_per_class={images}"])) for images in (6, 12))
    assert short.digest == long.digest, "they share a set"
    synthesize_here(short, quiet_events(tmp_path))
    assert (short.is_closed, long.is_closed) == (True, False)
    long.begin_synthesis()
    assert short.is_closed
    assert synthesize_here(short, quiet_events(tmp_path)).attempted == 0
    assert not long.is_closed, "who makes nothing closes nothing that others are making"
    synthesize_here(long, quiet_events(tmp_path))
    assert short.is_closed
    assert long.is_closed


@pytest.mark.parametrize(
    "overrides",
    [[], ["rounds=2", "synthesis.objective=[cross_entropy, {term: competition, weight: 5}]"]],
    ids=["one phase", "two phases"],
)
def test_training_waits_for_the_end_of_the_plan_that_its_phase_is_made_for_held_out_units_included(tmp_path, overrides):
    job = open_job(toy_recipe(tmp_path, ["distill.holdout=0.3", "transfer_set.images_per_class=12", *overrides]))
    assert job.held_out
    for phase in job.phases:
        feed = training_of(job, phase)._feed(None, training_of(job).trainer._device)
        synthesize_here(job, quiet_events(tmp_path), phase)
        assert job.transfer_set.is_closed(feed.plan)
    assert job.is_closed


@pytest.mark.parametrize("override", SAME_STUDENT)
def test_how_a_training_is_watched_saved_or_computed_does_not_name_another_student(tmp_path, override):
    before, after = (open_job(toy_recipe(tmp_path, given)) for given in ([], [override]))
    assert after.student_digest == before.student_digest
    assert note_training(before) is None
    assert note_training(after) is None


@pytest.mark.parametrize("override", ANOTHER_STUDENT)
def test_anything_else_names_another_student_and_what_differs_is_said(tmp_path, override):
    before, after = (open_job(toy_recipe(tmp_path, given)) for given in ([], [override]))
    assert after.student_digest != before.student_digest
    assert note_training(before) is None
    assert ANOTHER_STUDENT[override] in note_training(after)


def test_training_that_was_noted_before_is_no_news_and_the_newest_is_the_one_compared_with(tmp_path):
    jobs = [open_job(toy_recipe(tmp_path, [f"distill.steps={steps}"])) for steps in (6, 7, 8)]
    assert note_training(jobs[0]) is None
    assert note_training(jobs[1]) == "distill.steps is 6 there and 7 here"
    assert note_training(jobs[0]) is None, "it goes on where it was"
    assert note_training(jobs[2]) == "distill.steps is 6 there and 8 here"


def test_other_classes_of_the_same_number_name_another_student(tmp_path):
    first, other = (open_job(toy_recipe(tmp_path, [f"transfer_set.classes={chosen}"])) for chosen in ([0, 1], [2, 3]))
    assert first.digest == other.digest, "both may be in one set"
    assert first.planned_images == other.planned_images
    assert first.student_digest != other.student_digest
    note_training(first)
    assert note_training(other) == "classes is [0, 1] there and [2, 3] here"


@pytest.mark.parametrize("content", ["", "{", "\0\0"])
def test_damaged_note_of_a_training_is_set_aside_and_no_error(tmp_path, content, caplog):
    job = open_job(toy_recipe(tmp_path))
    note_training(job)
    (note,) = (tmp_path / "run" / "train").glob("training-*.json")
    note.write_text(content)
    other = open_job(toy_recipe(tmp_path, ["distill.steps=7"]))
    assert note_training(other) == f"{note.name}, which would tell what differs, was damaged"
    assert note.with_name(f"{note.name}.damaged").exists()
    assert f"{note} is damaged" in caplog.text
    assert note_training(other) is None
    assert note_training(job) == "distill.steps is 7 there and 6 here"


def test_of_many_differences_the_first_are_said_and_the_rest_are_counted(tmp_path):
    changes = ["distill.steps=7", "distill.batch_size=9", "distill.optimizer.lr=0.5", "distill.optimizer.momentum=0.5"]
    note_training(open_job(toy_recipe(tmp_path)))
    assert note_training(open_job(toy_recipe(tmp_path, changes))).endswith(", and 1 more")


def test_training_that_begins_anew_says_so_in_the_run(tmp_path):
    said = []
    for steps in (6, 7):
        events = quiet_events(tmp_path)
        events.say = lambda topic, text: said.append(text)
        run_here(open_job(toy_recipe(tmp_path, [f"distill.steps={steps}"])), events)
    assert said == [
        "trains from the beginning, since another was asked for: distill.steps is 6 there and 7 here",
    ]


def test_job_of_somebody_else_s_digest_is_the_same_job_without_a_look_at_the_weights(tmp_path):
    job = open_job(toy_recipe(tmp_path))
    (tmp_path / "teacher.safetensors").unlink()
    again = job_of(job.recipe, job.made_of)
    assert (again.digest, again.student_digest, again.phases) == (job.digest, job.student_digest, job.phases)


def test_teacher_that_is_given_is_not_opened_again(tmp_path):
    recipe = toy_recipe(tmp_path)
    teacher = open_teacher(recipe)
    expected = open_job(recipe).digest
    (tmp_path / "teacher.safetensors").unlink()
    assert open_job(recipe, teacher).digest == expected


def test_damage_is_caught_up_with_while_others_work_and_so_is_what_they_commit(tmp_path):
    job = open_job(toy_recipe(tmp_path))
    queue = job.begin_synthesis()
    for unit in job.units[:3]:
        worker_of(job).run(unit)
    job.catch_up(queue, job.news(at_once=True))
    assert (queue.num_open, queue.take()) == (1, job.units[3])
    (commit, *_) = job.snapshot().commits
    job.transfer_set.mark_damaged(commit, DamagedError(job.transfer_set.store.uri, commit.parts[0].path, "is damaged"))
    job.catch_up(queue, job.news(at_once=True))
    assert queue.num_open == 2
    assert queue.take() == job.units_by_id[commit.unit]


def test_set_is_open_while_there_is_something_to_make_and_closed_after_it(tmp_path):
    job = open_job(toy_recipe(tmp_path))
    job.transfer_set.create()
    job.transfer_set.close(job.phases[-1].plan, [])
    queue = job.begin_synthesis()
    assert not job.is_closed
    job.end_synthesis(queue)
    assert job.is_closed
