"""Nothing that a person gives as a secret is in any file of a run, in what commands say, or in what they log."""

from __future__ import annotations

import functools
import http.server
import logging
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
from test_cli import Terminal, sets

from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError
from raydfkd.report.redaction import is_redacted, redacted, redacted_data, redacted_setting

SMOKE = Path(__file__).parents[1] / "jobs/smoke.yaml"
OPTIONS = (
    "transfer_set.storage_options={secret: hunter-a1, client_kwargs: {token: hunter-b2}, endpoint_url: http://e}",
)
SET = "memory://user:hunter-c3@host/set"
QUERY = "X-Amz-Signature=hunter-d4&X-Amz-Credential=hunter-e5"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):
        if self.path.startswith("/refused"):
            self.send_error(403, f"no access for {self.path}")
            return None
        return super().send_head()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the URL at which a server has it."""
    folder = tmp_path_factory.mktemp("served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://who:hunter-f6@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def secretive(served, tmp_path_factory):
    """A terminal in whose folder the smoke job has run with secrets everywhere, those settings, and what was said."""
    folder, url = served
    terminal = Terminal(tmp_path_factory.mktemp("secretive"))
    shutil.copy(SMOKE, terminal.folder / "toy.yaml")
    assert terminal("teach", "toy.yaml", "--run-dir", "taught").code == 0
    shutil.copy(terminal.folder / "taught/teacher.safetensors", folder)
    fsspec.filesystem("memory").store.clear()
    weights = f"teacher.weights={url}/teacher.safetensors?{QUERY}"
    settings = (*OPTIONS, f"transfer_set.uri={SET}", weights, "teacher.train=null")
    logs = Logs()
    logging.getLogger().addHandler(logs)
    answer = terminal("--debug", "run", "toy.yaml", "--on", "local", *sets(*settings))
    logging.getLogger().removeHandler(logs)
    assert answer.code == 0, answer.err
    return terminal, settings, answer.out + answer.err + "\n".join(logs.lines)


class Logs(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_secrets_of_a_run_are_in_none_of_its_files_and_in_nothing_that_it_says(secretive):
    terminal, _, said = secretive
    files = [path for path in (terminal.folder / "runs/smoke").rglob("*") if path.is_file()]
    assert {"report.json", "report.html", "recipe.yaml", "metrics.jsonl", "student.safetensors"} <= {
        path.name for path in files
    }
    told = [str(path) for path in files if b"hunter" in path.read_bytes()]
    objects = fsspec.filesystem("memory").store.items()
    assert len(objects) > 4
    told += [name for name, content in objects if b"hunter" in content.getvalue()]
    assert not told
    assert "hunter" not in said
    command = (terminal.folder / "runs/smoke/report.json").read_text()
    assert "transfer_set.storage_options=***" in command
    assert "***@host/set" in command


COMMANDS = {
    "check": [],
    "synthesize": ["--on", "local"],
    "distill": ["--on", "local"],
    "evaluate": [],
    "report": [],
    "verify": [],
    "gc": ["--older-than", "0s"],
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_tells_a_secret(secretive, command, as_json):
    terminal, settings, _ = secretive
    answer = terminal(command, "toy.yaml", *COMMANDS[command], *sets(*settings), *(["--json"] if as_json else []))
    assert answer.code == 0, answer.err
    assert "hunter" not in answer.out + answer.err
    assert not [path for path in terminal.folder.rglob("*") if path.is_file() and b"hunter" in path.read_bytes()]


def test_saved_recipe_repeats_the_run_once_the_secrets_are_given_again(secretive):
    terminal, settings, _ = secretive
    saved = terminal.folder / "runs/smoke/recipe.yaml"
    answer = terminal("check", str(saved))
    assert answer.code == 2
    assert [line.partition(" ")[0] for line in answer.err.splitlines()] == [
        "teacher.weights",
        "transfer_set.uri",
        *(f"transfer_set.storage_options.{key}" for key in ("secret", "client_kwargs", "endpoint_url")),
    ]
    assert "give it again, as with --set teacher.weights=..." in answer.err
    again = load_recipe(saved, settings)
    first = load_recipe(SMOKE, [*settings, "runtime.executor=local"])
    assert (again, again.transfer_set.uri) == (first, SET)


MISTAKES = [
    ["transfer_set.storage_options.secret.deep=hunter-x", "transfer_set.storage_options.secret.deep.er=1"],
    ["transfer_set.storage_options=hunter-x"],
    ["transfer_set.storage_options.secret={hunter-x"],
    ["transfer_set.storage_options.secret=${hunter}"],
    ["transfer_set={uri: 1, storage_options: {secret: hunter-x}}"],
    ["transfer_set=[{storage_options: {secret: hunter-x}}]"],
    ["run_dir=ftp://user:hunter-x@host/runs"],
    ["transfer_set.uri=ftp://user:hunter-x@127.0.0.1:9/set"],
    ["transfer_set.uri=https://127.0.0.1:9/set?sig=hunter-x"],
    ["teacher.weights=http://user:hunter-x@127.0.0.1:9/w.pt?sig=hunter-y"],
    ["teacher.weights=s3://user:hunter-x@bucket/w.pt?sig=hunter-y", "teacher.network=noSuchNetwork"],
    ["student.network=hunter:net", "student.options={url: 'https://a:hunter-x@host/w?sig=hunter-y'}"],
]


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("mistakes", MISTAKES, ids=str)
def test_no_error_tells_a_secret(secretive, mistakes, debug):
    terminal, *_ = secretive
    overrides = ["teacher.train=null", *mistakes]
    answer = terminal(*(["--debug"] if debug else []), "run", "toy.yaml", "--on", "local", *sets(*overrides))
    assert answer.code == 2
    assert answer.err
    assert "hunter-" not in answer.out + answer.err


def test_refusal_of_a_server_tells_no_secret(secretive, served):
    terminal, *_ = secretive
    answer = terminal("check", "toy.yaml", *sets(f"teacher.weights={served[1]}/refused/w.pt?{QUERY}"))
    assert answer.code == 2
    assert answer.err.startswith("teacher.weights is 'http://***@127.0.0.1:")
    assert "hunter" not in answer.err


TEXTS = {
    "https://user:pass@host/a?b=c and s3://key@bucket/x": "https://***@host/a?*** and s3://***@bucket/x",
    "s3://bucket/a@b is not there; is it s3://bucket/x?": "s3://bucket/a@b is not there; is it s3://bucket/x?",
    "is http://host:8265 up? mail a@b": "is http://host:8265 up? mail a@b",
    "ftp://user:p@ss@host/set": "ftp://***@host/set",
    "url='https://h/x?sig=a%2Fb', status=403": "url='https://h/x?***', status=403",
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_login_and_query_of_a_url_are_redacted_and_nothing_else(text, shown):
    assert redacted(text) == redacted(shown) == shown
    assert is_redacted(text) is False
    assert is_redacted(shown) is (text != shown)
    assert str(RecipeError(text)) == shown


def test_known_secrets_are_redacted_the_longest_first():
    assert redacted("abcdef and abcd", ["abcd", "abcdef"]) == "*** and ***"


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("transfer_set.storage_options.secret=two words", "transfer_set.storage_options.secret=***"),
        ("transfer_set={storage_options: {a: b}}", "transfer_set=***"),
        ("--set=transfer_set.storage_options.a=b", "--set=***"),
        ("transfer_set.uri=s3://b/storage_options", "transfer_set.uri=***"),
        ("seed=1", "seed=1"),
        ("storage_options.yaml", "storage_options.yaml"),
    ],
)
def test_setting_with_storage_options_has_no_value_that_is_shown(setting, shown):
    assert redacted_setting(setting) == shown


def test_url_that_was_signed_anew_makes_the_same_set_and_student(tmp_path):
    def made(signature: str) -> Recipe:
        url = f"https://host/w.pt?sig={signature}"
        return load_recipe(SMOKE, {"teacher.options.url": url, "student.options.url": url}, tmp_path)

    assert made("a").made_of("w") == made("b").made_of("w")
    assert made("a").trained_by() == made("b").trained_by()
    assert redacted_data({"storage_options": {"a": 1}, "b": ("https://h/?x", 2)}) == {
        "storage_options": {"a": "***"},
        "b": ["https://h/?***", 2],
    }
