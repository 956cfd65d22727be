"""What the engine relies on of names of Ray's that are not public: a release that changes one is seen here first."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import signal
from pathlib import Path

import pytest

import raydfkd
from raydfkd.distributed import ray_internals

SOURCES = sorted(Path(raydfkd.__file__).parent.rglob("*.py"))
PRIVATE = re.compile(r"\bray\.((\w+\.)*_[a-z]\w*|core\.generated)")


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_no_other_module_imports_a_private_name():
    found = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        if path.name != "ray_internals.py"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    ]
    assert found == []


def test_tokens_are_enabled_by_a_call_without_arguments_which_sets_the_variable():
    enable = ray_internals.authentication_token_setup._enable_token_auth
    assert parameters(enable) == []
    assert 'Config.initialize("")' in inspect.getsource(enable)
    assert ray_internals.authentication_token_setup.AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"
    loader = ray_internals.RAYLET.AuthenticationTokenLoader.instance()
    assert loader.has_token(ignore_auth_mode=True) in (True, False)
    loader.reset_cache()


def test_a_head_is_asked_for_its_version():
    assert {field.name for field in ray_internals.PROTOCOL.CheckAliveReply.DESCRIPTOR.fields} >= {"ray_version"}
    assert hasattr(ray_internals.gcs_service_pb2_grpc, "NodeInfoGcsServiceStub")
    assert parameters(ray_internals.grpc_utils.init_grpc_channel)[:2] == ["address", "options"]


def test_record_of_a_head_is_the_text_of_a_file_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_internals.recorded_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.2:6379\n")
    assert ray_internals.recorded_address() == "192.0.2.2:6379"


@pytest.mark.ray
def test_longest_socket_path_is_that_of_a_session(ray_cluster):
    node = ray_internals.worker._global_node
    assert node is not None
    session = Path(node.get_session_dir_path())
    sockets = [str(path.relative_to(session.parent)) for path in session.rglob("*") if path.is_socket()]
    assert sockets
    assert max(len(path) for path in sockets) <= len(ray_internals.SESSION)


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_temporary_folder_that_is_too_long_for_sockets_has_another_instead(tmp_path, monkeypatch, variable):
    other = str(Path("/tmp") / "ray")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp")
    assert ray_internals.short_temp_dir() is None
    monkeypatch.setenv(variable, "/tmp/" + "x" * 60)
    assert ray_internals.short_temp_dir() == other
    with pytest.raises(OSError, match="too long as well"):
        ray_internals.short_temp_dir("/tmp/" + "y" * 60)


def test_rays_handler_of_sigterm_is_set_by_one_function():
    import ray

    source = inspect.getsource(ray.init)
    assert "ray._private.utils.set_sigterm_handler(sigterm_handler)" in source
    assert "signal.signal(" not in source
    before = signal.getsignal(signal.SIGTERM)
    with ray_internals.no_sigterm_handler():
        ray_internals.utils.set_sigterm_handler(signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


def name_if_alive(process) -> str:
    """Name of the process; empty where it has ended since it was listed, as idle workers of Ray's do at any time."""
    try:
        return process.name()
    except ray_internals.psutil.NoSuchProcess:
        return ""


@pytest.mark.ray
def test_cluster_of_this_process_is_known_with_its_processes_and_nodes(ray_cluster):
    import ray

    node = ray_internals.worker._global_node
    assert ray_internals.is_own_cluster()
    assert {kind for kind, _ in node.live_processes()} >= {"raylet", "gcs_server"}
    assert parameters(node.kill_all_processes) == ["check_alive", "allow_graceful", "wait"]
    assert parameters(node.destroy_external_storage) == []
    children = [child for _, process in node.live_processes() for child in ray_internals._children(process.pid)]
    assert any("Agent" in name for name in map(name_if_alive, children)), children
    assert ray_internals.draining_nodes() == {}
    assert ray_internals.free_resources().keys() == {ray.get_runtime_context().get_node_id()}
    answer = ray_internals.ask_head(ray.get_runtime_context().gcs_address, timeout_s=10)
    assert (answer.kind, answer.version) == ("ready", ray.__version__)


@pytest.mark.ray
def test_placement_groups_of_this_job_are_given_back(ray_cluster):
    from ray.util import placement_group, placement_group_table

    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    assert ray_internals.give_back_placement_groups() == 1
    assert placement_group_table(group)["state"] == "REMOVED"
    assert ray_internals.give_back_placement_groups() == 0


def test_packages_are_walked_with_ignored_files_left_out(tmp_path, caplog):
    for name in ("a.py", "b.log", "runs/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text("*.log\n")
    seen: list[Path] = []
    with caplog.at_level(logging.INFO):
        ray_internals.walk_package(tmp_path, ["/runs"], seen.append)
    assert {path.name for path in seen if path.is_file()} == {"a.py", ".gitignore"}


def test_errors_that_train_workers_raised_arrive_as_they_are_and_lost_workers_as_errors_of_rays():
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

    def status(error):
        return WorkerStatus(running=False, error=error, training_report=None)

    own, lost = ValueError("mine"), ray_internals.WorkerHealthCheckFailedError("...", failure=RuntimeError("died"))
    statuses = {0: status(UserExceptionWithTraceback(own, traceback_str="...")), 1: status(lost), 2: status(None)}
    failures = ray_internals.WorkerGroupPollStatus(statuses).get_worker_group_error().worker_failures
    assert failures == {0: own, 1: lost}
    assert issubclass(ray_internals.WorkerHealthCheckTimeoutError, Exception)


def test_names_of_ray_train_have_the_members_that_are_overridden_or_read():
    policy = ray_internals.ElasticScalingPolicy
    assert parameters(policy.make_decision_for_running_worker_group) == [
        "self",
        "worker_group_state",
        "worker_group_status",
    ]
    assert parameters(policy._count_possible_workers) == ["self", "reserved_resources"]
    assert parameters(policy._get_resize_decision) == ["self", "num_workers"]
    for name in ("_get_reserved_resources", "_maybe_send_resource_request", "after_controller_start"):
        assert callable(getattr(policy, name))
    for name in ("on_controller_start_worker_group", "after_controller_state_update", "after_controller_start"):
        assert callable(getattr(ray_internals.ControllerCallback, name))
    assert parameters(ray_internals.DefaultFailurePolicy.make_decision) == ["self", "training_failed_error"]
    assert "_worker_group_failures" in inspect.getsource(ray_internals.DefaultFailurePolicy)
    assert {decision.name for decision in ray_internals.FailureDecision} >= {"RETRY", "RAISE"}
    for state, names in (
        (ray_internals.WorkerGroupState, {"start_time", "num_workers"}),
        (ray_internals.WorkerGroupPollStatus, {"worker_statuses"}),
        (ray_internals.ResizeDecision, {"num_workers", "resources_per_worker"}),
    ):
        have = {field.name for field in dataclasses.fields(state)} | set(dir(state))
        assert names <= have, state
    assert ray_internals.NoopDecision() == ray_internals.NoopDecision()
    assert parameters(ray_internals.ReschedulingState.__init__)[1:] == ["training_failed_error"]
    assert issubclass(ray_internals.WorkerGroupStartupTimeoutError, Exception)
    assert issubclass(ray_internals.CheckpointManagerInitializationError, Exception)
    assert ray_internals.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME.endswith(".json")
