"""The jobs for GPUs on a cluster as those of ``cluster/``: a head without a GPU, and workers whose nodes have them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Head, free_port, started_head

JOBS = Path(__file__).parents[2] / "jobs"
NODES = {
    "one-gpu": [{"gpus": 1, "resources": {}}],
    "eight-gpus": [{"gpus": 3, "resources": {}}],
    "spot-64": [{"gpus": 1, "resources": {"synth": 1}}, {"gpus": 1, "resources": {"train": 1}}],
}
"""The GPUs are Ray's to reserve; there is none, and CUDA is not there."""
TOY = (
    "teacher.weights=random",
    "teacher.network=convnet",
    "teacher.options={widths: [4, 8]}",
    "teacher.classes=4",
    "teacher.image_space={channels: 1, size: 8, mean: [0.4], std: [0.3]}",
    "student.network=convnet",
    "student.options={widths: [4]}",
    "synthesis.batch_size=4",
    "synthesis.stages=[{steps: 3}]",
    "synthesis.warmup=1",
    "synthesis.augment=[]",
    "transfer_set.images_per_class=4",
    "transfer_set.unit={classes: 4, images_per_class: 2}",
    "distill.steps=6",
    "distill.batch_size=8",
    "distill.augment=[]",
    "distill.source={kind: growing, wait_for: 8}",
    "runtime.cpus_per_worker=1",
    "runtime.cpus_per_student_worker=1",
)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("home"), num_cpus=1, num_gpus=0) as started:
        while submit(started, "status").returncode:
            assert started.process.poll() is None, "the head has ended"
            time.sleep(1)
        yield started


def submit(head: Head, *args: str) -> subprocess.CompletedProcess[str]:
    return head.raydfkd(*args, folder=JOBS, RAY_API_SERVER_ADDRESS=head.dashboard)


@contextlib.contextmanager
def joined(head: Head, *, gpus: int, resources: dict[str, int]) -> Iterator[None]:
    """A node of two CPUs with GPUs by name only."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={head.address}"]
    command += ["--num-cpus=2", f"--num-gpus={gpus}", f"--resources={json.dumps(resources)}"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    environment = {**head.environment, "RAY_AUTH_MODE": "token"}
    node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert node.stdout is not None
        assert any("Ray runtime started" in line for line in node.stdout), "the node has ended"
        yield
    finally:
        node.terminate()
        node.wait(timeout=60)


@pytest.mark.cluster
@pytest.mark.parametrize("name", NODES)
def test_job_for_gpus_is_driven_by_a_head_without_one(head, tmp_path, name):
    run_dir = tmp_path / "run"
    toy = [part for setting in (*TOY, f"transfer_set.uri={tmp_path}/set") for part in ("--set", setting)]
    job = ("submit", f"{name}.yaml", "--run-dir", str(run_dir), *toy, "--json")
    with contextlib.ExitStack() as nodes:
        for node in NODES[name]:
            nodes.enter_context(joined(head, **node))
        as_it_is = submit(head, *job)
        assert as_it_is.returncode == 2
        said = [line for line in as_it_is.stderr.splitlines() if "no CUDA device" in line]
        assert said, as_it_is.stderr
        assert "plan " in as_it_is.stderr, "the head has checked the recipe, opened the teacher and begun"
        assert not (run_dir / "report.json").exists()
        done = submit(head, *job, "--set", "runtime.device=cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["units"]["committed"] == report["units"]["planned"] == 2
    assert report["device"].endswith(" CPU")
    assert (run_dir / "student.safetensors").is_file()
