from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import xxhash
from test_sources import Rows
from toy import toy_recipe

from raydfkd.config.schema import PluginSpec
from raydfkd.data.view_source import compressed, expanded
from raydfkd.errors import RecipeError
from raydfkd.runner.check import check
from raydfkd.seeds import derive_seed, rng_from

CLASSES = 6


class Teacher:
    """Answers of views, which follow from image and seed; counts the images that it was asked about."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images, seeds):
        self.asked += len(images)
        answers = [
            torch.randn(CLASSES, generator=rng_from(int(image.sum()) + int(seed)))
            for image, seed in zip(images, seeds, strict=True)
        ]
        return torch.stack(answers)


def sources_of(rows, teacher, ranks=1, **spec):
    feed = {"num_classes": CLASSES, "augment": (PluginSpec(kind="flip"),), "ask": teacher}
    return rows.sources(ranks, kind="views", feed=feed, **spec)


def batches(source, count):
    return list(itertools.islice(iter(source), count))


@pytest.fixture
def rows(tmp_path):
    found = Rows(tmp_path, part_rows=7)
    found.write(9, 23)
    return found


def test_answers_are_those_of_the_views_that_the_student_is_shown(rows):
    teacher = Teacher()
    (source,) = sources_of(rows, teacher, keep="all", views=3)
    for batch in batches(source, 12):
        expected = teacher(batch.images, batch.view_seeds).half()
        torch.testing.assert_close(batch.teacher_logits, expected, rtol=0, atol=0)
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()


def test_teacher_is_asked_once_about_each_view(rows):
    teacher = Teacher()
    (source,) = sources_of(rows, teacher, keep="all", views=3)
    batches(source, 40)
    assert teacher.asked == 3 * 32


def test_an_image_shows_all_its_views_in_turn(rows):
    (source,) = sources_of(rows, Teacher(), views=3, top_k=2)
    shown = {}
    for batch in batches(source, 6 * 4):  # six epochs of four steps
        for label, seed in zip(batch.labels.tolist(), batch.view_seeds.tolist(), strict=True):
            shown.setdefault(label, []).append(seed)
    assert all(len(set(seeds)) == 3 and seeds[:3] == seeds[3:] for seeds in shown.values())
    assert len({seed for seeds in shown.values() for seed in seeds}) == 3 * 32, "no two images share a view's seed"


def test_images_of_an_epoch_show_different_numbers_of_their_views(rows):
    (source,) = sources_of(rows, Teacher(), seed=3, views=3, top_k=2)
    numbers = []
    for batch in batches(source, 4):
        for image, seed in zip(batch.images, batch.view_seeds.tolist(), strict=True):
            key = xxhash.xxh3_64_intdigest(image.numpy().tobytes())
            numbers.append([derive_seed(3, key, view) for view in range(3)].index(seed))
    assert min(Counter(numbers)[view] for view in range(3)) >= 5


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", [1, 5])
def test_resumed_source_replays_the_same_views(rows, ranks, at):
    one = sources_of(rows, Teacher(), ranks, views=3, top_k=2)
    streams = [iter(source) for source in one]
    for _ in range(at):
        for stream in streams:
            next(stream)
    states = [source.state_dict() for source in one]
    other = sources_of(rows, Teacher(), ranks, views=3, top_k=2)
    for source, state in zip(other, states, strict=True):
        source.load_state_dict(state)
    again = [iter(source) for source in other]
    for _ in range(9):
        for stream, resumed in zip(streams, again, strict=True):
            expected, found = next(stream), next(resumed)
            assert torch.equal(found.view_seeds, expected.view_seeds)
            assert torch.equal(found.teacher_logits, expected.teacher_logits)


def test_likeliest_classes_keep_their_probability_and_the_others_share_the_rest():
    logits = 3 * torch.randn(5, CLASSES, generator=rng_from(0))
    found = expanded(compressed(logits, 2), CLASSES).float().softmax(1)
    shares = logits.softmax(1)
    for row in range(5):
        top = shares[row].topk(2).indices.tolist()
        rest = (1 - shares[row, top].sum()) / (CLASSES - 2)
        expected = torch.tensor([shares[row, k] if k in top else rest for k in range(CLASSES)])
        torch.testing.assert_close(found[row], expected, atol=2e-3, rtol=2e-3)


def test_answer_that_is_sure_beyond_float16_stays_finite():
    logits = torch.tensor([[1000.0, 0, 0, 0]])
    found = expanded(compressed(logits, 1), 4).float()
    assert found.isfinite().all()
    assert found.softmax(1)[0, 0] == pytest.approx(1)


def test_many_classes_can_be_told_apart():
    logits = torch.zeros(1, 40000)
    logits[0, 39999] = 20.0
    assert expanded(compressed(logits, 3), 40000).argmax(1).tolist() == [39999]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.source={kind: views, top_k: 2}"], "distill.augment is empty, so all views of an image are alike"),
        (["distill.source=views", "distill.augment=[flip]"], "distill.source.top_k is 10, but there are 4 classes"),
        (
            ["distill.source={kind: views, top_k: 2}", "distill.augment=[flip, mixup]"],
            r"distill.augment\[1\]: mixup mixes images, but distill.source views needs views of one each; drop it",
        ),
        (
            [
                "distill.source={kind: views, keep: all, views: 64}",
                "distill.augment=[flip]",
                "transfer_set.images_per_class=3000000",
            ],
            "distill.source.views is 64, but the answers to those of 12,000,000 images are 6 GiB and 4 are held",
        ),
    ],
)
def test_views_that_cannot_be_asked_about_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message) as error:
        check(toy_recipe(tmp_path, settings))
    assert "\n" not in str(error.value)
