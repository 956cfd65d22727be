"""Several criteria at once: their weights, the steps at which they count, and mistakes in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from toy import quiet_events, synthesize_here, toy_recipe, training_of

from raydfkd.config.load import load_recipe
from raydfkd.config.schema import DistillSpec
from raydfkd.distillation.criteria import CRITERIA
from raydfkd.distillation.loss import StudentLoss
from raydfkd.errors import RecipeError
from raydfkd.images.augment import build_augmentations
from raydfkd.job import open_job
from raydfkd.networks.observed import Observation
from raydfkd.networks.small import ConvNet
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from

STUDENT, TEACHER = (Observation(logits=torch.randn(6, 4, generator=rng_from(seed))) for seed in (0, 1))
LABELS = torch.arange(6) % 4


def loss_of(criterion, **settings):
    given = {"steps": 10, "criterion": criterion, "optimizer": {"lr": 0.1}, **settings}
    return StudentLoss(DistillSpec.model_validate_json(json.dumps(given)))


def alone(name):
    return CRITERIA.build(name, {}, where="test")(STUDENT, TEACHER, LABELS)


def value_at(loss, progress):
    return loss(STUDENT, TEACHER, LABELS, progress=progress)


def test_loss_of_several_criteria_is_their_weighted_sum():
    loss = loss_of([{"kind": "soft_kl", "weight": 0.9}, {"kind": "hard_labels", "weight": 0.1}])
    value = value_at(loss, 0.5)
    torch.testing.assert_close(value.total, 0.9 * alone("soft_kl") + 0.1 * alone("hard_labels"))
    assert value.parts.keys() == {"soft_kl", "hard_labels"}
    torch.testing.assert_close(value.parts["hard_labels"], alone("hard_labels"))


def test_loss_of_one_criterion_has_no_parts():
    value = value_at(loss_of("soft_kl"), 0.0)
    assert value.parts == {}
    torch.testing.assert_close(value.total, alone("soft_kl"), rtol=0, atol=0)


def test_weight_of_a_criterion_may_change_over_the_steps():
    loss = loss_of(["soft_kl", {"kind": "logit_l1", "weight": {"from": 4, "to": 0, "until": 0.5}}])
    totals = [value_at(loss, progress).total for progress in (0.0, 0.25, 0.5, 0.9)]
    expected = [alone("soft_kl") + weight * alone("logit_l1") for weight in (4, 2, 0, 0)]
    torch.testing.assert_close(totals, expected)


def test_criterion_counts_from_one_share_of_the_steps_until_another():
    loss = loss_of([{"kind": "logit_mse", "until": 0.3}, {"kind": "soft_kl", "from": 0.3}])
    names = [list(value_at(loss, progress).parts) for progress in (0.0, 0.29, 0.3, 1.0)]
    assert names == [["logit_mse"], ["logit_mse"], ["soft_kl"], ["soft_kl"]]
    torch.testing.assert_close(value_at(loss, 0.2).total, alone("logit_mse"), rtol=0, atol=0)


def test_learning_curve_has_each_criterion_under_its_name(tmp_path):
    criteria = "[{kind: logit_l1, until: 0.5}, {kind: soft_kl, name: kl, from: 0.5, weight: 0.5}]"
    recipe = toy_recipe(tmp_path, [f"distill.criterion={criteria}", "distill.steps=4"])
    job, curve = open_job(recipe), []
    synthesize_here(job, quiet_events(tmp_path))
    training_of(job, on_log=curve.append).run()
    assert [[key for key in entry if key.startswith("loss.")] for entry in curve] == [["loss.logit_l1"]] * 2 + [
        ["loss.kl"]
    ] * 2
    assert [entry["loss"] for entry in curve] == [
        *(entry["loss.logit_l1"] for entry in curve[:2]),
        *(0.5 * entry["loss.kl"] for entry in curve[2:]),
    ]


AT_MAPS = "{kind: attention_transfer, student: body.0.1, teacher: body.0.1}"
MISTAKES = {
    "distill.criterion=[soft_kl, soft_kl]": "two criteria are called soft_kl; give one of them another `name:`",
    "distill.criterion=[{kind: soft_kl, until: 0.3}, {kind: logit_l1, from: 0.5}]": (
        "no criterion counts from 0.3 of the steps on; let one begin there, with `from: 0.3`"
    ),
    "distill.criterion=[{kind: soft_kl, from: 0.5, until: 0.3}]": (
        "distill.criterion.0: soft_kl counts from 0.5 until 0.3, which is never; give a later until"
    ),
    "distill.criterion=[{kind: soft_k}]": "distill.criterion[0]: unknown criterion 'soft_k'; did you mean soft_kl?",
    "distill.criterion=[{kind: soft_kl, weight: x}]": 'distill.criterion.0.weight is "x": input should be',
    "distill.criterion=[{kind: soft_kl, temprature: 3}]": "distill.criterion[0].temprature: unknown key; did you mean",
    "distill.criterion={kind: hint, student: body.0.7}": (
        "distill.criterion names the layer 'body.0.7', which the student has not; the nearest are body.0.2"
    ),
    "distill.criterion=[soft_kl, {kind: hint, teacher: bdy.0.1}]": (
        "distill.criterion[1] names the layer 'bdy.0.1', which the teacher has not; the nearest are body.0.1"
    ),
    "distill.criterion={kind: hint, student: body.0.1}": (
        "distill.criterion: the student's body.0.1 answers 4x4x4 for each image and the teacher's penultimate 12, "
        "which cannot be connected"
    ),
    "distill.criterion={kind: relational, distance: 0, angle: 0}": "distance and angle are both 0",
    "distill.accumulate=20": "accumulate is 20, but a step has only 8 images; use at most that",
    "distill.optimizer.warmup=0.1": "warmup is 0.1, but one_cycle rises by itself; drop it, or use schedule cosine",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistake_in_the_training_is_named_in_one_line_before_any_work(tmp_path, setting):
    with pytest.raises(RecipeError) as error:
        check(toy_recipe(tmp_path, [setting]))
    assert len(error.value.lines) == 1
    assert MISTAKES[setting] in str(error.value)


def test_layers_of_the_teacher_are_refused_where_its_stored_answer_is_all_there_is(tmp_path):
    settings = [f"distill.criterion=[soft_kl, {AT_MAPS}]", "distill.teacher_logits=stored"]
    with pytest.raises(RecipeError, match=r"distill.criterion\[1\] reads a layer of the teacher, but .* is \"stored\""):
        check(toy_recipe(tmp_path, settings))


class Unused(ConvNet):
    """A network with a layer that its answer does not come from."""

    def __init__(self):
        super().__init__(4, 1, widths=(4, 6))
        self.spare = torch.nn.Conv2d(1, 8, 1)


def test_layer_that_takes_no_part_in_the_answer_is_refused(tmp_path):
    settings = [
        "student={network: 'test_loss:Unused'}",
        "distill.criterion={kind: hint, student: spare, teacher: body.0.1}",
    ]
    with pytest.raises(RecipeError, match="distill.criterion: the layer 'spare' takes no part in the network's answer"):
        check(toy_recipe(tmp_path, settings))


def test_check_leaves_networks_and_random_numbers_as_they_are(tmp_path):
    def hooks(*settings):
        prepared = check(toy_recipe(tmp_path, settings))
        networks = (prepared.network, prepared.student)
        return [len(layer._forward_hooks) for network in networks for layer in network.modules()]

    state = torch.get_rng_state()
    assert hooks("distill.criterion={kind: hint, student: body.0.1, teacher: body.0.1}") == hooks()
    assert torch.equal(torch.get_rng_state(), state)


def examples():
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    return [yaml.safe_load(block)["distill"] for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]


@pytest.mark.parametrize("example", examples(), ids=str)
def test_example_of_the_page_on_distillation_is_a_sound_section(example):
    given = {"steps": 10, "criterion": "hard_labels", "optimizer": {"lr": 0.1}, **example}
    spec = DistillSpec.model_validate_json(json.dumps(given))
    reader = StudentLoss(spec).label_reader(takes_mixed=False)
    build_augmentations(spec.augment, where="distill.augment", label_reader=reader)


def test_entry_of_a_list_of_criteria_is_set_by_its_name(tmp_path):
    criteria = "distill.criterion=[soft_kl, {kind: soft_kl, name: sharp, temperature: 1}]"
    recipe = toy_recipe(tmp_path, [criteria, "distill.criterion.sharp.weight=2"])
    assert [one.weight for one in recipe.distill.criterion] == [1.0, 2.0]


def test_section_that_says_nothing_new_is_trained_by_what_it_was_before():
    """Trainings that began before these keys were there go on."""
    recipe = load_recipe("digits-generators")
    new = {"clip_norm", "accumulate", "ema"}
    assert not new & recipe.trained_by()["distill"].keys()
    assert "warmup" not in recipe.trained_by()["distill"]["optimizer"]
    for key, value in {"clip_norm": 1.0, "accumulate": 2, "ema": 0.9}.items():
        changed = load_recipe("digits-generators", {f"distill.{key}": value})
        assert changed.trained_by()["distill"].keys() - recipe.trained_by()["distill"].keys() == {key}
