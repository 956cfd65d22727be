from __future__ import annotations

import pytest
import torch
from toy import (
    SYNTHESIZERS_UNDER_TEST,
    assert_same_rows,
    batches_of,
    batchnorm_teacher,
    joined,
    plain_teacher,
    toy_recipe,
    worker_of,
)

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.shards import rows_digest
from raydfkd.devices import pick_device, worker_device
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.networks.weights import save_bytes
from raydfkd.synthesis import worker as in_worker
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.synthesis.judge import ObjectiveNotFiniteError
from raydfkd.synthesis.synthesizer import SYNTHESIZERS
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import UnitProgress

CPU = torch.device("cpu")
BY_CLASS = (
    "synthesis.objective=[{{term: cross_entropy, weight: {0}}}, "
    "{{term: bn_moments, form: kl, scope: class, weight: {0}}}, {{term: image_l2, weight: {0}}}]"
)


@pytest.fixture(params=SYNTHESIZERS_UNDER_TEST)
def synthesizer(request):
    return request.param


@pytest.fixture
def recipe(tmp_path, synthesizer):
    return toy_recipe(tmp_path, synthesizer=synthesizer)


def worker_and_job(recipe, **arguments):
    job = open_job(recipe)
    job.transfer_set.create()
    return worker_of(job, **arguments), job


def test_same_request_twice_gives_the_same_bits(recipe):
    assert_same_rows(joined(batches_of(recipe)), joined(batches_of(recipe)))


def test_units_of_a_plan_differ(recipe):
    digests = {rows_digest(batches_of(recipe, unit)) for unit in recipe.plan()}
    assert len(digests) == len(recipe.plan())


def test_seed_of_the_recipe_changes_the_images(tmp_path, synthesizer, recipe):
    other = toy_recipe(tmp_path, ["seed=8"], synthesizer=synthesizer)
    assert not torch.equal(joined(batches_of(recipe)).images, joined(batches_of(other)).images)


def test_result_does_not_depend_on_torch_s_global_random_numbers(recipe):
    torch.manual_seed(1)
    one = joined(batches_of(recipe))
    torch.manual_seed(2)
    assert_same_rows(joined(batches_of(recipe)), one)


def test_synthesis_leaves_torch_s_global_random_numbers_alone(recipe):
    teacher = open_teacher(recipe).module
    synthesizer = build_synthesizer(recipe, teacher, CPU)
    state = torch.get_rng_state()
    list(synthesizer.produce(recipe.plan()[0].request, lambda _: None))
    assert torch.equal(torch.get_rng_state(), state)


def test_result_does_not_depend_on_what_the_worker_made_before(recipe):
    fresh = joined(batches_of(recipe))
    first, *others = recipe.plan()
    teacher = open_teacher(recipe).module
    used = build_synthesizer(recipe, teacher, CPU)
    for unit in others:
        list(used.produce(unit.request, lambda _: None))
    assert_same_rows(joined(list(used.produce(first.request, lambda _: None))), fresh)


@pytest.mark.parametrize("augment", ["[]", "[{kind: jitter, pixels: 2}, flip]"])
@pytest.mark.parametrize("weight", [1.0, 1e-7])
def test_class_yields_the_same_images_alone_as_packed_with_others(tmp_path, synthesizer, augment, weight):
    """Also where gradients are as small as Adam's eps, and the step depends on their scale."""
    made = {}
    for classes in (1, 2, 4):
        settings = [BY_CLASS.format(weight), f"synthesis.augment={augment}", f"transfer_set.unit.classes={classes}"]
        if synthesizer == "pixels":
            settings.append(f"synthesis.batch_size={2 * classes}")
        recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
        repeat = [joined(batches_of(recipe, unit)) for unit in recipe.plan() if unit.id.startswith("r000")]
        everything = joined(repeat)
        made[classes] = torch.stack([everything.images[everything.labels == label] for label in range(4)])
    for classes in (2, 4):
        difference = (made[classes].int() - made[1].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_images_are_stored_pixels_of_the_teacher_s_image_space(recipe):
    made = joined(batches_of(recipe))
    assert made.images.dtype == torch.uint8
    assert made.images.shape == (6, 1, 8, 8)
    assert made.images.float().std() > 10
    assert made.labels.dtype == torch.int64
    assert made.teacher_logits.dtype == torch.float16


def test_stored_logits_are_the_teacher_s_answer_to_the_stored_pixels(recipe):
    made = joined(batches_of(recipe))
    with torch.no_grad():
        expected = batchnorm_teacher()((made.images.float() / 255 - 0.4) / 0.3)
    torch.testing.assert_close(made.teacher_logits.float(), expected, rtol=2e-3, atol=2e-3)


def test_batch_owns_its_storage_and_later_batches_leave_it_alone(tmp_path, synthesizer):
    recipe = toy_recipe(tmp_path, ["transfer_set.images_per_class=5", "transfer_set.unit.images_per_class=5"],
                        synthesizer=synthesizer)  # fmt: skip
    teacher = open_teacher(recipe).module
    stream = build_synthesizer(recipe, teacher, CPU).produce(recipe.plan()[0].request, lambda _: None)
    first = next(stream)
    copies = [tensor.clone() for tensor in (first.images, first.labels, first.teacher_logits)]
    batches = [first, *stream]
    assert len(batches) > 1
    for tensor, copy in zip((first.images, first.labels, first.teacher_logits), copies, strict=True):
        assert torch.equal(tensor, copy)
    storages = set()
    for batch in batches:
        for tensor in (batch.images, batch.labels, batch.teacher_logits):
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == 3 * len(batches)


def test_diverged_objective_fails_the_unit_naming_step_and_term(tmp_path, synthesizer):
    broken = batchnorm_teacher()
    broken.head.weight.data[0] = broken.head.bias.data[0] = 3e38  # finite, as weights must be; the logit is not
    weights = tmp_path / "broken.safetensors"
    weights.write_bytes(save_bytes(broken))
    objective = "synthesis.objective=[{term: cross_entropy, name: target}, image_l2]"
    recipe = toy_recipe(tmp_path, [f"teacher.weights={weights}", objective], synthesizer=synthesizer)
    with pytest.raises(ObjectiveNotFiniteError, match=r"objective is (nan|inf) at step 1 \(total, target\)"):
        batches_of(recipe)


def test_objective_that_diverges_later_is_caught_at_the_last_step(tmp_path):
    """Pixels that no clip holds back run away; float32 overflows in the squares."""
    overrides = ["synthesis.objective=[{term: total_variation, norm: squared, weight: -1}]", "synthesis.clip=false"]
    stages = "synthesis.stages=[{steps: 5}]"
    recipe = toy_recipe(tmp_path, [*overrides, stages, "synthesis.lr=1e25", "synthesis.warmup=1"])
    with pytest.raises(ObjectiveNotFiniteError, match=r"at step 5 \(total, total_variation\)"):
        batches_of(recipe)


def test_committed_unit_holds_what_the_synthesizer_made(recipe):
    worker, job = worker_and_job(recipe)
    unit = job.units[1]
    commit = worker.run(unit, attempt=2)
    made = joined(batches_of(recipe, unit))
    assert (commit.unit, commit.attempt, commit.images) == (unit.id, 2, 6)
    assert commit.content == rows_digest([made])
    assert commit.curve == ()
    assert job.snapshot().units == (unit.id,)


def test_content_does_not_depend_on_the_order_or_repetition_of_units(tmp_path, synthesizer):
    digests = []
    for name, order in (("forward", (0, 1, 2, 3)), ("backward", (3, 2, 2, 1, 0, 3))):
        recipe = toy_recipe(tmp_path, [f"transfer_set.uri={tmp_path / name}"], synthesizer=synthesizer)
        worker, job = worker_and_job(recipe)
        for index in order:
            worker.run(job.units[index])
        assert job.snapshot().images == job.planned_images
        digests.append(job.transfer_set.content_digest())
    assert digests[0] == digests[1]


def test_size_of_parts_does_not_change_the_content(tmp_path, synthesizer):
    contents = set()
    for rows in (1, 4, 4096):
        overrides = [f"transfer_set.uri={tmp_path / str(rows)}", f"transfer_set.part_rows={rows}"]
        worker, job = worker_and_job(toy_recipe(tmp_path, overrides, synthesizer=synthesizer))
        contents.add(worker.run(job.units[0]).content)
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("synthesizer", "settings", "looks", "steps"),
    [
        ("generator", ["synthesis.steps=120", "synthesis.emissions=1"], [1, 50, 100, 120], 120),
        ("generator", ["synthesis.steps=3", "synthesis.emissions=1", "synthesis.renewal={steps: 2}"], [1, 5], 5),
        ("pixels", ["synthesis.stages=[{steps: 60}]", "synthesis.batch_size=6"], [1, 50, 60], 60),
        ("pixels", ["synthesis.stages=[{steps: 2}, {steps: 3}]", "synthesis.batch_size=4"], [1, 2, 5] * 2, 10),
    ],
)
def test_progress_has_each_look_at_the_objective_and_says_how_far_the_unit_is(
    tmp_path, synthesizer, settings, looks, steps
):
    told = []
    recipe = toy_recipe(tmp_path, settings, synthesizer=synthesizer)
    worker, job = worker_and_job(recipe, on_progress=told.append)
    worker.run(job.units[2])
    assert {progress.unit for progress in told} == {job.units[2].id}
    assert {progress.steps for progress in told} == {steps}
    seen = [progress for progress in told if progress.objective]
    assert [progress.objective["step"] for progress in seen] == looks
    assert all({"total", "cross_entropy", "bn_moments"} <= progress.objective.keys() for progress in seen)
    done = [progress.step for progress in told]
    assert done == sorted(done)
    assert seen[-1].step == steps, "the last look is at the last step"
    assert seen[-1].share == 1.0


def test_worker_says_that_it_is_alive_where_the_objective_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(in_worker, "TELL_EVERY_S", 0.0)
    told = []
    settings = ["synthesis.steps=7", "synthesis.emissions=1"]
    worker, job = worker_and_job(toy_recipe(tmp_path, settings, synthesizer="generator"), on_progress=told.append)
    worker.run(job.units[0])
    assert [progress.step for progress in told if not progress.objective] == [0, 1, 2, 3, 4, 5, 6]


def test_share_of_a_unit_is_at_most_one_and_zero_where_nobody_says_how_many_steps_there_are():
    shares = [UnitProgress(unit="u", step=step, steps=steps).share for step, steps in ((0, 4), (3, 4), (9, 4), (9, 0))]
    assert shares == [0.0, 0.75, 1.0, 0.0]


class Stumbles:
    """Makes one batch and then fails."""

    def __init__(self, setting):
        self._shape = setting.space.shape

    def produce(self, request, log, hook):
        yield SyntheticBatch(
            images=torch.zeros(4, *self._shape, dtype=torch.uint8),
            labels=torch.zeros(4, dtype=torch.int64),
            teacher_logits=torch.zeros(4, 4).half(),
            objective=0.0,
        )
        raise ObjectiveNotFiniteError("objective is nan at step 7 (total)")


def test_nothing_remains_of_a_unit_that_fails_half_way(tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHESIZERS._factories, "stumbles", Stumbles)
    settings = ["synthesis={synthesizer: stumbles, objective: [one_hot]}", "transfer_set.part_rows=1"]
    worker, job = worker_and_job(toy_recipe(tmp_path, settings))
    with pytest.raises(ObjectiveNotFiniteError):
        worker.run(job.units[0])
    assert job.transfer_set.store.list("parts") == []
    assert job.snapshot().images == 0


def test_synthesizer_that_does_not_say_how_many_steps_it_takes_is_as_good(tmp_path, monkeypatch):
    class Silent(Stumbles):
        def produce(self, request, log, hook):
            yield next(super().produce(request, log, hook))
            log({"step": 1, "total": 0.5})

    monkeypatch.setitem(SYNTHESIZERS._factories, "silent", Silent)
    told = []
    settings = ["synthesis={synthesizer: silent, objective: [one_hot]}"]
    worker, job = worker_and_job(toy_recipe(tmp_path, settings), on_progress=told.append)
    assert worker.run(job.units[0]).images == 4
    assert [(progress.steps, progress.objective) for progress in told] == [(0, {"step": 1, "total": 0.5})]


def test_record_of_a_unit_of_3000_steps_is_small_whatever_was_said_of_them(tmp_path, monkeypatch):
    class Talks(Stumbles):
        def produce(self, request, log, hook):
            for step in range(1, 3001):
                hook(dict)
                log({"step": step, "total": 1 / step, "cross_entropy": 0.5 / step, "bn_moments": 0.5 / step})
            yield next(super().produce(request, log, hook))

    monkeypatch.setitem(SYNTHESIZERS._factories, "talks", Talks)
    told = []
    settings = ["synthesis={synthesizer: talks, objective: [one_hot]}"]
    worker, job = worker_and_job(toy_recipe(tmp_path, settings), on_progress=told.append)
    unit = job.units[0]
    worker.run(unit)
    assert len([progress for progress in told if progress.objective]) == 3000
    assert len(job.transfer_set.store.get(f"commits/{unit.id}.json")) < 1000


def test_worker_refuses_weights_other_than_those_the_set_began_with(tmp_path):
    recipe = toy_recipe(tmp_path)
    job = open_job(recipe)
    (tmp_path / "teacher.safetensors").write_bytes(save_bytes(batchnorm_teacher(seed=1)))
    with pytest.raises(RecipeError, match="not the weights that this run began with"):
        SynthesisWorker(job, open_teacher(recipe), device=CPU)


def test_worker_computes_with_the_recipe_s_threads_and_gives_the_rest_back(tmp_path, monkeypatch):
    seen = []

    class Counts(Stumbles):
        def produce(self, request, log, hook):
            seen.append(torch.get_num_threads())
            yield next(super().produce(request, log, hook))

    monkeypatch.setitem(SYNTHESIZERS._factories, "counts", Counts)
    settings = ["synthesis={synthesizer: counts, objective: [one_hot], threads: 2}"]
    worker, job = worker_and_job(toy_recipe(tmp_path, settings))
    before = torch.get_num_threads()
    worker.run(job.units[0])
    assert seen == [2]
    assert torch.get_num_threads() == before


def plain_teacher_settings(tmp_path):
    """Replaces the teacher by one without BatchNorm that takes 8x8 images and no others."""
    weights = tmp_path / "plain.safetensors"
    weights.write_bytes(save_bytes(plain_teacher()))
    return ["teacher.network=toy:PlainNet", "teacher.options={}", f"teacher.weights={weights}"]


def test_recipe_that_matches_moments_is_refused_for_a_teacher_without_batchnorm(tmp_path, synthesizer):
    with pytest.raises(RecipeError, match="BatchNorm"):
        batches_of(toy_recipe(tmp_path, plain_teacher_settings(tmp_path), synthesizer=synthesizer))


def test_teacher_without_batchnorm_can_be_inverted_by_its_answers_alone(tmp_path, synthesizer):
    settings = [*plain_teacher_settings(tmp_path), "synthesis.objective=[cross_entropy, activation]"]
    if synthesizer == "pixels":
        settings.append("synthesis.stages=[{steps: 3}]")
    assert len(joined(batches_of(toy_recipe(tmp_path, settings, synthesizer=synthesizer)))) == 6


def test_pooling_to_a_size_that_the_teacher_cannot_take_is_refused_before_any_work(tmp_path):
    settings = [*plain_teacher_settings(tmp_path), "synthesis.objective=[cross_entropy]"]
    with pytest.raises(RecipeError, match="pool"):
        batches_of(toy_recipe(tmp_path, settings))


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda"), (2, "cuda")])
def test_worker_without_a_gpu_of_its_own_leaves_those_of_its_machine_alone(monkeypatch, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_device("auto", gpus).type == device
    assert worker_device("cpu", gpus).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker_device("auto", gpus).type == "cpu"
    with pytest.raises(RecipeError, match="no CUDA device"):
        worker_device("cuda", gpus)


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(RecipeError, match="no CUDA device; use auto or cpu"):
        pick_device("cuda")
