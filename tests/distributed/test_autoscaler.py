"""A cluster that starts at no workers, grows for a run and shrinks after it: Ray's autoscaler with fake machines.

Run by make test-cluster. Ray's fake machines look for their head at port 6379, so nothing else may be there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
import yaml
from clusters import COMMAND, processes

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[2] / "jobs" / "chaos.yaml"
PATIENCE_S = 180.0
CONFIG = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": "FAKE_HEAD_NODE_ID",
    },
    "auth": {},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "synth": {"resources": {"CPU": 1, "synth": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
NUM_NODES = """
import ray
ray.init(address="auto", log_to_driver=False)
print("nodes", sum(node["Alive"] for node in ray.nodes()), flush=True)
"""


@pytest.fixture
def head():
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("something listens at port 6379")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    config = Path(folder) / "autoscaler.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    environment = {
        **os.environ,
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAYDFKD_TEST": uuid.uuid4().hex,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": "FAKE_HEAD_NODE_ID",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "FAKE_HEAD_NODE_ID",
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["start", "--head", "--block", "--port", "6379", "--num-cpus", "1", "--include-dashboard", "false"]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), *command, "--autoscaling-config", str(config)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        drivers = {key: value for key, value in environment.items() if not key.startswith("RAY_OVERRIDE")}
        drivers.pop("RAY_CLOUD_INSTANCE_ID")
        yield {**drivers, "RAY_ADDRESS": "127.0.0.1:6379"}
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for left in processes(environment, b""):  # fake machines outlive their head
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def num_nodes(environment):
    found = subprocess.run(
        [sys.executable, "-c", NUM_NODES], env=environment, capture_output=True, text=True, check=False
    )
    counts = [int(line.split()[1]) for line in found.stdout.splitlines() if line.startswith("nodes ")]
    return counts[0] if counts else None


def wait_for(environment, wanted):
    deadline = time.monotonic() + PATIENCE_S
    while (found := num_nodes(environment)) != wanted:
        assert time.monotonic() < deadline, f"{found} nodes instead of {wanted} after {PATIENCE_S:.0f} s"
        time.sleep(1)


def test_machines_come_for_the_run_and_go_after_it(head, tmp_path):
    wait_for(head, 1)
    command = [*COMMAND, "synthesize", str(JOB), "--run-dir", str(tmp_path), "--set", "synthesis.steps=100"]
    command += ["--set", "transfer_set.images_per_class=100", "--set", "runtime.workers={min: 0, max: 2}"]
    command += ["--set", "runtime.resources_per_worker={synth: 1}"]
    began = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=head, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(head, 3)
        grown = time.monotonic() - began
        assert driver.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        driver.kill()
    done = time.monotonic()
    wait_for(head, 1)
    shrunk = time.monotonic() - done
    print(f"\nautoscaler: two machines {grown:.0f} s after the command, none {shrunk:.0f} s after its end")  # noqa: T201
    assert "units 50 done" in (tmp_path / "log").read_text()
