from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import CLASSES, batchnorm_teacher, plain_teacher

from raydfkd.errors import RecipeError
from raydfkd.networks.inside import TeacherInside, cosine_similarity

SHAPE = (1, 8, 8)


class Tall(nn.Module):
    """Two hidden linear layers before the last; ``skip`` lets the images past the second."""

    def __init__(self, skip=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.last = nn.Linear(64, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)
        self.skip = skip

    def forward(self, images):
        hidden = F.relu(self.first(images.flatten(1)))
        answer = F.relu(self.second(hidden))
        return self.last(answer + hidden[:, :10] if self.skip else answer)


class OnTokens(nn.Module):
    """A linear layer of each row of an image, then one of all."""

    def __init__(self):
        super().__init__()
        self.rows, self.last = nn.Linear(8, 3), nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.last(self.rows(images).flatten(1))


def inside_of(network, shape=SHAPE):
    return TeacherInside(network.eval(), shape, torch.device("cpu"))


def test_head_is_the_weight_of_the_layer_that_makes_the_logits():
    for teacher in (batchnorm_teacher(), plain_teacher()):
        torch.testing.assert_close(inside_of(teacher).head("targets"), teacher.head.weight.detach())


def test_convolution_over_one_position_is_a_head_too():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, CLASSES, 1), nn.Flatten())
    torch.testing.assert_close(inside_of(network).head("targets"), network[1].weight.detach()[:, :, 0, 0])


def test_network_without_a_final_linear_layer_is_refused_in_one_line():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.Tanh())
    with pytest.raises(RecipeError) as error:
        inside_of(network).head("synthesis.targets dirichlet")
    assert str(error.value) == (
        "synthesis.targets dirichlet needs the weights of a final linear layer, but no linear layer makes the logits "
        "of the teacher; use targets balanced"
    )


def test_tail_is_the_rest_of_the_network():
    network = Tall().eval()
    features = torch.randn(600, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.last(F.relu(features))
    inside = inside_of(network)
    torch.testing.assert_close(inside.layer("second", "targets"), network.second.weight.detach())
    torch.testing.assert_close(inside.tail("second", features), expected)


def test_teacher_is_left_as_it_is():
    network = Tall()
    state = copy.deepcopy(network.state_dict())
    network.train()
    inside = TeacherInside(network, SHAPE, torch.device("cpu"))
    inside.tail("second", torch.randn(2, 10))
    assert network.training
    assert all(weight.requires_grad for weight in network.parameters())
    assert not any(layer._forward_hooks for layer in network.modules())
    assert all(torch.equal(weight, state[name]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "path", "message"),
    [
        (Tall(), "secnd", "names the layer 'secnd', which the teacher has not; the nearest are second"),
        (batchnorm_teacher(), "body.0.0", "names the layer 'body.0.0', which is a Conv2d; name a linear layer: head"),
        (Tall(skip=True), "second", "names the layer 'second', but the teacher's logits do not follow from one answer"),
        (OnTokens(), "rows", "names the layer 'rows', but the teacher's logits do not follow from one answer"),
    ],
)
def test_layer_that_cannot_be_modelled_is_refused_in_one_line(network, path, message):
    with pytest.raises(RecipeError) as error:
        inside_of(network).layer(path, "synthesis.targets.layer")
    assert str(error.value).startswith(f"synthesis.targets.layer {message}")
    assert "\n" not in str(error.value)


def test_cosines_agree_with_a_direct_computation():
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    found = cosine_similarity(weight)
    for one in range(5):
        for other in range(5):
            expected = F.cosine_similarity(weight[one].double(), weight[other].double(), dim=0)
            torch.testing.assert_close(found[one, other], expected)
