"""Peak memory of a worker over many units."""

import subprocess
import sys

import pytest

WORK = """
import resource, sys
import torch
from raydfkd.job import open_job
from raydfkd.config.load import load_recipe
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.worker import SynthesisWorker

recipe = load_recipe("digits-generators", [
    "teacher.options={widths: [4, 8]}", "teacher.weights=random", "teacher.train=null", "real_data=null",
    "synthesis.steps=2", "synthesis.emissions=1", "synthesis.batch_per_class=2", "transfer_set.images_per_class=400",
    "teacher.image_space.size=16", "transfer_set.unit={classes: 10, images_per_class: 2}",
], sys.argv[1])
job = open_job(recipe)
job.transfer_set.create()
worker = SynthesisWorker(job, open_teacher(recipe), device=torch.device("cpu"))
assert len(job.units) == 200
for number, unit in enumerate(job.units, 1):
    worker.run(unit)
    if number in (50, 200):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.cluster
def test_peak_memory_of_a_worker_does_not_grow_from_the_50th_to_the_200th_unit(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    after_50, after_200 = (int(line) for line in result.stdout.split())
    assert after_200 - after_50 < 4096, f"grew by {after_200 - after_50} KiB"
