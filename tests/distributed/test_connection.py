"""Which cluster a driver joins, what it says where none answers, and how one of its own ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import COMMAND, Head, started_head
from small import small_recipe

from raydfkd.errors import RecipeError

NOBODY = "192.0.2.1:6379"
"""An address for documentation, where no machine is."""
AT_ONCE_S = 12.0
STOPS_WITHIN_S = 15.0
"""10 s for what is in work, and what Ray takes to end."""


def recipe_file(folder: Path, *overrides: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(small_recipe(folder / "run", *overrides).model_dump(mode="json")))
    return path


SHORT = (
    "transfer_set.images_per_class=4",
    "synthesis.steps=4",
    "runtime={workers: {min: 1, max: 1}, cpus_per_worker: 0.5}",
)


# Addresses


@pytest.fixture
def said(tmp_path, monkeypatch) -> list[str]:
    """What people were told; no cluster is on record and none named, and nobody waits long for one."""
    from raydfkd.distributed import connection

    monkeypatch.setattr(connection, "ANSWER_S", 0.5)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return []


def joined(address: str, said: list[str]) -> str | None:
    from raydfkd.distributed.connection import _cluster_to_join

    return _cluster_to_join(address, lambda topic, text: said.append(text))


def record(folder: Path, address: str) -> None:
    (folder / "ray" / "ray_current_cluster").write_text(address)


def test_without_a_name_or_a_record_a_cluster_is_started_here(said):
    assert joined("auto", said) is None
    assert joined("local", said) is None
    assert said == []


@pytest.mark.parametrize("address", [NOBODY, "127.0.0.1:1", "no.such.host.invalid:6379"])
def test_record_of_a_cluster_that_is_gone_is_passed_over_at_once_and_said(said, tmp_path, address):
    record(tmp_path, address)
    began = time.monotonic()
    assert joined("auto", said) is None
    assert time.monotonic() - began < AT_ONCE_S
    assert said == [f"the cluster on record at {address} does not answer; one is started here for this run"]


@pytest.mark.parametrize("is_named_in", ["recipe", "environment"])
@pytest.mark.parametrize("address", [NOBODY, "127.0.0.1:1", "no.such.host.invalid:6379"])
def test_named_cluster_that_does_not_answer_is_one_line_at_once(said, monkeypatch, is_named_in, address):
    named = f"runtime.address is '{address}'"
    if is_named_in == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
        named = f"RAY_ADDRESS is '{address}'"
    began = time.monotonic()
    with pytest.raises(RecipeError, match="no Ray cluster answers there") as error:
        joined("auto" if is_named_in == "environment" else address, said)
    assert time.monotonic() - began < AT_ONCE_S
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)


def test_program_that_listens_and_is_no_head_is_not_waited_for(said):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        began = time.monotonic()
        with pytest.raises(RecipeError, match="no Ray cluster answers there"):
            joined(f"127.0.0.1:{other.getsockname()[1]}", said)
        assert time.monotonic() - began < AT_ONCE_S


@pytest.mark.parametrize("address", ["head", "http://head:8265", "ray://head:10001", "head:", ":6379", "head:port"])
def test_address_that_no_driver_can_join_says_what_one_is(said, monkeypatch, address):
    with pytest.raises(RecipeError, match=r"give HOST:PORT of its head, such as head:6379"):
        joined(address, said)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RecipeError, match=r"^RAY_ADDRESS is "):
        joined("auto", said)


# Heads that are there


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.parametrize(
    "way", ["record", *(pytest.param(way, marks=pytest.mark.cluster) for way in ("runtime.address", "RAY_ADDRESS"))]
)
def test_head_that_asks_for_the_token_in_home_is_joined_without_a_word_about_it(head, tmp_path, way):
    recipe = recipe_file(tmp_path, *SHORT)
    args = ["--set", f"runtime.address={head.address}"] if way == "runtime.address" else []
    environment = {"RAY_ADDRESS": head.address} if way == "RAY_ADDRESS" else {}
    if way != "record":
        environment["RAY_TMPDIR"] = str(tmp_path)  # where nothing is on record
    done = head.raydfkd("synthesize", str(recipe), *args, folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "4 CPUs" in done.stdout, "this machine's own are not joined"
    assert "oken" not in done.stdout + done.stderr


@pytest.mark.cluster
@pytest.mark.ray
def test_wrong_token_is_one_line(head, tmp_path):
    recipe = recipe_file(tmp_path, *SHORT)
    args = ("synthesize", str(recipe), "--set", f"runtime.address={head.address}")
    done = head.raydfkd(*args, folder=tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2
    assert done.stderr == (
        f"runtime.address is '{head.address}': that cluster wants another token; put its into RAY_AUTH_TOKEN or "
        "~/.ray/auth_token (`ray get-auth-token` on its head prints it)\n"
    )


@pytest.mark.cluster
@pytest.mark.ray
def test_jobs_of_a_head_are_listed_with_the_token_in_home(head, tmp_path):
    done = head.raydfkd("status", "--address", head.dashboard, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no jobs\n", "")


@pytest.mark.cluster
def test_head_without_tokens_is_joined_by_somebody_who_has_one(tmp_path):
    (tmp_path / "home").mkdir()
    with started_head(tmp_path / "home", RAY_AUTH_MODE="disabled") as head:
        recipe = recipe_file(tmp_path, *SHORT)
        done = head.raydfkd("run", str(recipe), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "4 CPUs" in done.stdout


@pytest.mark.cluster
def test_head_that_is_killed_under_a_run_is_said_before_ray_ends_the_driver(tmp_path):
    (tmp_path / "home").mkdir()
    recipe = recipe_file(tmp_path, "synthesis.steps=1000000", "runtime.workers.max=1")
    with started_head(tmp_path / "home") as head, (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(
            [*COMMAND, "synthesize", str(recipe)], env=head.environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: "starting" in (tmp_path / "out").read_text(), driver)
            port = head.address.rpartition(":")[2]
            [server] = with_argument(f"--gcs_server_port={port}")
            os.kill(server, signal.SIGKILL)
            assert driver.wait(120) == 1
        finally:
            driver.kill()
            driver.wait()
    said = (tmp_path / "out").read_text()
    assert "does not answer; unless it does within a minute Ray ends this process" in said
    assert "the same command goes on from there" in said


# A cluster of its own


def with_argument(argument: str) -> list[int]:
    """Ids of processes that have it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if argument.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def marked(mark: str) -> dict[int, str]:
    """Ids and names of living processes that have ``mark`` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                name = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
                found[int(process.name)] = name
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def wait_for(condition, process: subprocess.Popen, within_s: float = 120) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        assert process.poll() is None, "it ended"
        time.sleep(0.2)


@pytest.fixture
def alone(tmp_path) -> dict[str, str]:
    """An environment in which no cluster is to be found; also the mark of all processes that begin in it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    (tmp_path / "home").mkdir()
    (tmp_path / "ray").mkdir()
    return {**environment, "HOME": str(tmp_path / "home"), "RAYDFKD_TEST": str(tmp_path)}


@pytest.mark.cluster
@pytest.mark.parametrize("reach", ["group", "every process"])
def test_sigterm_to_all_of_a_run_saves_what_is_in_work_and_leaves_nothing_of_ray(alone, tmp_path, reach):
    """As `timeout` sends it to the process group, and `scancel` and systemd to whatever a job has started."""
    recipe = recipe_file(
        tmp_path,
        "synthesis.steps=1000000",
        "transfer_set.unit={classes: 10, images_per_class: 24}",
        "runtime.checkpoint_every=100000000",
        "runtime.workers.max=1",
    )
    environment = {**alone, "RAY_TMPDIR": f"/tmp/{os.getpid()}"}
    command = [sys.executable, "-m", "raydfkd", "run", str(recipe), "--on", "ray"]
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
        )
    started: dict[int, str] = {}
    try:
        wait_for(lambda: "1 running   step" in (tmp_path / "out").read_text(), run)
        time.sleep(2)
        started = marked(str(tmp_path))
        began = time.monotonic()
        if reach == "group":
            os.killpg(run.pid, signal.SIGTERM)
        else:
            for process in started:
                os.kill(process, signal.SIGTERM)
        assert run.wait(60) == 130, (tmp_path / "out").read_text()
        if reach == "every process":  # on a machine that has nothing else to do; elsewhere the outcome has to hold
            assert time.monotonic() - began < STOPS_WITHIN_S
        left = marked(str(tmp_path))
        until = time.monotonic() + 5
        while left and time.monotonic() < until:
            time.sleep(0.2)
            left = marked(str(tmp_path))
        assert left == {}
    finally:
        for process in marked(str(tmp_path)):
            os.kill(process, signal.SIGKILL)
    said = (tmp_path / "out").read_text()
    assert "stopping within 10 s" in said
    assert said.splitlines()[-1] == "interrupted; what was committed stays, and the same command goes on from there"
    assert "Traceback" not in said
    assert len(list((tmp_path / "run/transfer_set/resume").glob("*.pt"))) == 1


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.parametrize("remedy", [False, True])
def test_long_temporary_folder_does_not_stop_a_cluster_of_its_own(alone, tmp_path, remedy):
    recipe = recipe_file(tmp_path, *SHORT)
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    began = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "synthesize", str(recipe)],
        env={**alone, "TMPDIR": str(folder), **({"RAY_TMPDIR": f"/tmp/{os.getpid()}"} if remedy else {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - began < 45, "Ray waits a minute for a dashboard that cannot start"
    said = "the temporary folder is too long a path for Ray's sockets, so they are in /tmp/ray"
    assert (said in done.stdout) == (not remedy)


@pytest.mark.cluster
@pytest.mark.ray
def test_sigterm_is_heard_after_connecting_by_who_listened_before(alone, tmp_path):
    """`ray.init` would put a handler of its own in place."""
    script = """
import os, signal, threading
from raydfkd.distributed.connection import connected

told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
with connected("local", print):
    assert told == [signal.SIGTERM], told
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM] * 2, told
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**alone, "RAY_TMPDIR": f"/tmp/{os.getpid()}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.endswith("done\n"), done.stderr
