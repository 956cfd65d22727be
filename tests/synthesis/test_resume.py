"""Units that are left between two steps and gone on with by another worker."""

from __future__ import annotations

import itertools
import uuid

import pytest
import torch
from faulty import PLANS, Faults
from toy import SYNTHESIZERS_UNDER_TEST, batches_of, joined, toy_recipe
from toy import worker_of as new_worker_of

from raydfkd.checkpoints import read_checkpoint
from raydfkd.data.shards import rows_digest
from raydfkd.data.sink import ParquetSink
from raydfkd.job import open_job
from raydfkd.store import retry
from raydfkd.store.errors import OutageError
from raydfkd.synthesis.checkpoint import Interrupted, UnitCheckpoint
from raydfkd.synthesis.generator_training import GeneratorTraining
from raydfkd.synthesis.judge import ObjectiveNotFiniteError
from raydfkd.synthesis.pixels import _Course

RENEWED = ("synthesis.emissions=1", "synthesis.conditional=true", "synthesis.renewal={steps: 2, latent_lr: 0.1}")
META = (*RENEWED[:2], "synthesis.renewal={steps: 2, latent_lr: 0.1, meta: {lr: 0.05}}")
NOISY = (*RENEWED[:2], "synthesis.renewal={steps: 2, noisy_layers: true, keep: 1, life: 2}")
NOISE = "synthesis={synthesizer: noise_images, targets: none, batch_size: 2}"
DRAWN = "synthesis={synthesizer: procedural_images, targets: none, batch_size: 2, select: balanced_confidence}"
BESIDE = "synthesis.beside=[{kind: noise_images, targets: none, batch_size: 2}]"
CONTRAST = "synthesis.objective=[cross_entropy, {term: contrast, width: 4, negatives: 3, bank: 7}]"
SELECTED = ("synthesis.select={kind: random, candidates: 1.7, judged_at_once: 3}",)
VARIANTS = {
    "pixels": ("pixels", []),
    "pixels, stages": ("pixels", ["synthesis.stages=[{steps: 3, pool: 2}, {steps: 2}]"]),
    "pixels, octaves": ("pixels", ["synthesis.stages=[{steps: 3, pool: 2}, {steps: 2}]", "synthesis.octaves=3"]),
    "pixels, soft targets": ("pixels", ["synthesis.targets={kind: gaussian, std: 1.0}"]),
    "pixels, selected": ("pixels", [*SELECTED, "synthesis.batch_size=2"]),
    "generator": ("generator", []),
    "generator, selected": ("generator", SELECTED),
    "generator, emissions": ("generator", ["synthesis.steps=6", "synthesis.emissions=3"]),
    "generator, renewed": ("generator", RENEWED),
    "generator, meta-learned": ("generator", META),
    "generator, noisy layers": ("generator", NOISY),
    "noise": ("pixels", [NOISE]),
    "drawn images": ("pixels", [DRAWN]),
    "pixels beside noise": ("pixels", [BESIDE]),
    "generator beside noise": ("generator", [BESIDE]),
    "generator, contrast": ("generator", [*RENEWED, CONTRAST]),
    "pixels, contrast": ("pixels", [CONTRAST]),
}
MANY_IMAGES = ("transfer_set.images_per_class=5", "transfer_set.unit.images_per_class=5")


def job_of(folder, synthesizer, *settings):
    job = open_job(toy_recipe(folder, [*MANY_IMAGES, *settings], synthesizer=synthesizer))
    job.transfer_set.create()
    return job


def worker_of(job, after=None, told=None):
    """A worker that is asked to stop after so many steps, and adds to ``told`` what it says of the objective."""
    asked = itertools.count()
    should_stop = (lambda: next(asked) >= after) if after is not None else (lambda: False)
    told = [] if told is None else told
    return new_worker_of(
        job,
        should_stop=should_stop,
        on_progress=lambda news: told.append(news) if news.objective else None,
    )


def objects(job, folder):
    return job.transfer_set.store.list(folder)


# a part for each image, for some of them, and for the whole unit
@pytest.mark.parametrize(
    ("variant", "part_rows"),
    [
        pytest.param(variant, rows, marks=() if rows == 4 or variant == "pixels" else pytest.mark.cluster)
        for variant in VARIANTS
        for rows in (1, 4, 4096)
    ],
)
def test_unit_that_is_left_at_any_step_and_gone_on_with_has_the_same_bytes(tmp_path, variant, part_rows):
    synthesizer, settings = VARIANTS[variant]
    settings = [*settings, f"transfer_set.part_rows={part_rows}"]
    undisturbed = job_of(tmp_path / "undisturbed", synthesizer, *settings)
    expected_progress, progress = [], []
    expected = worker_of(undisturbed, told=expected_progress).run(undisturbed.units[0])
    job = job_of(tmp_path / "disturbed", synthesizer, *settings)
    num_left = 0
    while True:
        try:
            commit = worker_of(job, after=num_left % 4 + 1, told=progress).run(job.units[0])
        except Interrupted:
            num_left += 1
            assert objects(job, "commits") == []
        else:
            break
    assert num_left >= 2
    assert (commit.content, commit.images, commit.objective) == (expected.content, expected.images, expected.objective)
    assert progress == expected_progress, "steps, their number and the curve"
    assert objects(job, "resume") == []
    assert set(objects(job, "parts")) >= {part.path for part in commit.parts}
    for part in commit.parts:
        job.transfer_set.read(part)


class Vanished(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_unit_of_a_worker_that_vanishes_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, synthesizer):
    steps = []

    def counted(vanishes_after):
        def should_stop():
            steps[-1] += 1
            if steps[-1] > vanishes_after:
                raise Vanished
            return False

        steps.append(0)
        return should_stop

    jobs = [job_of(tmp_path / name, synthesizer, "runtime.checkpoint_every=2") for name in ("one", "other")]
    expected = new_worker_of(jobs[0], should_stop=counted(vanishes_after=1000)).run(jobs[0].units[0])
    unit = jobs[1].units[0]
    worker = new_worker_of(jobs[1], should_stop=counted(vanishes_after=3))
    with monkeypatch.context() as nothing_is_tidied_up:
        nothing_is_tidied_up.setattr(ParquetSink, "abandon", ParquetSink.release)
        nothing_is_tidied_up.setattr(UnitCheckpoint, "remove", lambda _: None)
        with pytest.raises(Vanished):
            worker.run(unit)
    worker = new_worker_of(jobs[1], should_stop=counted(vanishes_after=1000))
    assert worker.run(unit).content == expected.content
    assert steps[2] == steps[0] - 2, "two steps had been saved"


@pytest.mark.parametrize("damage", ["part gone", "part damaged", "state damaged", "another recipe's"])
def test_state_that_cannot_be_gone_on_from_costs_time_and_nothing_else(tmp_path, damage, caplog):
    settings = ["transfer_set.part_rows=1", "synthesis.steps=6", "synthesis.emissions=3"]
    job = job_of(tmp_path, "generator", *settings)
    with pytest.raises(Interrupted):
        worker_of(job, after=5).run(job.units[0])
    store = job.transfer_set.store
    (state,) = store.list("resume")
    part = store.list("parts")[0]
    if damage == "part gone":
        store.delete(part)
    elif damage == "part damaged":
        store.put(part, store.get(part)[:-1] + b"?")
    elif damage == "state damaged":
        store.put(state, store.get(state)[:100])
    else:
        UnitCheckpoint(store, job.units[0], "another").save(read_checkpoint(store.get(state)))
    commit = worker_of(job).run(job.units[0])
    other = job_of(tmp_path / "other", "generator", *settings)
    assert commit.content == worker_of(other).run(other.units[0]).content
    assert ("begins anew" in caplog.text) == (damage != "another recipe's")


@pytest.mark.parametrize("first", ["old", "new"])
def test_attempt_that_is_alive_after_all_and_the_one_that_went_on_from_its_state_do_each_other_no_harm(tmp_path, first):
    """A network that was cut, not a machine that died: both finish, in either order."""
    job = job_of(tmp_path, "generator", "transfer_set.part_rows=2")
    unit, batches = job.units[0], batches_of(job.recipe)
    sinks = {"old": job.transfer_set.open(unit, attempt=1), "new": job.transfer_set.open(unit, attempt=2)}
    sinks["old"].write(batches[0])
    sinks["new"].load_state_dict(sinks["old"].state_dict())
    for sink in sinks.values():
        for batch in batches[1:]:
            sink.write(batch)
    sinks[first].commit(seconds=1.0)
    (commit,) = job.snapshot().commits
    for sink in sinks.values():
        if sink is not sinks[first]:
            assert sink.commit(seconds=1.0) == commit
    assert commit.content == rows_digest(batches)
    assert commit.attempt == {"old": 1, "new": 2}[first]
    assert objects(job, "parts") == sorted(part.path for part in commit.parts)
    assert torch.equal(torch.cat([job.transfer_set.read(part).images for part in commit.parts]), joined(batches).images)


def test_parts_of_the_attempt_that_was_gone_on_from_are_removed_with_the_commit(tmp_path):
    job = job_of(tmp_path, "generator", "synthesis.steps=6", "synthesis.emissions=3", "transfer_set.part_rows=1")
    with pytest.raises(Interrupted):
        worker_of(job, after=5).run(job.units[0])
    assert objects(job, "parts") != []
    commit = worker_of(job).run(job.units[0])
    assert objects(job, "parts") == sorted(part.path for part in commit.parts)


def test_state_of_an_attempt_that_failed_is_not_gone_on_from(tmp_path, monkeypatch):
    job = job_of(tmp_path, "generator", "runtime.checkpoint_every=1")
    worker = worker_of(job)
    original = GeneratorTraining.update

    def fails(training):
        if training.step == 2:
            raise ObjectiveNotFiniteError("objective is nan")
        return original(training)

    monkeypatch.setattr(GeneratorTraining, "update", fails)
    with pytest.raises(ObjectiveNotFiniteError):
        worker.run(job.units[0])
    assert objects(job, "resume") == objects(job, "parts") == []


@pytest.fixture
def outages(monkeypatch):
    """Makes jobs whose store goes away whenever the faults that come with them are switched on."""
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(retry, "_ATTEMPTS", 2)

    def make(folder, synthesizer, *settings):
        plan = uuid.uuid4().hex
        faults = PLANS[plan] = Faults(timeout=1.0)
        faults.is_on = False
        place = [f"transfer_set.uri=faulty://{plan}/set", f"transfer_set.storage_options={{plan: {plan}}}"]
        return job_of(folder, synthesizer, *place, *settings), faults

    return make


def steps_of(job, unit, at=None, act=lambda: None):
    """The number of steps that a new worker makes of the unit; ``act`` is called before step ``at``."""
    steps = itertools.count()
    made = []

    def should_stop():
        made.append(next(steps))
        if made[-1] == at:
            act()
        return False

    new_worker_of(job, should_stop=should_stop).run(unit)
    return len(made)


@pytest.mark.parametrize("end", ["outage", KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS_UNDER_TEST)
def test_what_a_unit_had_saved_is_gone_on_from_after_an_outage_or_an_end_of_the_process(
    tmp_path, outages, synthesizer, end
):
    settings = ["runtime.checkpoint_every=2", "transfer_set.part_rows=2"]
    undisturbed = job_of(tmp_path / "undisturbed", synthesizer, *settings)
    unit = undisturbed.units[0]
    whole = steps_of(undisturbed, unit)
    job, faults = outages(tmp_path / "cut", synthesizer, *settings)

    def cut():
        if end != "outage":
            raise end
        faults.is_on = True

    with pytest.raises(OutageError if end == "outage" else end):
        steps_of(job, unit, at=3, act=cut)
    faults.is_on = False
    assert objects(job, "resume") == [f"resume/{unit.id}.pt"]
    assert steps_of(job, unit) == whole - 2, "two steps had been saved"
    (commit,) = job.snapshot().commits
    assert commit.content == undisturbed.snapshot().commits[0].content
    assert objects(job, "resume") == []


@pytest.mark.parametrize(
    ("saved_with", "resumed_with"),
    [
        ("transfer_set.part_rows=4096", "transfer_set.part_rows=1"),
        ("transfer_set.part_rows=4", "transfer_set.part_rows=3"),
        ("transfer_set.encoding=raw", "transfer_set.encoding=png"),
        ("transfer_set.encoding=png", "transfer_set.encoding={kind: jpeg, quality: 90}"),
        ("transfer_set.encoding={kind: jpeg, quality: 90}", "transfer_set.encoding={kind: jpeg, quality: 50}"),
        ("transfer_set.logits=float16", "transfer_set.logits={kind: top_k, k: 2}"),
        ("transfer_set.logits={kind: top_k, k: 2}", "transfer_set.logits={kind: top_k, k: 3}"),
    ],
)
def test_unit_whose_rows_are_stored_in_another_form_now_begins_anew(tmp_path, saved_with, resumed_with):
    settings = ["synthesis.steps=6", "synthesis.emissions=3"]
    before = job_of(tmp_path, "generator", *settings, saved_with)
    with pytest.raises(Interrupted):
        worker_of(before, after=5).run(before.units[0])
    after = job_of(tmp_path, "generator", *settings, resumed_with)
    assert after.digest == before.digest, "the images are the same"
    expected = job_of(tmp_path / "undisturbed", "generator", *settings, resumed_with)
    commit, undisturbed = (worker_of(job).run(job.units[0]) for job in (after, expected))
    assert commit.content == undisturbed.content
    assert [(part.rows, part.xxh3) for part in commit.parts] == [(part.rows, part.xxh3) for part in undisturbed.parts]


def test_state_of_another_digest_is_no_state(tmp_path):
    job = job_of(tmp_path, "generator")
    store, unit = job.transfer_set.store, job.units[0]
    UnitCheckpoint(store, unit, "this").save({"step": 3})
    assert UnitCheckpoint(store, unit, "this").load() == {"step": 3, "digest": "this"}
    assert UnitCheckpoint(store, unit, "that").load() is None
    assert UnitCheckpoint(store, job.units[1], "this").load() is None


def test_unit_that_a_version_without_octaves_has_left_is_gone_on_with(tmp_path, monkeypatch):
    settings = VARIANTS["pixels, stages"][1]
    undisturbed = job_of(tmp_path / "undisturbed", "pixels", *settings)
    expected = worker_of(undisturbed).run(undisturbed.units[0])
    now = _Course.state_dict

    def before(course, optimizer):
        state = now(course, optimizer)
        (state["images"],) = state.pop("octaves")
        return state

    monkeypatch.setattr(_Course, "state_dict", before)
    job = job_of(tmp_path / "disturbed", "pixels", *settings)
    with pytest.raises(Interrupted):
        worker_of(job, after=3).run(job.units[0])
    assert worker_of(job).run(job.units[0]).content == expected.content
