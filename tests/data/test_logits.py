from __future__ import annotations

import math

import pytest
import torch

from raydfkd.data.logits import completed, largest
from raydfkd.seeds import rng_from

CLASSES = 9


def answers(count=5, scale=3.0, shift=2.0):
    return (scale * torch.randn(count, CLASSES, generator=rng_from(0)) + shift).half()


@pytest.mark.parametrize("k", [1, 3, CLASSES - 1])
def test_largest_logits_are_the_same_numbers_and_the_others_share_the_rest_of_the_probability(k):
    logits = answers()
    found = completed(*largest(logits, k), CLASSES)
    shares = logits.double().softmax(1)
    for row in range(len(logits)):
        top = logits[row].topk(k).indices.tolist()
        rest = 1 - shares[row, top].sum().item()
        for label in range(CLASSES):
            if label in top:
                assert found[row, label] == logits[row, label]
            else:
                assert found[row].double().softmax(0)[label].item() == pytest.approx(rest / (CLASSES - k), rel=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_order_of_the_largest_is_that_of_the_logits_at_any_temperature(temperature):
    logits = answers()
    found = completed(*largest(logits, 4), CLASSES)
    assert torch.equal((found / temperature).topk(4).indices, (logits / temperature).topk(4).indices)


def test_all_logits_but_one_leave_that_one_as_it_was():
    logits = answers()
    torch.testing.assert_close(completed(*largest(logits, CLASSES - 1), CLASSES), logits, rtol=1e-3, atol=1e-3)


def test_level_of_the_others_is_their_mean_in_probability():
    logits = torch.tensor([[9.0, 1.0, 2.0, 4.0]])
    kept, classes = largest(logits, 1)
    mean = math.log((math.exp(1) + math.exp(2) + math.exp(4)) / 3)
    torch.testing.assert_close(kept, torch.tensor([[9.0, mean]]).half())
    assert classes.tolist() == [[0]]


@pytest.mark.parametrize("logits", [[1e6, 0.0, 0.0], [0.0, -1e6, -1e6], [-1e6, -1e6, -1e6]])
def test_what_float16_cannot_hold_is_the_nearest_that_it_can(logits):
    found = completed(*largest(torch.tensor([logits]), 1), 3)
    assert found.isfinite().all()
    assert found.argmax(1).item() == max(range(3), key=logits.__getitem__)


@pytest.mark.parametrize(("classes", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_last_of_many_classes_can_be_told(classes, dtype):
    logits = torch.zeros(2, classes).half()
    logits[1, classes - 1] = 20
    kept, which = largest(logits, 2)
    assert which.dtype == dtype
    assert completed(kept, which, classes)[1].argmax().item() == classes - 1
