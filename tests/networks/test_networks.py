from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from raydfkd.config.schema import ImageSpace, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.build import build_network, count_parameters
from raydfkd.networks.weights import load_weights, save_bytes, weights_exist

SMALL = {"convnet": {"widths": [4, 8]}, "resnet_small": {"depth": 8, "width": 4}, "lenet5": {"shrink": 2}}

USERS_MODULE = """
import torch
from torch import nn

class Picky(nn.Module):
    "Takes 32-pixel images only, as torchvision's transformers do."

    def __init__(self, hidden=4):
        super().__init__()
        self.body = nn.Linear(1024, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images):
        torch._assert(images.shape[-1] == 32, f"Wrong image height! Expected 32 but got {images.shape[-1]}!")
        return self.head(self.body(images.flatten(1)))

def pair(): return Tuple()
class Tuple(Picky):
    def forward(self, images):
        return super().forward(images), None

def nothing(): return {"not": "a network"}
def broken(): raise ValueError("it rains")
def own_weights(): return torch.load("weights_that_are_not_there.pt")
def missing_package(): import einops_that_is_not
def wrong_key(): return {}["depth"]
def quits(): raise SystemExit(2)
text = "text"

def parallel(): return nn.DataParallel(Picky())
def of_precision(kind): return getattr(Picky(), kind)()
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def scripted(): return torch.jit.trace(Picky(), torch.zeros(2, 1, 32, 32))

class FixedBatch(Picky):
    def forward(self, images):
        return self.head(self.body(images.view(64, 1024)))

class Hints(Picky):
    def forward(self, batch):
        return super().forward(batch["img"])

class NoForward(nn.Module):
    pass

class TwoArguments(Picky):
    def forward(self, images, mode):
        return super().forward(images)
"""


def network_spec(network, size=32, channels=1, classes=10, **options):
    space = ImageSpace(channels=channels, size=size, mean=(0.5,) * channels, std=(0.5,) * channels)
    return TeacherSpec(network=network, options=options, classes=classes, image_space=space)


def build(network, seed=0, **settings):
    spec = network_spec(network, **settings)
    return build_network(spec, spec, where="teacher", seed=seed)


def refusal(function, *args, **kwargs):
    with pytest.raises(RecipeError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """A module of the user's beside the recipe."""
    (tmp_path / "users_networks.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)


# Architectures


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_network_maps_images_to_one_logit_a_class(name, channels):
    network = build(name, channels=channels, classes=7, **SMALL[name])
    assert network(torch.rand(3, channels, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("size", [28, 32, 64])
def test_residual_network_takes_images_of_28_to_64_pixels(size):
    assert build("resnet_small", size=size, depth=8)(torch.rand(2, 1, size, size)).shape == (2, 10)


def conv_norm(inputs, outputs, kernel=3):
    return inputs * outputs * kernel**2 + 2 * outputs


def test_residual_network_of_depth_20_has_the_papers_weights():
    stages = 6 * conv_norm(16, 16) + 5 * conv_norm(32, 32) + 5 * conv_norm(64, 64)
    stages += conv_norm(16, 32) + conv_norm(32, 64)
    shortcuts = conv_norm(16, 32, 1) + conv_norm(32, 64, 1)
    assert count_parameters(build("resnet_small")) == conv_norm(1, 16) + stages + shortcuts + 64 * 10 + 10 == 272_186


def test_lenet5_has_the_weights_of_the_original_with_full_connections():
    convolutions = (6 * 25 + 6) + (6 * 16 * 25 + 16) + (16 * 120 * 25 + 120)
    assert count_parameters(build("lenet5")) == convolutions + (120 * 84 + 84) + (84 * 10 + 10) == 61_706


def test_shrinking_lenet5_halves_every_hidden_layer():
    convolutions = (3 * 25 + 3) + (3 * 8 * 25 + 8) + (8 * 60 * 25 + 60)
    assert count_parameters(build("lenet5", shrink=2)) == convolutions + (60 * 42 + 42) + (42 * 10 + 10)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_of_a_residual_network_counts_its_layers(depth):
    layers = [layer for layer in build("resnet_small", depth=depth, width=2).modules() if isinstance(layer, nn.Conv2d)]
    assert len([layer for layer in layers if layer.kernel_size == (3, 3)]) + 1 == depth


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_depth_that_no_residual_network_has_is_refused(depth):
    message = refusal(build, "resnet_small", depth=depth)
    assert message == f"teacher.options: depth is {depth}; it must be 6n + 2, such as 8 or 20"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnet", {"width": [4]}, "teacher.options.width: unknown key; did you mean widths?"),
        ("convnet", {"widths": [4, 0]}, "teacher.options.widths.1 is 0: input should be greater than or equal to 1"),
        ("convnet", {"widths": 4}, "teacher.options.widths is 4: input should be a valid array"),
        ("resnet_small", {"width": -1}, "teacher.options.width is -1: input should be greater than or equal to 1"),
        ("lenet5", {"shrink": 0}, "teacher.options.shrink is 0: input should be greater than or equal to 1"),
        ("lenet5", {"shrink": 7}, "teacher.options: shrink is 7, but the first layer has 6 channels; use at most 6"),
    ],
)
def test_wrong_option_of_a_network_is_refused(name, options, message):
    assert refusal(build, name, **options) == message


def test_weights_follow_from_the_seed_and_global_random_numbers_stay():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build("convnet", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same, other = build("convnet", seed=3), build("convnet", seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_trial_on_blank_images_leaves_no_trace():
    network = build("convnet")
    assert network.training
    assert {int(value) for key, value in network.state_dict().items() if "num_batches" in key} == {0}


# Where networks come from


def test_unknown_network_is_named_with_the_closest_one():
    assert refusal(build, "resnet_smal") == "teacher.network: unknown network 'resnet_smal'; did you mean resnet_small?"


def test_torchvision_network_gets_as_many_classes_as_the_teacher_has():
    network = build("torchvision:resnet18", channels=3, classes=7)
    assert network.fc.out_features == 7


def test_unknown_torchvision_network_is_named_with_the_closest_one():
    assert refusal(build, "torchvision:resnet19") == (
        "teacher.network: torchvision has no 'resnet19'; did you mean resnet18?"
    )


def test_wrong_option_of_a_torchvision_network_is_refused():
    message = refusal(build, "torchvision:resnet18", depth=3)
    assert message.startswith("teacher.options do not suit torchvision:resnet18: ")
    assert "depth" in message


@pytest.mark.usefixtures("users_module")
def test_network_can_be_any_callable_of_the_users():
    assert build("users_networks:Picky", hidden=6).body.out_features == 6


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("no_such_module:Net", "which cannot be imported: No module named 'no_such_module'"),
        ("users_networks:Nut", "which cannot be imported: module 'users_networks' has no attribute 'Nut'"),
        (":Net", "which cannot be imported: Empty module name"),
        (".users_networks:Net", "which cannot be imported: "),
    ],
)
def test_callable_that_is_not_there_is_refused(network, message):
    assert refusal(build, network).startswith(f"teacher.network is {network!r}, {message}")


@pytest.mark.usefixtures("users_module")
def test_callable_that_returns_no_network_is_refused():
    assert refusal(build, "users_networks:nothing") == (
        "teacher.network: users_networks:nothing returned dict, not a torch.nn.Module"
    )


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("network", "options", "reason"),
    [
        ("users_networks:Picky", {"hidden": -1}, "with options {'hidden': -1}: Trying to create tensor with negative"),
        ("users_networks:broken", {}, "it rains"),
        ("users_networks:own_weights", {}, "FileNotFoundError: [Errno 2] No such file"),
        ("users_networks:missing_package", {}, "ModuleNotFoundError: No module named 'einops_that_is_not'"),
        ("users_networks:wrong_key", {}, "KeyError: 'depth'"),
        ("users_networks:quits", {}, "SystemExit: 2"),
    ],
)
def test_callable_that_raises_anything_is_refused_with_its_reason(network, options, reason):
    message = refusal(build, network, **options)
    assert message.startswith(f"teacher.network {network} cannot be built")
    assert reason in message


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize("options", [{"hiden": 3}, {"hidden": 3, "width": 4}])
def test_options_are_blamed_for_what_the_callable_does_not_take(options):
    message = refusal(build, "users_networks:Picky", **options)
    assert message.startswith("teacher.options do not suit users_networks:Picky: ")
    assert "unexpected keyword argument" in message


@pytest.mark.usefixtures("users_module")
def test_network_that_is_no_callable_is_refused():
    assert refusal(build, "users_networks:text") == (
        "teacher.network is 'users_networks:text', which is no class or function but str"
    )


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize("network", ["./users_networks.py:Picky", "users_networks.py:Picky"])
def test_path_to_a_module_is_taken_for_the_module(network):
    assert build(network).body.out_features == 4


def test_own_network_with_a_dot_for_the_colon_is_answered_with_the_colon():
    assert refusal(build, "nets.small") == (
        "teacher.network is 'nets.small', and no network has that name; one of your own is module:callable, such as "
        "nets:small"
    )


@pytest.mark.usefixtures("users_module")
def test_module_that_ends_the_process_when_imported_is_refused(tmp_path):
    (tmp_path / "users_script.py").write_text("import sys; sys.exit(2)")
    assert refusal(build, "users_script:Net").startswith("teacher.network is 'users_script:Net', whose module ends")


@pytest.mark.usefixtures("users_module")
def test_weights_do_not_depend_on_whether_the_module_was_imported_before(tmp_path):
    (tmp_path / "users_greedy.py").write_text(
        "import torch\ntorch.rand(100)\ndef net(): return torch.nn.Sequential(torch.nn.Flatten(), "
        "torch.nn.Linear(1024, 10))"
    )
    first, second = build("users_greedy:net"), build("users_greedy:net")
    assert torch.equal(first[1].weight, second[1].weight)


@pytest.mark.usefixtures("users_module")
def test_weights_of_lazy_layers_follow_from_the_seed_too():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (build("users_networks:lazy", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[1].weight, same[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_network_of_another_precision_is_taken_in_float32(kind):
    network = build("users_networks:of_precision", kind=kind)
    assert network(torch.zeros(2, 1, 32, 32)).dtype == torch.float32
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


@pytest.mark.usefixtures("users_module")
def test_network_in_a_wrapper_for_data_parallelism_is_taken_out_of_it():
    assert build("users_networks:parallel").body.out_features == 4


# What networks can take


def test_image_size_that_a_network_cannot_take_is_answered_with_sizes_that_work():
    message = refusal(build, "lenet5", size=16)
    assert message.startswith("teacher.image_space.size is 16, but teacher.network lenet5 cannot take 1x16x16 images (")
    assert message.endswith("); sizes that work: 32")


@pytest.mark.usefixtures("users_module")
def test_network_that_asserts_its_image_size_is_refused_like_any_other():
    message = refusal(build, "users_networks:Picky", size=28)
    assert "cannot take 1x28x28 images (Wrong image height! Expected 32 but got 28!)" in message
    assert message.endswith("sizes that work: 32")


def test_channels_that_a_network_cannot_take_are_refused():
    message = refusal(build, "torchvision:resnet18", channels=1)
    assert "teacher.network torchvision:resnet18 cannot take 1x32x32 images" in message
    assert message.endswith("check channels and network")


def test_student_that_does_not_fit_is_blamed_by_its_own_key():
    teacher, student = network_spec("convnet", size=16), network_spec("lenet5")
    message = refusal(build_network, student, teacher, where="student", seed=0)
    assert "but student.network lenet5 cannot take 1x16x16 images" in message


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("network", "classes", "answer"),
    [("users_networks:Picky", 7, r"\[2, 10\]"), ("users_networks:pair", 7, r"tuple of \[2, 10\]")],
)
def test_network_that_answers_something_else_than_the_classes_is_refused(network, classes, answer):
    message = refusal(build, network, classes=classes)
    expected = rf"teacher.classes is {classes}, but teacher.network {network} answers {answer} for 2 images; "
    assert re.match(expected + rf"it must be \[2, {classes}\]", message)


@pytest.mark.usefixtures("users_module")
def test_torchscript_network_answers_like_any_other(tmp_path):
    network = build("users_networks:scripted")
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(build("users_networks:Picky", seed=1)))
    load_weights(network, str(tmp_path / "weights.safetensors"), where="teacher.weights")


@pytest.mark.usefixtures("users_module")
def test_batch_size_that_a_network_fixes_is_named():
    message = refusal(build, "users_networks:FixedBatch")
    assert message.startswith("teacher.network users_networks:FixedBatch takes batches of 64 images, but not of 2 (")
    assert message.endswith("its forward must not fix the size of the batch")


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize("network", ["Hints", "NoForward", "TwoArguments"])
def test_network_that_is_called_with_something_else_than_images_is_refused(network):
    message = refusal(build, f"users_networks:{network}")
    assert message.startswith(f"teacher.network users_networks:{network} cannot be called with images [2, 1, 32, 32] ")
    assert "sizes" not in message


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_as_they_were_saved(tmp_path, suffix):
    saved, fresh = build("convnet", seed=1), build("convnet", seed=2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(saved.state_dict(), path)
    else:
        path.write_bytes(save_bytes(saved))
    digest = load_weights(fresh, str(path), where="teacher.weights")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in saved.state_dict().items())


def test_weights_can_be_at_any_url(tmp_path):
    saved, fresh = build("convnet", seed=1), build("convnet", seed=2)
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(saved))
    url = f"file://{tmp_path}/weights.safetensors"
    assert weights_exist(url, where="teacher.weights")
    assert not weights_exist(url + "x", where="teacher.weights")
    load_weights(fresh, url, where="teacher.weights")
    assert torch.equal(saved.head.weight, fresh.head.weight)


def test_random_weights_stay_and_have_a_digest_of_their_own():
    one, other = build("convnet", seed=1), build("convnet", seed=2)
    before = save_bytes(one)
    assert weights_exist("random", where="teacher.weights")
    assert load_weights(one, "random", where="teacher.weights") == hashlib.sha256(before).hexdigest()
    assert save_bytes(one) == before
    assert load_weights(other, "random", where="teacher.weights") != hashlib.sha256(before).hexdigest()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self):
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch", "beside tensors"])
def test_code_in_a_file_of_weights_never_runs(tmp_path, suffix, form):
    path, crater = tmp_path / f"weights{suffix}", tmp_path / "crater"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    elif form == "torch":
        torch.save(Bomb(crater), path)
    else:
        torch.save({**build("convnet").state_dict(), "extra": Bomb(crater)}, path)
    message = refusal(load_weights, build("convnet"), str(path), where="teacher.weights")
    assert message.startswith(f"teacher.weights is '{path}': not a state dict of tensors")
    assert "mkdir" in message
    assert not crater.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
        assert crater.exists(), "the bomb works"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\0" * 100])
def test_file_that_holds_no_weights_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert "not a state dict of tensors" in refusal(load_weights, build("convnet"), str(path), where="teacher.weights")


@pytest.mark.parametrize("saved", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {1: torch.zeros(3)}], ids=type)
def test_file_that_holds_other_data_than_a_state_dict_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "weights.pt")
    message = refusal(load_weights, build("convnet"), str(tmp_path / "weights.pt"), where="teacher.weights")
    assert "not a state dict of tensors" in message


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (
            {"network": "lenet5"},
            "head.weight is [10, 84], the network's [10, 8]; 1 of the network's 12 tensors fit",
        ),
        (
            {"network": "resnet_small"},
            "body.0.0.weight is [16, 1, 3, 3], the network's [4, 1, 3, 3]; 1 of the network's 12 tensors fit",
        ),
        (
            {"network": "convnet", "widths": [4, 6]},
            "body.1.0.weight is [6, 4, 3, 3], the network's [8, 4, 3, 3]; 6 of the network's 12 tensors fit",
        ),
        (
            {"network": "convnet", "widths": [4, 8], "classes": 7},
            "head.weight is [7, 8], the network's [10, 8]; 10 of the network's 12 tensors fit",
        ),
    ],
)
def test_weights_of_another_network_are_refused_naming_the_first_tensor(tmp_path, other, problem):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save_bytes(build(**other)))
    network = build("convnet", widths=[4, 8])
    before = save_bytes(network)
    assert refusal(load_weights, network, str(path), where="teacher.weights") == (
        f"teacher.weights is '{path}': weights of another network ({problem}); check network and options"
    )
    assert save_bytes(network) == before


@pytest.mark.parametrize("place", ["missing.pt", "file.txt/missing.pt"])
def test_weights_that_are_not_there_are_refused(tmp_path, place):
    (tmp_path / "file.txt").write_text("")
    assert refusal(load_weights, build("convnet"), str(tmp_path / place), where="teacher.weights").startswith(
        f"teacher.weights is '{tmp_path / place}': no such file; give trained weights, or teacher.train"
    )


@pytest.mark.parametrize("uri", ["nosuch://bucket/teacher.pt", "http://127.0.0.1:1/teacher.pt"])
def test_weights_on_a_file_system_that_does_not_answer_are_refused(uri):
    message = refusal(load_weights, build("convnet"), uri, where="teacher.weights")
    assert message.startswith(f"teacher.weights is '{uri}': ")


def test_unknown_protocol_is_no_answer_to_whether_weights_exist():
    assert refusal(weights_exist, "nosuch://a/b.pt", where="teacher.weights") == (
        "teacher.weights is 'nosuch://a/b.pt': cannot be read (Protocol not known: nosuch); "
        "give a file that this machine can read"
    )
