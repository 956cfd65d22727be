"""A student that is cut out of its teacher, with the weights that it begins with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import SPACE, batchnorm_teacher, fresh_student_of, quiet_events, synthesize_here, toy_recipe, training_of

from raydfkd.config.schema import ImageSpace, StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.job import open_job
from raydfkd.networks.build import NETWORKS, build_network, count_parameters, prune_teacher
from raydfkd.networks.flops import forward_flops
from raydfkd.networks.pruned import pruned_teacher
from raydfkd.networks.student import fresh_student
from raydfkd.networks.teacher import open_teacher

sys.path.append(str(Path(__file__).parents[1] / "report"))
import strangers_networks as strangers

OURS = {
    "convnet": {},
    "lenet5": {},
    "mobilenet_small": {},
    "plain_cnn": {"size": 32},
    "resnet_small": {"depth": 8},
    "vgg_small": {},
    "vit_small": {"size": 32},
}
STRANGE = {"residual": 16, "tanh": 16, "strided": 32, "pooled": 32, "mixing": 28}


def one(network: nn.Module) -> nn.Module:
    """The network with all weights drawn from the same numbers."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("name", OURS)
def test_half_of_the_channels_are_about_a_quarter_of_the_weights_and_of_the_work(name):
    network = NETWORKS.build(name, OURS[name], 10, 3, where="teacher.options")
    pruned = pruned_teacher(network, 10, (3, 32, 32))
    assert 0.2 < count_parameters(pruned) / count_parameters(network) < 0.35
    assert 0.2 < forward_flops(pruned, (3, 32, 32)) / forward_flops(network, (3, 32, 32)) < 0.45
    assert pruned(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert not pruned.training
    assert all(parameter.requires_grad for parameter in pruned.parameters())


@pytest.mark.parametrize("name", STRANGE)
def test_networks_of_strangers_are_pruned(name):
    network, edge = getattr(strangers, name)(), STRANGE[name]
    pruned = pruned_teacher(network, 10, (1, edge, edge))
    assert count_parameters(pruned) < 0.35 * count_parameters(network)
    assert pruned.train()(torch.randn(3, 1, edge, edge)).shape == (3, 10)


def test_weights_are_those_of_the_largest_channels_and_the_teacher_stays_as_it_is():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        network[0].weight[:] = torch.tensor([0.1, 3.0, 0.2, 2.0])[:, None, None, None]
        network[3].weight[:] = 1.0
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pruned = pruned_teacher(network, 3, (1, 2, 2))
    assert pruned[0].weight.flatten().tolist() == [3.0, 2.0]
    torch.testing.assert_close(pruned[0].bias, network[0].bias[[1, 3]])
    assert pruned[3].weight.shape == (3, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_heads_of_attention_keep_the_same_channels_each():
    network = one(NETWORKS.build("vit_small", {"size": 8, "width": 16, "heads": 2, "depth": 1}, 4, 1, where="teacher"))
    pruned = pruned_teacher(network, 4, (1, 8, 8))
    whole, part = (each.patches.weight.flatten(1) for each in (network, pruned))
    kept = [int((whole - row).abs().sum(1).argmin()) for row in part]
    assert [channel - 8 for channel in kept[4:]] == kept[:4]
    assert len(kept) == 8


def test_all_channels_are_the_teacher_itself():
    network = batchnorm_teacher()
    pruned, images = pruned_teacher(network, 4, SPACE.shape, keep=1.0), torch.randn(3, *SPACE.shape)
    torch.testing.assert_close(pruned(images), network.eval()(images))


def test_shapes_do_not_depend_on_weights_so_that_saved_students_load():
    teacher = TeacherSpec(network="resnet_small", options={"depth": 8, "width": 6}, classes=4, image_space=SPACE)
    spec = StudentSpec(network="pruned_teacher", options={"keep": 0.4})
    students = [build_network(spec, teacher, where="student", seed=seed) for seed in (0, 1)]
    trained = one(build_network(teacher, teacher, where="teacher", seed=2))
    students[0].load_state_dict(prune_teacher(spec, trained, teacher).state_dict())
    students[0].load_state_dict(students[1].state_dict())
    assert count_parameters(students[0]) < 0.3 * count_parameters(trained)


def test_channels_that_cannot_be_told_apart_are_refused_in_a_line():
    recurrent = strangers.Recurrent()
    with pytest.raises(ValueError, match=r"^the teacher's channels cannot be pruned \(.*\); name another network$"):
        pruned_teacher(recurrent, 10, (1, 28, 28))


class TwoAnswers(nn.Module):
    """A network that goes on behind its logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.more = nn.Conv2d(1, 8, 3), nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, images):
        features = self.body(images).relu().mean((2, 3))
        return self.head(features), self.more(features)


def test_training_begins_with_the_weights_of_the_teacher_as_it_is_trained(tmp_path):
    job = open_job(toy_recipe(tmp_path, ["student={network: pruned_teacher, options: {keep: 0.5}}"]))
    teacher = open_teacher(job.recipe).module
    begun, expected = fresh_student_of(job).state_dict(), pruned_teacher(teacher, 4, SPACE.shape).state_dict()
    assert all(torch.equal(begun[name], expected[name]) for name in expected)
    assert begun.keys() == expected.keys()
    versions = {}
    training = training_of(
        job, on_publish=lambda version, state: versions.setdefault(version, {k: v.clone() for k, v in state.items()})
    )
    synthesize_here(job, quiet_events(tmp_path))
    training.run()
    assert all(torch.equal(versions[0][name], expected[name]) for name in expected)
    assert any(not torch.equal(versions[max(versions)][name], expected[name]) for name in expected)


def test_student_of_a_tempered_teacher_begins_with_tempered_answers(tmp_path):
    changes = ["student={network: pruned_teacher, options: {keep: 1.0}}", "teacher.temperature=12"]
    job, images = open_job(toy_recipe(tmp_path, changes)), torch.randn(3, *SPACE.shape)
    student, teacher = fresh_student_of(job).eval(), open_teacher(job.recipe).module
    torch.testing.assert_close(student(images), teacher(images))


def test_logits_are_tempered_where_they_are_not_the_last_that_is_made(tmp_path):
    recipe = toy_recipe(tmp_path, ["student={network: pruned_teacher, options: {keep: 1.0}}", "teacher.temperature=12"])
    named = recipe.teacher.model_copy(update={"network": f"{__name__}:TwoAnswers", "options": {}, "weights": "random"})
    recipe, images = recipe.model_copy(update={"teacher": named}), torch.randn(3, *SPACE.shape)
    teacher = open_teacher(recipe).module
    torch.testing.assert_close(fresh_student(recipe, teacher).eval()(images), teacher(images))


def test_classes_stay_whole_where_they_are_not_the_last_that_is_made():
    logits, others = pruned_teacher(TwoAnswers(), 4, (1, 8, 8))(torch.randn(2, 1, 8, 8))
    assert (logits.shape, others.shape) == ((2, 4), (2, 6))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_channels_are_told_apart_where_nobody_wants_a_gradient(mode):
    with mode():
        pruned = pruned_teacher(batchnorm_teacher(), 4, SPACE.shape)
    assert count_parameters(pruned) < 0.5 * count_parameters(batchnorm_teacher())


def test_network_with_nothing_but_its_answer_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"cannot be pruned \(no layer has channels that may go\)"):
        pruned_teacher(network, 3, (1, 4, 4))


def test_only_a_student_is_pruned():
    space = ImageSpace(channels=1, size=8, mean=(0.5,), std=(0.5,))
    spec = TeacherSpec(network="pruned_teacher", classes=4, image_space=space)
    with pytest.raises(RecipeError, match="teacher.network is 'pruned_teacher', which is made of the teacher"):
        build_network(spec, spec, where="teacher", seed=0)


def test_a_share_is_of_some_channels():
    teacher = TeacherSpec(network="convnet", classes=4, image_space=SPACE)
    for keep, problem in ((0, "greater than 0"), (1.5, "less than or equal to 1")):
        spec = StudentSpec(network="pruned_teacher", options={"keep": keep})
        with pytest.raises(RecipeError, match=f"^student.options.keep is .*{problem}"):
            build_network(spec, teacher, where="student", seed=0)
