"""What Ray's autoscaler would start, asked without starting it."""

from __future__ import annotations

from typing import Any

import pytest
from manifests import REPOSITORY, items, load
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from raydfkd.config.load import load_recipe

CLUSTERS = ["launcher.aws.yaml", "launcher.gcp.yaml", "kuberay.cluster.yaml"]
pytestmark = pytest.mark.parametrize("name", CLUSTERS)


def started(name: str, bundle: dict[str, float], count: int, refused: tuple[str, ...] = ()) -> dict[str, int]:
    """Nodes of each group that ``count`` bundles bring up in an empty cluster."""
    config = AutoscalingConfig(autoscaling(name), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle)] * count),
        recoverable_resource_availabilities=dict.fromkeys(refused, 0.0),
    )
    launches = ResourceDemandScheduler().schedule(request).to_launch
    return {launch.instance_type: launch.count for launch in launches}


def autoscaling(name: str) -> dict[str, Any]:
    if name.startswith("launcher"):
        return prepare_config(load(name))
    (cluster,) = items(name)
    cluster["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(cluster)


def test_workers_come_on_spot(name):
    assert started(name, {"CPU": 1, "GPU": 1}, count=3) == {"spot": 3}


def test_workers_come_on_demand_where_spot_was_refused(name):
    assert started(name, {"CPU": 1, "GPU": 1}, count=3, refused=("spot",)) == {"fallback": 3}


def test_workers_beyond_the_spot_maximum_come_on_demand(name):
    most = autoscaling(name)["available_node_types"]["spot"]["max_workers"]

    assert started(name, {"CPU": 1, "GPU": 1}, count=most + 2) == {"spot": most, "fallback": 2}


def test_train_and_synth_resources_choose_their_groups(name):
    assert started(name, {"GPU": 1, "train": 1}, count=2) == {"train": 2}
    assert started(name, {"GPU": 1, "synth": 1}, count=2) == {"spot": 2}


def test_the_job_for_64_spot_machines_gets_them_and_its_students_workers_others(name):
    runtime = load_recipe(REPOSITORY / "jobs/spot-64.yaml").runtime
    worker = {"CPU": runtime.cpus_per_worker, "GPU": runtime.gpus_per_worker, **runtime.resources_per_worker}
    student = {
        "CPU": runtime.cpus_per_student_worker,
        "GPU": runtime.gpus_per_student_worker,
        **runtime.resources_per_student_worker,
    }

    assert started(name, worker, count=runtime.workers.max) == {"spot": 64}
    assert started(name, student, count=runtime.student_workers.max) == {"train": 8}


def test_nothing_runs_where_nothing_is_asked_for_and_nothing_runs_on_the_head(name):
    config = autoscaling(name)

    assert all(group["min_workers"] == 0 for group in config["available_node_types"].values())
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert config["idle_timeout_minutes"] == 5
