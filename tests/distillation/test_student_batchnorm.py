from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import batchnorm_teacher, plain_teacher

from raydfkd.distillation.batchnorm import answers_in_both_modes, reestimate, tracking_layers


def network_of(*layers, momentum=0.01):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), *layers).train()


def batches_of(count=5):
    rng = torch.Generator().manual_seed(0)
    return [2 * torch.randn(16, 1, 8, 8, generator=rng) + 1 for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.01, 0.1, None])
def test_statistics_are_the_mean_over_the_batches_whatever_the_momentum(momentum):
    network, batches = network_of(momentum=momentum), batches_of()
    network(torch.randn(8, 1, 8, 8))
    assert reestimate(network, iter(batches)) == 5
    with torch.no_grad():
        inputs = [network[0](images) for images in batches]
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs])
    variances = torch.stack([x.var((0, 2, 3), correction=1) for x in inputs])
    torch.testing.assert_close(network[1].running_mean, means.mean(0))
    torch.testing.assert_close(network[1].running_var, variances.mean(0))
    assert network[1].momentum == momentum
    assert network[1].num_batches_tracked == 1
    assert network[1].training


def test_dropout_rests_and_every_module_is_in_its_own_mode_afterwards():
    network = network_of(nn.Dropout(0.9), nn.BatchNorm2d(4, momentum=0.01))
    network[1].eval()
    before = network[1].running_mean.clone()
    reestimate(network, batches_of())
    assert [layer.training for layer in network] == [True, False, True, True]
    assert torch.equal(network[1].running_mean, before), "its owner has frozen it"
    with torch.no_grad():
        network.eval()
        expected = torch.stack([network[:2](images).mean((0, 2, 3)) for images in batches_of()]).mean(0)
    torch.testing.assert_close(network[3].running_mean, expected)


def test_without_a_batch_or_a_batchnorm_layer_nothing_changes():
    network = batchnorm_teacher().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert reestimate(network, []) == 0
    assert reestimate(plain_teacher().train(), batches_of()) == 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not tracking_layers(nn.BatchNorm2d(4, track_running_stats=False))


def test_an_interruption_leaves_the_momentum_as_it_was():
    network = network_of()

    def interrupted():
        yield batches_of(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate(network, interrupted())
    assert network[1].momentum == 0.01


def test_answers_of_both_modes_leave_no_trace():
    network = network_of(nn.Dropout(0.5), nn.Flatten())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (images,) = batches_of(1)
    by_batch, in_use = answers_in_both_modes(network, images)
    assert network[2].training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    network.eval()
    torch.testing.assert_close(in_use, network(images))
    network[1].train()
    torch.testing.assert_close(by_batch, network(images))
