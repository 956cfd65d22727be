"""Memory of workers, as trials on a few images foretell it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import toy_recipe

from raydfkd.config.load import load_recipe
from raydfkd.networks.generators import GENERATORS
from raydfkd.runner import memory
from raydfkd.runner.memory import HELD, memory_of


def test_tensors_count_once_for_as_long_as_something_holds_their_storage():
    weights = nn.Linear(50, 2)
    with memory._Live(weights) as live:
        one = torch.zeros(1000)
        views = [one[:10], one.view(10, 100)]
        assert live.bytes == 4000
        weights(torch.ones(1, 50))
        assert live.bytes == 4000, "images and answers are gone, weights lie elsewhere"
        del one
        assert live.bytes == 4000
        views.clear()
        assert live.bytes == 0
    assert live.peak >= 4000 + 200 + 8


@pytest.mark.parametrize("synthesizer", ["pixels", "generator"])
def test_peak_of_large_batches_follows_from_small_ones(tmp_path, monkeypatch, synthesizer):
    sizes = {"pixels": "synthesis.batch_size=64", "generator": "synthesis.batch_per_class=16"}
    unit = ["transfer_set.unit={classes: 4, images_per_class: 16}", "transfer_set.images_per_class=16"]
    recipe = toy_recipe(tmp_path, [*unit, sizes[synthesizer], "distill.batch_size=32"], synthesizer=synthesizer)
    small = memory_of(recipe)
    monkeypatch.setattr(memory, "FEW", 16)
    large = memory_of(recipe)
    assert small.synthesis.images == large.synthesis.images == 64
    assert small.student.images == 32
    assert small.synthesis.tensors == pytest.approx(large.synthesis.tensors, rel=0.1)
    assert small.student.tensors == pytest.approx(large.student.tensors, rel=0.1)


def test_image_takes_its_pixels_gradient_and_optimiser_state_and_more(tmp_path):
    found = memory_of(toy_recipe(tmp_path)).synthesis
    assert found.per_image > 4 * 4 * 64
    assert found.images == 4
    assert found.tensors == found.fixed + 4 * found.per_image


def test_each_class_of_a_unit_has_a_generator_with_gradient_and_optimiser_state(tmp_path):
    options = {"latent": 64, "width": 64, "doublings": 1}
    wide = ["synthesis.generator={kind: conv, latent: 64, width: 64, doublings: 1}", "teacher.classes=20"]
    wide += ["teacher.weights=random", "transfer_set.images_per_class=3"]
    found = [
        memory_of(toy_recipe(tmp_path, [*wide, f"transfer_set.unit.classes={classes}"], synthesizer="generator"))
        for classes in (4, 20)
    ]
    recipe = toy_recipe(tmp_path, wide, synthesizer="generator")
    generator = GENERATORS.build("conv", options, recipe.made_space, where="synthesis.generator")
    weights = sum(4 * parameter.numel() for parameter in generator.parameters())
    each = (found[1].synthesis.fixed - found[0].synthesis.fixed) / 16
    assert each == pytest.approx(4 * weights, rel=0.1)


def test_accumulation_and_more_train_workers_take_less_memory_each(tmp_path):
    changes = [[], ["distill.accumulate=2"], ["runtime.student_workers={min: 2, max: 2}"]]
    whole, parts, two = (memory_of(toy_recipe(tmp_path, changed)).student for changed in changes)
    assert [whole.images, parts.images, two.images] == [8, 4, 4]
    assert whole.per_image == parts.per_image == two.per_image
    assert parts.tensors < whole.tensors


def test_synthesizers_of_a_unit_share_a_device_but_do_not_work_at_once(tmp_path):
    alone = memory_of(toy_recipe(tmp_path)).synthesis
    beside = "synthesis.beside=[{kind: noise_images, images: 1, batch_size: 2, targets: none}]"
    both = memory_of(toy_recipe(tmp_path, [beside])).synthesis
    assert both.per_image == alone.per_image
    assert alone.fixed < both.fixed < 2 * alone.tensors


def test_process_on_a_cpu_holds_its_libraries_too(tmp_path):
    found = memory_of(toy_recipe(tmp_path)).synthesis
    assert found.process > 100 * 2**20
    assert found.on_host == found.process + round((1 + HELD) * found.tensors)


def test_images_for_which_memory_is_enough_are_counted(tmp_path):
    found = memory_of(toy_recipe(tmp_path)).synthesis
    assert found.most_images(found.fixed + 3.5 * found.per_image) == 3
    assert found.most_images(found.fixed - 1) == 0


def test_memory_is_known_of_rounds_against_a_student():
    changes = ["teacher.weights=random", "teacher.train=null", "real_data=null"]
    plain, against = (memory_of(load_recipe(name, changes)) for name in ("digits-deepinversion", "digits-adaptive"))
    assert against.synthesis.per_image > plain.synthesis.per_image, "the student is asked too"
