from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import CLASSES, SPACE, assert_same_rows, batches_of, batchnorm_teacher, joined, toy_recipe, unit_of

from raydfkd.errors import RecipeError
from raydfkd.networks.inside import TeacherInside
from raydfkd.runner.check import check
from raydfkd.seeds import rng_from
from raydfkd.synthesis.targets import (
    TARGETS,
    correlation_factor,
    dirichlet_concentrations,
    with_class_on_top,
)

SOFT = {
    "dirichlet": "{kind: dirichlet}",
    "gaussian": "{kind: gaussian, std: 2.0}",
    "gaussian, inner layer": "{kind: gaussian, std: 2.0, layer: head}",
}
TEMPERED = "synthesis.objective=[{term: cross_entropy, temperature: 20}]"


def weight_of(rows=CLASSES, inputs=12, seed=1):
    return torch.randn(rows, inputs, generator=rng_from(seed))


def sampler(kind, network=None, **options):
    inside = TeacherInside(network or batchnorm_teacher(), SPACE.shape, torch.device("cpu"))
    return TARGETS.build(kind, options, inside, where="synthesis.targets")


def drawn(targets, label, count, seed=5):
    return targets((label,), count, [rng_from(seed)])


def test_concentration_is_the_scale_times_the_similarity_of_the_classes():
    weight = weight_of()
    found = dirichlet_concentrations(weight, (1.0, 0.1))
    for scale, rows in zip((1.0, 0.1), found, strict=True):
        for one in range(CLASSES):
            cosines = [float(F.cosine_similarity(weight[one], row, dim=0)) for row in weight]
            low, high = min(cosines), max(cosines)
            expected = torch.tensor([scale * (cosine - low) / (high - low) + 1e-4 for cosine in cosines])
            torch.testing.assert_close(rows[one].float(), expected, atol=1e-5, rtol=1e-5)


def test_scale_of_a_tenth_makes_half_of_the_targets_sharper():
    """The released code normalises after the scale, which cancels it."""
    tops = drawn(sampler("dirichlet"), 0, 400).amax(1)
    one, other = tops[0::2].mean(), tops[1::2].mean()
    soft, sharp = (drawn(sampler("dirichlet", scales=[scale]), 0, 400).amax(1).mean() for scale in (1.0, 0.1))
    assert sharp - soft > 0.05
    assert abs(float(one - other)) == pytest.approx(float(sharp - soft), abs=0.04)


def test_scales_share_the_images_also_where_a_batch_has_one_of_each_class():
    targets, rng = sampler("dirichlet", scales=[100.0, 0.01]), rng_from(0)
    tops = torch.cat([targets((1,), 1, [rng]) for _ in range(200)]).amax(1)
    assert 0.4 < (tops > 0.95).float().mean() < 0.6


def test_mean_of_dirichlet_targets_is_that_of_their_concentration_where_nothing_is_chosen():
    targets = sampler("dirichlet", scales=[3.0])
    concentration = dirichlet_concentrations(batchnorm_teacher().head.weight.detach(), [3.0])[0, 2]
    found = targets.draw(2, 2000, rng_from(1)).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), concentration / concentration.sum(), atol=5e-3, rtol=0)


def test_normal_scores_are_correlated_as_the_weights_are_alike():
    weight = weight_of()
    factor = 1.5 * correlation_factor(weight)
    rows = F.normalize(weight.double(), dim=1)
    torch.testing.assert_close(factor @ factor.T, 2.25 * rows @ rows.T, atol=1e-5, rtol=0)


def test_more_units_than_inputs_make_no_error():
    factor = correlation_factor(weight_of(rows=9, inputs=3))
    assert factor.isfinite().all()
    torch.testing.assert_close((factor @ factor.T).diagonal(), torch.full((9,), 1 + 1e-6, dtype=torch.float64))


def test_gaussian_targets_are_softened_scores_of_that_covariance():
    network = batchnorm_teacher()
    found = sampler("gaussian", network, std=1.5, temperature=2.0).draw(0, 2000, rng_from(3)).flatten(0, 1)
    rows = F.normalize(network.head.weight.detach().double(), dim=1)
    expected = 2.25 * rows @ rows.T
    centred = 2.0 * (found.log() - found.log().mean(1, keepdim=True))  # softmax forgets a constant an image
    middle = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
    torch.testing.assert_close(centred.T.cov(), middle @ expected @ middle, atol=0.06, rtol=0)


def test_scores_of_an_inner_layer_pass_through_the_rest_of_the_teacher():
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()
    found = sampler("gaussian", network, std=2.0, layer="1", temperature=3.0).draw(0, 50, rng_from(3)).flatten(0, 1)
    noise = torch.randn(len(found), 6, generator=rng_from(3), dtype=torch.float64)
    scores = noise @ (2.0 * correlation_factor(network[1].weight.detach())).T
    with torch.no_grad():
        expected = (network[3](scores.float().relu()) / 3.0).softmax(1)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-5)


def test_first_draw_with_the_class_on_top_is_taken_and_else_the_nearest_with_two_entries_swapped():
    candidates = torch.tensor(
        [
            [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]],
            [[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]],
            [[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]],
        ]
    )
    torch.testing.assert_close(with_class_on_top(candidates, 0), torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]))


@pytest.mark.parametrize("targets", SOFT.values(), ids=SOFT)
def test_images_are_optimised_towards_soft_targets_of_their_classes(tmp_path, targets):
    settings = ["synthesis.stages=[{steps: 60}]", "synthesis.augment=[]", "synthesis.batch_size=100"]
    objective = "synthesis.objective=[cross_entropy]"
    recipe = toy_recipe(tmp_path, [*settings, objective, f"synthesis.targets={targets}"])
    unit, losses = unit_of((3, 1), 4), []
    made = joined(batches_of(recipe, unit, lambda entry: losses.append(entry["total"])))
    assert made.labels.tolist() == [3] * 4 + [1] * 4
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("targets", SOFT.values(), ids=SOFT)
def test_soft_targets_of_a_unit_follow_from_its_seeds(tmp_path, targets):
    recipe = toy_recipe(tmp_path, [TEMPERED, f"synthesis.targets={targets}"])
    one, same = (joined(batches_of(recipe, unit_of((3, 1), 4))) for _ in range(2))
    assert_same_rows(one, same)
    other = joined(batches_of(toy_recipe(tmp_path, [TEMPERED]), unit_of((3, 1), 4)))
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("synthesizer", "targets", "message"),
    [
        ("generator", "{kind: dirichlet}", "targets are soft, but a generator is not told .*; use pixels"),
        ("pixels", "{kind: gaussian, std: 1.0, layer: haed}", "synthesis.targets.layer names the layer 'haed'.* head"),
        ("pixels", "{kind: gaussian, std: 0.0}", "synthesis.targets.std is 0.0"),
        ("pixels", "{kind: dirichlet, scales: []}", "synthesis.targets.scales is"),
    ],
)
def test_soft_targets_that_cannot_be_followed_are_refused_before_any_work(tmp_path, synthesizer, targets, message):
    recipe = toy_recipe(tmp_path, [f"synthesis.targets={targets}"], synthesizer=synthesizer)
    with pytest.raises(RecipeError, match=message) as error:
        check(recipe)
    assert "\n" not in str(error.value)
