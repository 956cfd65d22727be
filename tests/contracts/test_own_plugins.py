"""Plug-ins of the user's, from a package that is not part of this one."""

from __future__ import annotations

import pytest
import torch
from toy import CLASSES, batches_of, joined, toy_recipe

import raydfkd
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import open_real_data
from raydfkd.runner.check import check

SOURCE = '''
import torch
from torch import nn

from raydfkd.data.batches import SyntheticBatch
import raydfkd
from raydfkd.errors import RecipeError
from raydfkd.images.real_data import LabelledImages, RealData, resized
from raydfkd.losses.objective import Term
from raydfkd.synthesis.targets import TargetSampler


class Dark(Term):
    """Mean brightness.

    Args:
        factor: of it.
    """

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, view):
        return self._factor * view.images.mean()


class Constant:
    """Images of one grey each.

    Args:
        grey: 0 to 255.
    """

    def __init__(self, setting, *, grey: int) -> None:
        self._setting, self._grey = setting, grey

    def num_steps(self, request):
        return 1

    def produce(self, request, log, hook=None):
        hook(dict) if hook else None
        log({"step": 1, "total": 0.0})
        images = torch.full((request.count, *self._setting.space.shape), self._grey / 255 - 0.5) / 0.225
        targets = self._setting.targets(request.classes, request.images_per_class, [])
        yield self._setting.judge.keep(images, targets, 0.0)


class Invert:
    """Black becomes white."""

    def __call__(self, images, rng):
        return -images


class Backwards(TargetSampler):
    """As many images of each class, the last class first."""

    def __call__(self, classes, images_per_class, rngs):
        return torch.tensor(classes[::-1]).repeat_interleave(images_per_class)


class Last:
    """The images that were made last.

    Args:
        sign: 1, or -1 for the first.
    """

    def __init__(self, *, sign: float = 1.0) -> None:
        self._sign = sign

    def scores(self, logits, labels, rng):
        return self._sign * torch.arange(len(labels))


class Flat(nn.Sequential):
    """One linear layer.

    Args:
        latent: random numbers of an image.
    """

    def __init__(self, space, *, latent: int = 3) -> None:
        super().__init__(nn.Linear(latent, space.channels * space.height * space.width), nn.Sigmoid())
        self.append(nn.Unflatten(1, space.shape))
        self.latent = latent


class Gap:
    """Squared difference of logits."""

    def __call__(self, student, teacher, labels):
        return (student.logits - teacher.logits).square().mean()


def stripes(space, *, root: str, wrong: str = "") -> RealData:
    """Images of four kinds of stripes.

    Args:
        root: folder.
        wrong: what to do wrongly.
    """
    if root != "here":
        raise RecipeError(f"real_data.root is {root!r}: no stripes there")

    def load(split):
        rng = torch.Generator().manual_seed(len(split))
        images, labels = torch.rand(8, 1, 5, 5, generator=rng), torch.arange(8) % 4
        if wrong == "size":
            return LabelledImages(images=(255 * images).byte(), labels=labels)
        if wrong == "labels":
            labels = labels + 1
        if wrong == "type":
            labels = labels.float()
        return LabelledImages(images=resized(images, space), labels=labels)

    return RealData(class_names=("a", "b", "c", "d"), channels=1, load=load)


class Lazy:
    """Images that are made while somebody asks for them."""

    def __init__(self, space, wrong):
        self.space, self.wrong = space, wrong

    def batches(self, size, on_broken):
        on_broken("the third")
        for first in range(0, 8, size):
            labels = torch.arange(first, min(first + size, 8)) % 4
            if self.wrong and first:
                labels = labels + 4
            yield torch.zeros(len(labels), *self.space.shape, dtype=torch.uint8), labels


def lazy_stripes(space, *, wrong: bool = False) -> RealData:
    """Images of four kinds of stripes, a few at a time."""
    return RealData(class_names=("a", "b", "c", "d"), channels=1, load=lambda split: Lazy(space, wrong))
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of a package of its own for each test, in a folder that is on the path."""
    name = f"mypkg_{tmp_path.name.replace('-', '_')}"
    (tmp_path / "outside" / name).mkdir(parents=True)
    (tmp_path / "outside" / name / "__init__.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "outside")
    return name


USES = {
    "term": ("generator", "synthesis.objective=[cross_entropy, {{term: {0}:Dark, factor: 2.0, weight: 0.5}}]"),
    "synthesizer": ("pixels", "synthesis={{synthesizer: {0}:Constant, grey: 77, objective: [cross_entropy]}}"),
    "augmentation": ("pixels", "synthesis.augment=[{{kind: {0}:Invert}}]"),
    "targets": ("generator", "synthesis.targets={0}:Backwards"),
    "selector": ("pixels", "synthesis.select={{kind: {0}:Last, sign: -1.0, candidates: 2}}"),
    "generator": ("generator", "synthesis.generator={{kind: {0}:Flat, latent: 5}}"),
    "criterion": ("generator", "distill.criterion={0}:Gap"),
    "real data": ("generator", "real_data={{kind: {0}:stripes, root: here}}"),
}


@pytest.mark.parametrize("use", USES)
def test_recipe_runs_with_a_plugin_of_the_user_s(tmp_path, package, use):
    synthesizer, setting = USES[use]
    recipe = toy_recipe(tmp_path, [setting.format(package)], synthesizer=synthesizer)
    result = raydfkd.run(recipe)
    assert result.outcome.given_up == ()
    assert result.job.snapshot().images == 24
    assert result.student is not None
    assert (result.report["student"]["top1"] is not None) == (use == "real data")


def test_synthesizer_of_the_user_s_makes_the_set(tmp_path, package):
    recipe = toy_recipe(tmp_path, [USES["synthesizer"][1].format(package)])
    assert joined(batches_of(recipe)).images.unique().tolist() == [77]


def test_targets_of_the_user_s_are_the_labels(tmp_path, package):
    recipe = toy_recipe(tmp_path, [USES["targets"][1].format(package)], synthesizer="generator")
    (first, *_) = batches_of(recipe)
    assert first.labels.tolist() == sorted(first.labels.tolist(), reverse=True)


def test_real_data_of_the_user_s_are_read_in_the_teacher_s_size(tmp_path, package):
    recipe = toy_recipe(tmp_path, [USES["real data"][1].format(package)])
    data = open_real_data(recipe.real_data, recipe.teacher.image_space, CLASSES)
    split = data.load("test")
    assert split.images.shape == (8, 1, 8, 8)
    assert split.images.dtype == torch.uint8
    assert data.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("size", "split test has images of torch.uint8 [8, 1, 5, 5]; give torch.uint8 [8, 1, 8, 8]"),
        ("labels", "split test has labels from 1 to 4; give 0 to 3, the position in class_names"),
        ("type", "split test has labels of torch.float32 [8]; give torch.int64 [N]"),
    ],
)
def test_real_data_that_are_read_wrongly_are_refused_in_one_line_before_any_work(tmp_path, package, wrong, message):
    recipe = toy_recipe(tmp_path, [f"real_data={{kind: '{package}:stripes', root: here, wrong: {wrong}}}"])
    with pytest.raises(RecipeError) as error:
        open_real_data(recipe.real_data, recipe.teacher.image_space, CLASSES)
    assert str(error.value) == f"real_data: {package}:stripes, {message}"


def test_real_data_of_the_user_s_may_be_read_batch_by_batch(tmp_path, package):
    report = raydfkd.run(toy_recipe(tmp_path, [f"real_data={package}:lazy_stripes"])).report
    assert report["judged_images"] == 8
    assert report["images_per_class"] == [2, 2, 2, 2]
    assert report["skipped_pictures"] == {"count": 1, "first": ["the third"]}


def test_batch_of_the_user_s_that_does_not_fit_is_refused_when_it_comes(tmp_path, package):
    recipe = toy_recipe(tmp_path, [f"real_data={{kind: '{package}:lazy_stripes', wrong: true}}"])
    data = open_real_data(recipe.real_data, recipe.teacher.image_space, CLASSES)
    batches = data.load("test").batches(4)
    assert next(batches)[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(RecipeError, match=r"lazy_stripes, split test has labels from 4 to 7; give 0 to 3"):
        next(batches)


def test_complaint_of_real_data_of_the_user_s_is_found_before_any_work(tmp_path, package):
    with pytest.raises(RecipeError, match=r"real_data.root is 'there': no stripes there"):
        check(toy_recipe(tmp_path, [f"real_data={{kind: '{package}:stripes', root: there}}"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("synthesis.objective=[{0}:Invert]", r"synthesis.objective\[0\]: \w+:Invert makes a Invert .*so it is no term"),
        ("synthesis.objective=[{0}:Flat]", r"synthesis.objective\[0\]: \w+:Flat does not take what a term is given"),
        ("synthesis.objective=[{0}:stripes]", r"synthesis.objective\[0\].root is required and missing"),
        ("synthesis.augment=[{0}:Dark]", r"synthesis.augment\[0\]: \w+:Dark cannot be called with images and"),
        ("synthesis.targets={0}:Gap", r"synthesis.targets: \w+:Gap does not take what a target sampler is given"),
        ("synthesis.select={0}:Gap", r"synthesis.select: \w+:Gap makes a Gap without scores, so it is no selector"),
        ("synthesis.generator={0}:Invert", r"synthesis.generator: \w+:Invert does not take what a generator is given"),
        (
            "synthesis={{synthesizer: {0}:Dark, objective: [one_hot]}}",
            r"synthesis: \w+:Dark does not take what a synthesizer is given",
        ),
        ("real_data={0}:Invert", r"real_data: \w+:Invert does not take what a real data set is given"),
        ("synthesis.objective=[{0}:Darker]", r"synthesis.objective\[0\] is '\w+:Darker', which cannot be imported"),
        ("synthesis.objective=[nopkg_at_all:Dark]", r"synthesis.objective\[0\] is 'nopkg_at_all:Dark', which cannot"),
    ],
)
def test_class_of_another_kind_is_refused_in_one_line(tmp_path, package, setting, message):
    recipe = toy_recipe(tmp_path, [setting.format(package)], synthesizer="generator")
    with pytest.raises(RecipeError, match=message) as error:
        check(recipe)
    assert "\n" not in str(error.value)
