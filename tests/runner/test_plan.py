"""What a recipe will take, before anything is spent."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from toy import toy_recipe

from raydfkd.cli import app
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.flops import forward_flops, image_gradient_flops, training_flops
from raydfkd.runner.plan import Device, devices_in, work_of

FIELDS = {"memory_gib": 80.0, "usd_per_hour": 2.0}


def test_work_of_a_layer_is_two_for_each_weight_and_pixel():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    forward = 2 * (3 * 8 * 9 * 36 + 8 * 36 * 5)
    assert forward_flops(layer, (3, 6, 6)) == forward
    assert image_gradient_flops(layer, (3, 6, 6)) == 2 * forward
    assert training_flops(layer, (3, 6, 6)) == 3 * forward - 2 * 3 * 8 * 9 * 36, "nobody asks for the images' gradient"
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in layer.parameters())


def test_network_whose_answer_depends_on_values_is_counted_by_doing_it():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, images):
            flat = images.flatten(1)
            return self.linear(flat) if flat.sum().item() == 0 else flat

    assert forward_flops(Fickle(), (1, 2, 2)) == 2 * 4 * 2


def test_deepinversion_of_resnet50_is_25_tflop_an_image():
    work = work_of(load_recipe("one-gpu", ["teacher.weights=random"]))
    assert work.tflop_per_image == pytest.approx(25.0, rel=0.02)
    assert work.synthesis_pflop == pytest.approx(10_000 * work.tflop_per_image / 1000)
    assert work.raw_bytes == 10_000 * (3 * 224 * 224 + 2 * 1000)
    assert (work.images, work.units, work.parts) == (10_000, 100, 100)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ([], 1),
        (["synthesis.stages=[{steps: 40}]"], 2),
        (["synthesis.select={kind: balanced_confidence, candidates: 3}"], 3),
    ],
)
def test_work_of_pixels_grows_with_steps_and_candidates(tmp_path, changes, factor):
    base = ["synthesis.stages=[{steps: 20}]"]
    recipe = toy_recipe(tmp_path, base)
    changed = toy_recipe(tmp_path, [*base, *changes])
    assert work_of(changed).tflop_per_image == pytest.approx(factor * work_of(recipe).tflop_per_image)


def test_renewed_generator_pays_its_steps_for_each_batch_of_a_unit():
    settings = ["transfer_set.unit.images_per_class=30", "transfer_set.images_per_class=30", "rounds=1"]
    settings += ["synthesis.objective=[cross_entropy, bn_moments]", "synthesis.steps=90", "synthesis.renewal.steps=45"]
    once = [*settings, "transfer_set.unit.images_per_class=10", "transfer_set.images_per_class=10"]
    whole, first = (work_of(load_recipe("fashion-resnet", changes)) for changes in (settings, once))
    assert whole.tflop_per_image / first.tflop_per_image == pytest.approx((90 + 2 * 45) / (3 * 90))


def test_hours_and_money_follow_from_the_device():
    device = Device(name="mine", peak_tflops=100, efficiency=0.5, measured=False, **FIELDS)
    work = work_of(load_recipe("one-gpu", ["teacher.weights=random"]))
    cost = work.on(device, workers=4, student_workers=2)
    assert cost.synthesis_hours == pytest.approx(work.synthesis_pflop * 1e15 / 50e12 / 3600)
    assert cost.wall_hours == pytest.approx(cost.synthesis_hours / 4 + cost.student_hours / 2)
    assert cost.usd == pytest.approx(2 * (cost.synthesis_hours + cost.student_hours))


def test_command_says_it_in_json_and_for_a_table_of_ones_own(tmp_path, capsys):
    table = tmp_path / "mine.yaml"
    table.write_text("spot: {peak_tflops: 100, efficiency: 0.1, memory_gib: 80, usd_per_hour: 1.5}")
    arguments = ["plan", "one-gpu", "--set", "teacher.weights=random", "--devices", str(table)]
    assert app([*arguments, "--json"], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tflop_per_image"] == pytest.approx(25.0, rel=0.02)
    (cost,) = found["devices"]
    assert cost["usd"] == pytest.approx(1.5 * (cost["synthesis_hours"] + cost["student_hours"]))
    assert app(arguments, standalone_mode=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("10,000 images x 25 TFLOP = 250 PFLOP, the student ")
    assert lines[-1].endswith("efficiency is a guess")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h20"], "--device is 'h20', which is not in the table; did you mean h200"),
        (["--devices", "none.yaml"], "--devices is 'none.yaml': No such file"),
        (["--set", "transfer_set.images_per_class=0"], "images_per_class is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(RecipeError, match=message):
        app(["plan", "one-gpu", "--set", "teacher.weights=random", *arguments], standalone_mode=False)


def test_packaged_table_is_sound():
    rows = devices_in()
    assert len({row.name for row in rows}) == len(rows) > 5
    assert all(0 < row.efficiency < 1 for row in rows)
    assert torch.tensor([row.peak_tflops for row in rows]).min() > 0
