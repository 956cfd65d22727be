"""Units whose images come from several synthesizers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image
from toy import CLASSES, batches_of, joined, toy_recipe, unit_of

from raydfkd.config.recipe import Recipe
from raydfkd.data.batches import SyntheticBatch
from raydfkd.errors import RecipeError
from raydfkd.runner.check import check
from raydfkd.synthesis.mixture import MixedSynthesizer
from raydfkd.synthesis.synthesizer import num_steps_of

DRAWN = "{kind: procedural_images, images: 2, targets: none, select: {kind: balanced_confidence, candidates: 2}}"
NOISE = "{kind: noise_images, targets: none}"


class Numbered:
    """Makes images that are its number, and remembers what it was asked for."""

    def __init__(self, number):
        self.number, self.asked = number, []

    def produce(self, request, log, hook=None):
        self.asked.append(request)
        labels = torch.tensor(request.classes).repeat_interleave(request.images_per_class)
        yield SyntheticBatch(
            images=torch.full((len(labels), 1, 1, 1), self.number, dtype=torch.uint8),
            labels=labels,
            teacher_logits=torch.zeros(len(labels), 4),
            objective=0.0,
        )

    def num_steps(self, request):
        return request.images_per_class


@pytest.mark.parametrize(
    ("shares", "wanted", "expected"),
    [((1, 1), 6, (3, 3)), ((4, 1), 60, (48, 12)), ((4, 1), 2, (1, 1)), ((1, 1, 1), 10, (3, 4, 3)), ((9, 1), 1, (0, 1))],
)
def test_each_synthesizer_makes_its_share_of_each_class(shares, wanted, expected):
    synthesizers = [Numbered(number) for number in range(len(shares))]
    mixed = MixedSynthesizer(list(zip(shares, synthesizers, strict=True)))
    request = unit_of((2, 0), wanted).request
    made = joined(list(mixed.produce(request, lambda _: None)))
    found = Counter(zip(made.images.flatten().tolist(), made.labels.tolist(), strict=True))
    assert found == Counter({(part, label): n for part, n in enumerate(expected) for label in (2, 0) if n})
    assert num_steps_of(mixed, request) == wanted
    asked = [synthesizer.asked[0] for synthesizer in synthesizers if synthesizer.asked]
    assert len({own.seed for own in asked}) == len({own.class_seeds[0] for own in asked}) == len(asked)
    assert asked[-1].seed == request.seed, "the section's own draws what it would draw alone"


def mixed_recipe(folder, *settings, beside=f"[{DRAWN}]", synthesizer="generator") -> Recipe:
    return toy_recipe(folder, [f"synthesis.beside={beside}", *settings], synthesizer=synthesizer)


def test_section_gives_each_unit_images_of_both(tmp_path):
    settings = ["synthesis.emissions=1", "synthesis.steps=2"]
    alone = joined(batches_of(toy_recipe(tmp_path, settings, synthesizer="generator"), unit_of((3, 1), 2)))
    made = joined(batches_of(mixed_recipe(tmp_path, *settings), unit_of((3, 1), 6)))
    assert len(made) == 12
    assert made.labels[-4:].bincount(minlength=CLASSES).tolist() == [0, 2, 0, 2]
    assert torch.equal(made.images[-4:], alone.images), "the generator's are those of the recipe without the others"
    assert torch.equal(made.labels[:8], made.teacher_logits[:8].argmax(1))


def test_what_is_beside_is_part_of_the_sets_digest_and_nothing_changes_without(tmp_path):
    plain, one, other = (
        mixed_recipe(tmp_path, beside=text).made_of("sha") for text in ("[]", f"[{DRAWN}]", f"[{NOISE}]")
    )
    assert "beside" not in plain["synthesis"]
    assert plain == toy_recipe(tmp_path, synthesizer="generator").made_of("sha")
    assert one["synthesis"]["beside"] != other["synthesis"]["beside"]


def test_pictures_of_the_section_are_for_those_that_optimise(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8), 90).save(tmp_path / "pictures" / name)
    moments = "synthesis.objective=[cross_entropy, {term: bn_moments, form: norm}]"
    settings = [f"synthesis.statistics={tmp_path / 'pictures'}", moments, "synthesis.emissions=1"]
    other = "{kind: generator, objective: [bn_moments], steps: 1, batch_per_class: 2, emissions: 1}"
    check(mixed_recipe(tmp_path, *settings, beside=f"[{NOISE}, {other}]"))
    specs = mixed_recipe(tmp_path, *settings, beside=f"[{NOISE}, {other}]").synthesis
    found = [specs.of_beside(spec).statistics for spec in specs.beside]
    assert found == [None, specs.statistics]


WRONG = {
    "an unknown one": ("[procedural_image]", [], r"^synthesis.beside\[0\].*procedural_images"),
    "an unknown option": ("[{kind: noise_images, targets: none, stdd: 1}]", [], "stdd.*std"),
    "labels that it cannot make": ("[noise_images]", [], "what is drawn has no class before the teacher sees it"),
    "no images": ("[{kind: noise_images, images: 0}]", [], "synthesis.beside.*images"),
    "a live source": (
        f"[{NOISE}]",
        ["distill.source=live", "transfer_set.images_per_class=0", "synthesis.emissions=1"],
        "synthesis.beside has noise_images, but distill.source live trains one generator; drop beside",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_in_what_is_beside_are_named(tmp_path, case):
    beside, settings, message = WRONG[case]
    with pytest.raises(RecipeError, match=message):
        check(mixed_recipe(tmp_path, *settings, beside=beside))
