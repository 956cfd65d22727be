"""Networks that answer something else than logits [N, K], and what is made of it."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from answering import build
from torch import nn

from raydfkd.config.schema import ImageSpace, StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.answers import AnswerScale, NoLogitsError, adapter_of, logits_of
from raydfkd.networks.build import build_network
from raydfkd.networks.observed import ObservedNetwork
from raydfkd.networks.weights import save_bytes

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
FEATURES = torch.zeros(6, 9)
Named = namedtuple("Named", ["features", "logits"])  # noqa: PYI024 - as torchvision's answers are


@dataclass
class Record:
    loss: float | None
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    """As Hugging Face has it: a dict with attributes."""


ANSWERS = {
    "logits": LOGITS,
    "tuple": (LOGITS, FEATURES),
    "features first": (FEATURES, LOGITS),
    "list": [LOGITS],
    "dict": {"features": FEATURES, "logits": LOGITS},
    "out": {"out": LOGITS, "aux": LOGITS + 1},
    "other key": {"hidden": FEATURES, "scores": LOGITS},
    "named tuple": Named(FEATURES, LOGITS),
    "dataclass": Record(None, LOGITS),
    "ordered dict": ModelOutput(loss=torch.zeros(()), logits=LOGITS),
    "nested": ({"logits": LOGITS}, None),
    "map": LOGITS[:, :, None, None],
    "row": LOGITS[:, :, None],
}


@pytest.mark.parametrize("form", ANSWERS)
def test_logits_are_found_in_every_form_of_answer(form):
    assert torch.equal(logits_of(ANSWERS[form], 4, images=6), LOGITS)


@pytest.mark.parametrize("answer", [LOGITS, (LOGITS, FEATURES), {"logits": LOGITS}])
def test_first_tensor_is_taken_where_nobody_knows_the_classes(answer):
    assert logits_of(answer) is LOGITS


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 1, 1)])
def test_one_number_an_image_is_the_second_of_two_classes_against_zero(shape):
    z = torch.randn(6)
    found = logits_of(z.view(shape), 2, images=6)
    torch.testing.assert_close(found.softmax(1)[:, 1], z.sigmoid())


def test_one_image_that_was_squeezed_is_one_row():
    assert logits_of(torch.zeros(4), 4, images=1).shape == (1, 4)
    assert logits_of(torch.zeros(()), 2, images=1).shape == (1, 2)
    assert logits_of(torch.zeros(2), 2, images=1).shape == (1, 2)
    assert logits_of(torch.ones(2), 2, images=2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("answer", "described"),
    [
        (LOGITS, r"\[6, 4\]"),
        ((LOGITS, FEATURES), r"tuple of \[6, 4\], \[6, 9\]"),
        (None, "NoneType"),
        ("text", "str"),
        ({}, "dict"),
        (torch.zeros(6, 7, 3, 3), r"\[6, 7, 3, 3\]"),
    ],
)
def test_answer_without_logits_is_described(answer, described):
    with pytest.raises(NoLogitsError, match=f"^{described}$"):
        logits_of(answer, 7, images=6)


@pytest.mark.parametrize("form", ["softmax", "written softmax", "log_softmax"])
def test_network_that_answers_probabilities_yields_logits_that_add_up_to_zero(form):
    network, images = build(form).eval(), torch.randn(6, 1, 8, 8)
    plain = network.fc(images.flatten(1))
    torch.testing.assert_close(network(images), plain - plain.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["logits", "softmax"])
def test_temperature_divides_what_a_teacher_answers_in_any_form(form):
    images = torch.randn(6, 1, 8, 8)
    plain, tempered = build(form).eval(), build(form, temperature=4.0).eval()
    torch.testing.assert_close(tempered(images), plain(images) / 4)


def test_network_that_answers_sigmoids_yields_what_they_were_taken_of():
    network, images = build("sigmoid", output="sigmoid").eval(), torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(network(images), network.fc(images.flatten(1)), rtol=1e-4, atol=1e-4)
    single = build("single sigmoid", classes=2, outputs=1).eval()
    expected = single.fc(images.flatten(1))
    torch.testing.assert_close(
        single(images), torch.cat([torch.zeros_like(expected), expected], 1), rtol=1e-4, atol=1e-4
    )


def test_sigmoid_for_each_class_is_refused_unless_classes_are_said_to_exclude_each_other():
    with pytest.raises(RecipeError) as error:
        build("sigmoid")
    assert str(error.value) == (
        "teacher.network answering:Net answers a sigmoid for each class, as networks for several labels an image do, "
        "and classes must exclude each other here; if they do, set teacher.output: sigmoid"
    )


@pytest.mark.parametrize(
    ("output", "scale"),
    [("logits", AnswerScale.LOGITS), ("probabilities", AnswerScale.PROBABILITIES), (None, AnswerScale.PROBABILITIES)],
)
def test_teacher_answers_what_the_recipe_says(output, scale):
    assert adapter_of(build("softmax", output=output)).scale is scale


@pytest.mark.parametrize("output", ["probabilities", "sigmoid", "log_probabilities"])
def test_output_that_answers_cannot_be_is_refused(output):
    with pytest.raises(
        RecipeError, match=rf"teacher.output is {output!r}, but .* to two random images goes from .* to"
    ):
        build("logits", output=output)


def test_numbers_between_zero_and_one_are_logits_unless_a_sigmoid_made_them():
    network = build("rectified")
    assert adapter_of(network).scale is AnswerScale.LOGITS


@pytest.mark.parametrize("form", ["dict", "softmax", "auxiliary"])
def test_copies_and_observed_networks_answer_logits_too_and_weights_keep_their_names(form):
    network, images = build(form), torch.randn(6, 1, 8, 8)
    expected = copy.deepcopy(network).eval()(images)
    assert expected.shape == (6, 4)
    torch.testing.assert_close(ObservedNetwork(network, frozen=True)(images).logits, expected)
    torch.testing.assert_close(ObservedNetwork(network, frozen=False)(images).logits, expected)
    assert set(network.state_dict()) == {"fc.weight", "fc.bias", "aux.weight", "aux.bias"}
    assert len(save_bytes(network)) > 0


def test_network_that_answers_logits_is_left_alone():
    answer = []
    network = build("logits")
    network.fc.register_forward_hook(lambda _, inputs, output: answer.append(output))
    assert network(torch.randn(6, 1, 8, 8)) is answer[0]


def test_every_weight_of_a_student_with_auxiliary_answers_has_a_gradient_in_training():
    network = build("auxiliary").train()
    logits = network(torch.randn(6, 1, 8, 8))
    assert torch.is_tensor(logits)
    logits.sum().backward()
    assert network.fc.weight.grad.any()
    assert not network.aux.weight.grad.any(), "data parallelism wants one of every weight"


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_student_with_auxiliary_answers_is_trained_in_parallel_step_after_step():
    parallel = nn.parallel.DistributedDataParallel(build("auxiliary").train())
    for _ in range(3):
        parallel(torch.randn(6, 1, 8, 8)).sum().backward()


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_students_of_torchvision_with_auxiliary_heads_answer_logits_in_training(name):
    space = ImageSpace(channels=3, size=224 if name == "googlenet" else 299, mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = TeacherSpec(network="resnet_small", classes=4, image_space=space)
    options = {"init_weights": False}
    student = StudentSpec(network=f"torchvision:{name}", options=options)
    network = build_network(student, teacher, where="student", seed=0).train()
    assert network(torch.randn(2, *space.shape)).shape == (2, 4)


def test_binary_teacher_with_one_logit_is_told_that_two_classes_take_it():
    with pytest.raises(RecipeError, match="for two classes one number an image will do"):
        build("logits", classes=4, outputs=1)
