"""Weights that a batch begins with, learned over the batches."""

from __future__ import annotations

import copy

import pytest
import torch

from raydfkd.synthesis.meta import MetaSpec, MetaWeights


def steps(meta, weights, targets, *, count=3, lr=0.1):
    """Plain gradient steps on the squared distance to ``targets``; returns the gradients."""
    gradients = []
    for _ in range(count):
        loss = sum(((tensor - target) ** 2).sum() for tensor, target in zip(weights, targets, strict=True))
        for tensor in weights:
            tensor.grad = None
        loss.backward()
        meta.note_gradients()
        gradients.append([tensor.grad.clone() for tensor in weights])
        with torch.no_grad():
            for tensor in weights:
                tensor.sub_(lr * tensor.grad)
    return gradients


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_meta_weights_step_as_adam_does_along_the_gradient_of_their_kind(kind):
    weights = [torch.randn(4, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    begun = [tensor.detach().clone() for tensor in weights]
    expected = [tensor.clone().requires_grad_() for tensor in begun]
    adam = torch.optim.Adam(expected, lr=0.05, betas=(0.5, 0.999))
    meta = MetaWeights(weights, MetaSpec(lr=0.05, kind=kind))
    for _ in range(2):
        before = [tensor.detach().clone() for tensor in expected]
        gradients = steps(meta, weights, [torch.ones(4), torch.zeros(2, 3)])
        for index, tensor in enumerate(expected):
            along = sum(step[index] for step in gradients) if kind == "fomaml" else before[index] - weights[index]
            tensor.grad = along.detach().clone()
        adam.step()
        meta.learn()
        for own, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(own.detach(), other.detach())


def test_tasks_that_lie_around_a_place_teach_to_begin_there():
    weights = [torch.zeros(8, requires_grad=True)]
    meta = MetaWeights(weights, MetaSpec(lr=0.1, kind="reptile"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        steps(meta, weights, [3 + 0.3 * torch.randn(8, generator=generator)])
        meta.learn()
    torch.testing.assert_close(weights[0].detach(), torch.full((8,), 3.0), atol=0.3, rtol=0)


def test_meta_weights_go_on_from_their_state():
    weights = [torch.randn(4, requires_grad=True)]
    meta = MetaWeights(weights, MetaSpec(lr=0.05))
    steps(meta, weights, [torch.ones(4)])
    meta.learn()
    steps(meta, weights, [torch.ones(4)], count=1)
    copies = [weights[0].detach().clone().requires_grad_()]
    other = MetaWeights(copies, MetaSpec(lr=0.05))
    other.load_state_dict(copy.deepcopy(meta.state_dict()))
    meta.learn()
    other.learn()
    assert torch.equal(weights[0], copies[0])
