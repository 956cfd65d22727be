"""What a network shows by itself."""

from __future__ import annotations

import pytest
import torch
from zoo import Normalized, Small, tall, trained

from raydfkd.errors import RecipeError
from raydfkd.networks.build import NETWORKS
from raydfkd.networks.scout import scout


def found(network, *, options=None, weights=None, **given):
    return scout(f"zoo:{network}", options=options or {}, weights=weights, given=given)


def space_of(seen):
    return {key: seen.section["image_space"][key] for key in ("channels", "size")}


def test_layers_and_weights_are_counted():
    seen = found("Small")
    assert (dict(seen.norms), seen.statistics, seen.has_attention) == ({"BatchNorm2d": 2}, 2, False)
    assert seen.parameters == sum(parameter.numel() for parameter in Small().parameters())


def test_size_of_a_network_for_any_size_is_said_to_be_a_guess():
    seen = found("Small")
    assert space_of(seen) == {"channels": 3, "size": 32}
    assert seen.sources["size"] == "a guess, it takes 8 to 384; set what it was trained on"
    assert not seen.fixed_size


def test_only_size_that_works_is_found():
    seen = found("plain")
    assert space_of(seen) == {"channels": 1, "size": 28}
    assert seen.sources["size"] == "the only usual size that it takes"
    assert seen.fixed_size


def test_size_that_is_not_square_is_the_nearest_to_one():
    assert space_of(found("tall")) == {"channels": 3, "size": [96, 64]}
    with torch.no_grad():
        assert tall()(torch.zeros(2, 3, 96, 64)).shape == (2, 4)


def test_size_that_nobody_would_try_must_be_given():
    with pytest.raises(RecipeError, match="--network takes random images of no usual size; give --size"):
        found("plain", options={"size": 75})
    assert space_of(found("plain", options={"size": 75}, image_space={"size": 75})) == {"channels": 1, "size": 75}


@pytest.mark.parametrize(
    ("numbers", "channels", "size"), [(784, 1, 28), (3 * 32 * 32, 3, 32), (64, 1, 8), (224 * 224, 1, 224)]
)
def test_images_of_linear_layers_are_those_that_flatten_to_their_width(numbers, channels, size):
    assert space_of(found("linear", options={"numbers": numbers})) == {"channels": channels, "size": size}


def test_channels_of_linear_layers_follow_from_the_size_that_is_given():
    seen = found("linear", options={"numbers": 75 * 75}, image_space={"size": 75})
    assert space_of(seen) == {"channels": 1, "size": 75}


def test_network_for_vectors_is_refused_with_what_makes_it_one_for_images():
    with pytest.raises(RecipeError, match="takes vectors of 784 numbers and no images; give one that flattens"):
        found("linear", options={"flattens": False})


def test_network_that_normalises_by_itself_takes_images_from_0_to_1():
    seen = found("Normalized")
    assert (seen.section["image_space"]["mean"], seen.section["image_space"]["std"]) == ([0.0] * 3, [1.0] * 3)
    assert seen.sources["mean"] == "it normalises by itself (Normalized), so it takes images in [0, 1]"


def test_what_is_given_counts():
    seen = found("Normalized", classes=4, image_space={"size": 64, "mean": [0.5] * 3})
    assert seen.section["image_space"] == {"channels": 3, "size": 64, "mean": [0.5] * 3, "std": [1.0] * 3}
    assert (seen.sources["size"], seen.sources["mean"], seen.sources["classes"]) == ("given", "given", "given")


def test_classes_of_a_librarys_network_are_those_of_its_file_of_weights(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("resnet10t", num_classes=7, in_chans=4).state_dict(), path)
    seen = scout("timm:resnet10t", options={}, weights=str(path), given={})
    assert seen.section["classes"] == 7
    assert seen.sources["classes"] == "of the last linear layer in the file of weights"
    assert seen.section["image_space"] == {"channels": 4, "size": 176, "mean": [0.5] * 4, "std": [0.5] * 4}


def test_one_logit_is_two_classes():
    assert found("Small", options={"outputs": 1}).section["classes"] == 2


def test_network_is_left_as_it_is():
    before = torch.random.get_rng_state()
    found("Small")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_zoo_is_the_same_each_time():
    first, second = trained(Normalized()), trained(Normalized())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_file_that_does_not_keep_the_layers_order_says_the_same(tmp_path):
    teacher = NETWORKS.build("lenet5", {}, 7, 1, where="teacher.options")
    shuffled = dict(sorted(teacher.state_dict().items(), reverse=True))
    torch.save(shuffled, tmp_path / "shuffled.pt")
    seen = scout("lenet5", options={}, weights=str(tmp_path / "shuffled.pt"), given={"image_space": {"size": 32}})
    assert space_of(seen) == {"channels": 1, "size": 32}
    assert seen.section["classes"] == 7


@pytest.mark.parametrize(
    ("layers", "is_strided", "kernel"),
    [
        ([[3, 2], [3, 2], [3, 1]], True, 3),
        ([[8, 4], [4, 2]], True, 8),
        ([[3, 2], [3, 1], [3, 1]], False, 3),
        ([[5, 1], [5, 1]], False, 5),
        ([[4, 4], [2, 2]], False, 3),
        ([[1, 2]], False, 3),
    ],
    ids=["most", "as in DQN", "a third", "none", "patches", "nothing sees"],
)
def test_network_is_strided_where_half_of_what_sees_several_places_is(layers, is_strided, kernel):
    seen = found("stack", options={"layers": layers})
    assert (seen.is_strided, seen.kernel) == (is_strided, kernel)
