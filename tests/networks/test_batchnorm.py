"""BatchNorm as people write it: every way must leave the answer as it is and yield the moments of a plain layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d
from toy import CLASSES, toy_images

from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Need, ObservedNetwork

MOMENTS = {Need.MOMENTS: "the term"}
CLASS_MOMENTS = {Need.CLASS_MOMENTS: "the term"}


class Plain(nn.Module):
    """Convolution, BatchNorm twice in a row by two layers of one state, mean, linear layer."""

    norm = nn.BatchNorm2d

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1, bias=False)
        self.bn = self.norm(5)
        self.again = self.norm(5)
        self.fc = nn.Linear(5, CLASSES)

    def body(self, images):
        return self.again(F.relu(self.bn(self.conv(images))))

    def forward(self, images):
        return self.fc(self.body(images).mean((2, 3)))


class SharedLayer(Plain):
    """One layer under two names of its parent."""

    def __init__(self):
        super().__init__()
        self.again = self.bn


class ByType(Plain):
    """Goes through its children and asks what they are."""

    def body(self, images):
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                images = layer(images)
            elif isinstance(layer, nn.BatchNorm2d):
                images = F.relu(layer(images)) if layer is self.bn else layer(images)
        return images


class InAList(Plain):
    """Keeps its layers in a list of its own too."""

    def __init__(self):
        super().__init__()
        self.order = [self.conv, self.bn, F.relu, self.again]

    def body(self, images):
        for layer in self.order:
            images = layer(images)
        return images


def functional(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)


class Functional(Plain):
    """Calls ``batch_norm`` with the attributes of its layers."""

    def body(self, images):
        return functional(F.relu(functional(self.conv(images), self.bn)), self.again)


class TorchFunction(Plain):
    """Calls torch's own ``batch_norm``."""

    def body(self, images):
        def normalize(x, bn):
            stored = bn.running_mean, bn.running_var
            return torch.batch_norm(x, bn.weight, bn.bias, *stored, False, 0.1, bn.eps, torch.backends.cudnn.enabled)

        return normalize(F.relu(normalize(self.conv(images), self.bn)), self.again)


class FlatteningNorm(nn.BatchNorm1d):
    """Normalises each position as a row, as transformers with BatchNorm do."""

    def forward(self, x):
        rows = x.movedim(1, -1)
        return super().forward(rows.reshape(-1, rows.shape[-1])).view(rows.shape).movedim(-1, 1)


class Tokens(Plain):
    norm = FlatteningNorm


class WrittenOut(Plain):
    norm = FrozenBatchNorm2d


class ActivatedNorm(FrozenBatchNorm2d):
    """Written out, with an activation of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Activated(Plain):
    """BatchNorm whose first layer brings the activation along."""

    def __init__(self):
        super().__init__()
        self.bn, self.again = ActivatedNorm(5), FrozenBatchNorm2d(5)

    def body(self, images):
        return self.again(self.bn(self.conv(images)))


class Checkpointed(Plain):
    """Makes its maps again in the backward pass."""

    def body(self, images):
        return checkpoint(super().body, images, use_reentrant=False)


class OldCheckpointed(Plain):
    """The same in the way in which its first forward pass has no gradients."""

    def body(self, images):
        return checkpoint(super().body, images, use_reentrant=True)


def exported():
    network = with_statistics(Plain())
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},)).module()


def decomposed():
    network = with_statistics(Plain())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    return program.run_decompositions().module()


def with_hook(network):
    network.bn.register_forward_hook(lambda layer, inputs, output: 2 * output)
    return network


def with_statistics(network):
    """``network`` with weights and statistics that are the same for every way of writing it."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(value.shape, generator=generator) + 0.2 for name, value in Plain().state_dict().items()}
    own = network.state_dict()
    shared = isinstance(network, SharedLayer)
    network.load_state_dict({name: state[name.replace("again", "bn") if shared else name] for name in own})
    return network.eval()


NETWORKS = [Plain, SharedLayer, ByType, InAList, Functional, TorchFunction, Tokens, WrittenOut, Activated, Checkpointed]


@pytest.fixture(params=[*NETWORKS, "hook", "sync", "data parallel"], ids=lambda kind: getattr(kind, "__name__", kind))
def network(request):
    if request.param == "hook":
        return with_hook(with_statistics(Plain()))
    if request.param == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(with_statistics(Plain()))
    if request.param == "data parallel":
        return nn.DataParallel(with_statistics(Plain()))
    return with_statistics(request.param())


def inputs_of_batchnorm(network, images):
    """What is normalised, in float64: by hand, so that it depends on no mechanism of networks."""
    own = getattr(network, "module", network)
    exact = copy.deepcopy(own).double()
    exact._forward_hooks.clear()
    double = images.double()
    first = exact.conv(double)
    factor = 2 if own.bn._forward_hooks else 1
    return first, F.relu(functional(first, exact.bn)) * factor


def test_answer_is_that_of_the_network_alone(network):
    images = toy_images(6)
    seen = ObservedNetwork(network, taps=MOMENTS, frozen=True)(images)
    torch.testing.assert_close(seen.logits, network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_each_normalisation_yields_the_moments_of_its_input(network, precision):
    images = toy_images(6)
    observed = ObservedNetwork(network, taps=MOMENTS, frozen=True, precision=precision, image_shape=(1, 8, 8))
    seen = observed(images)
    tolerance = 1e-4 if precision == torch.float32 else 3e-2
    assert len(seen.moments) == 2
    for found, x in zip(seen.moments, inputs_of_batchnorm(network, images), strict=True):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        torch.testing.assert_close(found.mean[0].double(), mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.var[0].double(), var, rtol=tolerance, atol=tolerance)


def test_gradient_of_the_moments_is_that_of_the_plain_network(network):
    images = toy_images(6)
    observed = ObservedNetwork(network, taps=MOMENTS, frozen=True)
    found = sum(one.mean.square().sum() + one.var.square().sum() for one in observed(images).moments)
    (gradient,) = torch.autograd.grad(found, images)
    exact = images.detach().double().requires_grad_()
    pairs = [torch.var_mean(x, (0, 2, 3), correction=0) for x in inputs_of_batchnorm(network, exact)]
    (expected,) = torch.autograd.grad(sum(m.square().sum() + v.square().sum() for v, m in pairs), exact)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_moments_are_named_by_their_layers_and_types_and_attributes_stay(network):
    observed = ObservedNetwork(network, taps=MOMENTS, frozen=True)
    names = [one.layer.removeprefix("module.") for one in observed(toy_images(6)).moments]
    assert names == (["bn", "bn"] if isinstance(network, SharedLayer) else ["bn", "again"])
    kinds = [type(layer) for layer in network.modules()]
    assert [type(layer) for layer in observed._module.modules()] == kinds


@pytest.mark.parametrize("make", [exported, decomposed])
def test_exported_network_yields_the_moments_of_the_one_it_was_made_of(make):
    from raydfkd.networks.build import _plain

    images = toy_images(6)
    seen = ObservedNetwork(_plain(make()), taps=MOMENTS, frozen=True)(images)
    expected = ObservedNetwork(with_statistics(Plain()), taps=MOMENTS, frozen=True)(images)
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for found, one in zip(seen.moments, expected.moments, strict=True):
        torch.testing.assert_close(found.var, one.var, rtol=1e-4, atol=1e-5)


def test_moments_outlive_a_backward_pass_that_makes_them_again():
    observed = ObservedNetwork(with_statistics(Checkpointed()), taps=MOMENTS, frozen=True)
    for _ in range(2):
        seen = observed(toy_images(6))
        (seen.logits.sum() + seen.moments[0].var.sum()).backward()
    assert len(seen.moments) == 2
    assert observed._trace.notes is None


def refusal(network, taps=MOMENTS):
    with pytest.raises(RecipeError) as error:
        ObservedNetwork(network, taps=taps, frozen=True, image_shape=(1, 8, 8))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_moments_without_a_gradient_are_refused():
    message = refusal(with_statistics(OldCheckpointed()))
    assert message.startswith("the term needs the gradient of what the teacher's layer bn gets, and there is none")
    assert "use_reentrant=False" in message


class Unused(nn.Module):
    """The only BatchNorm is of a branch that evaluation does not run."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)
        self.side = nn.BatchNorm1d(64)

    def forward(self, images):
        return self.fc(self.side(images.flatten(1)) if self.training else images.flatten(1))


def test_batchnorm_that_takes_no_part_in_the_answer_is_refused():
    assert refusal(Unused()) == (
        "the term needs BatchNorm layers with stored statistics, but none of the 1 of the teacher (side, ...) takes "
        "part in its answer; drop it"
    )


class Standardizing(nn.BatchNorm2d):
    """Keeps statistics and does something of its own with them."""

    def forward(self, x):
        return (x - self.running_mean.view(1, -1, 1, 1)).tanh()


def test_layer_that_has_statistics_and_does_something_else_is_named():
    network = with_statistics(Plain())
    network.again = Standardizing(5).eval()
    message = refusal(network)
    assert message.startswith(
        "the term needs the moments of BatchNorm layers, but the teacher's again is a Standardizing"
    )


def test_torchscript_is_refused_for_what_it_is_where_moments_are_wanted_and_answers_otherwise():
    network = torch.jit.trace(with_statistics(Plain()), torch.zeros(2, 1, 8, 8))
    assert "TorchScript" in refusal(network)
    images = toy_images(6)
    seen = ObservedNetwork(network, frozen=True)(images)
    torch.testing.assert_close(seen.logits, network(images))


class Mirrored(Plain):
    """Judges image and mirror image in one batch."""

    def forward(self, images):
        both = super().forward(torch.cat([images, images.flip(3)]))
        return both[: len(images)] + both[len(images) :]


class MirroredAtOnce(Mirrored):
    """The same, with BatchNorm on the image, whose moments a mirror does not change."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(1)

    def body(self, images):
        return super().body(self.first(images))


class SequenceFirst(Tokens):
    """Normalises positions in the order in which transformers with the sequence first have them."""

    def body(self, images):
        x = self.conv(images).flatten(2).permute(2, 0, 1)
        rows = F.batch_norm(x.flatten(0, 1), self.bn.running_mean, self.bn.running_var)
        return rows.view(x.shape).permute(1, 2, 0)[..., None]


@pytest.mark.parametrize("network", [Mirrored(), MirroredAtOnce(), SequenceFirst()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("need", "part"), [(Need.CLASS_MOMENTS, "class"), (Need.IMAGE_MOMENTS, "image")])
def test_moments_of_parts_are_refused_where_rows_are_not_in_the_order_of_the_images(network, need, part):
    message = refusal(network.eval(), {need: "the term"})
    assert message.startswith(f"the term needs moments of each {part}, but the rows that the teacher's layer ")
    assert message.endswith("take those of the whole batch (scope: batch)")
    ObservedNetwork(network, taps=MOMENTS, frozen=True, image_shape=(1, 8, 8))


def test_moments_by_class_of_a_layer_over_positions_are_those_of_each_class(network):
    images = toy_images(6)
    seen = ObservedNetwork(network, taps=CLASS_MOMENTS, frozen=True)(images, groups=3)
    first, _ = inputs_of_batchnorm(network, images)
    for group, part in enumerate(first.chunk(3)):
        var, mean = torch.var_mean(part, (0, 2, 3), correction=0)
        torch.testing.assert_close(seen.moments[0].mean[group].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.moments[0].var[group].double(), var, rtol=1e-4, atol=1e-5)


class Conditional(Plain):
    """BatchNorm whose shift follows from the image."""

    def body(self, images):
        x = self.conv(images)
        bias = self.bn.bias + images.mean()
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, bias, False, 0.0, self.bn.eps)


def test_gradient_through_a_weight_that_depends_on_the_image_is_kept():
    network, images = with_statistics(Conditional()), toy_images(6)
    seen = ObservedNetwork(network, taps=MOMENTS, frozen=True)(images)
    (found,) = torch.autograd.grad(seen.logits.sum() + seen.moments[0].var.sum(), images)
    var = torch.var(network.conv(images), (0, 2, 3), correction=0)
    (expected,) = torch.autograd.grad(network(images).sum() + var.sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_normalisation_by_fresh_float32_maps_keeps_its_digits_under_autocast():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, CLASSES)).eval()
    images = (3 + torch.randn(16, 3, 8, 8)).contiguous(memory_format=torch.channels_last)
    (found,) = ObservedNetwork(network, taps=MOMENTS, frozen=True, precision=torch.bfloat16)(images).moments
    var, mean = torch.var_mean(images.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(found.mean[0].double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.var[0].double(), var, rtol=1e-4, atol=0)


class Volumes(nn.Module):
    """Takes an image for a volume, as networks for spectral cubes do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images[:, None])).mean((2, 3, 4)))


def test_network_with_weights_of_five_dimensions_is_observed():
    network, images = Volumes().eval(), toy_images(6)
    seen = ObservedNetwork(network, taps=MOMENTS, frozen=True)(images)
    torch.testing.assert_close(seen.logits, network(images), rtol=1e-4, atol=1e-5)
    assert len(seen.moments) == 1
