"""The benchmarks run and name their fields; how fast anything is, is not a test."""

import json

import pytest
import torch
from torch import nn

from raydfkd.bench import cases
from raydfkd.bench.cases import CASES, build_teacher, choose_cases, recipe_of, resnet34_32
from raydfkd.bench.ceilings import PASSES, Ceilings, Cost, cost_of_step, measure_ceilings
from raydfkd.bench.published import fair_loop, published_loop
from raydfkd.bench.synthesis import bench_synthesis
from raydfkd.bench.table import Row, alternate, table
from raydfkd.errors import RecipeError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small_teacher():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).eval()


@pytest.mark.cluster
def test_rows_of_the_synthesis_benchmark_carry_the_names_that_scripts_rely_on():
    (row,) = (json.loads(row.to_json()) for row in bench_synthesis(rounds=1, device="cpu", cases=("convnet-32",)))
    assert row.keys() == {
        *("case", "device", "steps_per_s", "ratio_published", "ratio_published_range"),
        *("ratio_fair", "ratio_fair_range", "share_of_ceiling", "note"),
    }
    assert row["case"] == "synthesis convnet-32 batch 100"
    assert min(row[name] for name in ("steps_per_s", "ratio_published", "ratio_fair", "share_of_ceiling")) > 0


def test_case_whose_package_is_missing_is_skipped_with_one_line(monkeypatch, caplog):
    absent = cases.Case(network="no_such_package.x:net", size=8, classes=2, cuda_batch=2, cpu_batch=2)
    monkeypatch.setitem(CASES, "absent", absent)
    assert not list(bench_synthesis(rounds=1, device="cpu", cases=("absent",)))
    lines = [record.message for record in caplog.records]
    assert lines == ["case absent is skipped: it needs no_such_package; pip install 'raydfkd[bench]'"]


def test_all_cases_are_measured_on_cuda_and_the_quick_ones_on_cpu():
    assert list(choose_cases((), CUDA)) == list(CASES)
    assert {"convnet-32", "resnet18-224"} <= choose_cases((), CPU).keys() < CASES.keys()
    assert list(choose_cases(("resnet50-224",), CPU)) == ["resnet50-224"]


def test_unknown_case_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="--case resnet50: no such case.*resnet50-224"):
        list(bench_synthesis(device="cpu", cases=("resnet50",)))


def test_resnet34_of_small_images_keeps_their_resolution_in_the_first_stage():
    network = resnet34_32().eval()
    assert sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in network.modules()) == 33
    assert network.layer1(network.maxpool(network.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 64, 32, 32)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_untrained_batchnorm_gets_the_statistics_of_its_own_input():
    recipe = recipe_of(CASES["convnet-32"], CPU, precision="float32")
    teacher = build_teacher(recipe, CPU)
    caught = []
    teacher.body[1][1].register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    teacher(torch.randn(64, 1, 32, 32))
    var, mean = torch.var_mean(caught[0], (0, 2, 3))
    assert (teacher.body[1][1].running_mean - mean).abs().max() < 0.3 * var.sqrt().max()
    torch.testing.assert_close(teacher.body[1][1].running_var, var, rtol=0.3, atol=0)


@pytest.mark.parametrize("loop", [published_loop, fair_loop])
def test_loop_to_measure_against_makes_progress_on_its_own_copy_of_the_images(loop):
    teacher = small_teacher()
    images = torch.randn(6, 1, 8, 8)
    before = images.clone()
    options = {"precision": torch.bfloat16} if loop is fair_loop else {}
    step = loop(teacher, images, torch.arange(6) % 3, lr=0.1, **options)
    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert torch.equal(images, before)


def test_both_loops_have_the_same_objective():
    torch.manual_seed(0)
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    losses = []
    for loop, options in ((published_loop, {}), (fair_loop, {"precision": torch.float32})):
        torch.manual_seed(1)
        losses.append(float(loop(small_teacher(), images, targets, lr=0.1, **options)()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_work_of_a_step_is_counted_forward_and_for_the_images_gradient():
    images = torch.zeros(6, 1, 8, 8)
    convolution, linear = 2 * 6 * 4 * 36 * 9, 2 * 6 * 144 * 3
    cost = cost_of_step(small_teacher(), images, precision=torch.bfloat16)
    assert cost.flops == 2 * (convolution + linear)
    assert cost.bytes == PASSES * 2 * (6 * 4 * 36)


def test_the_slower_of_arithmetic_and_memory_binds():
    ceilings = Ceilings(flops_per_s=10.0, bytes_per_s=100.0)
    assert ceilings.least_seconds(Cost(flops=20.0, bytes=100.0)) == 2
    assert ceilings.least_seconds(Cost(flops=20.0, bytes=500.0)) == 5


def test_ceilings_of_this_machine_are_plausible():
    found = measure_ceilings(CPU, torch.float32)
    assert 1e9 < found.flops_per_s < 1e14
    assert 1e8 < found.bytes_per_s < 1e13


def test_ratio_is_the_median_over_pairs_with_the_least_and_the_greatest(monkeypatch):
    clock = iter([0, 1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 16])  # seconds of three pairs: 1 and 1, 1 and 2, 1 and 10
    monkeypatch.setattr("raydfkd.bench.table.time.perf_counter", lambda: next(clock))
    speed, ratio = alternate(lambda: 10, lambda: 10, rounds=3)
    assert speed == pytest.approx(10)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2, 1, 10))
    row = Row(case="a", device="cpu", ratio_raw=ratio)
    assert json.loads(row.to_json(torch="2")) == {
        **{"case": "a", "device": "cpu", "ratio_raw": 2.0, "ratio_raw_range": [1.0, 10.0], "torch": "2"}
    }
    assert table([row]).splitlines()[1].endswith("  2.00 (1.00-10.00)")


def test_table_leaves_out_columns_that_no_row_has():
    text = table([Row(case="a", device="cpu", rows_per_s=1234.5), Row(case="b", device="cpu")])
    assert text.splitlines() == ["case  device  rows_per_s", "a     cpu     1,234.50", "b     cpu     -"]
