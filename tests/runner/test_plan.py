"""What a recipe will take, before anything is spent."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import toy_recipe

from raydfkd.cli import app
from raydfkd.config.load import load_recipe
from raydfkd.errors import RecipeError
from raydfkd.networks.flops import forward_flops, image_gradient_flops, load_of, training_flops
from raydfkd.runner.here import Here
from raydfkd.runner.memory import Memories, Memory, memory_of
from raydfkd.runner.plan import GIB, Device, Plan, devices_in, work_of

MINE = {
    "name": "mine",
    "peak_tflops": 100,
    "efficiency": 0.5,
    "measured": False,
    "bandwidth_gb_s": 1000.0,
    "memory_gib": 80.0,
    "is_host": False,
    "usd_per_hour": 2.0,
}
SMALL = Memory(fixed=GIB, per_image=GIB // 4, images=16, key="synthesis.batch_size", images_of_one=1, process=GIB)
PLANNED = Memories(synthesis=SMALL, student=replace(SMALL, key="distill.batch_size", images=8))


def test_work_of_a_layer_is_two_for_each_weight_and_pixel():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    forward = 2 * (3 * 8 * 9 * 36 + 8 * 36 * 5)
    assert forward_flops(layer, (3, 6, 6)) == forward
    assert image_gradient_flops(layer, (3, 6, 6)) == 2 * forward
    assert training_flops(layer, (3, 6, 6)) == 3 * forward - 2 * 3 * 8 * 9 * 36, "nobody asks for the images' gradient"
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in layer.parameters())


def test_depthwise_convolution_is_trained_with_three_times_the_work_of_its_answer():
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), layer, nn.Flatten())
    stem, own = 2 * 3 * 16 * 36, 2 * 16 * 9 * 36
    assert forward_flops(network, (3, 6, 6)) == stem + own
    assert training_flops(network, (3, 6, 6)) == 2 * stem + 3 * own


def test_transposed_convolution_is_trained_with_three_times_the_work_of_its_answer():
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), nn.Flatten())
    assert training_flops(network, (4, 3, 3)) == 2 * forward_flops(network, (4, 3, 3)) == 2 * 2 * 4 * 6 * 4 * 9


def test_what_moves_is_what_layers_read_and_write_beside_their_weights():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert load_of(network, (3, 6, 6)).elements == 3 * 36 + 8 * 36 + 8 * 36 + 5
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(36, 7, bias=False), nn.Flatten())
    forward = 3 * 36 + 3 * 7
    assert load_of(tokens, (3, 6, 6), backward="image").elements == 2 * forward, "no weights for each image"


def test_network_whose_answer_depends_on_values_is_counted_by_doing_it():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, images):
            flat = images.flatten(1)
            return self.linear(flat) if flat.sum().item() == 0 else flat

    assert forward_flops(Fickle(), (1, 2, 2)) == 2 * 4 * 2


def test_torchscript_is_counted_as_the_network_that_it_was_made_of():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)).eval()
    scripted = torch.jit.trace(network, torch.zeros(2, 1, 8, 8))
    assert forward_flops(scripted, (1, 8, 8)) == forward_flops(network, (1, 8, 8)) > 0


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


def test_stages_of_a_size_are_counted_at_that_size(tmp_path):
    small = toy_recipe(tmp_path, ["synthesis.stages=[{pool: 2, steps: 20}]"])
    scaled = toy_recipe(tmp_path, ["synthesis.stages=[{size: 4, steps: 20}]"])
    assert work_of(small).tflop_per_image == work_of(scaled).tflop_per_image


def test_renewed_generator_pays_its_steps_for_each_batch_of_a_unit():
    settings = ["transfer_set.unit.images_per_class=30", "transfer_set.images_per_class=30", "rounds=1"]
    settings += ["synthesis.objective=[cross_entropy, bn_moments]", "synthesis.steps=90", "synthesis.renewal.steps=45"]
    once = [*settings, "transfer_set.unit.images_per_class=10", "transfer_set.images_per_class=10"]
    whole, first = (work_of(load_recipe("fashion-resnet", changes)) for changes in (settings, once))
    assert whole.tflop_per_image / first.tflop_per_image == pytest.approx((90 + 2 * 45) / (3 * 90))


@pytest.fixture(scope="module")
def planned():
    workers = ["runtime.workers={min: 1, max: 4}", "runtime.student_workers={min: 1, max: 2}"]
    recipe = load_recipe("one-gpu", ["teacher.weights=random", "teacher.network=torchvision:resnet18", *workers])
    return Plan(recipe=recipe, work=work_of(recipe), memory=PLANNED)


def test_hours_and_money_follow_from_the_device(planned):
    cost, work = planned.on(Device(**MINE)), planned.work
    assert cost.synthesis_hours == pytest.approx(work.synthesis_pflop * 1e15 / 50e12 / 3600)
    assert cost.wall_hours == pytest.approx(cost.synthesis_hours / 4 + cost.student_hours / 2)
    assert cost.usd == pytest.approx(2 * (cost.synthesis_hours + cost.student_hours))


def test_no_step_is_faster_than_what_it_moves(planned):
    slow = Device(**MINE | {"bandwidth_gb_s": 10.0})
    assert planned.on(slow).synthesis_hours == pytest.approx(planned.work.synthesis_pb * 1e15 / 10e9 / 3600)
    unknown = Device(**MINE | {"bandwidth_gb_s": None})
    assert planned.on(unknown).synthesis_hours == planned.on(Device(**MINE)).synthesis_hours


def test_machine_that_was_timed_takes_the_time_of_its_units_and_steps(planned):
    cost = planned.here(Here(device=torch.device("cpu"), unit_s=36.0, student_step_s=0.18))
    assert cost.device.name == "here"
    assert cost.synthesis_hours == pytest.approx(100 * 36 / 3600)
    assert cost.student_hours == pytest.approx(20_000 * 2 * 0.18 / 3600)
    assert cost.wall_hours == pytest.approx(1 / 4 + 1)
    assert cost.device.hours(planned.work.synthesis_pflop, 0) == pytest.approx(cost.synthesis_hours)
    assert cost.synthesis_gib == pytest.approx(1 + 1.4 * 5)


@pytest.mark.parametrize(
    ("changes", "misfit"),
    [
        ({"memory_gib": 12.0}, ""),
        ({"memory_gib": 9.0}, "does not fit; lower synthesis.batch_size to 12"),
        (
            {"memory_gib": 4.0},
            "does not fit; lower synthesis.batch_size to 3; the student does not fit; raise distill.accumulate to 3",
        ),
        (
            {"memory_gib": 2.0},
            "does not fit; not even with synthesis.batch_size 1; the student does not fit; take a sm",
        ),
        ({"memory_gib": 8.1, "is_host": True}, ""),
        ({"memory_gib": 7.9, "is_host": True}, "does not fit; lower synthesis.batch_size to 15"),
    ],
)
def test_device_whose_memory_is_too_small_says_what_to_lower(planned, changes, misfit):
    """Half a GPU is a worker's, as the recipe says, and a tenth of it is nobody's; a CPU holds the process too."""
    assert planned.on(Device(**MINE | changes)).misfit.startswith(misfit)
    assert bool(planned.on(Device(**MINE | changes)).misfit) == bool(misfit)


def test_generators_of_a_unit_are_lowered_by_images_of_each_class(planned):
    memory = replace(SMALL, key="synthesis.batch_per_class", images=40, images_of_one=10)
    with_generators = replace(planned, memory=replace(PLANNED, synthesis=memory))
    misfit = with_generators.on(Device(**MINE | {"memory_gib": 16.0})).misfit
    assert misfit == "does not fit; lower synthesis.batch_per_class to 2"


def test_command_says_it_in_json_and_for_a_table_of_ones_own(tmp_path, capsys):
    recipe, table = toy_recipe(tmp_path), tmp_path / "mine.yaml"
    table.write_text("spot: {peak_tflops: 100, efficiency: 0.1, memory_gib: 0.00001, usd_per_hour: 1.5}")
    arguments = ["plan", str(tmp_path / "toy.yaml"), "--set", "teacher.weights=random", "--devices", str(table)]
    assert app([*arguments, "--json"], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tflop_per_image"] == work_of(recipe).tflop_per_image
    (cost,) = found["devices"]
    assert cost["usd"] == pytest.approx(1.5 * (cost["synthesis_hours"] + cost["student_hours"]))
    memory = memory_of(recipe)
    assert found["memory"]["synthesis"]["per_image"] == pytest.approx(memory.synthesis.per_image, rel=0.1)
    assert cost["student_gib"] * GIB == pytest.approx(memory.student.tensors, rel=0.1)
    assert app(arguments, standalone_mode=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("24 images x ")
    assert any(line.startswith("a worker takes ") for line in lines)
    assert "efficiency is a guess; does not fit; " in lines[-1]
    assert not any(line.startswith("usd:") for line in lines), "there are prices"


def test_command_times_this_machine_and_says_where_prices_go(tmp_path, capsys):
    toy_recipe(tmp_path)
    arguments = ["plan", str(tmp_path / "toy.yaml"), "--set", "teacher.weights=random", "--device", "h200"]
    assert app([*arguments, "--measure", "0.1s"], standalone_mode=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == ["here:", "usd:", "device", "h200", "here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h20"], "--device is 'h20', which is not in the table; did you mean h200"),
        (["--devices", "none.yaml"], "--devices is 'none.yaml': No such file"),
        (["--set", "transfer_set.images_per_class=0"], "images_per_class is missing"),
        (["--measure", "soon"], "--measure is 'soon'; write it as 90s"),
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
