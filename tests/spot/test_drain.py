from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raydfkd.spot.drain import RayNode, drain_nodes, local_nodes, watch
from raydfkd.spot.notices import Notice, provider_of

NODE = RayNode(id="ab" * 28, gcs_address="10.0.0.1:6379")
INSTANCE_ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class Metadata:
    """A metadata server: paths in ``said`` have an answer, others have none; ``cloud`` says whose manners it has."""

    def __init__(self, cloud: str, **said: str) -> None:
        self.cloud = cloud
        self.said: dict[str, str] = {MAINTENANCE: "NONE", PREEMPTED: "FALSE"} if cloud == "gcp" else {}
        self.tokens: list[str] = []
        self.asked: list[str] = []
        self.changed = threading.Event()
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                if metadata.cloud != "aws" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
                    return self.say(405)
                metadata.tokens.append(f"token-{len(metadata.tokens)}")
                return self.say(200, metadata.tokens[-1])

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                metadata.asked.append(self.path)
                if metadata.cloud == "broken":
                    return self.say(200, "not what it should be")
                if metadata.cloud == "aws" and self.headers.get("X-aws-ec2-metadata-token") not in metadata.tokens[-1:]:
                    return self.say(401)
                if metadata.cloud == "gcp" and self.headers.get("Metadata-Flavor") != "Google":
                    return self.say(403)
                if "wait_for_change=true" in query and f"last_etag=e{metadata.said.get(path)}" in query:
                    metadata.changed.wait(float(query.split("timeout_sec=")[1].split("&")[0]))
                return self.say(200 if path in metadata.said else 404, metadata.said.get(path, ""))

            def say(self, status: int, text: str = "") -> None:
                self.send_response(status)
                self.send_header("ETag", f"e{text}")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.changed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def metadata() -> Iterator[Any]:
    """Starts metadata servers."""
    servers: list[Metadata] = []

    def start(cloud: str) -> Metadata:
        servers.append(Metadata(cloud))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


# What clouds say


def test_aws_without_a_notice_says_nothing_and_one_token_serves_many_looks(metadata):
    aws = metadata("aws")
    cloud = provider_of("aws", aws.url)
    assert [cloud.notice(0) for _ in range(3)] == [None, None, None]
    assert aws.tokens == ["token-0"]
    assert aws.asked == [INSTANCE_ACTION] * 3


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_notice_leaves_what_its_time_leaves(metadata, action):
    aws = metadata("aws")
    aws.said[INSTANCE_ACTION] = json.dumps({"action": action, "time": in_seconds(90)})
    notice = provider_of("aws", aws.url).notice(0)
    assert notice is not None
    assert notice.reason == f"aws spot/instance-action: {action}"
    assert 87 <= notice.seconds <= 90


@pytest.mark.parametrize(("ahead", "seconds"), [(-30, 0), (4000, 120)])
def test_aws_notice_leaves_between_nothing_and_two_minutes(metadata, ahead, seconds):
    aws = metadata("aws")
    aws.said[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": in_seconds(ahead)})
    assert provider_of("aws", aws.url).notice(0).seconds == seconds


def test_token_that_has_expired_is_renewed(metadata):
    aws = metadata("aws")
    cloud = provider_of("aws", aws.url)
    cloud.notice(0)
    aws.tokens.append("of somebody else")
    assert cloud.notice(0) is None
    assert aws.tokens[-1] == "token-2"


def test_rebalance_recommendation_counts_only_where_it_is_wanted(metadata):
    aws = metadata("aws")
    aws.said[REBALANCE] = json.dumps({"noticeTime": in_seconds(0)})
    assert provider_of("aws", aws.url).notice(0) is None
    notice = provider_of("aws", aws.url, rebalance=True).notice(0)
    assert notice == Notice(reason="aws events/recommendations/rebalance: rebalance", seconds=120)


@pytest.mark.parametrize("said", ["[]", "not json", '{"time": 3}', '{"time": "soon"}', "7"])
def test_aws_notice_that_cannot_be_read_is_a_failure_and_no_notice(metadata, said):
    aws = metadata("aws")
    aws.said[INSTANCE_ACTION] = said
    with pytest.raises((OSError, ValueError)):
        provider_of("aws", aws.url).notice(0)


def test_gcp_says_nothing_of_a_machine_that_stays_or_is_moved(metadata):
    gcp = metadata("gcp")
    cloud = provider_of("gcp", gcp.url)
    assert cloud.notice(0.1) is None
    gcp.said[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert cloud.notice(0.1) is None


@pytest.mark.parametrize(
    ("path", "said", "notice"),
    [
        (PREEMPTED, "TRUE", Notice(reason="gcp preempted", seconds=30)),
        (
            MAINTENANCE,
            "TERMINATE_ON_HOST_MAINTENANCE",
            Notice(reason="gcp maintenance-event: TERMINATE_ON_HOST_MAINTENANCE", seconds=60),
        ),
    ],
)
def test_gcp_notice(metadata, path, said, notice):
    gcp = metadata("gcp")
    gcp.said[path] = said
    assert provider_of("gcp", gcp.url).notice(0.1) == notice


def test_gcp_is_heard_the_moment_it_speaks(metadata):
    gcp = metadata("gcp")
    cloud = provider_of("gcp", gcp.url)
    cloud.notice(30)

    def preempt() -> None:
        gcp.said[PREEMPTED] = "TRUE"
        gcp.changed.set()

    threading.Timer(0.3, preempt).start()
    began = time.monotonic()
    assert cloud.notice(30) is not None
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("cloud", "path"), [("aws", INSTANCE_ACTION), ("gcp", PREEMPTED)])
def test_cloud_is_found_by_its_manners(metadata, cloud, path):
    server = metadata(cloud)
    found = provider_of("auto", server.url)
    assert found.name == "gcp or aws"
    assert found.notice(0.1) is None
    assert found.name == cloud
    server.said[path] = json.dumps({"action": "stop", "time": in_seconds(60)}) if cloud == "aws" else "TRUE"
    assert found.notice(0.1) is not None


def test_machine_of_neither_cloud_is_a_failure(metadata):
    with pytest.raises(OSError, match=r"."):
        provider_of("auto", metadata("neither").url).notice(0)


def test_proxy_is_not_asked(metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert provider_of("aws", metadata("aws").url).notice(0) is None


# Watching


class Script:
    """A cloud that says one thing after the other."""

    name = "test"

    def __init__(self, *said: Notice | Exception | None) -> None:
        self.said = list(said)

    def notice(self, wait_s: float) -> Notice | None:
        next_one = self.said.pop(0)
        if isinstance(next_one, Exception):
            raise next_one
        return next_one


class Clock:
    """Time that epochs by sleeping."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


GOING = Notice(reason="test", seconds=120)


def watched(cloud: Script, *accepted: bool) -> tuple[bool, list[Notice]]:
    clock, drained, answers = Clock(), [], list(accepted)

    def drain(notice: Notice) -> bool:
        drained.append(notice)
        return answers.pop(0) if answers else False

    return watch(cloud, drain, every_s=3, sleep=clock.sleep, clock=clock), drained


def test_nothing_is_drained_before_the_notice_and_once_after_it():
    cloud = Script(None, None, GOING, GOING)
    assert watched(cloud, True) == (True, [GOING])
    assert cloud.said == [GOING], "the second time nobody asks"


def test_metadata_that_fails_is_asked_again_and_that_is_said_once(caplog):
    failures = [OSError("refused"), ValueError("no json")] * 10
    assert watched(Script(*failures, None, GOING), True) == (True, [GOING])
    assert [record.message for record in caplog.records] == [
        "no notices can be read from test (refused); going on asking",
        "test answers again",
    ]


def test_drain_that_is_not_accepted_is_repeated_with_less_time_until_it_is():
    is_drained, drained = watched(Script(GOING), False, False, True)
    assert is_drained
    assert [notice.seconds for notice in drained] == [120, 119, 118]


def test_drain_that_is_never_accepted_ends_with_the_machine():
    is_drained, drained = watched(Script(GOING))
    assert not is_drained
    assert (drained[0].seconds, drained[-1].seconds, len(drained)) == (120, 0, 121)


# Draining


@pytest.fixture
def ray(tmp_path):
    """A command in place of `ray`, which writes down how it is called and fails while there is a file ``fail``."""
    script = tmp_path / "ray.py"
    script.write_text(
        "import pathlib, sys\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "with open(place / 'calls', 'a') as calls: calls.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "if (place / 'fail').exists(): sys.exit('Traceback\\nthe head is away')\n"
    )
    return [sys.executable, str(script)]


def test_every_node_of_the_machine_is_drained_with_one_line(ray, tmp_path, caplog):
    caplog.set_level(logging.INFO, "raydfkd")
    other = RayNode(id="cd" * 28, gcs_address="10.0.0.1:6379")
    assert drain_nodes(GOING, lambda: [NODE, other], ray)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"drain-node --address 10.0.0.1:6379 --node-id {node.id} --reason DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message test --deadline-remaining-seconds 120"
        for node in (NODE, other)
    ]
    assert [record.message for record in caplog.records] == [
        f"test: node {node.id} drains, 120 s are left" for node in (NODE, other)
    ]


def test_drain_that_fails_says_why(ray, tmp_path, caplog):
    (tmp_path / "fail").touch()
    assert not drain_nodes(GOING, lambda: [NODE], ray)
    assert caplog.records[0].message == f"node {NODE.id} could not be drained: the head is away"


def test_machine_without_a_node_is_not_drained(ray, tmp_path, caplog):
    assert not drain_nodes(GOING, list, ray)
    assert "no Ray node runs on this machine yet" in caplog.text
    assert not (tmp_path / "calls").exists()


def test_nodes_are_found_by_the_flags_of_their_raylets(tmp_path):
    raylet = ["/x/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/s", "--node_id=ab", "--gcs-address=h:1"]
    processes = {
        "10": raylet,
        "11": [*raylet[:2], "--node_id=cd", "--gcs-address=h:2"],
        "12": ["python", "agent.py", "--node_id=ab", "--gcs-address=h:1"],
        "13": ["raylet"],
        "14": [""],
        "self": raylet,
    }
    for pid, arguments in processes.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes("\0".join([*arguments, ""]).encode())
    (tmp_path / "15").mkdir()
    found = {node.id: node.gcs_address for node in local_nodes(processes=tmp_path)}
    assert found == {"ab": "h:1", "cd": "h:2"}
    assert [node.id for node in local_nodes(["cd"], tmp_path)] == ["cd"]


# The command


def start(url: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from raydfkd.cli import main; main()", "node-watch", "--every", "0.2"]
    return subprocess.Popen(
        [*command, "--metadata-url", url, *args], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_command_survives_silence_and_ends_quietly_when_it_is_told_to(metadata):
    server = metadata("neither")
    process = start(server.url)
    while len(server.asked) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    memory = Path(f"/proc/{process.pid}/status").read_text()
    resident_kb = int(next(line.split()[1] for line in memory.splitlines() if line.startswith("VmRSS")))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(said.splitlines()) == 1
    assert "no notices can be read from gcp or aws" in said
    assert resident_kb < 80_000, "one process a machine must not cost what torch or Ray cost"


def test_unknown_provider_is_one_line():
    process = start("http://127.0.0.1:1", "--provider", "awz")
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (
        2,
        "Invalid value for '--provider': 'awz' is not one of 'auto', 'aws', 'gcp'.\n",
    )


CLUSTER = """
import json, sys, time
from ray.cluster_utils import Cluster
import ray
from ray._private.state import state
cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1, resources={"synth": 1})
cluster.wait_for_nodes()

@ray.remote(num_cpus=0, resources={"synth": 1})
class Worker:
    def ready(self):
        pass

worker = Worker.remote()  # a node without work would be gone the moment it drains
ray.get(worker.ready.remote())
print(json.dumps({"going": node.node_id, "address": cluster.address}), flush=True)
while sys.stdin.readline():
    print(json.dumps(state.get_draining_nodes()), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.cluster
def test_notice_drains_the_real_node(metadata, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "HOME": str(tmp_path)}
    server = metadata("aws")
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **token},
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None

    def draining() -> dict[str, int]:
        cluster.stdin.write("?\n")
        cluster.stdin.flush()
        return dict(answer())

    def answer() -> Any:
        for line in cluster.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the cluster has ended")

    try:
        going = answer()["going"]
        process = start(server.url, "--provider", "aws", "--node-id", going, **token)
        assert draining() == {}
        server.said[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": in_seconds(100)})
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert f"node {going} drains" in said.splitlines()[-1]
        (node,) = draining().items()
        assert node[0] == going
        assert 0 < node[1] / 1000 - time.time() <= 100
    finally:
        cluster.stdin.close()
        cluster.wait(timeout=60)
