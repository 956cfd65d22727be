"""A run as a job of another cluster: against a fake job server, and once against a real head with its dashboard."""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from clusters import Head, started_head
from ray.exceptions import AuthenticationError

from raydfkd.cli import main
from raydfkd.distributed.ray_internals import walk_package
from raydfkd.distributed.submit import job_server as submission
from raydfkd.distributed.submit.job_server import JobServer, report_in
from raydfkd.distributed.submit.working_dir import package_of

REPOSITORY = Path(__file__).parents[2]
ADDRESS = "http://head:8265"
REPORT = {
    "teacher": {"top1": 0.99},
    "student": {"top1": 0.97},
    "agreement": 0.98,
    "judged_on": "real digits test images",
    "judged_images": 540,
    "recipe_digest": "ab",
    "recipe": {"name": "smoke"},
}
LOG = ["Running entrypoint", "synthesis 40/40 images", json.dumps(REPORT), "1 of 2 units are done"]


@dataclass
class FakeClient:
    """A cluster that has at most one job, which ends as ``status`` with ``exit_code`` once it is followed."""

    status: str = "SUCCEEDED"
    exit_code: int | None = 0
    lines: list[str] = field(default_factory=lambda: list(LOG))
    message: str = ""
    error: Exception | None = None
    breaks: list[int] = field(default_factory=list)
    """Chunks after which one connection after the other is lost."""
    interrupted: bool = False
    not_ready: int = 0
    """Times that it refuses a job because it has only just begun."""
    submitted: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    has_ended: bool = False

    def submit_job(self, **job: Any) -> str:
        if self.error is not None:
            raise self.error
        if self.not_ready:
            self.not_ready -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, please try ...")
        self.submitted = job
        return str(job["submission_id"])

    def get_job_info(self, job_id: str) -> Any:
        if self.error is not None:
            raise self.error
        if job_id != self.submitted.get("submission_id", "j1"):
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        ended = self.has_ended or self.stopped
        return SimpleNamespace(
            submission_id=job_id,
            job_id="01000000",
            status="STOPPED" if self.stopped else self.status if ended else "RUNNING",
            metadata={"recipe": "smoke", "run_dir": "/runs/smoke"},
            start_time=1_000_000,
            end_time=1_090_000 if ended else None,
            driver_exit_code=self.exit_code if ended else None,
            message=self.message,
            runtime_env=self.submitted.get("runtime_env"),
        )

    def list_jobs(self) -> list[Any]:
        driver = SimpleNamespace(submission_id=None)
        return [driver, self.get_job_info(self.submitted.get("submission_id", "j1"))]

    def get_job_logs(self, job_id: str) -> str:
        self.get_job_info(job_id)
        return "\n".join(self.lines) + "\n"

    async def tail_job_logs(self, job_id: str) -> Any:
        if self.interrupted:
            raise KeyboardInterrupt
        text = self.get_job_logs(job_id)
        chunks = [text[start : start + 7] for start in range(0, len(text), 7)]  # lines come in pieces
        if self.breaks:
            chunks = chunks[: self.breaks.pop(0)]
            for chunk in chunks:
                yield chunk
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        for chunk in chunks:
            yield chunk
        self.has_ended = True

    def stop_job(self, job_id: str) -> bool:
        self.stopped = True
        return True


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command left in the terminal."""

    code: int
    out: str
    err: str


def raydfkd(*args: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["raydfkd", *args])
        with pytest.raises(SystemExit) as stop:
            main()
    assert isinstance(stop.value.code, int)
    return Answer(code=stop.value.code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def client(monkeypatch):
    fake = FakeClient()
    server = JobServer(fake, ADDRESS, sleep=lambda _: None)
    monkeypatch.setattr(submission, "connect", lambda address: server)
    return fake


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a recipe and things that are not sent."""
    (tmp_path / "mine.yaml").write_text("recipe: digits-generators\nname: mine\n")
    (tmp_path / "mynet.py").write_text("")
    (tmp_path / ".gitignore").write_text("data/\n")
    for place in ("data", "runs/x", ".git", ".venv", "__pycache__"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "file").write_text("x" * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN_DIR = ("--run-dir", "/runs/mine")


def submit(*args: str) -> Answer:
    return raydfkd("submit", "mine.yaml", *RUN_DIR, "--address", ADDRESS, *args)


# Submitting


def test_submitted_job_runs_the_recipe_in_the_folder_that_was_sent(folder, client):
    answer = submit("--set", "seed=1", "--set", "distill.augment=[flip]", "--name", "first")
    assert answer.code == 0, answer.err
    assert client.submitted["entrypoint"] == (
        "raydfkd run mine.yaml --json --run-dir /runs/mine --set seed=1 --set 'distill.augment=[flip]'"
    )
    assert client.submitted["submission_id"] == "first"
    assert client.submitted["runtime_env"]["working_dir"] == "."
    assert client.submitted["metadata"] == {"recipe": "mine", "run_dir": "/runs/mine"}


@pytest.mark.parametrize("name", ["digits-generators", "smoke"])
def test_packaged_recipe_or_job_is_submitted_by_name(folder, client, name):
    assert raydfkd("submit", name, *RUN_DIR, "--address", ADDRESS).code == 0
    assert client.submitted["entrypoint"].startswith(f"raydfkd run {name} ")
    assert client.submitted["submission_id"].startswith(f"{name}-2")


def test_recipe_in_another_working_folder_is_called_from_there(folder, client, monkeypatch):
    monkeypatch.chdir(folder.parent)
    answer = raydfkd("submit", f"{folder.name}/mine.yaml", *RUN_DIR, "--working-dir", folder.name)
    assert answer.code == 0, answer.err
    assert client.submitted["entrypoint"].startswith("raydfkd run mine.yaml ")


def test_only_what_a_job_needs_is_sent_and_its_size_is_said(folder, client):
    assert package_of(folder).files == {"mine.yaml", "mynet.py", ".gitignore"}
    assert f"sending {folder}: 3 files, 0.0 MiB\n" in submit().out


CREDENTIALS = (
    *("store.env", ".env", ".env.local", ".aws/credentials", ".ssh/id_rsa", "deep/er/.ssh/known_hosts", "id_ed25519"),
    *("secret.pem", "my-credentials.json", "Credentials.csv", "token.json", "keys/gcs.key", ".netrc", ".kube/config"),
    "service-account.json",
)


def test_files_with_credentials_are_not_sent_and_named_in_a_line(folder, client):
    for name in CREDENTIALS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hidden")
    package = package_of(folder)
    assert package.files == {"mine.yaml", "mynet.py", ".gitignore"}
    assert package.withheld == tuple(sorted(CREDENTIALS))
    answer = submit()
    assert answer.code == 0
    assert (
        "not sent, as it may hold credentials: .aws/credentials, .env, .env.local, .kube/config, .netrc and 10 more\n"
    ) in answer.out
    sent = client.submitted["runtime_env"]
    found = []
    walk_package(folder, sent["excludes"], lambda path: found.append(path.name) if path.is_file() else None)
    assert sorted(found) == [".gitignore", "mine.yaml", "mynet.py"]


def test_needed_file_that_is_called_like_credentials_is_refused_by_name(folder, client):
    (folder / "token.json").write_text("weights")
    answer = submit("--set", "teacher.weights=token.json", "--set", "teacher.train=null")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("token.json is not sent with the job: it is called as files with credentials are; ")


def test_weights_of_the_verifier_are_sent(folder, client):
    (folder / "other.pt").write_bytes(b"weights")
    space = "image_space: {channels: 1, size: 8, mean: [0.5], std: [0.5]}"
    answer = submit("--set", f"verifier={{network: lenet5, classes: 10, weights: other.pt, {space}}}")
    assert answer.code == 0, answer.err
    assert "other.pt" in package_of(folder).files


def test_folder_of_pictures_in_the_working_directory_is_sent_and_one_that_is_not_there_is_refused(folder, client):
    (folder / "pictures").mkdir()
    (folder / "pictures/1.png").write_bytes(b"picture")
    assert submit("--set", "synthesis.statistics=pictures/").code == 0
    assert "pictures/1.png" in package_of(folder).files
    for place in ("picture", "data", "../pictures"):
        answer = submit("--set", f"synthesis.statistics={place}")
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"{place} is not sent with the job: it is not in --working-dir")


def test_credentials_that_git_ignores_are_no_news(folder, client):
    (folder / "data/store.env").write_text("hidden")
    assert package_of(folder).withheld == ()
    assert "may hold credentials" not in submit().out


def test_job_is_granted_time_to_save_and_gets_no_variable_that_is_not_named(folder, client, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    assert submit().code == 0
    assert client.submitted["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


def test_named_variable_is_sent_and_never_printed(folder, client, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    answers = [
        submit("--env", "AWS_SECRET_ACCESS_KEY", "--name", "j1"),
        raydfkd("status", "--address", ADDRESS),
        raydfkd("status", "j1", "--json", "--address", ADDRESS),
    ]
    assert client.submitted["runtime_env"]["env_vars"]["AWS_SECRET_ACCESS_KEY"] == "hidden"
    assert [answer.code for answer in answers] == [0, 0, 0]
    assert not [answer for answer in answers if "hidden" in answer.out + answer.err]


def test_head_that_has_only_just_begun_is_waited_for(folder, client):
    client.not_ready = 3
    assert submit().code == 0
    assert client.submitted


WRONG = {
    "mistake in the recipe": (["--set", "sed=1"], "sed: unknown key; did you mean seed?"),
    "mistake in an option of a term": (
        ["--set", "synthesis.objective.bn_moments.fom=kl"],
        "synthesis.objective[1].fom: unknown key; did you mean form?",
    ),
    "run in the job's folder": (
        ["--run-dir", "runs/mine"],
        "run_dir is 'runs/mine', inside the job's own folder, which goes with the job; "
        "give a folder that every node sees, such as --run-dir /runs/mine",
    ),
    "set in the job's folder": (
        ["--set", "transfer_set.uri=set"],
        "transfer_set.uri is 'set', inside the job's own folder, which goes with the job; "
        "give a URL, or a folder that every node sees",
    ),
    "secret in the command": (
        ["--set", "transfer_set.storage_options.secret=hidden"],
        "--set transfer_set.storage_options.secret: a job's command is shown to everyone; leave credentials to the "
        "nodes' environment, or name a variable of yours with --env",
    ),
    "secret in a mapping": (
        ["--set", "transfer_set={storage_options: {token: hidden}}"],
        "--set transfer_set: a job's command is shown to everyone; leave credentials to the nodes' environment, or "
        "name a variable of yours with --env",
    ),
    "password in a URL": (
        ["--set", "transfer_set.uri=ftp://me:hidden@host/set"],
        "--set transfer_set.uri: a job's command is shown to everyone; leave credentials to the nodes' environment, or "
        "name a variable of yours with --env",
    ),
    "presigned URL": (
        ["--set", "teacher.weights=https://host/w.pt?sig=hidden"],
        "--set teacher.weights: a job's command is shown to everyone; leave credentials to the nodes' environment, or "
        "name a variable of yours with --env",
    ),
    "variable that is not set": (
        ["--env", "NOT_SET_ANYWHERE"],
        "--env NOT_SET_ANYWHERE: not set here; export it first, or leave it to the nodes' environment",
    ),
    "weights that are not sent": (
        ["--set", "teacher.weights=data/file"],
        "data/file is not sent with the job: it is not in --working-dir ., or .gitignore leaves it out; "
        "put it there, or give a URL or a path that every node sees",
    ),
    "folder that is not there": (["--working-dir", "nowhere"], "--working-dir is 'nowhere': no such folder"),
    "recipe outside the folder": (
        ["--working-dir", "data"],
        "mine.yaml is not inside --working-dir data, so it would not be sent; move either",
    ),
    "name that is none": (["--name", "a/b"], "--name is 'a/b'; use letters, digits, dash, dot and underscore"),
}


@pytest.mark.parametrize(("args", "message"), WRONG.values(), ids=list(WRONG))
def test_mistake_gets_one_line_and_nothing_is_submitted(folder, client, args, message):
    answer = submit(*args)
    assert (answer.code, answer.out, answer.err) == (2, "", message + "\n")
    assert client.submitted == {}


def test_folder_that_is_too_large_is_refused_with_what_makes_it_so(folder, client):
    with open(folder / "huge.bin", "wb") as file:
        file.truncate(150 * 2**20)  # a hole: no byte is written
    answer = submit()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        "--working-dir . holds 150.0 MiB, 150.0 MiB of it in huge.bin; at most 100.0 MiB are sent with a job: name "
        "what it does not need in .gitignore or .rayignore\n"
    )
    (folder / ".rayignore").write_text("*.bin\n")
    assert submit().code == 0


ERRORS = {
    "name that is taken": (
        RuntimeError("ValueError: Job with submission_id x already exists. Please use a different submission_id."),
        "--name is 'x': the cluster has a job of that name; give another, or see `raydfkd status x`",
    ),
    "other token": (
        AuthenticationError("Authentication failed"),
        f"{ADDRESS} wants another token; put the cluster's into RAY_AUTH_TOKEN or ~/.ray/auth_token "
        "(`ray get-auth-token` on its head prints it)",
    ),
    "no cluster": (
        ConnectionError("Failed to connect"),
        f"{ADDRESS}: no Ray cluster answers there; is --address its dashboard's, and is its port forwarded to here?",
    ),
    "anything else": (RuntimeError("Traceback\nOSError: disk full"), f"{ADDRESS} refuses: OSError: disk full"),
}


@pytest.mark.parametrize(("error", "message"), ERRORS.values(), ids=list(ERRORS))
def test_refusal_of_the_cluster_gets_one_line(folder, client, error, message):
    client.error = error
    answer = submit("--name", "x")
    assert (answer.code, answer.err) == (2, message + "\n")


@pytest.mark.parametrize("command", [["submit", "smoke"], ["status"], ["logs", "j1"], ["stop", "j1"]], ids=str)
@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001"])
def test_address_that_is_no_dashboard_is_refused_at_once(monkeypatch, command, address):
    monkeypatch.chdir(REPOSITORY / "jobs")
    if command[0] == "submit":
        command = ["submit", "smoke.yaml", *RUN_DIR]
    answer = raydfkd(*command, "--address", address)
    assert (answer.code, answer.err) == (
        2,
        f"--address is {address!r}; give the cluster's dashboard, such as http://head:8265\n",
    )


def test_missing_address_is_said_and_one_that_is_no_dashboard_is_not_taken_from_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    answer = raydfkd("status")
    assert (answer.code, answer.err) == (
        2,
        "--address is missing; give the cluster's dashboard, such as http://head:8265\n",
    )


def test_address_where_nobody_listens_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")  # which --address goes before
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        answer = raydfkd("status", "--address", address)
    assert answer.code == 2
    assert answer.err.startswith(f"{address}: no Ray cluster answers there; ")


# Following


def test_followed_job_is_shown_without_its_report_which_becomes_the_table(folder, client):
    answer = submit("--name", "j1")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[1:5] == ["job j1; Ctrl-C only stops following it", LOG[0], LOG[1], LOG[3]]
    assert "recipe_digest" not in answer.out
    assert "agreement on 540 real digits test images" in answer.out
    assert lines[-2:] == ["report    /runs/smoke/report.html", "student   /runs/smoke/student.safetensors"]


def test_json_is_the_jobs_report_alone_and_people_read_on_standard_error(folder, client):
    answer = submit("--json")
    assert answer.code == 0
    assert json.loads(answer.out) == REPORT
    assert LOG[1] in answer.err


@pytest.mark.parametrize(
    ("status", "exit_code", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 1, 1, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 130, 130, ""),
        ("FAILED", 137, 1, "job j1: FAILED; killed for memory\n"),
        ("FAILED", None, 1, "job j1: FAILED; killed for memory\n"),
        ("STOPPED", None, 130, "job j1 was stopped; what was committed stays, and submitted again it resumes from "),
    ],
)
def test_exit_code_is_the_jobs(folder, client, status, exit_code, code, said):
    client.status, client.exit_code, client.message = status, exit_code, "killed for memory\nand a long log"
    answer = submit("--name", "j1")
    assert answer.code == code
    assert answer.err.startswith(said)
    assert answer.err.count("\n") == (1 if said else 0)


@pytest.mark.parametrize("breaks", [[0], [5], [3, 9], [0, 0, 40]], ids=str)
def test_lost_connection_costs_no_line_and_repeats_none(folder, client, breaks):
    client.breaks = breaks
    answer = submit("--name", "j1")
    assert answer.code == 0
    assert [line for line in answer.out.splitlines() if line in LOG] == [LOG[0], LOG[1], LOG[3]]
    assert "agreement on 540 real digits test images" in answer.out


def test_job_that_ends_while_its_connection_is_lost_is_shown_to_its_end(folder, client):
    client.breaks, client.has_ended = [4], True
    answer = submit("--name", "j1")
    assert answer.code == 0
    assert [line for line in answer.out.splitlines() if line in LOG] == [LOG[0], LOG[1], LOG[3]]


def test_ctrl_c_only_stops_following_and_says_how_to_go_on(folder, client):
    client.interrupted = True
    answer = submit("--name", "j1")
    assert answer.code == 130
    assert answer.err == (
        f"job j1 goes on; to follow it: raydfkd logs j1 --follow --address {ADDRESS}   "
        f"to end it: raydfkd stop j1 --address {ADDRESS}\n"
    )
    assert not client.stopped


def test_detached_job_is_not_followed(folder, client):
    answer = submit("--name", "j1", "--detach")
    assert answer.code == 0
    assert "raydfkd logs j1 --follow" in answer.out
    assert LOG[0] not in answer.out
    assert json.loads(submit("--detach", "--json", "--name", "j1").out)["name"] == "j1"


def test_logs_with_follow_end_as_submit_does(client):
    client.status, client.exit_code = "FAILED", 1
    answer = raydfkd("logs", "j1", "--follow", "--address", ADDRESS)
    assert answer.code == 1
    assert "agreement on 540 real digits test images" in answer.out


@pytest.mark.parametrize("line", ["", "{", "{]", '{"teacher": 1}', "[1]", "{1: 2}", '"teacher"', json.dumps(LOG)])
def test_line_that_looks_like_a_report_is_none(line):
    assert report_in(line) is None


# Asking and stopping


def test_logs_are_printed_as_they_are(client):
    answer = raydfkd("logs", "j1", "--address", ADDRESS)
    assert (answer.code, answer.out) == (0, "\n".join(LOG) + "\n")


def test_status_lists_submitted_jobs(client):
    answer = raydfkd("status", "--address", ADDRESS)
    assert answer.code == 0
    (line,) = answer.out.splitlines()
    assert line.split()[:2] == ["j1", "RUNNING"]
    assert line.endswith("smoke")
    (job,) = json.loads(raydfkd("status", "--json", "--address", ADDRESS).out)
    assert (job["name"], job["recipe"], job["run_dir"]) == ("j1", "smoke", "/runs/smoke")


def test_status_of_a_job_tells_its_last_words(client):
    client.has_ended = True
    answer = raydfkd("status", "j1", "--address", ADDRESS)
    assert answer.code == 0
    said = dict(line.split(maxsplit=1) for line in answer.out.splitlines() if not line.startswith("  "))
    assert (said["status"], said["seconds"], said["exit_code"]) == ("SUCCEEDED", "0:01:30", "0")
    assert LOG[-1] in answer.out


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_unknown_job_is_one_line(client, command):
    answer = raydfkd(command, "j2", "--address", ADDRESS)
    assert (answer.code, answer.err) == (2, f"{ADDRESS} has no job 'j2'; `raydfkd status` lists those it has\n")


def test_stop_waits_for_the_jobs_end(client):
    answer = raydfkd("stop", "j1", "--address", ADDRESS)
    assert (answer.code, answer.out) == (0, "job j1: STOPPED\n")
    again = raydfkd("stop", "j1", "--address", ADDRESS)
    assert (again.code, again.out) == (0, "job j1 had ended already (STOPPED)\n")


# The real thing


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The job server of a head, asked from the folder of jobs."""

    head: Head

    def raydfkd(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        address = {"RAY_API_SERVER_ADDRESS": self.head.dashboard}
        return self.head.raydfkd(*args, folder=REPOSITORY / "jobs", **{**address, **environment})


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Jobs]:
    with started_head(tmp_path_factory.mktemp("home")) as started:
        jobs = Jobs(head=started)
        while jobs.raydfkd("status").returncode:
            assert started.process.poll() is None, "the head has ended"
            time.sleep(1)
        yield jobs


@pytest.mark.cluster
def test_submitted_run_is_followed_to_its_report(head, tmp_path):
    run_dir = str(tmp_path / "smoke")
    secret = uuid.uuid4().hex
    done = head.raydfkd(
        "submit", "smoke.yaml", "--run-dir", run_dir, "--name", "smoke", "--env", "MY_KEY", "--json", MY_KEY=secret
    )
    assert done.returncode == 0, done.stderr
    assert "is now ignored" not in done.stderr, "Ray tells how it packs"
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "smoke/report.json").read_text())
    assert "synthesis 80/80 images" in done.stderr

    status = json.loads(head.raydfkd("status", "smoke", "--json").stdout)
    assert (status["status"], status["exit_code"], status["run_dir"]) == ("SUCCEEDED", 0, run_dir)
    assert [job["name"] for job in json.loads(head.raydfkd("status", "--json").stdout)] == ["smoke"]
    log = head.raydfkd("logs", "smoke").stdout
    assert report_in(log.splitlines()[-1]) == report
    assert secret not in log + done.stdout + done.stderr

    twice = head.raydfkd("submit", "smoke.yaml", "--run-dir", run_dir, "--name", "smoke")
    assert (twice.returncode, twice.stderr.count("\n")) == (2, 1), twice.stderr
    assert "--name is 'smoke': the cluster has a job of that name" in twice.stderr


@pytest.mark.cluster
def test_mistake_that_only_the_cluster_finds_has_the_jobs_exit_code(head, tmp_path):
    wrong = ("--set", "teacher.weights=/no/where.pt", "--set", "teacher.train=null")
    failed = head.raydfkd("submit", "smoke.yaml", "--run-dir", str(tmp_path / "wrong"), *wrong)
    assert failed.returncode == 2
    assert "teacher.weights is '/no/where.pt': no such file" in failed.stdout


@pytest.mark.cluster
def test_stopped_run_keeps_its_commits_and_goes_on_when_submitted_again(head, tmp_path):
    recipe = yaml.safe_load((REPOSITORY / "jobs/smoke.yaml").read_text())
    assert recipe["transfer_set"]["unit"] == {"images_per_class": 2}
    long = ("submit", "smoke.yaml", "--run-dir", str(tmp_path / "long"), "--set", "transfer_set.images_per_class=2000")
    assert head.raydfkd(*long, "--name", "long", "--detach").returncode == 0
    until = time.monotonic() + 240
    while not list((tmp_path / "long/transfer_set").rglob("*.parquet")):
        assert time.monotonic() < until, head.raydfkd("logs", "long").stdout
        time.sleep(0.5)
    stopped = head.raydfkd("stop", "long", "--json")
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    assert head.raydfkd("logs", "long", "--follow").returncode == 130
    assert "interrupted; what was committed stays" in head.raydfkd("logs", "long").stdout
    commits = len(list((tmp_path / "long/transfer_set/commits").iterdir()))
    attempted = (tmp_path / "long/metrics.jsonl").read_text().count('"event": "unit"')
    assert 1 <= attempted == commits < 1000
    short = (*long[:-1], f"transfer_set.images_per_class={2 * commits}")
    again = head.raydfkd(*short, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["units"]["attempted"] == attempted, "of all sessions, so that the second made none"


@pytest.mark.cluster
def test_wrong_token_is_one_line(head):
    refused = head.raydfkd("status", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode == 2
    assert refused.stderr.endswith("prints it)\n")
    assert "wants another token" in refused.stderr.splitlines()[-1]
