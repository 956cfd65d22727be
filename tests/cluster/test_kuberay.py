from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
from kuberay import ClusterSpec, checked
from manifests import CLUSTER, constrained, filled, items
from pydantic import ValidationError
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

from raydfkd.config.load import load_recipe

FILES = sorted(path.name for path in CLUSTER.glob("kuberay.*.yaml"))
WITH_CLUSTER = ["kuberay.cluster.yaml", "kuberay.job.yaml"]


def cluster_of(name: str) -> ClusterSpec:
    spec = checked(items(name)[0]).spec
    return spec if isinstance(spec, ClusterSpec) else spec.ray_cluster_spec


@pytest.mark.parametrize("name", FILES)
def test_manifest_has_only_fields_that_kuberay_and_kubernetes_know(name):
    for item in items(name):
        checked(item)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("minReplicas:", "minReplica:"),
        ("version: v2", "version: v3"),
        ('"30"', "30"),  # an environment variable is text
        ("max_spot 64", 'max_spot "64"'),
        ("mountPath: /dev/shm", "mountpath: /dev/shm"),
        ("medium: Memory", "medium: memory"),
        ("memory: &memory 28Gi", "memory: &memory 28GB"),
        ("restartPolicy: Never", "restartPolicy: never"),
        ("mode: token", "mode: on"),
        ("{name: runs, mountPath: /runs}", "{name: run, mountPath: /runs}"),
    ],
)
@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_mistake_is_found(name, right, wrong):
    (item,) = items(name, lambda text: text.replace(right, wrong))

    with pytest.raises(ValidationError):
        checked(item)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", FILES)
def test_kubectl_resolves_the_same_values_as_rays_loader(name):
    command = ["kubectl", "annotate", "--local", "--output=json", "--filename=-", "read-by=kubectl"]
    text = filled((CLUSTER / name).read_text())
    read = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=30).stdout

    (item,) = items(name)
    item["metadata"]["annotations"] = {"read-by": "kubectl"}
    assert json.loads(read) == item


def test_job_has_the_cluster_of_the_cluster_file():
    assert items("kuberay.job.yaml")[0]["spec"]["rayClusterSpec"] == items("kuberay.cluster.yaml")[0]["spec"]


def test_entrypoint_is_a_valid_run_on_gpus():
    command, recipe, *options = shlex.split(items("kuberay.job.yaml")[0]["spec"]["entrypoint"])[1:]
    pairs = list(zip(options[::2], options[1::2], strict=True))

    runtime = load_recipe(recipe, [value for key, value in pairs if key == "--set"], dict(pairs)["--run-dir"]).runtime
    assert command == "run"
    assert runtime.gpus_per_worker
    assert runtime.gpus_per_student_worker


@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_cluster_authenticates_and_runs_the_pinned_ray(name):
    cluster = cluster_of(name)

    assert cluster.auth_options.mode == "token"
    assert cluster.ray_version == constrained("ray")
    assert cluster.enable_in_tree_autoscaling


@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_node_may_drain_longer_than_it_takes(name):
    for group in cluster_of(name).worker_group_specs:
        pod = group.template.spec
        drain_s = float(pod.containers[0].variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])

        assert pod.termination_grace_period_seconds > drain_s
        assert drain_s == RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S


@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_every_pod_has_shared_memory_room_to_spill_credentials_and_scraped_metrics(name):
    cluster = cluster_of(name)

    for template in [cluster.head_group_spec.template, *(group.template for group in cluster.worker_group_specs)]:
        pod, (container, *_) = template.spec, template.spec.containers
        shm = pod.volume_at("/dev/shm").empty_dir
        assert shm is not None
        assert shm.medium == "Memory"
        assert pod.volume_at("/runs").persistent_volume_claim is not None
        assert pod.restart_policy == "Never"
        assert "ephemeral-storage" in container.resources.limits
        assert [source.secret_ref.name for source in container.env_from] == ["raydfkd-store"]
        assert template.metadata.annotations["prometheus.io/scrape"] == "true"
        ports = {port.name: str(port.container_port) for port in container.ports}
        assert template.metadata.annotations["prometheus.io/port"] == ports["metrics"]


@pytest.mark.parametrize("name", WITH_CLUSTER)
def test_only_the_spot_group_tolerates_spot_nodes_and_the_head_has_no_gpu(name):
    cluster = cluster_of(name)

    tolerated = {
        group.group_name: {toleration.key for toleration in group.template.spec.tolerations}
        for group in cluster.worker_group_specs
    }
    spot = tolerated.pop("spot")
    (selector,) = next(g for g in cluster.worker_group_specs if g.group_name == "spot").template.spec.node_selector
    assert selector in spot
    assert all(keys == {"nvidia.com/gpu"} for keys in tolerated.values())
    assert "nvidia.com/gpu" not in cluster.head_group_spec.template.spec.containers[0].resources.limits


def test_claim_of_the_runs_is_the_one_that_pods_mount():
    claim = checked(items("kuberay.runs.yaml")[0])
    volume = cluster_of("kuberay.cluster.yaml").head_group_spec.template.spec.volume_at("/runs")

    assert volume.persistent_volume_claim is not None
    assert volume.persistent_volume_claim.claim_name == claim.metadata.name
    assert claim.spec.access_modes == ["ReadWriteMany"]
