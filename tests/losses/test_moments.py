from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from toy import (
    batches_of,
    batchnorm_teacher,
    contents_of_interrupted,
    toy_images,
    toy_recipe,
    toy_view,
    unit_of,
    variants,
)

from raydfkd.losses.objective import TERMS, Objective, View
from raydfkd.networks.batchnorm import LayerMoments
from raydfkd.networks.observed import Observation

_INCREMENT = "{term: exponential_increment, of: {kind: bn_moments, form: kl, momentum: 0.5}, refresh: 3}"
OPTIONS = list(variants(TERMS, "bn_moments"))


def term(**options):
    return TERMS.build("bn_moments", options, where="test")


def layer(seed, *, groups, channels):
    rng = torch.Generator().manual_seed(seed)
    return LayerMoments(
        mean=torch.randn(groups, channels, generator=rng),
        var=torch.rand(groups, channels, generator=rng) + 0.2,
        running_mean=torch.randn(channels, generator=rng),
        running_var=torch.rand(channels, generator=rng) + 0.2,
    )


def value_of(layers, **options):
    seen = Observation(logits=torch.zeros(4, 3), moments=tuple(layers))
    groups = len(layers[0].mean)
    images = torch.zeros(groups, 1, 2, 2)
    view = View(images=images, targets=None, teacher=seen, observe=lambda _: seen, groups=groups)
    return term(**options)(view).item()


def spread(layer, statistic):
    """Batch and stored spread as the statistic has them."""
    pair = layer.var.numpy(), layer.running_var.numpy()
    return pair if statistic == "var" else tuple(np.sqrt(var) for var in pair)


@pytest.mark.parametrize("statistic", ["var", "std"])
def test_norm_is_the_sum_over_layers_of_the_two_norms_over_channels(statistic):
    layers = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    expected = 0.0
    for one in layers:
        batch, stored = spread(one, statistic)
        expected += np.linalg.norm(one.mean.numpy()[0] - one.running_mean.numpy())
        expected += np.linalg.norm(batch[0] - stored)
    assert value_of(layers, form="norm", statistic=statistic) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("statistic", ["var", "std"])
def test_squared_is_the_sum_over_layers_of_mean_squared_differences(statistic):
    layers = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    expected = 0.0
    for one in layers:
        batch, stored = spread(one, statistic)
        expected += np.square(one.mean.numpy()[0] - one.running_mean.numpy()).mean() + np.square(batch - stored).mean()
    assert value_of(layers, form="squared", statistic=statistic) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["kl", "reverse_kl"])
def test_divergence_is_that_of_gaussians_averaged_over_channels_and_layers(form):
    layers = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    divergences = []
    for one in layers:
        floor = 1e-3 * one.running_var.median()
        batch = Normal(one.mean, (one.var + floor).sqrt())
        stored = Normal(one.running_mean, (one.running_var + floor).sqrt())
        pair = (batch, stored) if form == "kl" else (stored, batch)
        divergences.append(kl_divergence(*pair).mean().item())
    assert value_of(layers, form=form) == pytest.approx(np.mean(divergences), rel=1e-5)


def test_kl_does_not_change_with_the_scale_of_a_layer():
    one = layer(0, groups=1, channels=5)
    large = LayerMoments(
        mean=100 * one.mean, var=1e4 * one.var, running_mean=100 * one.running_mean, running_var=1e4 * one.running_var
    )
    assert value_of([large], form="kl") == pytest.approx(value_of([one], form="kl"), rel=1e-4)


def test_kl_stays_moderate_for_a_channel_that_training_left_dead():
    alive = layer(0, groups=1, channels=5)
    dead = LayerMoments(
        mean=torch.cat([alive.mean, torch.tensor([[0.02]])], 1),
        var=torch.cat([alive.var, torch.tensor([[1e-3]])], 1),
        running_mean=torch.cat([alive.running_mean, torch.zeros(1)]),
        running_var=torch.cat([alive.running_var, torch.tensor([1e-12])]),
    )
    assert value_of([dead], form="kl") < 2 * value_of([alive], form="kl")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_batch_with_the_stored_moments_has_distance_zero(options):
    one = layer(0, groups=1, channels=5)
    equal = LayerMoments(
        mean=one.running_mean[None],
        var=one.running_var[None],
        running_mean=one.running_mean,
        running_var=one.running_var,
    )
    assert value_of([equal], **options) == pytest.approx(0, abs=1e-6)
    assert value_of([one], **options) > 0.1


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_layer_that_is_matched_exactly_does_not_spoil_the_gradient_of_another(options):
    one, other = layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)
    mean = torch.cat([one.running_mean, other.mean[0]]).requires_grad_()
    moments = (
        replace(one, mean=mean[None, :5], var=one.running_var[None]),
        replace(other, mean=mean[None, 5:]),
    )
    seen = Observation(logits=torch.zeros(4, 3), moments=moments)
    view = View(images=torch.zeros(1, 1, 2, 2), targets=None, teacher=seen, observe=lambda _: seen)
    (gradient,) = torch.autograd.grad(term(**options)(view), mean)
    torch.testing.assert_close(gradient[:5], torch.zeros(5), rtol=0, atol=1e-6)
    assert gradient[5:].isfinite().all()
    assert gradient[5:].abs().min() > 0


def collapsed(stored):
    """The loss of a channel that hardly varies any more, the second of a layer with these ``stored`` variances."""
    running = torch.tensor(stored)
    batch = running.clone()
    batch[1] *= 1e-3
    one = LayerMoments(
        mean=torch.zeros(1, len(stored)), var=batch[None], running_mean=torch.zeros(len(stored)), running_var=running
    )
    return value_of([one], form="kl") * len(stored)


def test_kl_of_a_collapsed_channel_does_not_depend_on_how_loud_another_one_is():
    quiet, loud = collapsed([0.1] * 9), collapsed([0.1] * 8 + [1e4])
    assert loud == pytest.approx(quiet, rel=1e-3)
    assert quiet == pytest.approx(0.5 * (math.log(1 / 2e-3) - 1), rel=0.01), "with a thousandth for both"


def test_kl_is_finite_where_most_or_all_channels_are_dead():
    for stored in ([0.0] * 8 + [1.0, 2.0], [0.0] * 10, [1e-38] * 9 + [1.0]):
        assert math.isfinite(collapsed(stored))
    assert collapsed([0.0] * 8 + [1.0, 2.0]) < 1


@pytest.mark.parametrize("form", ["norm", "squared", "kl"])
def test_scope_class_is_the_mean_over_classes_of_each_class_by_itself(form):
    both = [layer(0, groups=2, channels=5), layer(1, groups=2, channels=3)]
    alone = [
        value_of(
            [
                LayerMoments(
                    mean=one.mean[group : group + 1],
                    var=one.var[group : group + 1],
                    running_mean=one.running_mean,
                    running_var=one.running_var,
                )
                for one in both
            ],
            form=form,
            scope="class",
        )
        for group in range(2)
    ]
    assert value_of(both, form=form, scope="class") == pytest.approx(np.mean(alone), rel=1e-6)


@pytest.mark.parametrize("form", ["norm", "squared", "kl"])
def test_scope_batch_is_the_same_however_the_batch_was_grouped(form):
    images = toy_images(6)
    expected = term(form=form)(toy_view(images))
    for groups in (2, 3, 6):
        torch.testing.assert_close(term(form=form)(toy_view(images, groups=groups)), expected, rtol=1e-5, atol=0)


def test_scope_class_and_scope_batch_differ_where_classes_differ():
    view = toy_view(torch.cat([toy_images(3), toy_images(3, seed=1) + 1]), groups=2)
    assert term(scope="class")(view) > 1.05 * term(scope="batch")(view)


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_first_layer_scale_multiplies_the_first_layer_alone(form):
    layers = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    first, second = (value_of([one], form=form) for one in layers)
    assert value_of(layers, form=form, first_layer_scale=10.0) == pytest.approx(10 * first + second, rel=1e-6)


def test_first_layer_scale_applies_to_the_mean_over_layers_too():
    layers = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    first, second = (value_of([one], form="kl") for one in layers)
    expected = (10 * first + second) / 2
    assert value_of(layers, form="kl", first_layer_scale=10.0) == pytest.approx(expected, rel=1e-6)


def reference(teacher, images, groups, *, form, statistic, scope):
    """The term written down again from the layers' real inputs, in float64 and with autograd's own derivatives."""
    inputs = []
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for norm in norms]
    teacher(images)
    for hook in hooks:
        hook.remove()
    distances = []
    for norm, x in zip(norms, inputs, strict=True):
        for part in [x] if scope == "batch" else x.chunk(groups):
            var, mean = torch.var_mean(part, (0, 2, 3), correction=0)
            stored = norm.running_var
            if form in {"kl", "reverse_kl"}:
                floor = 1e-3 * stored.median()
                pair = [Normal(mean, (var + floor).sqrt()), Normal(norm.running_mean, (stored + floor).sqrt())]
                divergence = kl_divergence(*(pair if form == "kl" else pair[::-1]))
                distances.append(divergence.mean() / len(norms))
                continue
            if statistic == "std":
                var, stored = var.sqrt(), stored.sqrt()
            pair = (mean - norm.running_mean, var - stored)
            distances.append(sum(one.norm() if form == "norm" else one.square().mean() for one in pair))
    return torch.stack(distances).sum() / (1 if scope == "batch" else groups)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_value_and_gradient_agree_with_autograd_in_float64(options):
    teacher, images, groups = batchnorm_teacher(), toy_images(6), 2
    if options["scope"] == "image":
        groups = len(images)
    view = toy_view(images, teacher=teacher, groups=groups)
    value = term(**options)(view)
    (gradient,) = torch.autograd.grad(value, images)

    exact = images.detach().double().requires_grad_()
    expected = reference(copy.deepcopy(teacher).double(), exact, groups, **options)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error < 1e-5


def test_reverse_kl_punishes_a_collapsed_channel_more_than_kl_and_leaves_a_dead_one_alone():
    running = torch.ones(9)
    batch = running.clone()
    batch[1] = 0
    one = LayerMoments(mean=torch.zeros(1, 9), var=batch[None], running_mean=torch.zeros(9), running_var=running)
    assert value_of([one], form="reverse_kl") > 50 * value_of([one], form="kl")
    dead = replace(one, running_var=batch)
    assert value_of([dead], form="reverse_kl") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["norm", "squared", "kl", "reverse_kl"])
def test_scope_image_is_the_mean_over_images_of_each_image_by_itself(form):
    images = toy_images(4)
    alone = [term(form=form)(toy_view(images[row : row + 1])) for row in range(4)]
    found = term(form=form, scope="image")(toy_view(images, groups=4))
    torch.testing.assert_close(found, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def pair_of(layers, groups=1):
    """The view of images with these moments."""
    seen = Observation(logits=torch.zeros(4, 3), moments=tuple(layers))
    images = torch.zeros(4, 1, 2, 2)
    return View(images=images, targets=None, teacher=seen, observe=lambda _: seen, groups=groups)


def blend(first, second, share):
    """Layers whose moments are those of ``first`` and a ``share`` of those of ``second``."""
    return [
        replace(one, mean=(1 - share) * one.mean + share * other.mean, var=(1 - share) * one.var + share * other.var)
        for one, other in zip(first, second, strict=True)
    ]


def batches():
    """Three batches of moments in the same two layers."""
    stored = [layer(0, groups=1, channels=5), layer(1, groups=1, channels=3)]
    others = [[layer(2 * seed, groups=1, channels=5), layer(2 * seed + 1, groups=1, channels=3)] for seed in (1, 2)]
    return [
        stored,
        *(
            [replace(one, mean=other.mean, var=other.var) for one, other in zip(stored, batch, strict=True)]
            for batch in others
        ),
    ]


@pytest.mark.parametrize("form", ["norm", "squared", "kl", "reverse_kl"])
def test_momentum_compares_a_batch_together_with_the_running_average_of_kept_ones(form):
    first, second, third = batches()
    averaging = term(form=form, momentum=0.9)
    plain = term(form=form)
    torch.testing.assert_close(averaging(pair_of(first)), plain(pair_of(first)), rtol=0, atol=0)
    averaging.commit(pair_of(first))
    torch.testing.assert_close(averaging(pair_of(second)), plain(pair_of(blend(second, first, 0.9))))
    averaging.commit(pair_of(second))
    average = blend(second, first, 0.9)
    torch.testing.assert_close(averaging(pair_of(third)), plain(pair_of(blend(third, average, 0.9))))


def test_average_takes_no_gradient_and_that_of_the_batch_is_weakened_by_the_momentum():
    teacher, images = batchnorm_teacher(), toy_images(4)
    averaging = term(form="squared", momentum=0.75)
    averaging.commit(toy_view(images, teacher=teacher))
    (gradient,) = torch.autograd.grad(averaging(toy_view(images, teacher=teacher)), images)
    (plain,) = torch.autograd.grad(term(form="squared")(toy_view(images, teacher=teacher)), images)
    torch.testing.assert_close(gradient, 0.25 * plain, rtol=1e-4, atol=1e-6)


def test_average_is_of_all_groups_together_and_survives_a_checkpoint():
    both = [layer(0, groups=2, channels=5)]
    averaging = term(momentum=0.9)
    averaging.commit(pair_of(both, groups=2))
    pooled = both[0].pooled()
    torch.testing.assert_close(averaging.average, torch.cat([pooled.mean, pooled.var]))
    objective, again = (Objective([("bn_moments", 1.0, one)]) for one in (averaging, term(momentum=0.9)))
    again.resume(objective.state_dict(), torch.device("cpu"))
    torch.testing.assert_close(again.terms["bn_moments"].average, averaging.average)


def test_term_without_momentum_has_no_state_and_is_not_told_of_kept_batches():
    assert not term().state_dict()
    assert (term().remembers, term(momentum=0.9).remembers) == (False, True)


@pytest.mark.parametrize(("synthesizer", "after"), [("pixels", 9), ("generator", 5)])
@pytest.mark.parametrize("objective", ["{term: bn_moments, momentum: 0.9}", _INCREMENT])
def test_what_a_term_knows_of_earlier_batches_survives_an_interruption(tmp_path, synthesizer, after, objective):
    settings = [f"synthesis.objective=[cross_entropy, {objective}]"]
    content, expected = contents_of_interrupted(tmp_path, settings, synthesizer=synthesizer, after=after)
    assert content == expected


def test_kept_batches_change_the_next_ones_of_a_unit(tmp_path):
    def made(name, momentum):
        objective = f"synthesis.objective=[{{term: bn_moments, form: kl, momentum: {momentum}}}]"
        return batches_of(toy_recipe(tmp_path / name, [objective, "synthesis.batch_size=2"]), unit_of((0, 1), 3))

    averaged, plain = made("averaged", 0.9), made("plain", 0.0)
    assert torch.equal(averaged[0].images, plain[0].images)
    assert not torch.equal(averaged[1].images, plain[1].images)
