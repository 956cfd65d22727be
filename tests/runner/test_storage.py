"""What a set takes on the store, and the teacher's answers wherever they are kept."""

from __future__ import annotations

import json

import pytest
import torch
from toy import toy_recipe

from raydfkd.cli import app
from raydfkd.config.load import load_recipe
from raydfkd.data.commits import GROUP_BYTES
from raydfkd.data.encodings import Encoding, encode_images
from raydfkd.images.procedural import MODELS, draw, plain_grounds
from raydfkd.networks.build import build_network
from raydfkd.networks.flops import forward_flops, training_flops
from raydfkd.networks.teacher import build_teacher
from raydfkd.runner.memory import Memories, Memory
from raydfkd.runner.plan import work_of
from raydfkd.runner.storage import storage_of
from raydfkd.seeds import rng_from


def test_bytes_on_the_store_are_those_of_rows_as_they_are_written(tmp_path):
    recipe = toy_recipe(tmp_path, ["transfer_set.images_per_class=60", "transfer_set.unit.images_per_class=60"])
    for change, based_on in (
        ([], "pixels as they are"),
        (["transfer_set.logits={kind: top_k, k: 2}"], "pixels as they are"),
        (["transfer_set.encoding={kind: webp, quality: 90}"], "64 drawn images of that size"),
    ):
        changed = toy_recipe(tmp_path / str(len(based_on)), [*change, "transfer_set.images_per_class=60"])
        stored = storage_of(changed, 240)
        assert stored.based_on == based_on
        assert stored.bytes == round(240 * (stored.pixel_bytes + changed.transfer_set.logits.bytes_of(4) + 28))
    assert storage_of(recipe, 1).pixel_bytes == 64


def test_size_of_encoded_images_is_that_of_drawn_ones():
    recipe = load_recipe("one-gpu", ["teacher.weights=random", "transfer_set.encoding={kind: webp, quality: 90}"])
    space = recipe.made_space
    drawn = draw(tuple(MODELS), 64, space, rng_from(0), plain=plain_grounds(space))
    files = encode_images((255 * drawn).round().to(torch.uint8), Encoding(kind="webp", quality=90))
    assert storage_of(recipe, 10).pixel_bytes == sum(map(len, files)) / 64
    better = load_recipe("one-gpu", ["teacher.weights=random", "transfer_set.encoding={kind: webp, quality: 98}"])
    assert storage_of(better, 10).bytes > storage_of(recipe, 10).bytes


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ([], 1.0),
        (["distill.teacher_logits=stored"], 0.0),
        (["distill.source={kind: views, views: 5, top_k: 2}", "distill.augment=[flip]"], 5 * 24 / (6 * 8)),
    ],
)
def test_teacher_is_asked_each_step_or_never_or_once_for_each_view(tmp_path, changes, share):
    recipe = toy_recipe(tmp_path, changes)
    work = work_of(recipe)
    forward = forward_flops(build_teacher(recipe), (1, 8, 8))
    student = training_flops(build_network(recipe.student, recipe.teacher, where="student", seed=0), (1, 8, 8))
    assert work.answers.live_pflop == pytest.approx(6 * 8 * forward / 1e15)
    assert work.answers.asked == share * 6 * 8
    assert work.student_pflop == pytest.approx((6 * 8 * student + share * 6 * 8 * forward) / 1e15)


@pytest.mark.parametrize(
    ("source", "views", "size"),
    [
        ("{kind: views, views: 5, top_k: 2}", 5, 5 * (2 * 3 + 2 * 2)),
        ("{kind: views, views: 3, keep: all}", 3, 3 * 2 * 4),
        ("growing", 8, 8 * 2 * 4),
    ],
)
def test_answers_to_views_take_the_bytes_that_the_source_holds(tmp_path, source, views, size):
    recipe = toy_recipe(tmp_path, [f"distill.source={source}", "distill.augment=[flip]"])
    answers = work_of(recipe).answers
    assert (answers.views, answers.views_bytes, answers.stored_bytes) == (views, 24 * size, 24 * 2 * 4)


@pytest.mark.cluster
def test_parts_are_as_many_as_the_sink_makes_of_large_images():
    recipe = load_recipe("one-gpu", ["teacher.weights=random", "transfer_set.part_rows=4096"])
    rows = GROUP_BYTES // (3 * 224 * 224)
    unit = f"{{classes: 1, images_per_class: {2 * rows}}}"
    many = [f"transfer_set.images_per_class={2 * rows}", f"transfer_set.unit={unit}"]
    changed = load_recipe("one-gpu", ["teacher.weights=random", *many])
    assert work_of(changed).parts == 2 * len(recipe.classes)


@pytest.mark.cluster
def test_plan_says_what_a_set_takes_in_its_form_and_what_answers_take_in_each(capsys, monkeypatch):
    some = Memory(fixed=1, per_image=1, images=1, key="synthesis.batch_size", images_of_one=1, process=1)
    monkeypatch.setattr("raydfkd.runner.memory.memory_of", lambda recipe: Memories(synthesis=some, student=some))
    small = ["teacher.weights=random", "teacher.network=torchvision:resnet18", "teacher.image_space.size=32"]
    small += ["synthesis.precision=float32", "distill.precision=float32", "distill.batch_size=8"]
    settings = [part for setting in (*small, "transfer_set.encoding=raw") for part in ("--set", setting)]
    raw = ["plan", "one-gpu", *settings]
    assert app([*raw, "--device", "h100", "--json"], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"]["bytes"] == 10_000 * (3 * 32 * 32 + 2 * 1000 + 28)
    assert found["answers"]["views_bytes"] == 10_000 * 8 * (2 * 11 + 2 * 10)
    assert app([*raw, "--device", "h100"], standalone_mode=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "100 units, 100 files, 0.051 GB on the store"
    assert lines[2].endswith(" PFLOP, 0.00336 GB of memory")
    assert app([*raw[:-1], "transfer_set.encoding=png", "--device", "h100"], standalone_mode=False) == 0
    encoded = capsys.readouterr().out.splitlines()[1]
    assert encoded.endswith(" GB on the store by 64 drawn images of that size, 0.0507 GB before they are encoded")
