"""What the engine promises, on a GPU; skipped where there is none. `pytest tests/test_cuda.py`, a minute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import SYNTHESIZERS_UNDER_TEST, batchnorm_teacher, joined, toy_images, toy_recipe, toy_view, unit_of

from raydfkd.bench.cases import CASES, build_teacher, recipe_of
from raydfkd.bench.generators import GeneratorCase, build_generators, one_by_one_step, stacked_step
from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.config.load import load_recipe
from raydfkd.distillation.trainer import TrainingHooks
from raydfkd.distillation.training import StudentTraining
from raydfkd.job import open_job
from raydfkd.losses.objective import TERMS
from raydfkd.networks.observed import Need, ObservedNetwork
from raydfkd.networks.teacher import open_teacher
from raydfkd.runner.run import run
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
JOBS = Path(__file__).parents[1] / "jobs"
ON_CUDA = ["runtime.device=cuda"]
FIVE_IMAGES = ["transfer_set.images_per_class=5", "transfer_set.unit.images_per_class=5"]


def gradient_of(observed, images, groups=1):
    """What the network says of ``images``, and the gradient of a number made of all of it."""
    images = images.detach().requires_grad_()
    seen = observed(images, groups=groups)
    total = seen.logits.square().mean() + sum(one.mean.square().mean() + one.var.mean() for one in seen.moments)
    (gradient,) = torch.autograd.grad(total, images)
    return seen, gradient.cpu()


def distance(one, other):
    return ((one.detach().cpu() - other.detach().cpu()).norm() / other.detach().norm().cpu()).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "within"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("need", "groups"), [(Need.MOMENTS, 1), (Need.CLASS_MOMENTS, 4), (Need.IMAGE_MOMENTS, 64)])
def test_observed_network_says_on_cuda_what_it_says_on_cpu(caplog, compiled, precision, within, need, groups):
    images = toy_images(64)
    taps = frozenset({Need.FEATURES, need})
    there = ObservedNetwork(batchnorm_teacher(), taps=taps, frozen=True, compiled=compiled, precision=precision)
    seen, gradient = gradient_of(there.to(CUDA), images.to(CUDA), groups)
    here, expected = gradient_of(ObservedNetwork(batchnorm_teacher(), taps=taps, frozen=True), images, groups)
    assert distance(gradient, expected) < within
    assert distance(seen.logits, here.logits) < within
    assert distance(seen.features, here.features) < within
    for found, wanted in zip(seen.moments, here.moments, strict=True):
        assert found.mean.dtype == torch.float32
        assert distance(found.mean, wanted.mean) < within
        assert distance(found.var, wanted.var) < within
    assert not [line for line in caplog.records if line.name.startswith("raydfkd")], "it is compiled without a word"


def test_deep_network_that_lies_on_the_gpu_is_not_refused_for_the_rounding_of_its_convolutions():
    recipe = recipe_of(CASES["resnet34-32"], CUDA, precision="bfloat16")
    teacher = build_teacher(recipe, CUDA)
    assert torch.backends.cudnn.allow_tf32
    ObservedNetwork(teacher, taps=frozenset({Need.MOMENTS}), frozen=True, image_shape=(3, 32, 32))
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("total_variation", {"norm": norm}) for norm in ("l2", "l1", "squared")],
        ("image_l2", {}),
    ],
)
def test_prior_that_is_compiled_has_the_value_and_gradient_of_the_plain_one(name, options):
    term, found = TERMS.build(name, options, where="test"), []
    for compiled in (False, True):
        images = toy_images(6).detach().to(CUDA).requires_grad_()
        value = term(replace(toy_view(toy_images(6)), images=images, compiled=compiled))
        found.append((value.detach(), *torch.autograd.grad(value, images)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def made_on(device, recipe, unit, log=lambda _: None):
    synthesizer = build_synthesizer(recipe, open_teacher(recipe).module.to(device), device)
    return list(synthesizer.produce(unit.request, log))


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_synthesis_on_cuda_begins_where_that_on_cpu_does(tmp_path, synthesizer):
    recipe, unit = toy_recipe(tmp_path, synthesizer=synthesizer), unit_of((3, 1), 4)
    looks = {device: [] for device in (CPU, CUDA)}
    batches = {device: joined(made_on(device, recipe, unit, looks[device].append)) for device in looks}
    first, same = (looks[device][0] for device in looks)
    assert first == pytest.approx(same, rel=1e-2)
    assert batches[CUDA].labels.tolist() == batches[CPU].labels.tolist()
    assert batches[CUDA].images.device == CPU


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_unit_that_is_left_on_cuda_and_gone_on_with_has_the_same_images(tmp_path, synthesizer, precision):
    made = []
    for stop_after in (None, 4):
        settings = [f"synthesis.precision={precision}", *FIVE_IMAGES, *ON_CUDA]
        recipe = toy_recipe(tmp_path / str(stop_after), settings, synthesizer=synthesizer)
        job = open_job(recipe)
        job.transfer_set.create()
        steps = 0

        def should_stop(stop_after=stop_after):
            nonlocal steps
            steps += 1
            return steps - 1 == stop_after

        def worker(job=job, should_stop=should_stop):
            return SynthesisWorker(job, open_teacher(job.recipe), device=CUDA, should_stop=should_stop)

        if stop_after is not None:
            with pytest.raises(Interrupted):
                worker().run(job.units[0])
        commit = worker().run(job.units[0])
        made.append(torch.cat([job.transfer_set.read(part).images.float() for part in commit.parts]))
    assert (made[0] - made[1]).abs().mean() < 1, "of 255 levels"


@pytest.mark.parametrize("form", ["auto", "loop", "vmap", "grouped"])
def test_stack_of_generators_makes_on_cuda_the_images_of_training_one_by_one(form):
    case = GeneratorCase(size=8, options={"latent": 4, "width": 8}, cpu=(), cuda=())
    made, latents = build_generators(case, 3), torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    stacked = stacked_step(made, latents.to(CUDA), form)
    single = one_by_one_step(made, latents.to(CUDA))
    for _ in range(3):
        torch.testing.assert_close(stacked(), single(), rtol=1e-2, atol=1e-2)


def test_batch_that_the_gpu_has_no_memory_for_is_halved(tmp_path, caplog):
    count = 100_000
    recipe = toy_recipe(
        tmp_path,
        [f"synthesis.batch_size={2 * count}", "synthesis.stages=[{steps: 3}]", "teacher.options={widths: [8, 12]}"],
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.4e9) / total)
    try:
        batches = made_on(CUDA, recipe, unit_of((3, 1), count))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(map(len, batches)) == 2 * count
    assert f"no memory for a batch of {2 * count} images; going on with half as many" in caplog.text


def test_student_on_cuda_goes_on_from_a_checkpoint_of_it(tmp_path):
    job = open_job(toy_recipe(tmp_path, [*ON_CUDA, "distill.precision=bfloat16", "distill.source.kind=snapshot"]))
    job.transfer_set.create()
    worker = SynthesisWorker(job, open_teacher(job.recipe), device=CUDA)
    for unit in job.units:
        worker.run(unit)
    states = []

    def training(**hooks):
        told = TrainingHooks(**{"on_log": lambda _: None, **hooks})
        return StudentTraining(job, open_teacher(job.recipe), job.phases[-1], hooks=told)

    wants = iter([False, False, True])
    whole = training(
        on_checkpoint=lambda state: states.append(checkpoint_bytes(state)), wants_checkpoint=lambda: next(wants, False)
    ).run()
    resumed = training()
    resumed.load_state_dict(read_checkpoint(states[0]))
    assert resumed.trainer.step == 3
    student = resumed.run()
    for name, weights in whole.items():
        torch.testing.assert_close(student[name], weights, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("job", ["smoke", "digits-generators"])
def test_run_on_cuda_ends_with_a_student_that_was_judged(tmp_path, job):
    source = str(JOBS / "smoke.yaml") if job == "smoke" else job
    fewer = ["transfer_set.images_per_class=80", "distill.steps=200"] if job != "smoke" else []
    report = run(load_recipe(source, ["runtime.executor=local", *ON_CUDA, *fewer], str(tmp_path))).report
    json.dumps(report)
    assert report["student"]["top1"] > (0.0 if job == "smoke" else 0.5)
