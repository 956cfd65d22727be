from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import CLASSES, batchnorm_teacher, toy_images

from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Layer, Need, ObservedNetwork
from raydfkd.networks.taps import FIRST_CONVOLUTION, layer_at

FEATURES = {Need.FEATURES: "the term"}


class HeadFirst(nn.Module):
    """Registers its head before the layers of a squeeze-and-excitation block, and an auxiliary head last."""

    def __init__(self):
        super().__init__()
        self.head = self.make_head()
        self.conv = nn.Conv2d(1, 8, 3)
        self.squeeze, self.excite = nn.Linear(8, 2), nn.Linear(2, 8)
        self.aux = nn.Linear(8, CLASSES)

    def make_head(self):
        return nn.Linear(8, CLASSES)

    def features(self, images):
        x = self.conv(images)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return (x * gate[..., None, None]).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


class NormalizedAnswer(HeadFirst):
    def forward(self, images):
        return super().forward(images).log_softmax(1)


class NamedArgument(HeadFirst):
    def forward(self, images):
        return self.head(input=self.features(images))


class TwiceCalled(HeadFirst):
    """Asks its head about something else afterwards."""

    def forward(self, images):
        logits = super().forward(images)
        self.head(torch.zeros(1, 8))
        return logits


class ConvolutionalHead(HeadFirst):
    def make_head(self):
        return nn.Conv2d(8, CLASSES, 1)

    def forward(self, images):
        return self.head(self.features(images)[..., None, None]).flatten(1)


class Cosine(HeadFirst):
    """Its logits are made by no layer."""

    def forward(self, images):
        return F.linear(F.normalize(self.features(images)), F.normalize(self.head.weight))


@pytest.mark.parametrize("kind", [HeadFirst, NormalizedAnswer, NamedArgument, TwiceCalled, ConvolutionalHead])
def test_features_are_the_input_of_the_layer_that_makes_the_logits_wherever_it_is_registered(kind):
    network, images = kind().eval(), toy_images(6)
    seen = ObservedNetwork(network, taps=FEATURES, frozen=True, image_shape=(1, 8, 8))(images)
    torch.testing.assert_close(seen.features, network.features(images), rtol=1e-4, atol=1e-5)


class Pooled(nn.Sequential):
    """Its logits are means of a convolution's output."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("network", [Cosine(), Pooled()])
def test_network_whose_logits_no_linear_layer_makes_has_no_features(network):
    with pytest.raises(RecipeError) as error:
        ObservedNetwork(network, taps=FEATURES, frozen=True, image_shape=(1, 8, 8))
    assert str(error.value) == (
        "the term needs the input of a final linear layer, but no linear layer makes the logits of the teacher; drop it"
    )


def test_what_is_found_by_running_the_network_draws_no_random_number():
    network = HeadFirst()
    state = torch.get_rng_state()
    ObservedNetwork(network, taps=FEATURES, frozen=True, image_shape=(1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)


# Layers by their paths


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiled_path", ["body.0.1", "body", "head"])
def test_output_of_a_layer_is_read_by_its_path(frozen, compiled_path):
    network, images, caught = batchnorm_teacher(), toy_images(6), []
    layer = network.get_submodule(compiled_path)
    hook = layer.register_forward_hook(lambda _, inputs, output: caught.append(output.clone()))
    network(images)
    hook.remove()
    seen = ObservedNetwork(network, taps={Layer(compiled_path)}, frozen=frozen)(images)
    torch.testing.assert_close(seen.layers[compiled_path], caught[0], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(seen.layers[compiled_path].square().sum(), images)
    assert gradient.any()


def test_no_layer_is_kept_once_it_was_read():
    observed = ObservedNetwork(batchnorm_teacher(), taps={Layer("body"), Need.FEATURES}, frozen=True)
    observed(toy_images(6))
    assert not observed._layers
    assert not observed._features


@pytest.mark.parametrize("wrapper", [nn.Identity, nn.DataParallel])
def test_path_that_no_layer_has_is_answered_with_the_nearest(wrapper):
    network = batchnorm_teacher() if wrapper is nn.Identity else wrapper(batchnorm_teacher())
    with pytest.raises(RecipeError) as error:
        ObservedNetwork(network, taps={Layer("body.0.4"): "distill.criterion"}, frozen=True, name="student")
    message = str(error.value)
    assert message.startswith(
        "distill.criterion names the layer 'body.0.4', which the student has not; the nearest are"
    )
    assert "body.0." in message


def test_layer_that_gets_no_gradient_is_refused():
    class Detached(HeadFirst):
        def features(self, images):
            with torch.no_grad():
                x = self.conv(images)
            return x.mean((2, 3)) + images.mean((1, 2, 3))[:, None]

    observed = ObservedNetwork(Detached(), taps={Layer("conv"): "the criterion"}, frozen=True)
    with pytest.raises(RecipeError, match="the criterion needs the gradient of what the teacher's layer conv gets"):
        observed(toy_images(6))


# Input


class Writing(nn.Module):
    """Centres its images in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, images):
        images -= images.mean((1, 2, 3), keepdim=True)
        return self.fc(images.flatten(1))


class WritingUnseen(Writing):
    """The same where autograd does not see it."""

    def forward(self, images):
        images.data -= images.data.mean((1, 2, 3), keepdim=True)
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("network", [Writing(), WritingUnseen()])
def test_network_that_writes_to_its_input_gets_a_copy(network):
    observed, images = ObservedNetwork(network, frozen=True), toy_images(6)
    before = images.detach().clone()
    for _ in range(2):
        seen = observed(images)
        assert torch.equal(images, before)
    torch.testing.assert_close(seen.logits, network(before.clone()))
    seen.logits.sum().backward()
    assert images.grad is not None


def test_network_that_leaves_its_input_alone_gets_the_images_themselves():
    given = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    network.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    observed, images = ObservedNetwork(network, frozen=True), toy_images(6)
    observed(images), observed(images)
    assert given[-1] is images


@pytest.mark.parametrize("wrapper", [lambda network: network, nn.DataParallel])
def test_first_convolution_needs_no_path(wrapper):
    network = wrapper(batchnorm_teacher())
    expected = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    assert layer_at(network, FIRST_CONVOLUTION, name="teacher", who="the term") is expected


def test_network_without_a_convolution_has_no_first_one():
    with pytest.raises(RecipeError, match="the term names the first convolution, but the teacher has none; name a lay"):
        layer_at(nn.Linear(2, 2), FIRST_CONVOLUTION, name="teacher", who="the term")


def test_layer_that_is_called_first_convolution_is_meant_itself():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(8, 8))
    network.add_module(FIRST_CONVOLUTION, nn.ReLU())
    assert isinstance(layer_at(network, FIRST_CONVOLUTION, name="teacher", who="the term"), nn.ReLU)
