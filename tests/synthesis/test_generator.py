from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toy import CLASSES, SmallMemory, batches_of, batchnorm_teacher, joined, toy_recipe, unit_of

from raydfkd.errors import RecipeError
from raydfkd.images.augment import AUGMENTATIONS
from raydfkd.networks.teacher import open_teacher
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.units import Request, WorkUnit


def recipe_with(tmp_path, *overrides):
    return toy_recipe(tmp_path, [f"synthesis.{override}" for override in overrides], synthesizer="generator")


@pytest.mark.parametrize(
    ("images_per_class", "emissions", "sizes"),
    [(4, 1, [4, 4]), (5, 1, [4, 4, 2]), (5, 2, [4, 4, 2]), (7, 3, [4, 4, 2, 4]), (1, 3, [2])],
)
def test_every_class_gets_exactly_its_images(tmp_path, images_per_class, emissions, sizes):
    recipe = recipe_with(tmp_path, f"emissions={emissions}")
    batches = batches_of(recipe, unit_of((3, 1), images_per_class))
    assert sorted(len(batch) for batch in batches) == sorted(sizes)
    assert joined(batches).labels.bincount(minlength=CLASSES).tolist() == [0, images_per_class, 0, images_per_class]
    for batch in batches:
        assert batch.labels.tolist() == [3] * (len(batch) // 2) + [1] * (len(batch) // 2)


def test_the_teacher_comes_to_see_the_classes_that_were_asked_for(tmp_path):
    recipe = recipe_with(tmp_path, "objective=[cross_entropy]", "steps=80", "lr=0.02", "augment=[]", "emissions=1")
    made = joined(batches_of(recipe, unit_of(tuple(range(CLASSES)), 6)))
    assert (made.teacher_logits.argmax(1) == made.labels).float().mean() > 0.9
    with torch.no_grad():
        noise = F.cross_entropy(batchnorm_teacher()(torch.randn(len(made), 1, 8, 8)), made.labels)
    assert F.cross_entropy(made.teacher_logits.float(), made.labels) < 0.3 * noise


@pytest.mark.parametrize(("emissions", "at"), [(1, [6]), (2, [3, 6]), (3, [3, 4, 6])])
def test_images_are_drawn_at_even_times_from_the_middle_of_training_to_its_end(tmp_path, monkeypatch, emissions, at):
    steps = []
    monkeypatch.setitem(AUGMENTATIONS._factories, "count", lambda: lambda images, rng: steps.append(1) or images)
    recipe = recipe_with(tmp_path, f"emissions={emissions}", "augment=[count]")
    teacher = open_teacher(recipe).module
    synthesizer = build_synthesizer(recipe, teacher, torch.device("cpu"))
    stream = synthesizer.produce(unit_of((0, 1), 2 * emissions).request, lambda _: None)
    assert [len(steps) for _ in stream] == at


def test_odd_image_out_is_made_in_a_whole_batch(tmp_path):
    """A generator's BatchNorm makes an image depend on its batch; by itself it would look unlike all others."""
    recipe = recipe_with(tmp_path, "emissions=1")
    three, four = (joined(batches_of(recipe, unit_of((0, 1), count))) for count in (3, 4))
    for label in (0, 1):
        assert torch.equal(three.images[three.labels == label], four.images[four.labels == label][:3])


def test_more_draws_than_half_the_steps_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="emissions is 4, but half of 6 steps are fewer; use at most 3"):
        batches_of(recipe_with(tmp_path, "emissions=4"))


def test_mistake_in_the_generator_s_options_is_found_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match=r"synthesis.generator.*widht.*did you mean width"):
        batches_of(recipe_with(tmp_path, "generator={kind: conv, widht: 4}"))


def test_loop_and_vmap_make_the_same_set_to_the_rounding_of_pixels(tmp_path):
    unit = unit_of((0, 1, 2), 3)
    made = {form: joined(batches_of(recipe_with(tmp_path, f"form={form}"), unit)) for form in ("loop", "vmap", "auto")}
    assert torch.equal(made["auto"].images, made["loop"].images)
    difference = (made["vmap"].images.int() - made["loop"].images.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_unconditional_synthesis_trains_one_generator_and_labels_its_images_by_the_teacher(tmp_path):
    recipe = recipe_with(tmp_path, "targets=none", "objective=[one_hot, class_balance, activation]", "emissions=1")
    made = joined(batches_of(recipe, unit_of((0, 1, 2), 3)))
    assert len(made) == 9
    assert made.labels.tolist() == made.teacher_logits.argmax(1).tolist()


def test_unconditional_images_do_not_depend_on_the_labels_of_the_unit(tmp_path):
    recipe = recipe_with(tmp_path, "targets=none", "objective=[one_hot, class_balance]")
    one, other = (
        joined(
            batches_of(
                recipe,
                WorkUnit(
                    id="test", request=Request(classes=classes, images_per_class=3, seed=1, class_seeds=(5, 6 + extra))
                ),
            )
        )
        for extra, classes in enumerate([(0, 1), (2, 3)])
    )
    assert torch.equal(one.images, other.images)


def test_term_that_needs_targets_is_refused_for_unconditional_synthesis(tmp_path):
    with pytest.raises(RecipeError, match=r"objective\[0\]: cross_entropy needs targets"):
        batches_of(recipe_with(tmp_path, "targets=none"))


def test_objective_falls_while_the_generators_train(tmp_path):
    logged = []
    batches_of(recipe_with(tmp_path, "steps=60", "lr=0.02", "augment=[]"), unit_of((0, 1), 2), logged.append)
    assert [entry["step"] for entry in logged] == [1, 50, 60]
    assert logged[-1]["total"] < 0.7 * logged[0]["total"]


def test_repeats_of_a_class_come_from_different_generators(tmp_path):
    recipe = recipe_with(tmp_path)
    one, other = (joined(batches_of(recipe, unit_of((0, 1), 3, seed=seed))) for seed in (1, 2))
    assert (one.images != other.images).float().mean() > 0.5


def test_conditional_generator_is_one_for_all_classes_and_makes_what_it_is_told(tmp_path):
    trained = ("objective=[cross_entropy]", "steps=80", "lr=0.02", "augment=[]", "emissions=1", "conditional=true")
    made = joined(batches_of(recipe_with(tmp_path, *trained), unit_of((2, 0, 3), 5)))
    assert made.labels.bincount(minlength=CLASSES).tolist() == [5, 0, 5, 5]
    assert (made.teacher_logits.argmax(1) == made.labels).float().mean() > 0.9


def test_conditional_generator_needs_a_latent_to_put_the_class_beside(tmp_path):
    recipe = recipe_with(tmp_path, "conditional=true", "emissions=1", "batch_per_class=1")
    made = joined(batches_of(recipe, unit_of((1, 2), 2)))
    assert not torch.equal(made.images[made.labels == 1], made.images[made.labels == 2])


def test_renewal_draws_a_batch_of_each_class_after_the_first_training_and_after_each_renewal(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setitem(AUGMENTATIONS._factories, "count", lambda: lambda images, rng: steps.append(1) or images)
    recipe = recipe_with(tmp_path, "emissions=1", "augment=[count]", "renewal={steps: 3, keep: 0.5}")
    teacher = open_teacher(recipe).module
    synthesizer = build_synthesizer(recipe, teacher, torch.device("cpu"))
    stream = synthesizer.produce(unit_of((0, 1), 5).request, lambda _: None)
    assert [(len(steps), len(batch)) for batch in stream] == [(6, 4), (9, 4), (12, 2)]


def test_renewed_generators_keep_their_share_of_the_weights(tmp_path):
    """Nothing but the share of fresh weights may tell two runs apart, and with all kept the training just goes on."""
    kept = {
        keep: joined(batches_of(recipe_with(tmp_path, "emissions=1", f"renewal={{steps: 1, keep: {keep}}}"), unit))
        for keep in (0.0, 0.5, 1.0)
        for unit in [unit_of((0, 1), 4)]
    }
    first = {keep: made.images[:4] for keep, made in kept.items()}
    assert torch.equal(first[0.0], first[1.0])
    assert torch.equal(first[0.5], first[1.0])
    changes = [(kept[keep].images[4:].float() - kept[1.0].images[4:].float()).abs().mean() for keep in (0.0, 0.5)]
    assert min(changes) > 0


def test_trained_latents_are_those_that_the_images_are_made_of(tmp_path):
    lowered = ("objective=[cross_entropy]", "emissions=1", "augment=[]", "steps=100", "lr=1e-9")
    objectives = []
    for latents in ("", ", latent_lr: 0.2"):
        recipe = recipe_with(tmp_path, *lowered, f"renewal={{steps: 1{latents}}}")
        objectives.append(F.cross_entropy(*logits_and_labels(batches_of(recipe, unit_of((0, 1, 2, 3), 2)))))
    assert objectives[1] < 0.9 * objectives[0], "with weights held, only the latents can have moved"


def logits_and_labels(batches):
    made = joined(batches)
    return made.teacher_logits.float(), made.labels


def test_renewal_and_several_emissions_are_refused_together(tmp_path):
    with pytest.raises(RecipeError, match="emissions is 2, but with renewal images are drawn after each one"):
        batches_of(recipe_with(tmp_path, "renewal={steps: 3}"))


@pytest.mark.parametrize(("room", "size"), [(16, 4), (15, 2), (7, 1)])
def test_batch_that_does_not_fit_into_memory_is_halved_and_every_image_is_made(tmp_path, caplog, room, size):
    recipe = recipe_with(tmp_path, "objective=[cross_entropy]", "batch_per_class=4", "emissions=2")
    synthesizer = build_synthesizer(recipe, SmallMemory(room, torch.OutOfMemoryError()), torch.device("cpu"))
    for _ in range(2):
        batches = list(synthesizer.produce(unit_of((0, 1, 2, 3), 5).request, lambda _: None))
        assert joined(batches).labels.bincount(minlength=CLASSES).tolist() == [5] * 4
        assert max(map(len, batches)) <= 4 * size
    lines = [record.message for record in caplog.records]
    assert lines == [
        f"no memory for {before} images of each class; going on with half as many" for before in (4, 2) if before > size
    ], "said once, and remembered for the next unit"


def test_class_image_that_does_not_fit_by_itself_is_an_error(tmp_path):
    recipe = recipe_with(tmp_path, "objective=[cross_entropy]", "emissions=1")
    synthesizer = build_synthesizer(recipe, SmallMemory(1, torch.OutOfMemoryError()), torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        list(synthesizer.produce(unit_of((0, 1), 2).request, lambda _: None))
