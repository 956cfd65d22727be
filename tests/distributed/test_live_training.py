"""A generator that is trained beside its student inside Ray Train."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from small import small_recipe
from toy import fresh_student_of

from raydfkd.report.metrics import read_metrics
from raydfkd.runner.run import run

pytestmark = pytest.mark.ray

LIVE = (
    "distill.source={kind: live, generator_steps: 1, student_steps: 5, keep: 20}",
    "transfer_set={images_per_class: 0}",
    "synthesis.targets=none",
    "synthesis.augment=[]",
    "synthesis.objective=[logit_gap]",
    "synthesis.emissions=1",
    "distill.steps=30",
    "runtime.student_workers={min: 2, max: 2}",
)


def live_recipe(folder, *overrides):
    return small_recipe(folder, *LIVE, *overrides)


@pytest.mark.cluster
def test_adversarial_training_on_two_workers_runs_to_its_end_resumes_and_keeps_images(ray_cluster, tmp_path):
    result = run(live_recipe(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["judged_images"]) == (20, 0)
    assert report["units"]["planned"] == 0
    entries = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["event"] == "student"]
    assert [entry["step"] for entry in entries] == [1, 10, 20, 30]
    assert {entry["workers"] for entry in entries} == {2}
    assert [entry["images_seen"] for entry in entries] == [64, 640, 1280, 1920], "each worker sees its half"
    student = safetensors.torch.load_file(result.student)
    fresh = fresh_student_of(result.job).state_dict()
    assert all(value.isfinite().all() for value in student.values())
    assert any(not torch.equal(student[name], fresh[name]) for name in fresh)

    again = run(live_recipe(tmp_path))
    assert again.report["content_digest"] == report["content_digest"]
    assert again.report["seconds"] == report["seconds"]
    saved = safetensors.torch.load_file(again.student)
    assert all(torch.equal(saved[name], student[name]) for name in student)
