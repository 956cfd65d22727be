from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn
from toy import (
    SPACE,
    PlainNet,
    batchnorm_teacher,
    plain_teacher,
    quiet_events,
    toy_recipe,
)

from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.config.schema import DistillSpec, OptimizerSpec
from raydfkd.data.sources import StudentBatch
from raydfkd.distillation.trainer import StudentTrainer
from raydfkd.distillation.training import StudentCheckpoint, StudentTraining
from raydfkd.images.pixels import PixelRange
from raydfkd.job import open_job
from raydfkd.networks import observed
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.optimizers import build_optimizer
from raydfkd.runner.local import LocalExecutor

CPU = torch.device("cpu")
AUGMENTED = (
    "distill.augment=[{kind: affine, degrees: 15, shift: 0.1}, {kind: noise, std: 0.1}, flip, "
    "{kind: jitter, pixels: 1}, mixup]"
)


class DropoutNet(PlainNet):
    """A student that draws random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.Dropout(0.5))


def job_with_images(folder, *overrides):
    job = open_job(toy_recipe(folder, overrides))
    LocalExecutor().synthesize(job, quiet_events(folder))
    return job


def training_of(job, on_log=lambda _: None, on_checkpoint=lambda _: None):
    return StudentTraining(job, on_log=on_log, on_checkpoint=on_checkpoint, device=CPU)


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
    ],
    ids=["plain", "augmented", "sgd", "stored", "dropout"],
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, overrides):
    job = job_with_images(tmp_path, "distill.steps=9", "distill.checkpoint_every=4", *overrides)
    checkpoints, curve = [], []
    expected = training_of(job, curve.append, lambda state: checkpoints.append(checkpoint_bytes(state))).run()
    assert len(checkpoints) == 3
    for content, step in zip(checkpoints, (4, 8, 9), strict=True):
        torch.manual_seed(step)  # an interrupted process starts with other global random numbers
        resumed_curve = []
        resumed = training_of(job, resumed_curve.append)
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
        self.job.transfer_set.reopen()
        self.commit()

    def commit(self):
        path = min(self._records)
        self._store.put(path, self._records.pop(path))

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


@pytest.mark.parametrize("refresh_steps", ["null", 2])
@pytest.mark.parametrize("killed_at", [6, 9, 11])
def test_training_that_is_killed_while_the_set_grows_ends_in_the_same_student(
    tmp_path, monkeypatch, refresh_steps, killed_at
):
    """Steps after the last checkpoint are made again with the batches that they had, though the set is larger now."""
    settings = ["distill.steps=16", "distill.checkpoint_every=4", f"distill.source.refresh_steps={refresh_steps}"]
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
    first = training_of(job, on_checkpoint=lambda state: states.append(checkpoint_bytes(state)))
    first.run(until=5)
    assert first.trainer.step == 5
    assert len(states) == 1, "there is a checkpoint to go on from"
    second = training_of(job)
    second.load_state_dict(read_checkpoint(states[0]))
    assert_same_weights(second.run(until=90), expected)
    first.run()
    assert_same_weights(first.run(), expected)


def test_student_is_published_when_fresh_every_so_often_and_at_the_end(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=9", "distill.publish_every=4", "distill.checkpoint_every=4")
    versions, states = {}, []

    def publish(version, state):
        assert version not in versions
        versions[version] = {name: value.clone() for name, value in state.items()}

    training = StudentTraining(
        job,
        on_log=lambda _: None,
        on_checkpoint=lambda state: states.append((len(versions), checkpoint_bytes(state))),
        on_publish=publish,
        device=CPU,
    )
    student = training.run()
    assert list(versions) == [0, 4, 8, 9]
    assert_same_weights(versions[0], job.fresh_student().state_dict())
    assert_same_weights(versions[9], student)
    assert [published for published, _ in states] == [2, 3, 4], "a kill after the checkpoint would leave a version out"

    versions.clear()
    resumed = StudentTraining(job, on_log=lambda _: None, on_checkpoint=lambda _: None, on_publish=publish, device=CPU)
    resumed.load_state_dict(read_checkpoint(states[0][1]))
    resumed.run()
    assert list(versions) == [8, 9]


def test_only_the_first_rank_publishes(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=1")
    published = []
    training = StudentTraining(
        job,
        on_log=lambda _: None,
        on_checkpoint=lambda _: None,
        on_publish=lambda *_: published.append(_),
        rank=1,
        world_size=2,
        device=CPU,
        agree=lambda _: job.snapshot(),
    )
    training.run()
    assert not published


def test_checkpoint_is_made_out_of_turn_when_one_is_wanted(tmp_path):
    job = job_with_images(tmp_path, "distill.steps=6", "distill.checkpoint_every=100")
    asked, saved = [], []
    training = StudentTraining(
        job,
        on_log=lambda _: None,
        on_checkpoint=lambda state: saved.append(state["trainer"]["step"]),
        wants_checkpoint=lambda: asked.append(1) or len(asked) == 3,
        device=CPU,
    )
    training.run()
    assert saved == [3, 6]
    assert len(asked) == 6, "every rank is asked equally often"


def test_student_computes_in_float32_where_there_is_no_bfloat16(monkeypatch, caplog):
    monkeypatch.setattr(observed, "_has_bfloat16", lambda _: False)
    losses = []
    for precision in ("bfloat16", "float32"):
        trainer = trainer_of(plain_teacher(seed=1), precision=precision)
        trainer._on_log = losses.append
        trainer.fit([batch_of(slice(0, 8))], steps=1)
    assert losses[0]["loss"] == losses[1]["loss"]
    assert "cpu has no bfloat16; computing in float32" in caplog.text


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
    training_of(job, curve.append).run()
    first, last = curve[:10], curve[-10:]
    assert sum(entry["loss"] for entry in last) < 0.6 * sum(entry["loss"] for entry in first)
    assert sum(entry["agreement"] for entry in last) > sum(entry["agreement"] for entry in first)


def test_stored_logits_train_like_live_ones_to_the_rounding_of_float16(tmp_path):
    losses = {}
    for source in ("live", "stored"):
        curve = []
        training_of(job_with_images(tmp_path, f"distill.teacher_logits={source}"), curve.append).run()
        losses[source] = [entry["loss"] for entry in curve]
    assert losses["stored"] == pytest.approx(losses["live"], rel=1e-2)
    assert losses["stored"] != losses["live"]


def test_curve_has_the_first_and_last_step_and_every_log_every_th(tmp_path):
    curve = []
    training_of(job_with_images(tmp_path, "distill.steps=7", "distill.log_every=3"), curve.append).run()
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
    checkpoint = StudentCheckpoint(tmp_path / "train", job.student_digest)
    assert checkpoint.load() is None
    checkpoint.save(read_checkpoint(states[0]))
    assert checkpoint_bytes(StudentCheckpoint(tmp_path / "train", job.student_digest).load()) == states[0]
    assert StudentCheckpoint(tmp_path / "train", "0" * 64).load() is None


def batch_of(rows, *, share=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=rng)[rows]
    logits = torch.randn(24, 4, generator=rng)[rows].half()
    return StudentBatch(images=images, labels=logits.argmax(1), teacher_logits=logits, share=share, snapshot_images=24)


def trainer_of(student, *, rank=0, **changes):
    settings = {"steps": 3, "criterion": "logit_l1", "optimizer": {"lr": 0.01}, "log_every": 1, **changes}
    return StudentTrainer(
        student,
        ObservedNetwork(batchnorm_teacher(), frozen=True),
        DistillSpec.model_validate_json(json.dumps(settings)),
        pixels=PixelRange(SPACE),
        device=CPU,
        seed=1,
        rank=rank,
        on_log=lambda _: None,
        on_checkpoint=lambda _: None,
    )


def gradient_of(batch, rank=0, **changes):
    student = plain_teacher(seed=1)
    trainer_of(student, rank=rank, **changes).fit([batch], steps=1)
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("criterion", ["logit_l1", "soft_kl", "hard_labels"])
def test_gradients_averaged_over_ranks_are_those_of_all_images_at_once(criterion):
    """Data parallelism averages; ranks with unequally many images must not count equally."""
    whole = gradient_of(batch_of(slice(0, 16)), criterion=criterion)
    small = gradient_of(batch_of(slice(0, 5), share=5 * 2 / 16), criterion=criterion)
    large = gradient_of(batch_of(slice(5, 16), share=11 * 2 / 16), rank=1, criterion=criterion)
    torch.testing.assert_close((small + large) / 2, whole, rtol=1e-4, atol=1e-6)


def test_ranks_augment_their_images_differently():
    augment = [{"kind": "noise", "std": 1.0}]
    same, again, other = (gradient_of(batch_of(slice(0, 8)), rank=rank, augment=augment) for rank in (0, 0, 1))
    torch.testing.assert_close(same, again, rtol=0, atol=0)
    assert not torch.allclose(same, other)


def test_stored_logits_are_what_the_criterion_sees():
    batch, student, curve = batch_of(slice(0, 8)), plain_teacher(seed=1), []
    with torch.no_grad():
        expected = (student(PixelRange(SPACE).from_uint8(batch.images)) - batch.teacher_logits.float()).abs().mean()
    trainer = trainer_of(student, teacher_logits="stored")
    trainer._on_log = curve.append
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
