"""Runs that need the same teacher have the same one, whoever teaches it."""

from __future__ import annotations

import hashlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import raydfkd.runner.teach
from raydfkd.config.load import load_recipe
from raydfkd.networks.teacher import build_teacher
from raydfkd.networks.weights import save_bytes
from raydfkd.runner.events import Events, Listener
from raydfkd.runner.teach import teach
from raydfkd.store.store import Store

SMOKE = Path(__file__).parents[2] / "jobs" / "smoke.yaml"


class Lines(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, topic: str, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def trainings(monkeypatch):
    """Seeds of the recipes whose teacher was trained; each training waits for ``trainings.may_end``."""
    train = raydfkd.runner.teach.train_on_real_data
    done: list[int] = []

    def training(recipe, *args):
        done.append(recipe.seed)
        train(recipe, *args)

    monkeypatch.setattr(raydfkd.runner.teach, "train_on_real_data", training)
    return done


def of_seed(seed, weights):
    return load_recipe(SMOKE, [f"seed={seed}", f"teacher.weights={weights}", "runtime.executor=local"])


def test_of_two_runs_that_need_a_teacher_one_trains_it_and_the_other_waits(tmp_path, trainings, monkeypatch):
    said, has_waited = Lines(), threading.Event()
    train = raydfkd.runner.teach.train_on_real_data

    def slowly(*args):
        assert has_waited.wait(60), "the other run waits meanwhile"
        train(*args)

    monkeypatch.setattr(raydfkd.runner.teach, "train_on_real_data", slowly)
    monkeypatch.setattr(said, "say", lambda _, text: (said.lines.append(text), "waiting" in text and has_waited.set()))
    recipes = [of_seed(seed, tmp_path / "teacher.safetensors") for seed in (1, 2)]  # who do not compute alike
    with ThreadPoolExecutor(2) as pool:
        teachers = list(pool.map(lambda recipe: teach(recipe, Events(said), anew=False), recipes))
    assert len(trainings) == 1
    assert teachers[0].sha256 == teachers[1].sha256
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    assert [line for line in said.lines if "waiting for" in line]


def test_where_nothing_can_be_locked_the_first_weights_count_for_all(trainings, monkeypatch):
    folder, said = f"memory://{uuid.uuid4().hex}", Lines()
    theirs = save_bytes(build_teacher(of_seed(2, "random")))
    train = raydfkd.runner.teach.train_on_real_data

    def overtaken(*args):
        train(*args)
        Store(folder).put("t.safetensors", theirs)

    monkeypatch.setattr(raydfkd.runner.teach, "train_on_real_data", overtaken)
    teacher = teach(of_seed(1, f"{folder}/t.safetensors"), Events(said), anew=False)
    assert trainings == [1]
    assert (
        teacher.sha256 == hashlib.sha256(theirs).hexdigest() == hashlib.sha256(save_bytes(teacher.module)).hexdigest()
    )
    assert Store(folder).get("t.safetensors") == theirs
    assert [line for line in said.lines if "its weights are taken" in line]


def test_teaching_anew_replaces_what_is_there(tmp_path, trainings):
    weights = tmp_path / "teacher.safetensors"
    first, second = (teach(of_seed(seed, weights), Events()) for seed in (1, 2))
    assert trainings == [1, 2]
    assert first.sha256 != second.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
