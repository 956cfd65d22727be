from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import (
    SPACE,
    PlainNet,
    batchnorm_teacher,
    fresh_student_of,
    plain_teacher,
    quiet_events,
    synthesize_here,
    toy_recipe,
    training_of,
)

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.config.schema import DistillSpec, OptimizerSpec
from raydfkd.data.news import tell_of_change
from raydfkd.data.sources import Ranks, StudentBatch
from raydfkd.distillation.average import WeightAverage
from raydfkd.distillation.criteria import HardLabels
from raydfkd.distillation.loss import StudentLoss
from raydfkd.distillation.trainer import (
    StepHooks,
    StudentTrainer,
    TrainingHooks,
    divergences,
    ignore,
    weighted,
)
from raydfkd.distillation.training import StudentCheckpoint, StudentTraining
from raydfkd.errors import StudentDivergedError
from raydfkd.images.augment import AUGMENTATIONS
from raydfkd.images.pixels import PixelRange, nominal_from_uint8
from raydfkd.job import open_job
from raydfkd.networks.observed import Observation, ObservedNetwork
from raydfkd.networks.optimizers import build_optimizer
from raydfkd.networks.small import ConvNet
from raydfkd.networks.teacher import open_teacher
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.units import Phase

CPU = torch.device("cpu")
AUGMENTED = (
    "distill.augment=[{kind: affine, degrees: 15, shift: 0.1}, {kind: noise, std: 0.1}, flip, "
    "{kind: jitter, pixels: 1}, mixup]"
)
STAGED = (
    "distill.criterion=[{kind: activation_boundary, student: body.0.1, teacher: body.0.1, until: 0.7},"
    "{kind: hint, from: 0.3, weight: {from: 1, to: 0.1}}, {kind: hard_labels, smoothing: 0.1, weight: 0.1}]"
)
"""Criteria that take turns, with two connectors between networks of different width."""


VIEWED = "distill.augment=[{kind: affine, degrees: 15, shift: 0.1}, flip, {kind: jitter, pixels: 1}]"


class DropoutNet(PlainNet):
    """A student that draws random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.Dropout(0.5))


def job_with_images(folder, *overrides):
    job = open_job(toy_recipe(folder, ["synthesis.stages=[{steps: 1}]", *overrides]))  # any images will do
    synthesize_here(job, quiet_events(folder))
    return job


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [AUGMENTED],
        ["distill.optimizer={kind: sgd, lr: 0.05, schedule: cosine, weight_decay: 1e-3}"],
        ["distill.optimizer={kind: adam, lr: 0.01, schedule: constant}", "distill.teacher_logits=stored"],
        ["student={network: 'test_trainer:DropoutNet'}"],
        [STAGED, "distill.precision=bfloat16"],
        [STAGED, "distill.ema=0.9", "distill.augment=[cutmix]", "distill.clip_norm=0.1"],
        ["distill.accumulate=3", "distill.optimizer={lr: 0.01, schedule: cosine, warmup: 0.5}"],
        ["distill.source=priority"],
        ["distill.source=priority", "distill.accumulate=3"],
        ["distill.source={kind: views, views: 3, top_k: 2}", VIEWED],
    ],
    ids=[
        "plain",
        "augmented",
        "sgd",
        "stored",
        "dropout",
        "connectors",
        "average",
        "parts",
        "priority",
        "both",
        "views",
    ],
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, overrides):
    job = job_with_images(tmp_path, "distill.steps=9", "distill.checkpoint_every=4", *overrides)
    checkpoints, curve = [], []
    hooks = {"on_log": curve.append, "on_checkpoint": lambda state: checkpoints.append(checkpoint_bytes(state))}
    expected = training_of(job, **hooks).run()
    assert len(checkpoints) == 3
    for content, step in zip(checkpoints, (4, 8, 9), strict=True):
        torch.manual_seed(step)  # an interrupted process starts with other global random numbers
        resumed_curve = []
        resumed = training_of(job, on_log=resumed_curve.append)
        resumed.load_state_dict(read_checkpoint(content))
        assert resumed.trainer.step == step
        assert_same_weights(resumed.run(), expected)
        assert resumed_curve == curve[step:]


class Killed(BaseException):
    """Ends a training where no code of ours expects it."""


class GrowingSet:
    """A job's set whose units are committed one by one as its student makes steps."""

    def __init__(self, folder, *overrides):
        self.job = job_with_images(folder, *overrides)
        self._store = self.job.transfer_set.store
        self._records = {}
        for path in self._store.list("commits"):
            self._records[path] = self._store.get(path)
            self._store.delete(path)
        self.job.transfer_set.reopen(self.job.phases[-1].plan)
        self.commit()

    def commit(self):
        path = min(self._records)
        self._store.put(path, self._records.pop(path))
        tell_of_change(self._store)

    def train(self, monkeypatch, checkpoint=None, *, killed_at=None):
        """Checkpoints by step, hashes of each step's images and labels, and the final weights."""
        checkpoints, batches = {}, {}
        train_step = StudentTrainer._train_step

        def watched(trainer, batch):
            if trainer.step == killed_at:
                raise Killed
            if trainer.step in (2, 5, 7) and len(self._records) == {2: 3, 5: 2, 7: 1}[trainer.step]:
                self.commit()
            batches[trainer.step] = hash(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes())
            return train_step(trainer, batch)

        monkeypatch.setattr(StudentTrainer, "_train_step", watched)
        training = training_of(
            self.job,
            on_checkpoint=lambda state: checkpoints.update({state["trainer"]["step"]: checkpoint_bytes(state)}),
        )
        if checkpoint is not None:
            training.load_state_dict(read_checkpoint(checkpoint))
        student = None
        with contextlib.suppress(Killed):
            student = {name: value.clone() for name, value in training.run().items()}
        monkeypatch.undo()
        return checkpoints, batches, student


@pytest.mark.parametrize(
    "source", ["growing", "{kind: growing, refresh_steps: 2}", "{kind: priority, refresh_steps: 2}"]
)
@pytest.mark.parametrize("killed_at", [*(pytest.param(step, marks=pytest.mark.cluster) for step in (6, 9)), 11])
def test_training_that_is_killed_while_the_set_grows_ends_in_the_same_student(tmp_path, monkeypatch, source, killed_at):
    """Steps after the last checkpoint are made again with the batches that they had, though the set is larger now."""
    settings = ["distill.steps=16", "distill.checkpoint_every=4", f"distill.source={source}"]
    settings += ["distill.batch_size=2", "distill.source.complete_by=1.0"]
    _, expected, student = GrowingSet(tmp_path / "one", *settings).train(monkeypatch)
    assert len(expected) == 16

    grows = GrowingSet(tmp_path / "other", *settings)
    checkpoints, before, _ = grows.train(monkeypatch, killed_at=killed_at)
    saved = max(checkpoints)
    assert saved < killed_at == len(before)
    _, after, resumed = grows.train(monkeypatch, checkpoints[saved])
    assert {**before, **after} == expected
    assert after == {step: expected[step] for step in range(saved, 16)}
    assert_same_weights(resumed, student)


def test_training_in_two_calls_makes_the_steps_of_one_with_the_learning_rates_of_one(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=9", "distill.checkpoint_every=100")
    expected = training_of(job).run()
    states = []
    half = Phase(units=job.units, until_step=5)
    first = training_of(job, half, on_checkpoint=lambda state: states.append(checkpoint_bytes(state)))
    first.run()
    assert first.trainer.step == 5
    assert len(states) == 1, "there is a checkpoint to go on from"
    second = training_of(job)
    second.load_state_dict(read_checkpoint(states[0]))
    assert_same_weights(second.run(), expected)
    assert_same_weights(second.run(), expected)
    first.run()
    assert first.trainer.step == 5


def test_student_is_published_when_fresh_every_so_often_and_at_the_end(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=9", "distill.publish_every=4", "distill.checkpoint_every=4")
    versions, states = {}, []

    def publish(version, state):
        assert version not in versions
        versions[version] = {name: value.clone() for name, value in state.items()}

    training = training_of(
        job,
        on_checkpoint=lambda state: states.append((len(versions), checkpoint_bytes(state))),
        on_publish=publish,
    )
    student = training.run()
    assert list(versions) == [0, 4, 8, 9]
    assert_same_weights(versions[0], fresh_student_of(job).state_dict())
    assert_same_weights(versions[9], student)
    assert [published for published, _ in states] == [2, 3, 4], "a kill after the checkpoint would leave a version out"

    versions.clear()
    resumed = training_of(job, on_publish=publish)
    resumed.load_state_dict(read_checkpoint(states[0][1]))
    resumed.run()
    assert list(versions) == [8, 9]


def test_only_the_first_rank_publishes(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=1")
    published = []
    training = StudentTraining(
        job,
        open_teacher(job.recipe),
        job.phases[0],
        hooks=TrainingHooks(on_log=ignore, on_publish=lambda *_: published.append(_)),
        ranks=Ranks(rank=1, size=2, agree=lambda _: job.snapshot()),
        device=CPU,
    )
    training.run()
    assert not published


def test_checkpoint_is_made_out_of_turn_when_one_is_wanted(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=6", "distill.checkpoint_every=100")
    asked, saved = [], []
    training = training_of(
        job,
        on_checkpoint=lambda state: saved.append(state["trainer"]["step"]),
        wants_checkpoint=lambda: asked.append(1) or len(asked) == 3,
    )
    training.run()
    assert saved == [3, 6]
    assert len(asked) == 6, "every rank is asked equally often"


def test_student_computes_in_float32_where_there_is_no_bfloat16(monkeypatch):
    monkeypatch.setattr("raydfkd.devices.has_bfloat16", lambda _: False)
    losses = []
    for precision in ("bfloat16", "float32"):
        trainer = trainer_of(plain_teacher(seed=1), precision=precision, on_log=losses.append)
        trainer.fit([batch_of(slice(0, 8))], steps=1)
    assert losses[0]["loss"] == losses[1]["loss"]


def test_training_twice_gives_the_same_student(tmp_path):
    job = job_with_images(tmp_path, AUGMENTED)
    assert_same_weights(training_of(job).run(), training_of(job).run())


def test_seed_of_the_recipe_changes_the_student(tmp_path):
    one, other = (training_of(job_with_images(tmp_path / str(seed), f"seed={seed}")).run() for seed in (1, 2))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("criterion", ["logit_l1", "soft_kl", "hard_labels"])
def test_loss_falls_and_agreement_rises(tmp_path, criterion):
    job = job_with_images(tmp_path, "distill.steps=80", f"distill.criterion={criterion}")
    curve = []
    training_of(job, on_log=curve.append).run()
    first, last = curve[:10], curve[-10:]
    assert sum(entry["loss"] for entry in last) < 0.6 * sum(entry["loss"] for entry in first)
    if criterion != "hard_labels":  # the toy's labels are not what its teacher says
        assert sum(entry["agreement"] for entry in last) > sum(entry["agreement"] for entry in first)


def test_stored_logits_train_like_live_ones_to_the_rounding_of_float16(tmp_path):
    losses = {}
    for source in ("live", "stored"):
        curve = []
        training_of(job_with_images(tmp_path, f"distill.teacher_logits={source}"), on_log=curve.append).run()
        losses[source] = [entry["loss"] for entry in curve]
    assert losses["stored"] == pytest.approx(losses["live"], rel=1e-2)
    assert losses["stored"] != losses["live"]


def test_largest_logits_train_like_all_where_all_but_one_are_stored_and_otherwise_where_few_are(tmp_path):
    losses = []
    for number, logits in enumerate(("float16", "{kind: top_k, k: 3}", "{kind: top_k, k: 1}")):
        curve = []
        settings = ["distill.teacher_logits=stored", f"transfer_set.logits={logits}", "distill.criterion=soft_kl"]
        training_of(job_with_images(tmp_path / str(number), *settings), on_log=curve.append).run()
        losses.append([entry["loss"] for entry in curve])
    whole, three, one = losses
    assert three == pytest.approx(whole, rel=1e-2)
    assert one[0] != pytest.approx(whole[0], rel=1e-2)


def test_curve_has_the_first_and_last_step_and_every_log_every_th(tmp_path):
    curve = []
    training_of(job_with_images(tmp_path, "distill.steps=7", "distill.log_every=3"), on_log=curve.append).run()
    assert [entry["step"] for entry in curve] == [1, 3, 6, 7]
    assert [entry["images_seen"] for entry in curve] == [8, 24, 48, 56]
    assert {entry["snapshot_images"] for entry in curve} == {24}


def test_training_that_is_done_makes_no_step_more(tmp_path):
    job = job_with_images(tmp_path)
    states = []
    done = training_of(job, on_checkpoint=states.append).run()
    resumed = training_of(job, on_log=lambda _: pytest.fail("a step was made"))
    resumed.load_state_dict(read_checkpoint(checkpoint_bytes(states[-1])))
    assert_same_weights(resumed.run(), done)


def test_checkpoint_is_kept_as_one_file_and_read_back_as_it_was(tmp_path):
    job = job_with_images(tmp_path)
    states = []
    training_of(job, on_checkpoint=lambda state: states.append(checkpoint_bytes(state))).run()
    checkpoint = StudentCheckpoint(job)
    assert checkpoint.load() is None
    checkpoint.save(read_checkpoint(states[0]))
    assert checkpoint_bytes(StudentCheckpoint(job).load()) == states[0]
    other = open_job(toy_recipe(tmp_path, ["distill.steps=7"]))
    assert StudentCheckpoint(other).load() is None, "another training, in the same folder"


def batch_of(rows, *, share=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=rng)[rows]
    logits = torch.randn(24, 4, generator=rng)[rows].half()
    return StudentBatch(images=images, labels=logits.argmax(1), teacher_logits=logits, share=share, snapshot_images=24)


def trainer_of(student, *, rank=0, on_log=ignore, on_checkpoint=ignore, **changes):
    settings = {"steps": 3, "criterion": "logit_l1", "optimizer": {"lr": 0.01}, "log_every": 1, **changes}
    spec = DistillSpec.model_validate_json(json.dumps(settings))
    return StudentTrainer(
        student,
        ObservedNetwork(batchnorm_teacher(), taps=StudentLoss(spec).teacher_taps, frozen=True),
        spec,
        pixels=PixelRange(SPACE),
        device=CPU,
        seed=1,
        rank=rank,
        hooks=StepHooks(on_log=on_log, on_checkpoint=on_checkpoint),
    )


def gradient_of(batch, rank=0, **changes):
    trainer = trainer_of(plain_teacher(seed=1), rank=rank, **changes)
    trainer.fit([batch], steps=1)
    return torch.cat([parameter.grad.flatten() for parameter in trainer._trained.parameters()])


@pytest.mark.parametrize("criterion", ["logit_l1", "soft_kl", "hard_labels", "hint"])
def test_gradients_averaged_over_ranks_are_those_of_all_images_at_once(criterion):
    """Data parallelism averages; ranks with unequally many images must not count equally."""
    whole = gradient_of(batch_of(slice(0, 16)), criterion=criterion)
    small = gradient_of(batch_of(slice(0, 5), share=5 * 2 / 16), criterion=criterion)
    large = gradient_of(batch_of(slice(5, 16), share=11 * 2 / 16), rank=1, criterion=criterion)
    torch.testing.assert_close((small + large) / 2, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["logit_l1", "hint", ["soft_kl", {"kind": "hint", "weight": 0.1}]], ids=str)
@pytest.mark.parametrize("rows", [16, 13, 2])
def test_gradient_of_a_batch_in_parts_is_that_of_the_batch(criterion, rows):
    batch = batch_of(slice(0, rows), share=0.9)
    whole = gradient_of(batch, criterion=criterion, augment=["mixup"])
    parts = gradient_of(batch, criterion=criterion, augment=["mixup"], accumulate=3)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_batch_in_parts_is_logged_as_the_batch():
    curves = [], []
    for curve, accumulate in zip(curves, (1, 3), strict=True):
        criterion = ["logit_l1", {"kind": "logit_mse", "weight": 0.5}]
        trainer = trainer_of(plain_teacher(seed=1), criterion=criterion, accumulate=accumulate, on_log=curve.append)
        trainer.fit([batch_of(slice(0, 13))], steps=1)
    assert curves[1][0] == pytest.approx(curves[0][0])


def test_networks_see_a_part_of_the_batch_at_once():
    student, seen = plain_teacher(seed=1), []
    student.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])) if module.training else None)
    trainer_of(student, accumulate=3).fit([batch_of(slice(0, 16))], steps=1)
    assert seen == [6, 5, 5]


def test_gradient_is_scaled_down_to_the_norm_that_is_given_and_never_up():
    plain = gradient_of(batch_of(slice(0, 8)), criterion="hint")
    clipped = gradient_of(batch_of(slice(0, 8)), criterion="hint", clip_norm=plain.norm().item() / 4)
    torch.testing.assert_close(clipped, plain / 4, rtol=1e-4, atol=1e-6)
    same = gradient_of(batch_of(slice(0, 8)), criterion="hint", clip_norm=plain.norm().item() * 4)
    torch.testing.assert_close(same, plain, rtol=0, atol=0)


def test_connectors_are_made_from_the_seed_trained_along_and_no_part_of_the_student():
    trainers = [trainer_of(plain_teacher(seed=1), criterion="hint") for _ in range(2)]
    before = [trainer._loss.state_dict()["0"]["weight"].clone() for trainer in trainers]
    torch.testing.assert_close(*before, rtol=0, atol=0)
    trainers[0].fit([batch_of(slice(0, 8))] * 3, steps=3)
    assert not torch.allclose(trainers[0]._loss.state_dict()["0"]["weight"], before[0])
    assert trainers[0].student.state_dict().keys() == plain_teacher().state_dict().keys()


def test_connectors_leave_the_student_and_the_random_numbers_as_they_are():
    student, state = batchnorm_teacher(seed=1), torch.get_rng_state()
    trainer_of(student, criterion={"kind": "hint", "student": "body.0.0", "teacher": "body.1.0"})
    assert_same_weights(student.state_dict(), batchnorm_teacher(seed=1).state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_student_in_use_is_the_average_over_the_steps():
    weights, student = [], batchnorm_teacher(seed=1)
    trainer = trainer_of(student, steps=6, ema=0.5, on_log=lambda _: weights.append(student.head.weight.clone()))
    expected = student.head.weight.detach().clone()
    trainer.fit([batch_of(slice(0, 8))] * 5, steps=5)
    for step, weight in enumerate(weights, start=1):
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(trainer.student.head.weight, expected)
    assert not torch.allclose(trainer.student.head.weight, student.head.weight)


def test_average_is_logged_published_settled_and_saved(tmp_path):
    settings = ["distill.ema=0.9", "distill.steps=9", "distill.publish_every=4", "distill.checkpoint_every=4"]
    job = job_with_images(tmp_path, *settings)
    versions, states, curve = {}, [], []
    training = training_of(
        job,
        on_log=curve.append,
        on_checkpoint=lambda state: states.append(checkpoint_bytes(state)),
        on_publish=lambda step, state: versions.update({step: {name: value.clone() for name, value in state.items()}}),
    )
    student = training.run()
    for step, content in zip((4, 8, 9), states, strict=True):
        assert_same_weights(read_checkpoint(content)["student"], versions[step])
    assert_same_weights(student, versions[9])
    trained = training._student.state_dict()
    assert any(not torch.equal(student[name], trained[name]) for name in student)
    plain = training_of(job_with_images(tmp_path / "plain", *settings[1:]))
    torch.testing.assert_close(plain.run()["head.weight"], trained["head.weight"], rtol=0, atol=0)


def test_shared_weights_are_averaged_once():
    student = PlainNet()
    student.twin = student.head
    average = WeightAverage(student, 0.5)
    with torch.no_grad():
        before = student.head.weight.clone()
        student.head.weight.zero_()
    average.update(1000)
    torch.testing.assert_close(average.network.head.weight, before / 2)


def test_criterion_sees_labels_that_are_mixed_as_the_images_are():
    labels, images = [], []

    class Watched(HardLabels):
        def __call__(self, student, teacher, given):
            labels.append(given)
            return super().__call__(student, teacher, given)

    trainer = trainer_of(plain_teacher(seed=1), criterion="hard_labels", augment=["cutmix"])
    part = trainer._loss._parts[0]
    trainer._loss._parts = [replace(part, criterion=Watched())]
    batch = batch_of(slice(0, 8))
    trainer.fit([batch], steps=1)
    rng = rng_from(derive_seed(1, "augment", 0, 0))
    images, mixture = AUGMENTATIONS.build("cutmix", {}, where="test").mix(nominal_from_uint8(batch.images), rng)
    torch.testing.assert_close(labels[0], mixture.of(batch.labels, 4))


def test_stages_and_augmentations_follow_the_pace_and_not_the_number_of_steps():
    curve = []
    stages = [{"kind": "logit_l1", "until": 0.5}, {"kind": "logit_mse", "from": 0.5}]
    trainer = trainer_of(plain_teacher(seed=1), steps=10, criterion=stages, on_log=curve.append)
    trainer.fit([batch_of(slice(0, 8))] * 9, steps=10, pace=lambda step: (0, 0, 5, 5, 12)[step])
    assert ["loss.logit_mse" in entry for entry in curve] == [False, False, True, True]


def test_ranks_augment_their_images_differently():
    augment = [{"kind": "noise", "std": 1.0}]
    same, again, other = (gradient_of(batch_of(slice(0, 8)), rank=rank, augment=augment) for rank in (0, 0, 1))
    torch.testing.assert_close(same, again, rtol=0, atol=0)
    assert not torch.allclose(same, other)


def test_stored_logits_are_what_the_criterion_sees():
    batch, student, curve = batch_of(slice(0, 8)), plain_teacher(seed=1), []
    with torch.no_grad():
        expected = (student(PixelRange(SPACE).from_uint8(batch.images)) - batch.teacher_logits.float()).abs().mean()
    trainer = trainer_of(student, teacher_logits="stored", on_log=curve.append)
    trainer.fit([batch], steps=1)
    assert curve[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_student_trains_with_the_statistics_of_its_batches():
    student = batchnorm_teacher(seed=1)
    before = student.body[0][1].running_mean.clone()
    trainer_of(student).fit([batch_of(slice(0, 8))], steps=1)
    assert student.training
    assert not torch.equal(student.body[0][1].running_mean, before)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_schedule_lasts_for_all_steps_and_peaks_at_the_recipe_s_rate(kind, schedule):
    steps, student = 20, nn.Linear(2, 2)
    optimizer, scheduler = build_optimizer(student, OptimizerSpec(kind=kind, lr=0.1, schedule=schedule), steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert min(rates) > 0
    if schedule == "constant":
        assert set(rates) == {0.1}
    else:
        assert rates[-1] < 0.01
    if schedule == "cosine":
        assert rates == sorted(rates, reverse=True)


def test_weight_decay_and_momentum_reach_the_optimizer():
    spec = OptimizerSpec(kind="sgd", lr=0.1, weight_decay=0.3, momentum=0.7)
    sgd, _ = build_optimizer(nn.Linear(2, 2), spec, steps=3)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["weight_decay"] == 0.3
    assert sgd.param_groups[0]["nesterov"]
    adam, _ = build_optimizer(nn.Linear(2, 2), spec.model_copy(update={"kind": "adam"}), steps=3)
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize(("momentum", "cycle"), [(0.9, (0.95, 0.85)), (0.5, (0.55, 0.45)), (0.98, (0.99, 0.97))])
def test_one_cycle_cycles_momentum_about_that_of_the_recipe(kind, momentum, cycle):
    spec = OptimizerSpec(kind=kind, lr=0.1, momentum=momentum)
    optimizer, scheduler = build_optimizer(nn.Linear(2, 2), spec, steps=100)
    momenta = []
    for _ in range(100):
        group = optimizer.param_groups[0]
        momenta.append(group["momentum"] if kind == "sgd" else group["betas"][0])
        optimizer.step()
        scheduler.step()
    assert (max(momenta), min(momenta)) == pytest.approx(cycle, abs=1e-3)
    assert momenta[0] == pytest.approx(cycle[0])


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", 0.5), ("constant", 1.0)])
def test_warm_up_rises_to_the_peak_over_its_share_of_the_steps(schedule, expected):
    spec = OptimizerSpec(lr=0.1, schedule=schedule, warmup=0.2)
    optimizer, scheduler = build_optimizer(nn.Linear(2, 2), spec, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert max(rates) == rates[20] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.1 * expected)


def test_one_cycle_of_the_default_momentum_is_that_of_pytorch_to_the_last_bit():
    ours = build_optimizer(nn.Linear(2, 2), OptimizerSpec(lr=0.1), steps=7)
    theirs = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=8)
    for _ in range(7):
        for key in ("lr", "betas"):
            assert ours[0].param_groups[0][key] == theirs.param_groups[0][key]
        for optimizer, scheduler in (ours, (theirs, schedule)):
            optimizer.step()
            scheduler.step()


class OwnCriterion:
    """A criterion of the user's, without any base class."""

    def __init__(self, *, power: float = 2.0) -> None:
        self._power = power

    def __call__(self, student, teacher, labels):
        return (student.logits - teacher.logits).abs().pow(self._power).mean()


def test_criterion_of_the_user_s_own_trains_a_student(tmp_path):
    criterion = "distill.criterion={kind: 'test_trainer:OwnCriterion', power: 1.0}"
    own, logit_l1 = [], []
    training_of(job_with_images(tmp_path / "own", criterion), on_log=own.append).run()
    training_of(job_with_images(tmp_path / "l1"), on_log=logit_l1.append).run()
    assert [entry["loss"] for entry in own] == pytest.approx([entry["loss"] for entry in logit_l1], rel=1e-5)


class Broken(PlainNet):
    """A student whose answers are not finite from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        return super().forward(images) * (float("nan") if self.calls > 2 else 1.0)


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_student_that_becomes_nan_ends_the_training_and_is_not_saved(log_every):
    saved = []
    settings = {"steps": 9, "log_every": log_every, "checkpoint_every": 2, "optimizer": {"lr": 0.25}}
    trainer = trainer_of(Broken(), on_checkpoint=saved.append, **settings)
    with pytest.raises(
        StudentDivergedError, match=r"diverged: .* at step [34]; distill.optimizer.lr is 0.25, try 0.025"
    ):
        trainer.fit([batch_of(slice(0, 8), seed=step) for step in range(9)], steps=9)
    assert saved == [2]


def test_student_that_becomes_nan_in_its_last_step_is_not_saved():
    student = plain_teacher(seed=1)
    student.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer = trainer_of(student, steps=1, on_checkpoint=pytest.fail)
    with pytest.raises(StudentDivergedError, match="not all of its weights are finite at step 1"):
        trainer.fit([batch_of(slice(0, 8))], steps=1)


def slow(student):
    """``student`` with running statistics that hardly move."""
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.001
    return student


class SlowNet(ConvNet):
    """A student whose BatchNorm needs a thousand steps, as MobileNetV3's needs a hundred."""

    def __init__(self) -> None:
        super().__init__(4, 1, widths=(4, 6))
        slow(self)


def test_finished_student_has_the_statistics_of_its_last_weights_however_slow_its_batchnorm(tmp_path):
    lost = {}
    for momentum, network in (("slow", "test_trainer:SlowNet"), ("usual", "convnet")):
        options = "" if momentum == "slow" else ", options: {widths: [4, 6]}"
        overrides = [f"student={{network: '{network}'{options}}}", "distill.steps=60", "distill.optimizer.lr=0.05"]
        curve = []
        training_of(job_with_images(tmp_path / momentum, *overrides), on_log=curve.append).run()
        lost[momentum] = curve[-1]["agreement"]
    assert lost["slow"] == pytest.approx(lost["usual"], abs=0.15)


def test_agreement_in_the_log_is_that_of_the_student_as_it_will_be_used():
    batch, student, curve = batch_of(slice(0, 24)), batchnorm_teacher(seed=1), []
    trainer = trainer_of(student, optimizer={"lr": 1e-9}, on_log=curve.append)
    trainer.fit([batch], steps=1)
    with torch.no_grad():
        images = PixelRange(SPACE).from_uint8(batch.images)
        same = student.eval()(images).argmax(1) == batchnorm_teacher()(images).argmax(1)
    assert curve[0]["agreement"] == pytest.approx(same.float().mean().item())


def test_training_interrupted_between_its_last_step_and_its_statistics_catches_up_on_them(tmp_path):
    job = job_with_images(tmp_path)
    expected = {name: value.clone() for name, value in training_of(job).run().items()}

    class Interrupted(Exception):
        pass

    def interrupted(self, batches):
        raise Interrupted

    training = training_of(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentTrainer, "_settle", interrupted)
        with pytest.raises(Interrupted):
            training.run()
    states = []
    resumed = training_of(job, on_log=lambda _: pytest.fail("a step was made"), on_checkpoint=states.append)
    resumed.load_state_dict(read_checkpoint(checkpoint_bytes(training.state_dict())))
    assert_same_weights(resumed.run(), expected)
    assert len(states) == 1


def test_student_wrapped_for_data_parallelism_is_finished_like_one_that_is_not(tmp_path):
    job = job_with_images(tmp_path)
    curves = [], []
    expected = {name: value.clone() for name, value in training_of(job, on_log=curves[0].append).run().items()}
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = StudentTraining(
            job,
            open_teacher(job.recipe),
            job.phases[-1],
            hooks=TrainingHooks(on_log=curves[1].append),
            parallel=nn.parallel.DistributedDataParallel,
            device=CPU,
        )
        assert_same_weights(wrapped.run(), expected)
    finally:
        torch.distributed.destroy_process_group()
    assert curves[0] == curves[1]


def test_student_that_loses_its_agreement_outside_training_is_told_of(caplog):
    teacher, rng = batchnorm_teacher(), torch.Generator().manual_seed(0)
    trainer = trainer_of(batchnorm_teacher(), steps=1, optimizer={"lr": 1e-9})
    shown = [batch_of(slice(0, 24))]
    for layer in trainer._network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(10 * torch.randn(layer.running_mean.shape, generator=rng))
    images, _ = trainer._augmented(shown[0], 0)
    trainer._network.train()
    with torch.no_grad():
        trainer._teacher = lambda images: Observation(logits=teacher.train()(images))
    trainer._compare_modes([(images, shown[0])])
    assert "agrees with its teacher on 100 % of images while BatchNorm" in caplog.text


def test_schedule_follows_the_pace_that_it_is_given():
    rates = []
    trainer = trainer_of(
        plain_teacher(seed=1),
        steps=10,
        optimizer={"lr": 0.1, "schedule": "cosine"},
        on_log=lambda _: rates.append(trainer._optimizer.param_groups[0]["lr"]),
    )
    batches = [batch_of(slice(0, 8))] * 9
    trainer.fit(batches, steps=10, pace=lambda step: (0, 0, 5, 5, 12)[step])
    assert trainer.step == 4
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.0], abs=1e-9)


def test_divergence_of_an_image_agrees_with_a_direct_sum():
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found = divergences(student.requires_grad_(), teacher)
    for row in range(5):
        p, q = teacher[row].softmax(0), student[row].softmax(0)
        torch.testing.assert_close(found[row], (p * (p.log() - q.log())).sum().detach())
    assert not found.requires_grad


def test_weights_make_the_gradient_that_of_the_weighted_mean():
    torch.manual_seed(0)
    body, head, images = nn.Linear(6, 5), nn.Linear(5, 4), torch.randn(3, 6)
    teacher, weights = torch.randn(3, 4), torch.tensor([0.5, 2.0, 1.5])

    def answer():
        features = body(images).tanh()
        return Observation(logits=head(features), features=features, layers={"body": features})

    def losses(observation):
        """One of each image; reads the features behind the logits too, which must not be weighted twice."""
        logits = (observation.logits - teacher).square().mean(1)
        return logits + observation.features.abs().mean(1) + observation.layers["body"].square().mean(1)

    parameters = [*body.parameters(), *head.parameters()]
    expected = torch.autograd.grad((weights * losses(answer())).mean(), parameters)
    value = losses(weighted(answer(), weights)).mean()
    found = torch.autograd.grad(value, parameters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(value, losses(answer()).mean())


def test_source_is_told_how_far_the_student_was_on_each_image(tmp_path, monkeypatch):
    job = job_with_images(tmp_path, "distill.source=priority", "distill.teacher_logits=stored", "distill.steps=4")
    training, told, shown = training_of(job), [], []
    train_step = StudentTrainer._train_step

    def watched(trainer, batch):
        with torch.no_grad():
            images = trainer._pixels.from_uint8(batch.images)
            shown.append(divergences(trainer._observed(images).logits, batch.teacher_logits.float()))
        return train_step(trainer, batch)

    monkeypatch.setattr(StudentTrainer, "_train_step", watched)
    note = training._source.note
    monkeypatch.setattr(training._source, "note", lambda losses: (told.append(losses), note(losses)))
    training.run()
    assert len(told) == 4
    torch.testing.assert_close(torch.stack(told), torch.stack(shown))


def test_replayed_views_have_the_teacher_s_answers_and_training_asks_it_no_more(tmp_path, monkeypatch):
    settings = ["distill.source={kind: views, views: 2, keep: all}", VIEWED, "distill.steps=12"]
    job = job_with_images(tmp_path, *settings)
    training, seen, asked = training_of(job), [], []
    monkeypatch.setattr(training.trainer, "_teacher", lambda images: asked.append(images) or ANSWER(images))
    train_step = StudentTrainer._train_step

    def watched(trainer, batch):
        made = train_step(trainer, batch)
        seen.append((made.images, made.teacher))
        return made

    monkeypatch.setattr(StudentTrainer, "_train_step", watched)
    training.run()
    for images, answers in seen:
        torch.testing.assert_close(ANSWER(images).logits, answers, atol=1e-2, rtol=1e-2)
    assert sum(map(len, asked)) == 2 * job.snapshot().images
    assert len(seen) == 12


def test_weights_of_a_batch_reach_the_student_s_step(tmp_path):
    plain, ones, twice = (
        StudentBatch(**values, weights=weights)
        for values, weights in (
            (BATCH, None),
            (BATCH, torch.ones(6)),
            (BATCH, torch.full((6,), 2.0)),
        )
    )
    settings = ["distill.optimizer={kind: sgd, lr: 0.1, schedule: constant, momentum: 0.5}", "distill.steps=4"]

    def moved(batch):
        training = training_of(open_job(toy_recipe(tmp_path, settings)))
        before = [weight.detach().clone() for weight in training._student.parameters()]
        training.trainer._train_step(batch)
        after = training._student.parameters()
        return torch.cat([(new.detach() - old).flatten() for new, old in zip(after, before, strict=True)])

    torch.testing.assert_close(moved(ones), moved(plain), rtol=0, atol=0)
    torch.testing.assert_close(moved(twice), 2 * moved(plain))


ANSWER = ObservedNetwork(batchnorm_teacher(), frozen=True)
BATCH = {
    "images": torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    "labels": torch.zeros(6, dtype=torch.int64),
    "teacher_logits": torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).half(),
    "snapshot_images": 6,
}
