"""Methods for vision transformers, on small ones of the libraries."""

from __future__ import annotations

import json

import pytest
from toy import batches_of, unit_of

from raydfkd.config.load import load_recipe
from raydfkd.config.schema import TeacherSpec
from raydfkd.errors import RecipeError
from raydfkd.networks.build import build_network
from raydfkd.networks.weights import save_bytes
from raydfkd.seeds import rng_from

TEACHERS = {
    "timm": ("timm:test_vit", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32}),
    "torchvision": (
        "torchvision.models:VisionTransformer",
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32},
    ),
}
OWN = """
recipe: vit_patch_similarity
name: own
teacher: {teacher}
student: {{network: convnet, options: {{widths: [4, 8]}}}}
transfer_set: {{images_per_class: 2, unit: {{classes: 4, images_per_class: 2}}}}
runtime: {{executor: local, device: cpu}}
"""
SPACE = {"channels": 3, "size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def recipe_of(folder, library, *settings):
    """A recipe whose teacher tells patches apart, as trained ones do and those with fresh weights do not."""
    name, options = TEACHERS[library]
    options = options | ({} if name.startswith("timm") else {"num_classes": 4})
    section = {"network": name, "options": options, "classes": 4, "image_space": SPACE, "weights": "random"}
    spec = TeacherSpec.model_validate_json(json.dumps(section))
    network = build_network(spec, spec, where="teacher", seed=0)
    for weights in network.parameters():
        if weights.ndim > 1:
            weights.data.normal_(std=2 / weights[0].numel() ** 0.5, generator=rng_from(0))
    (folder / "teacher.safetensors").write_bytes(save_bytes(network))
    path = folder / "own.yaml"
    path.write_text(OWN.format(teacher=json.dumps(section | {"weights": str(folder / "teacher.safetensors")})))
    return load_recipe(path, settings, run_dir=str(folder / "run"))


def run(recipe):
    """What is logged of the objective while one unit is made."""
    logged = []
    batches_of(recipe, unit_of((0, 1, 2, 3), 2), log=logged.append)
    return logged


@pytest.mark.parametrize("library", TEACHERS)
def test_entropies_of_attention_rise_over_the_steps_and_the_class_is_seen(tmp_path, library):
    recipe = recipe_of(tmp_path, library, "synthesis.stages=[{steps: 30}]", "synthesis.batch_size=8")
    logged = run(recipe)
    first, last = logged[0], logged[-1]
    assert (first["step"], last["step"]) == (1, 30)
    assert last["patch_similarity_entropy"] < first["patch_similarity_entropy"] - 0.1, "negative entropy falls"
    assert last["attention_entropy"] < first["attention_entropy"] - 0.03
    assert last["cross_entropy"] < first["cross_entropy"]


def test_terms_of_attention_are_refused_for_a_network_that_has_none(tmp_path):
    convnet = ["teacher.network=convnet", "teacher.options={widths: [4, 8]}", "teacher.weights=random"]
    with pytest.raises(
        RecipeError, match=r"synthesis.objective's \w+ needs self-attention over patches, but the teacher"
    ):
        run(recipe_of(tmp_path, "timm", *convnet))
