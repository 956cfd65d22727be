"""What a run's metrics add up to, over all of its sessions."""

from __future__ import annotations

import pytest

from raydfkd.report.metrics import StatsReader

SESSION = {"event": "session", "job": "this", "training": "student"}
UNIT = {"event": "unit", "images": 10}
STEP = {"event": "student", "training": "student"}


def at(time, event, **changes):
    return {**event, "time": float(time), **changes}


def synthesized(time):
    return {"event": "synthesis", "time": float(time)}


def stats(*metrics, job="this", training="student"):
    reader = StatsReader(job=job, training=training)
    for event in metrics:
        reader.add(event)
    return reader.stats()


def test_sessions_of_a_run_add_up_and_the_time_between_them_does_not_count():
    first = [at(0, SESSION), synthesized(1), at(3, UNIT), at(5, UNIT), at(5, STEP), at(6, STEP)]
    second = [at(1000, SESSION), synthesized(1001), at(1003, UNIT), at(1004, STEP), at(1010, STEP)]
    found = stats(*first, *second)
    assert found.seconds == 6 + 10
    assert found.synthesis_seconds == 4 + 2
    assert found.distillation_seconds == 1 + 6
    assert (found.images, found.attempted) == (30, 3)
    assert found.images_per_second == pytest.approx(30 / 6)


def test_session_that_finds_all_done_changes_no_figure():
    first = [at(0, SESSION), synthesized(1), at(3, UNIT), at(4, STEP), at(6, STEP)]
    assert stats(*first, at(50, SESSION)) == stats(*first)
    assert stats(*first, at(50, SESSION), at(58, {"event": "training"})) == stats(*first)


def test_attempts_that_failed_or_were_lost_count_as_attempts():
    events = [at(2, {"event": "failure"}), at(3, {"event": "lost"}), at(4, UNIT)]
    assert stats(at(0, SESSION), *events).attempted == 3


def test_devices_are_those_of_the_workers_of_all_sessions_that_made_these_images():
    def worker(device):
        return at(1, {"event": "worker", "device": device})

    sessions = [at(0, SESSION), worker("H100"), worker("H100"), at(2, SESSION, job="that"), worker("A100")]
    assert stats(*sessions, at(3, SESSION), worker("H200")).devices == ("H100", "H200")
    assert stats(*sessions, job="none").devices == ()


def test_sessions_on_other_images_and_steps_of_other_students_are_left_out():
    other_images = [at(0, SESSION, job="that"), synthesized(1), at(3, UNIT)]
    other_student = [at(10, SESSION, training="other"), at(11, STEP, training="other"), at(19, STEP, training="other")]
    this = [at(20, SESSION), at(21, STEP), at(23, STEP)]
    found = stats(*other_images, *other_student, *this)
    assert (found.images, found.attempted) == (0, 0)
    assert found.distillation_seconds == 2
    assert found.images_per_second == 0


def test_metrics_before_the_first_session_or_none_at_all_are_nothing():
    assert stats(at(0, UNIT), at(9, STEP)) == stats()
    assert (stats().seconds, stats().images_per_second) == (0, 0)


def test_session_that_was_killed_before_its_first_commit_has_made_no_images_for_no_time():
    found = stats(at(0, SESSION), synthesized(1), at(9, {"event": "objective"}))
    assert (found.seconds, found.synthesis_seconds) == (9, 0)


def test_images_of_the_student_are_those_of_its_last_entry():
    entries = [at(time, STEP, snapshot_images=images) for time, images in ((1, 10), (2, 40))]
    other = at(3, STEP, training="other", snapshot_images=99)
    assert stats(at(0, SESSION), *entries, other).student_images == 40
    assert stats(at(0, SESSION), *entries, at(4, STEP)).student_images == 40, "of an entry that does not say"
    assert stats(at(0, SESSION), other).student_images is None
