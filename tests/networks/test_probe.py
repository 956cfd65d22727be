from __future__ import annotations

import copy

import pytest
import torch
from answering import build as build_answering
from answering import spec_of
from torch import nn
from torch.nn import functional as F
from toy import CLASSES, SPACE, batchnorm_teacher

from raydfkd.config.schema import StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.build import build_network
from raydfkd.networks.probe import probe_student, probe_teacher

SPEC = TeacherSpec(network="convnet", classes=CLASSES, image_space=SPACE)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, images):
        return self.fc(images.flatten(1))


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class Inference(Net):
    @torch.inference_mode()
    def forward(self, images):
        return super().forward(images)


class Rounded(Net):
    def forward(self, images):
        return super().forward((images * 10).round() / 10)


class Detached(Net):
    def forward(self, images):
        return self.fc(images.detach().flatten(1) + nn.Parameter(torch.zeros(64)))


class Random(Net):
    def forward(self, images):
        return self.fc(F.dropout(images.flatten(1), 0.3))


class NotFinite(Net):
    def forward(self, images):
        return super().forward(images).abs().neg().log()


class SteepAtZero(Net):
    """Its answer is finite and the gradient of it is not."""

    def forward(self, images):
        return super().forward(images) + (images * 0).sqrt().mean()


def refusal(function, *args):
    with pytest.raises(RecipeError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("network", "finding"),
    [
        (NoGrad(), "answers without a gradient for its input"),
        (Inference(), "answers without a gradient for its input"),
        (Rounded(), "has a gradient of zero for its input everywhere"),
        (Detached(), "has a gradient of zero for its input everywhere"),
        (Random(), "answers otherwise when asked again"),
        (NotFinite(), "answers random images with numbers that are not finite"),
        (SteepAtZero(), "has a gradient for its input that is not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_teacher_that_cannot_be_inverted_is_refused(network, finding):
    message = refusal(probe_teacher, network, SPEC)
    assert message.startswith(f"teacher.network convnet {finding}")
    assert ";" in message


def test_teacher_that_can_be_inverted_is_left_as_it_was_without_a_word():
    network = batchnorm_teacher().train()
    state, rng = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert probe_teacher(network, SPEC) == []
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_statistics_of_no_training_are_told():
    (line,) = probe_teacher(build_network(SPEC, SPEC, where="teacher", seed=0), SPEC)
    assert line.startswith(
        "teacher.network convnet has BatchNorm statistics of 0 and 1 in 3 of 3 layers (body.0.1, ...)"
    )


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("softmax", "answers probabilities; their logarithm is taken"),
        ("log_softmax", "answers log-probabilities; they are taken for its logits"),
        ("sigmoid", "answers sigmoids;"),
    ],
)
def test_answers_that_are_taken_for_logits_are_told(form, told):
    output = "sigmoid" if form == "sigmoid" else None
    (line,) = probe_teacher(build_answering(form, output=output), spec_of(form, output=output))
    assert line.startswith(f"teacher.network answering:Net {told}")


# Students


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.neck, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.fc(self.neck(self.conv(images).mean((2, 3))))


def test_student_that_normalises_over_the_batch_is_refused_for_batches_of_one():
    assert refusal(probe_student, Neck(), SPEC, 1).startswith(
        "distill.batch_size is 1, but student.network normalises over the batch ("
    )
    assert probe_student(Neck(), SPEC, 64) == []


@pytest.mark.parametrize("batch_size", [1, 2, 500])
def test_student_that_learns_is_left_as_it_was_without_a_word(batch_size):
    student = batchnorm_teacher().train()
    state, rng = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    assert probe_student(student, SPEC, batch_size) == []
    assert student.training
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert all(weight.grad is None for weight in student.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_student_of_which_nothing_learns_is_refused():
    assert "no weights that take a gradient" in refusal(probe_student, Net().requires_grad_(False), SPEC, 8)


def test_student_of_which_a_part_learns_is_taken():
    student = batchnorm_teacher()
    student.body.requires_grad_(False)
    assert probe_student(student, SPEC, 8) == []


def test_auxiliary_answers_of_a_student_are_told():
    assert probe_student(build_answering("auxiliary"), spec_of("auxiliary"), 8) == [
        "student.network answers a tuple in training; its logits are trained, 2 of its 4 weights serve other answers "
        "and are not"
    ]


def test_student_whose_answer_in_eval_mode_is_another_than_the_trained_one_is_refused():
    message = refusal(probe_student, build_answering("two heads"), spec_of("two heads"), 8)
    assert message.startswith("student.network answers several logits in training and others in eval mode")
    assert "aux.weight" in message


def test_auxiliary_head_that_needs_larger_images_is_named_with_the_option_that_drops_it():
    space = SPACE.model_copy(update={"channels": 3, "size": 96, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    teacher = TeacherSpec(network="convnet", classes=CLASSES, image_space=space)
    for options, fails in (({"init_weights": False}, True), ({"init_weights": False, "aux_logits": False}, False)):
        spec = StudentSpec(network="torchvision:inception_v3", options=options)
        network = build_network(spec, teacher, where="student", seed=0)
        if fails:
            message = refusal(probe_student, network, teacher, 8)
            assert message.startswith("student.network cannot be trained on 3x96x96 images (")
            assert "student.options={aux_logits: false}" in message
        else:
            assert probe_student(network, teacher, 8) == []
