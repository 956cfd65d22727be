"""Figures of answers to labelled images, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raydfkd.distillation.metrics import MOST_CONFUSED, Comparison, Scores


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def figures(logits, labels, *, batch=1000):
    scores = Scores(logits.shape[1])
    for rows, truth in zip(logits.split(batch), torch.tensor(labels).split(batch), strict=True):
        scores.add(rows, truth)
    return scores.figures()


def one_hot(answers, classes):
    return 20 * torch.nn.functional.one_hot(torch.tensor(answers), classes).double()


def test_top1_is_the_share_of_right_answers_over_all_and_over_each_class():
    found = figures(one_hot([0, 0, 1, 2, 2], 4), [0, 0, 0, 1, 2])
    assert found.top1 == 3 / 5
    assert found.per_class == [2 / 3, 0, 1, None]
    assert found.images_per_class == [3, 1, 1, 0]


def test_confusion_counts_the_answers_to_each_class_row_by_row():
    found = figures(one_hot([0, 0, 1, 2, 2], 3), [0, 0, 0, 1, 2])
    assert found.confusion == {"matrix": [[2, 1, 0], [0, 0, 1], [0, 0, 1]]}


def test_of_more_than_a_hundred_classes_the_most_frequent_mistakes_are_kept():
    labels = [5, 5, 5, 7, 7, 9, *range(101)]
    answers = [6, 6, 6, 8, 8, 9, *range(101)]
    found = figures(one_hot(answers, 101), labels)
    assert found.confusion == {"pairs": [[5, 6, 3], [7, 8, 2]]}
    many = figures(one_hot([(label + 1) % 101 for label in range(101)], 101), list(range(101)))
    assert many.confusion == {"pairs": [[label, label + 1, 1] for label in range(MOST_CONFUSED)]}


def test_top5_counts_labels_among_the_five_largest():
    logits = torch.arange(10.0).repeat(4, 1)  # from class 9, the largest, down
    assert figures(logits, [9, 5, 4, 0]).top5 == 2 / 4


def test_top5_says_nothing_of_fewer_than_ten_classes():
    assert figures(one_hot([0, 1], 9), [0, 1]).top5 is None


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy_over_fifteen_bins():
    # confidences 0.61 and 0.65 are in the bin (0.6, 0.667], of which one is right; 0.9 is in (0.867, 0.933], wrong
    logits = logits_of([[0.61, 0.39], [0.35, 0.65], [0.9, 0.1]])
    assert figures(logits, [0, 0, 1]).ece == pytest.approx((abs(0.61 + 0.65 - 1) + 0.9) / 3, abs=1e-12)


def test_errors_of_confidence_cancel_within_a_bin_and_not_between_bins():
    same = figures(logits_of([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]), [0, 0, 0, 1])
    assert same.ece == pytest.approx(0, abs=1e-12)
    apart = figures(logits_of([[0.55, 0.45], [0.95, 0.05]]), [0, 1])  # one right, one wrong
    assert apart.ece == pytest.approx((0.45 + 0.95) / 2, abs=1e-12)


def test_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    # 3/5 is the upper edge of bin 9, (8/15, 9/15]: 0.6 and 0.54 share it, 0.54 right and 0.6 wrong
    found = figures(logits_of([[0.6, 0.4], [0.54, 0.46]]), [1, 0])
    assert found.ece == pytest.approx(abs(0.6 + 0.54 - 1) / 2, abs=1e-9)


def test_certainty_is_in_the_last_bin():
    assert figures(torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), [0, 1]).ece == 0.5


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_figures_do_not_depend_on_the_size_of_the_batches(batch):
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(64, 12, generator=rng), torch.randint(0, 12, (64,), generator=rng).tolist()
    whole, parts = figures(logits, labels), figures(logits, labels, batch=batch)
    assert parts.ece == pytest.approx(whole.ece, abs=1e-15)
    assert (parts.top1, parts.top5, parts.per_class, parts.confusion) == (
        whole.top1,
        whole.top5,
        whole.per_class,
        whole.confusion,
    )


def test_agreement_is_the_share_of_same_answers_whether_right_or_not():
    comparison = Comparison(4)
    comparison.add(one_hot([0, 1, 2], 4), one_hot([0, 1, 3], 4), torch.tensor([0, 3, 3]))
    comparison.add(one_hot([2], 4), one_hot([2], 4), torch.tensor([2]))
    assert (comparison.agreement, comparison.images) == (3 / 4, 4)
    assert (comparison.student.top1, comparison.teacher.top1) == (2 / 4, 3 / 4)


def test_without_labels_there_is_agreement_and_nothing_else():
    comparison = Comparison(4)
    comparison.add(one_hot([0, 1], 4), one_hot([0, 2], 4), None)
    assert comparison.agreement == 1 / 2
    assert comparison.student is comparison.teacher is None


def test_of_no_images_nothing_is_known():
    assert math.isnan(Comparison(4).agreement)
