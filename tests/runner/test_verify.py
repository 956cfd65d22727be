"""What another network sees in the synthetic images, beside the moments that the teacher finds in them."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from toy import CLASSES, SPACE, batchnorm_teacher, plain_teacher, toy_images, toy_recipe, toy_view

import raydfkd
from raydfkd.commands.inspect import check as check_command
from raydfkd.commands.run import synthesize as synthesize_command
from raydfkd.config.load import load_recipe
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import ImageSpace
from raydfkd.errors import MissingError, RecipeError
from raydfkd.images.pictures import read_picture
from raydfkd.images.pixels import PixelRange, nominal_to_uint8
from raydfkd.job import open_job
from raydfkd.losses.moments import BatchNormMoments
from raydfkd.networks.observed import Need, ObservedNetwork
from raydfkd.networks.small import ConvNet
from raydfkd.networks.teacher import Teacher
from raydfkd.networks.verifier import Verifier, open_verifier
from raydfkd.networks.weights import save_bytes
from raydfkd.runner import gallery as in_gallery
from raydfkd.runner import verify as in_verify
from raydfkd.runner.check import check
from raydfkd.runner.moment_distance import IMAGES, moment_distance, moment_distances
from raydfkd.runner.run import report_again, run, synthesize_job
from raydfkd.runner.verify import Diversity, verify
from raydfkd.runner.view import SetView

MEAN, STD = 0.5, 0.25


def judging_network(seed: int = 3) -> ConvNet:
    """A network that nobody has made images of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConvNet(CLASSES, 1, widths=(6, 10))
        with torch.no_grad():
            network.head.weight *= 4
            for _ in range(5):
                network(torch.randn(32, 1, 12, 12))
    return network.eval()


def of_verifier(folder, *overrides, size=12, weights=None, **keys):
    """Overrides of a toy recipe whose verifier is ``judging_network()``, which takes images of ``size`` pixels."""
    file = folder / "verifier.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save_bytes(judging_network()))
    section = {
        "network": "convnet",
        "options": {"widths": [6, 10]},
        "classes": CLASSES,
        "image_space": {"channels": 1, "size": size, "mean": [MEAN], "std": [STD]},
        "weights": str(file) if weights is None else weights,
        **keys,
    }
    return [f"verifier={json.dumps(section)}", *overrides]


def recipe_of(folder, *overrides, **keys):
    return toy_recipe(folder, of_verifier(folder, *overrides, **keys))


def seen(images, size):
    """Stored pixels as the verifier takes them, in units of [0, 1] and then normalised."""
    large = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return (large / 255 - MEAN) / STD


def answers(images, size=12):
    with torch.no_grad():
        return judging_network()(seen(images, size))


def distance_of_pairs(features, labels):
    """One minus the cosine of each pair of a class, a mean over pairs and then over classes."""
    means = []
    for label in labels.unique():
        pairs = itertools.combinations(features[labels == label], 2)
        distances = [1 - F.cosine_similarity(one, other, dim=0) for one, other in pairs]
        means += [torch.stack(distances).mean()] if distances else []
    return torch.stack(means).mean().item()


def features_of(network, images):
    found = {}
    hook = network.head.register_forward_pre_hook(lambda _, inputs: found.update(features=inputs[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    return found["features"]


@pytest.mark.parametrize("size", [12, 8, 5])
def test_verifier_is_asked_about_the_stored_images_at_its_own_size(tmp_path, size):
    made = synthesize_job(recipe_of(tmp_path, size=size))
    rows, found = SetView(made.job).sample(2000), made.verified["verifier"]
    right = answers(rows.images, size).argmax(1) == rows.labels
    assert len(rows) == made.job.planned_images == found["images"]
    assert found["top1"] == pytest.approx(right.double().mean().item())
    assert found["per_class"] == [right[rows.labels == label].double().mean().item() for label in range(CLASSES)]
    features = features_of(judging_network(), seen(rows.images, size))
    assert found["diversity"] == pytest.approx(distance_of_pairs(features, rows.labels), abs=1e-5)
    assert (found["network"], found["of"], found["real"]) == ("convnet", "intended", None)
    assert found["top5"] is None, "there are four classes"


def test_worst_classes_are_named(tmp_path):
    made = synthesize_job(recipe_of(tmp_path, "teacher.class_names=[crow, jay, kite, owl]"))
    found = made.verified["verifier"]
    expected = sorted((share, label) for label, share in enumerate(found["per_class"]))[:2]
    names = ("crow", "jay", "kite", "owl")
    assert found["worst"] == [{"class": label, "name": names[label], "top1": share} for share, label in expected]


def test_photographs_are_looked_at_in_the_same_way(tmp_path):
    rng = np.random.default_rng(0)
    for name in range(CLASSES):
        (tmp_path / "birds" / str(name)).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            image.save(tmp_path / "birds" / str(name) / f"{number}.png")
    recipe = recipe_of(tmp_path, f"real_data={{kind: image_folder, root: {tmp_path}/birds}}")
    report = run(recipe).report
    paths = sorted((tmp_path / "birds").glob("*/*.png"))
    images = torch.stack([read_picture(path, SPACE) for path in paths])
    labels = torch.tensor([int(path.parent.name) for path in paths])
    real = report["verifier"]["real"]
    assert (real["images"], real["top5"]) == (3 * CLASSES, None)
    assert real["top1"] == pytest.approx((answers(images).argmax(1) == labels).double().mean().item())
    features = features_of(judging_network(), seen(images, 12))
    assert real["diversity"] == pytest.approx(distance_of_pairs(features, labels), abs=1e-5)
    direct = toy_view(PixelRange(SPACE).from_uint8(images), taps=frozenset({Need.MOMENTS}))
    expected = BatchNormMoments(form="kl")(direct).item()
    assert report["moment_distance"]["real"] == pytest.approx(expected, rel=1e-4)


def test_images_that_were_made_for_no_class_are_about_the_teachers_answer(tmp_path):
    recipe = recipe_of(
        tmp_path, "synthesis.targets=none", "synthesis.objective=[one_hot, {term: bn_moments, form: kl}]"
    )
    assert recipe.synthesis.targets.kind == "none"
    made = synthesize_job(recipe)
    rows, found = SetView(made.job).sample(2000), made.verified["verifier"]
    answer = rows.teacher_logits.float().argmax(1)
    assert found["of"] == "teacher's answer"
    assert found["top1"] == pytest.approx((answers(rows.images).argmax(1) == answer).double().mean().item())


def test_no_more_images_are_looked_at_than_there_is_room_for(tmp_path, monkeypatch):
    made = synthesize_job(recipe_of(tmp_path))
    monkeypatch.setattr(in_verify, "BYTES", 12 * 64)
    prepared = check(made.job.recipe)
    again = verify(made.job, prepared.teacher, prepared.verifier, SetView(made.job), None)
    assert again["verifier"]["images"] == 12


def test_verifier_without_a_linear_head_has_no_diversity(tmp_path):
    class Averaging(nn.Module):
        def forward(self, images):
            return F.adaptive_avg_pool2d(images, 2).flatten(1)

    made = synthesize_job(toy_recipe(tmp_path))
    verifier = Verifier(module=Averaging().eval(), name="averaging", space=SPACE, sha256="")
    found = verify(made.job, check(made.job.recipe).teacher, verifier, SetView(made.job), None)["verifier"]
    assert found["diversity"] is None
    assert 0 <= found["top1"] <= 1


def test_diversity_is_the_same_in_batches_of_any_size():
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 7, generator=rng), torch.randint(0, 6, (40,), generator=rng)
    labels[labels == 5] = 4
    labels[0] = 5  # a class of one image, which has no pair
    for size in (1, 7, 40):
        diversity = Diversity(9)
        for rows in torch.arange(40).split(size):
            diversity.add(features[rows], labels[rows])
        assert diversity.value == pytest.approx(distance_of_pairs(features, labels), abs=1e-6)


def test_diversity_of_nothing_is_none_and_of_copies_zero():
    assert Diversity(3).value is None
    copies = Diversity(3)
    copies.add(torch.ones(1, 4), torch.tensor([1]))
    assert copies.value is None
    copies.add(2 * torch.ones(1, 4), torch.tensor([1]))
    assert copies.value == pytest.approx(0, abs=1e-12)


# Moments


def test_moments_of_batches_together_are_those_of_one_batch():
    images = toy_images(50).detach()
    network = ObservedNetwork(batchnorm_teacher(), taps={Need.MOMENTS}, frozen=True)
    expected = BatchNormMoments(form="kl")(toy_view(images, taps=frozenset({Need.MOMENTS}))).item()
    assert moment_distance(network, images.split(16)) == pytest.approx(expected, rel=1e-4)
    assert moment_distance(network, [images]) == pytest.approx(expected, rel=1e-4)


def test_noise_and_synthetic_images_have_the_distance_of_the_objectives_term(tmp_path):
    teacher = Teacher(module=batchnorm_teacher(), sha256="")
    noise = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    recipe, pixels = toy_recipe(tmp_path), PixelRange(SPACE)
    stored = nominal_to_uint8(noise)
    found = moment_distances(recipe, teacher, stored, None)
    view = toy_view(pixels.from_uint8(stored), taps=frozenset({Need.MOMENTS}))
    assert found["synthetic"] == pytest.approx(BatchNormMoments(form="kl")(view).item(), rel=1e-4)
    assert found["noise"] == pytest.approx(found["synthetic"], rel=0.1), "other noise of the same kind"
    assert found["real"] is None


def test_images_made_by_matching_moments_are_nearer_than_noise(tmp_path):
    recipe = toy_recipe(
        tmp_path, ["synthesis.stages=[{steps: 60}]", "synthesis.objective=[{term: bn_moments, form: kl}]"]
    )
    found = synthesize_job(recipe).verified["moment_distance"]
    assert found["synthetic"] < found["noise"]


def test_teacher_without_batchnorm_has_no_moment_distance(tmp_path):
    teacher = Teacher(module=plain_teacher(), sha256="")
    assert moment_distances(toy_recipe(tmp_path), teacher, torch.zeros(3, 1, 8, 8, dtype=torch.uint8), None) is None


# Where it is shown


def test_report_page_and_pictures_show_the_verifier(tmp_path, capsys):
    recipe = recipe_of(tmp_path)
    made = synthesize_job(recipe)
    page = made.page.read_text()
    assert "put in the intended class, top-1" in page
    assert ", verifier’s " in page, "each picture has its confidence"
    result = run(recipe)
    assert result.report["verifier"] == made.verified["verifier"]
    assert result.report["moment_distance"] == made.verified["moment_distance"]
    saved = json.loads((tmp_path / "run/report.json").read_text())
    assert saved["verifier"] == made.verified["verifier"]
    assert "images shown to convnet, which has not made them" in result.page.read_text()
    result.page.unlink()
    again, page = report_again(recipe)
    assert again["verifier"] == made.verified["verifier"]
    assert ", verifier’s " in page.read_text()


def test_page_of_pictures_is_written_again_with_the_verifier(tmp_path):
    recipe = recipe_of(tmp_path)
    first = synthesize_job(recipe).page.read_text()
    (tmp_path / "run/gallery.html").unlink()
    _, page = report_again(recipe)
    assert page.read_text() == first


def test_picture_has_the_verifiers_confidence_in_its_class(tmp_path):
    made = synthesize_job(recipe_of(tmp_path))
    pictures = in_verify.with_opinion(gallery_of(made.job), made.job.recipe, check(made.job.recipe).verifier)
    shares = answers(pictures.images.flatten(0, 1)).softmax(1).view(CLASSES, -1, CLASSES)
    for label in range(CLASSES):
        torch.testing.assert_close(pictures.verifier_confidence[label], shares[label, :, label])


def gallery_of(job):
    return in_gallery.gallery(SetView(job), job.recipe.classes, job.recipe.class_names)


def test_summary_of_a_synthesis_has_the_figures_for_scripts_and_for_people(tmp_path, capsys):
    source = tmp_path / "mine.yaml"
    source.write_text(recipe_of(tmp_path).to_yaml())
    synthesize_command(str(source), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["verifier"]["images"] == found["images"] == 24
    assert set(found["moment_distance"]) == {"noise", "synthetic", "real"}
    synthesize_command(str(source))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    share = f"{found['verifier']['top1']:.1%}".replace("%", "\N{NO-BREAK SPACE}%")
    assert lines["verifier"] == f"convnet: {share} of 24 images put in the intended class"
    assert lines["moment_distance"].startswith("noise 0.")


def test_run_without_a_verifier_has_none_and_its_moments_all_the_same(tmp_path):
    report = run(toy_recipe(tmp_path)).report
    assert report["verifier"] is None
    assert report["moment_distance"]["synthetic"] > 0


# What is missing, and what is wrong


def only(lines):
    (line,) = [line for line in lines if "not verified" in line]
    return line


def test_missing_weights_leave_the_run_without_a_verifier_and_say_so(tmp_path, capsys):
    recipe = recipe_of(tmp_path, weights="nowhere.safetensors")
    report = run(recipe).report
    assert report["verifier"] is None
    expected = (
        "the images are not verified: verifier.weights is 'nowhere.safetensors': no such file; give trained weights of "
        "convnet, or drop verifier"
    )
    assert only(report["warnings"]) == only(check(recipe).notes) == expected
    assert expected.replace("'", "&#39;") in (tmp_path / "run/report.html").read_text()
    source = tmp_path / "mine.yaml"
    source.write_text(recipe.to_yaml())
    check_command(str(source))
    assert f"# {expected}\n" in capsys.readouterr().out


COLOUR = "teacher.image_space={channels: 3, size: 8, mean: [0.4, 0.4, 0.4], std: [0.3, 0.3, 0.3]}"


def test_missing_package_leaves_the_run_without_a_verifier_and_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    recipe = toy_recipe(tmp_path, ["verifier.network=timm:resnet18", "verifier.classes=4"])
    assert (recipe.verifier.weights, recipe.verifier.image_space) == ("pretrained", None)
    (line,) = [line for line in check(recipe).notes if "not verified" in line]
    assert line.startswith("the images are not verified: verifier.network needs timm, which is not installed")
    assert line.endswith("pip install 'raydfkd[timm]'")


def test_recipe_that_was_saved_without_the_package_is_filled_in_once_it_is_there(tmp_path, monkeypatch):
    overrides = ["verifier={network: timm:resnet18, weights: random, classes: 4}", COLOUR]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "timm", None)
        (tmp_path / "saved.yaml").write_text(toy_recipe(tmp_path, overrides).to_yaml())
    saved = load_recipe(tmp_path / "saved.yaml")
    assert saved.verifier.image_space == toy_recipe(tmp_path, overrides).verifier.image_space
    assert saved.verifier.image_space.size == 224


def test_weights_out_of_reach_are_missing_too(tmp_path, monkeypatch):
    class Hub(ConvNet):
        def __init__(self, *args, **options):
            raise OSError("no route to host")

    monkeypatch.setattr("raydfkd.networks.hubs.Torchvision.build", lambda *args, **options: Hub())
    section = "{network: torchvision:resnet18, classes: 4, image_space: {size: 32}}"
    recipe = toy_recipe(tmp_path, [f"verifier={section}", COLOUR])
    with pytest.raises(MissingError, match="no route to host; offline give verifier.weights as a file"):
        open_verifier(recipe, recipe.verifier)


def refused(folder, *overrides, **keys):
    with pytest.raises(RecipeError) as caught:
        check(toy_recipe(folder, of_verifier(folder, *overrides, **keys)))
    return str(caught.value)


def test_verifier_over_other_classes_is_refused(tmp_path):
    assert refused(tmp_path, classes=5) == (
        "verifier.classes is 5, but teacher.classes is 4; give a network over the teacher's classes, or drop verifier"
    )


def test_verifier_of_other_channels_is_refused(tmp_path):
    space = {"channels": 3, "size": 8, "mean": [0.5] * 3, "std": [0.2] * 3}
    assert refused(tmp_path, image_space=space).startswith(
        "verifier.image_space.channels is 3, but the teacher's is 1;"
    )


def test_verifier_with_weights_of_another_network_is_refused_before_work(tmp_path):
    said = refused(tmp_path, options={"widths": [4, 8]})
    assert said.startswith(f"verifier.weights is '{tmp_path}/verifier.safetensors': weights of another network")
    assert not (tmp_path / "run").exists()


def test_verifier_that_answers_another_number_of_classes_is_refused_by_its_own_name(tmp_path):
    said = refused(tmp_path, network="test_verify:ten", options={})
    assert said.startswith("verifier.classes is 4, but verifier.network test_verify:ten answers [2, 10]")


def ten():
    return ConvNet(10, 1, widths=(6, 10))


def test_verifier_that_is_the_teacher_itself_is_refused(tmp_path):
    teacher = {"options": {"widths": [8, 12]}, "weights": str(tmp_path / "teacher.safetensors")}
    assert "the teacher's own weights" in refused(tmp_path, **teacher)


def test_network_of_no_library_has_to_say_its_image_space(tmp_path):
    with pytest.raises(RecipeError, match="verifier: image_space is missing; say which convnet has"):
        toy_recipe(tmp_path, ["verifier={network: convnet, classes: 4, weights: random}"])
    with pytest.raises(RecipeError, match="verifier.weights"):
        toy_recipe(tmp_path, ["verifier={network: convnet, classes: 4}"])


# The recipe


def test_verifier_is_no_part_of_what_images_and_student_are_made_of(tmp_path):
    bare, verified = open_job(toy_recipe(tmp_path)), open_job(recipe_of(tmp_path))
    assert bare.digest == verified.digest
    assert bare.student_digest == verified.student_digest


def test_weights_of_the_verifier_move_with_the_run(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, weights="${run_dir}/verifier.safetensors")
    assert recipe.verifier.weights == f"{tmp_path}/run/verifier.safetensors"
    assert recipe.moved_to("/elsewhere").verifier.weights == "/elsewhere/verifier.safetensors"
    monkeypatch.chdir(tmp_path)
    near = recipe_of(tmp_path, weights="verifier.safetensors")
    assert near.located().verifier.weights == f"{tmp_path}/verifier.safetensors"
    assert recipe_of(tmp_path, weights="random").located().verifier.weights == "random"
    assert Recipe.model_validate_json(near.model_dump_json()) == near


def test_home_and_scheme_of_the_verifiers_weights_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert recipe_of(tmp_path, weights="~/v.pt").verifier.weights == "/home/someone/v.pt"
    assert recipe_of(tmp_path, weights="file:///v.pt").verifier.weights == "/v.pt"


def test_verifier_of_a_library_brings_image_space_and_weights(tmp_path):
    recipe = toy_recipe(
        tmp_path,
        [
            "teacher.classes=1000",
            COLOUR,
            "verifier.network=torchvision:resnet18",
            "transfer_set.classes=[0, 1]",
        ],
    )
    assert (recipe.verifier.weights, recipe.verifier.classes) == ("pretrained", 1000)
    assert recipe.verifier.image_space == ImageSpace(
        channels=3, size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def test_public_run_takes_a_verifier(tmp_path):
    assert raydfkd.run(recipe_of(tmp_path)).report["verifier"]["images"] == 24
