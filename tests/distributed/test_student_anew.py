"""A student that was trained with Ray on an incomplete set, once the others are there."""

from __future__ import annotations

import pytest
import torch
from small import small_recipe
from toy import quiet_events, worker_of

from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.report.metrics import read_metrics

pytestmark = pytest.mark.ray


def distill(job, folder):
    """What comes of it, and what is said of the student."""
    from raydfkd.distributed.executor import RayExecutor

    said, events = [], quiet_events(folder)
    events.say = lambda topic, text: said.append(text) if topic == "student" else None
    return RayExecutor().distill(job, job.phases[-1], open_teacher(job.recipe), events), said


@pytest.mark.cluster
def test_student_of_an_incomplete_set_is_trained_anew_once_there_are_more_images(ray_cluster, tmp_path):
    """Also where Ray Train has listed the checkpoints of the training that ended, and its epochs are noted."""
    students = {}
    for name, halves in (("whole", [slice(None)]), ("in two", [slice(0, 6), slice(6, None)])):
        job = open_job(small_recipe(tmp_path / name, "distill.source=snapshot"))
        job.transfer_set.create()
        for half in halves:
            worker = worker_of(job)
            for unit in job.units[half]:
                worker.run(unit)
            job.transfer_set.close(job.phases[-1].plan, [])
            students[name], said = distill(job, tmp_path / name)
    images = job.planned_images - sum(unit.request.count for unit in job.units if unit.id in job.held_out)
    assert said == [f"trains from the beginning: it has seen 120 of {images} images, and now there are {images}"]
    assert all(torch.equal(students["in two"][key], value) for key, value in students["whole"].items())
    entries = [entry for entry in read_metrics(tmp_path / "in two" / "metrics.jsonl") if entry["event"] == "student"]
    assert [entry["step"] for entry in entries] == [1, 10, 20, 30, 40] * 2
    assert [entry["snapshot_images"] for entry in entries] == [120] * 5 + [images] * 5
