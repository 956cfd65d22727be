"""A student that learns from a generator which is trained against it: a plan without units."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from toy import quiet_events, run_here, toy_recipe

import raydfkd
from raydfkd.checkpoints import checkpoint_bytes, read_checkpoint
from raydfkd.data.live_source import LiveSource
from raydfkd.data.sources import Ranks
from raydfkd.distillation.trainer import TrainingHooks, ignore
from raydfkd.distillation.training import StudentTraining
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.teacher import open_teacher
from raydfkd.report.metrics import read_metrics
from raydfkd.runner.check import check
from raydfkd.runner.run import run
from raydfkd.synthesis.build import generator_maker

LIVE = (
    "distill.source={kind: live, generator_steps: 1, student_steps: 3, keep: 10}",
    "transfer_set.images_per_class=0",
    "synthesis.targets=none",
    "synthesis.objective=[logit_gap]",
    "synthesis.emissions=1",
    "distill.steps=9",
    "distill.checkpoint_every=4",
)


def live_recipe(folder, *overrides, synthesizer="generator"):
    return toy_recipe(folder, [*LIVE, *overrides], synthesizer=synthesizer)


def training_of(job, *, ranks=None, **hooks):
    recipe, teacher = job.recipe, open_teacher(job.recipe)
    return StudentTraining(
        job,
        teacher,
        job.phases[0],
        hooks=TrainingHooks(**{"on_log": ignore, **hooks}),
        ranks=ranks,
        generator=generator_maker(recipe, teacher.module),
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adversarial_recipe_runs_in_one_process_and_keeps_some_images_to_look_at(tmp_path):
    recipe = live_recipe(tmp_path)
    result = run(recipe)
    assert result.job.units == ()
    assert (result.outcome.attempted, result.missing) == (0, frozenset())
    report = result.report
    assert report["images"] == 10
    assert (report["judged_on"], report["judged_images"]) == ("no image: none is real, and none was held out", 0)
    assert report["units"] == {"planned": 0, "committed": 1, "attempted": 0, "quarantined": 0}
    assert result.page.is_file()
    entries = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if entry["event"] == "student"]
    assert [entry["step"] for entry in entries] == [*range(1, 10)]
    assert [entry["snapshot_images"] for entry in entries] == [8 * step for step in range(1, 10)]


def test_adversarial_run_called_again_makes_nothing_and_says_the_same(tmp_path):
    first, again = (run(live_recipe(tmp_path)).report for _ in range(2))
    assert {**again, "command": ""} == {**first, "command": ""}


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.cluster)])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["synthesis.augment=[]", "distill.augment=[{kind: noise, std: 0.1}]"],
        ["synthesis.targets=balanced", "synthesis.objective=[cross_entropy, {term: competition, weight: 5}]"],
        ["synthesis.targets=balanced", "synthesis.objective=[cross_entropy, logit_gap]", "synthesis.conditional=true"],
        [
            "distill.criterion=[soft_kl, {kind: hint, weight: 0.1},"
            "{kind: attention_transfer, student: body.0.1, teacher: body.0.1, weight: 250, until: 0.6}]",
            "distill.ema=0.9",
            "distill.accumulate=2",
        ],
    ],
    ids=["plain", "noise", "classes", "conditional", "layers"],
)
def test_adversarial_training_resumes_from_its_checkpoint_bit_for_bit(tmp_path, settings, optimizer):
    job = open_job(live_recipe(tmp_path, f"distill.optimizer.kind={optimizer}", *settings))
    checkpoints, curve = [], []
    hooks = {"on_log": curve.append, "on_checkpoint": lambda state: checkpoints.append(checkpoint_bytes(state))}
    expected = {name: value.clone() for name, value in training_of(job, **hooks).run().items()}
    assert len(checkpoints) == 3
    for content, step in zip(checkpoints, (4, 8, 9), strict=True):
        torch.manual_seed(step)  # an interrupted process starts with other global random numbers
        resumed_curve = []
        resumed = training_of(job, on_log=resumed_curve.append)
        resumed.load_state_dict(read_checkpoint(content))
        assert_same(resumed.run(), expected)
        assert resumed_curve == curve[step:]


def test_adversarial_run_that_stops_anywhere_goes_on_to_the_same_student(tmp_path, monkeypatch):
    _, expected = run_here(open_job(live_recipe(tmp_path / "whole")), quiet_events(tmp_path / "whole"))
    job = open_job(live_recipe(tmp_path / "cut", "distill.checkpoint_every=1"))
    batches, made = LiveSource.__iter__, []

    def stopping(self):
        for batch in batches(self):
            made.append(batch)
            if len(made) % 4 == 0:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(LiveSource, "__iter__", stopping)
    stops = 0
    while stops < 20:
        try:
            _, student = run_here(job, quiet_events(tmp_path / "cut"))
        except KeyboardInterrupt:
            stops += 1
            if stops == 3:
                monkeypatch.setattr(LiveSource, "__iter__", batches)
        else:
            break
    assert stops == 3
    assert_same(student, expected)


def test_generator_is_trained_before_every_run_of_student_steps_against_the_student_of_then(tmp_path, monkeypatch):
    job = open_job(live_recipe(tmp_path, "student.network=test_live:NormFree", "student.options={}"))
    training = training_of(job)
    source, weights = training._source, []
    update = source._generator.update

    def watched():
        weights.append((source._step, training._student.head.weight.detach().clone()))
        return update()

    monkeypatch.setattr(source._generator, "update", watched)
    training.run()
    assert [step for step, _ in weights] == [0, 3, 6]
    assert not torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[1][1], weights[2][1])


class NormFree(torch.nn.Module):
    """A student without BatchNorm, so that nothing is drawn once the last step is made."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 4)

    def forward(self, images):
        return self.head(images.flatten(1))


def test_generator_finds_images_on_which_student_and_teacher_disagree(tmp_path):
    """With a student that stands still, the generator's steps raise what it is trained for."""
    settings = ["distill.steps=200", "distill.source.student_steps=1", "distill.optimizer.lr=1e-9", "synthesis.lr=0.02"]
    job = open_job(live_recipe(tmp_path, *settings, "distill.checkpoint_every=1000"))
    curve = []
    training_of(job, on_log=curve.append).run()
    gaps = [entry["loss"] for entry in curve]
    assert sum(gaps[-20:]) > 1.2 * sum(gaps[:20])


def test_ranks_draw_shares_of_a_batch_from_latents_of_their_own(tmp_path):
    job = open_job(live_recipe(tmp_path, "distill.batch_size=7"))
    found = []
    for rank in range(2):
        source = training_of(job, ranks=Ranks(rank=rank, size=2))._source
        found.append(next(iter(source)))
    assert [len(batch.labels) for batch in found] == [3, 4]
    assert sum(batch.share for batch in found) / 2 == pytest.approx(1.0)
    assert not torch.equal(found[0].images, found[1].images[:3])


def test_student_of_a_live_source_can_be_trained_by_the_command_that_only_distils(tmp_path):
    recipe = live_recipe(tmp_path)
    student = raydfkd.distill(recipe)
    whole = run(live_recipe(tmp_path / "other"))
    assert_same(student.state_dict(), safetensors.torch.load_file(whole.student))
    assert open_job(recipe).snapshot().images == 10


WRONG = {
    "images to make as well": (
        ["transfer_set.images_per_class=6"],
        "distill.source is live, which makes its own images, but transfer_set.images_per_class is 6 and rounds 1; "
        "leave both out",
    ),
    "synthesizer without a generator": (
        ["synthesis={synthesizer: pixels, batch_size: 4, stages: [{steps: 3}], objective: [logit_gap], targets: none}"],
        "distill.source is live, but synthesizer pixels trains no generator; use generator",
    ),
    "misspelled option": (
        ["distill.source={kind: live, studnt_steps: 5}"],
        "distill.source.studnt_steps: unknown key; did you mean student_steps?",
    ),
    "option out of range": (
        ["distill.source={kind: live, student_steps: 0}"],
        "distill.source.student_steps is 0: input should be greater than or equal to 1",
    ),
    "term that needs targets": (
        ["synthesis.objective=[cross_entropy, logit_gap]"],
        "synthesis.objective[0]: cross_entropy needs targets, but targets is none; use `targets: balanced`",
    ),
    "another source without images": (
        ["distill.source=growing", "synthesis.objective=[one_hot]"],
        "transfer_set.images_per_class is missing; say how many images to make of each class",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=list(WRONG))
def test_what_a_live_source_does_not_go_with_is_refused_in_one_line_before_any_work(tmp_path, overrides, message):
    with pytest.raises(RecipeError) as error:
        check(live_recipe(tmp_path, *overrides))
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def test_images_of_a_live_source_are_not_synthesized_by_themselves(tmp_path):
    with pytest.raises(RecipeError, match="use run"):
        raydfkd.synthesize(live_recipe(tmp_path))
    assert not (tmp_path / "run").exists()
