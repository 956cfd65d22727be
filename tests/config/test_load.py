from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import raydfkd
from raydfkd.config.describe import model_in
from raydfkd.config.load import expand_home, load_recipe, packaged_jobs, packaged_path, packaged_recipes
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import keys_of
from raydfkd.config.schema import PluginSpec, Range, RuntimeSpec
from raydfkd.config.static_check import static_check
from raydfkd.errors import RecipeError, differences
from raydfkd.store.store import Store

JOBS = Path(__file__).parents[2] / "jobs"
PACKAGED = [*packaged_recipes(), *packaged_jobs()]


def refused(*args, **kwargs) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(*args, **kwargs)
    return str(error.value)


# Jobs


def test_packaged_jobs_are_the_files_of_the_folder_jobs():
    assert packaged_jobs() == sorted(path.stem for path in JOBS.glob("*.yaml"))
    for name in packaged_jobs():
        assert packaged_path(name).read_bytes() == (JOBS / f"{name}.yaml").read_bytes()


def test_recipes_jobs_and_the_page_are_in_a_wheel():
    package = Path(raydfkd.__file__).parent
    patterns = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in patterns["raydfkd"] for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    jobs = {package / "recipes/jobs" / path.name for path in JOBS.glob("*.yaml")}
    assert packed == data | jobs


def test_no_job_is_called_like_a_recipe():
    assert not set(packaged_jobs()) & set(packaged_recipes())


@pytest.mark.parametrize("name", packaged_jobs())
def test_job_is_the_same_by_its_name_and_by_its_file(name, tmp_path, monkeypatch):
    by_file = load_recipe(JOBS / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == by_file


def test_file_of_the_working_folder_does_not_stand_in_for_the_base_of_a_packaged_recipe(tmp_path, monkeypatch):
    (tmp_path / "digits-generators").write_text("name: intruder\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").teacher.network == "convnet"


def test_job_that_is_looked_for_as_a_file_where_there_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("jobs/smoke.yaml") == (
        "jobs/smoke.yaml: no such file; `smoke` alone is the one that comes with raydfkd"
    )


@pytest.mark.parametrize("name", ["../jobs/smoke", "jobs/smoke", ".", "", "smoke.yaml"])
def test_only_a_bare_name_is_that_of_a_packaged_recipe(name):
    assert packaged_path(name) is None


# Overrides


def options_of(model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Dotted keys of options that are no sections."""
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        if inner is None or issubclass(inner, PluginSpec) or "tuple" in str(field.annotation):
            yield f"{where}{name}"
        else:
            yield from options_of(inner, f"{where}{name}.")


def value_at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = None if data is None else data[part]
    return data


FIRST = {"digits-generators", "fashion-resnet", "spot-64"}
"""Of a synthesizer each, on Ray and in one process; seconds each, so the others are left to the cluster's tests."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.cluster) for name in sorted(PACKAGED)]
)
def test_every_option_of_every_packaged_recipe_can_be_set_by_itself(name):
    recipe = load_recipe(name)
    data = recipe.shown()
    for key in options_of(Recipe):
        value = value_at(data, key)
        if value is None and key.startswith(("teacher.train.", "real_data", "synthesis.start.", "verifier.")):
            continue
        said = f"{key}={json.dumps(value)}"
        assert load_recipe(name, [said]) == recipe, said
        assert load_recipe(name, {key: value}) == recipe, said


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("key", ["runtime.workers.max", "runtime.student_workers.max"])
def test_number_of_workers_can_be_set_on_every_packaged_recipe(name, key):
    runtime = load_recipe(name, [f"{key}=4"]).runtime
    assert value_at(runtime.model_dump(), key.removeprefix("runtime.")) == 4


def test_range_with_one_end_has_the_default_at_the_other(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: digits-generators\nname: mine\nruntime: {workers: {max: 4}}\n")
    assert load_recipe(path).runtime.workers == Range(min=1, max=4)
    assert RuntimeSpec().workers == Range(min=1, max=1)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("distill.criterion.temperature=3", "distill.criterion", {"kind": "soft_kl", "temperature": 3}),
        ("transfer_set.encoding.quality=80", "transfer_set.encoding", {"kind": "jpeg", "quality": 80}),
        ("real_data.download=true", "real_data", {"kind": "fashion_mnist", "download": True}),
        ("synthesis.generator.width=8", "synthesis.generator", {"kind": "conv", "width": 8}),
        ("synthesis.targets.share=1", "synthesis.targets", {"kind": "balanced", "share": 1}),
        ("synthesis.renewal.steps=9", "synthesis.renewal", {"steps": 9}),
        ("teacher.train.epochs=2", "teacher.train.epochs", 2),
    ],
)
def test_option_of_a_plugin_given_by_its_bare_name_or_by_default_can_be_set(override, key, value):
    bare = {
        "distill.criterion": "soft_kl",
        "transfer_set.encoding": "jpeg",
        "real_data": "fashion_mnist",
        "synthesis.generator": "conv",
        "teacher.train": None,
        "synthesis.renewal": None,
    }
    changed = yaml.safe_load(load_recipe("digits-generators", bare | _value(override)).to_yaml())
    assert value_at(changed, key) == value


def _value(override: str) -> dict[str, Any]:
    key, _, text = override.partition("=")
    return {key: yaml.safe_load(text)}


def test_recipe_can_give_an_option_to_the_bare_plugin_of_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: digits-generators\nname: mine\nreal_data: {kind: digits}\ndistill: {criterion: {hard: 1}}")
    assert load_recipe(path).distill.criterion == PluginSpec(kind="logit_l1", hard=1)  # type: ignore[call-arg]


def test_generator_whose_name_is_not_given_is_the_default_one():
    recipe = load_recipe("fashion-resnet", {"synthesis.generator": {"latent": 8}})
    static_check(recipe)
    with pytest.raises(RecipeError, match=r"synthesis.generator.latnt: unknown key; did you mean latent\?"):
        static_check(load_recipe("fashion-resnet", {"synthesis.generator": {"latnt": 8}}))


def test_overrides_can_be_a_mapping_of_plain_data_that_is_not_read_as_yaml(tmp_path):
    options = {"widths": (2, 4)}
    changes = {"name": "1e3", "seed": 3, "teacher.options": options, "run_dir": tmp_path, "synthesis.augment": ["flip"]}
    recipe = load_recipe("digits-generators", changes | {"teacher.options.widths.0": 3})
    assert (recipe.name, recipe.seed, recipe.run_dir) == ("1e3", 3, str(tmp_path))
    assert recipe.teacher.options == {"widths": [3, 4]}
    assert options == {"widths": (2, 4)}, "what the caller gave is as it was"
    assert recipe.synthesis.augment == (PluginSpec(kind="flip"),)
    assert load_recipe("digits-generators", {"runtime.workers": Range(max=3)}).runtime.workers.max == 3


SCALED = """
recipe: digits-generators
name: mine
scales:
  smoke: {name: small, synthesis: {steps: 3}, transfer_set: {images_per_class: 80}}
"""


def test_scale_changes_the_numbers_that_it_names_and_other_changes_come_after_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(SCALED)
    full, small = load_recipe(tmp_path / "mine.yaml"), load_recipe(tmp_path / "mine.yaml", ["scale=smoke"])
    assert full == load_recipe("digits-generators", {"name": "mine"})
    assert small == load_recipe(
        "digits-generators", ["name=small", "synthesis.steps=3", "transfer_set.images_per_class=80"]
    )
    assert load_recipe(tmp_path / "mine.yaml", ["synthesis.steps=7", "scale=smoke"]).synthesis.options["steps"] == 7


def test_scale_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(SCALED)
    assert refused(tmp_path / "mine.yaml", ["scale=smok"]) == "scale is 'smok'; did you mean smoke?"
    assert refused("digits-generators", ["scale=smoke"]) == "scale is 'smoke'; digits-generators has no scales; drop it"


def test_override_of_a_mapping_that_leads_nowhere_is_named():
    assert refused("digits-generators", {"name.first": 1}).startswith("override name.first: name is ")


def test_entry_of_an_empty_list_is_refused_as_one_that_is_not_there():
    message = refused("digits-generators", ["teacher.train.augment=[]", "teacher.train.augment.flip.probability=1"])
    assert message.endswith("teacher.train.augment has no entry 'flip'; there are none")


# Mistakes


def test_all_mistakes_are_said_at_once():
    message = refused("digits-generators", ["distill.stps=1", "seed=x", "teacher.image_space.mean=[77.9]", "sed=1"])
    assert sorted(message.splitlines()) == [
        "distill.stps: unknown key; did you mean steps?",
        "sed: unknown key; did you mean seed?",
        'seed is "x": input should be a valid integer',
        "teacher.image_space: mean is [77.9], but images are in [0, 1] before normalisation; divide by 255",
    ]


def test_all_that_does_not_go_together_is_said_at_once():
    message = refused("digits-generators", {"transfer_set.classes": [3, 12], "name": "a b"})
    assert [line.partition(" ")[0] for line in message.splitlines()] == [
        "name",
        "transfer_set.classes",
        "transfer_set.unit.classes",
    ]


def test_mistakes_in_all_plugins_are_said_at_once():
    recipe = load_recipe("digits-generators", {"distill.criterion": "soft_k", "synthesis.step": 3})
    with pytest.raises(RecipeError) as error:
        static_check(recipe)
    assert [line.partition(":")[0] for line in error.value.lines] == ["synthesis.step", "distill.criterion"]


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("steps=3", "did you mean distill.steps or synthesis.steps?"),
        ("stpes=3", "did you mean distill.steps or synthesis.steps?"),
        ("workers.max=3", "did you mean runtime.workers?"),
        ("distill.lr=3", "did you mean distill.optimizer.lr?"),
        ("distill.optimizer.steps=3", "did you mean distill.steps?"),
        ("teacher.size=3", "did you mean teacher.image_space.size?"),
        ("transfer_set.steps=3", "did you mean distill.steps or synthesis.steps?"),
        (
            "distill.images_per_class=3",
            "did you mean transfer_set.images_per_class?",
        ),
        ("distill.batch=3", "did you mean batch_size?"),
        ("batch_size=3", "did you mean distill.batch_size?"),
    ],
)
def test_key_of_another_section_is_answered_with_where_it_belongs(override, remedy):
    key = override.partition("=")[0].removesuffix(".max")
    assert refused("digits-generators", [override]) == f"{key}: unknown key; {remedy}"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("synthesis.batch=3", "did you mean batch_per_class?"),
        ("synthesis.pool=3", "did you mean synthesis.stages.0.pool?"),
        ("synthesis.generator.steps=3", "did you mean synthesis.steps"),
        ("synthesis.images_per_class=3", "did you mean transfer_set.images_per_class"),
        ("synthesis.generator.batch_per_class=3", "did you mean synthesis.batch_per_class?"),
    ],
)
def test_option_of_another_plugin_is_answered_with_where_it_belongs(override, remedy):
    name = "digits-deepinversion" if "pool" in override else "digits-generators"
    with pytest.raises(RecipeError) as error:
        static_check(load_recipe(name, [override]))
    assert str(error.value).startswith(f"{override.partition('=')[0]}: unknown key; {remedy}")


@pytest.mark.parametrize("value", ["[77.9]", "[-1]"])
def test_mean_of_pixels_that_are_not_in_0_to_1_is_refused(value):
    assert "images are in [0, 1] before normalisation" in refused(
        "digits-generators", [f"teacher.image_space.mean={value}"]
    )


def test_deviation_of_pixels_on_the_scale_of_bytes_is_refused_with_the_remedy():
    message = refused("digits-generators", {"teacher.image_space.std": [95.3]})
    assert message.endswith("std is [95.3], but images are in [0, 1] before normalisation; divide by 255")


# Folders of users


def test_tilde_is_the_users_folder_wherever_a_path_stands(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "base.yaml").write_text("recipe: fashion-generators\nname: base\nrun_dir: ~/runs/${name}\n")
    (home / "mine.yaml").write_text("recipe: ~/base.yaml\nreal_data: {root: ~/fashion}\n")
    changes = {
        "teacher.weights": "~/w.pt",
        "transfer_set.storage_options": {"token": "~/key.json"},
        "teacher.class_names": "~/names.txt",
    }
    recipe = load_recipe("~/mine.yaml", changes)
    assert recipe.run_dir == f"{home}/runs/base"
    assert recipe.transfer_set.uri == f"{home}/runs/base/transfer_set"
    assert recipe.teacher.weights == f"{home}/w.pt"
    assert recipe.teacher.class_names == f"{home}/names.txt"
    assert recipe.real_data.options == {"root": f"{home}/fashion"}
    assert recipe.transfer_set.storage_options == {"token": f"{home}/key.json"}
    assert load_recipe("~/mine.yaml", run_dir="~/there").run_dir == f"{home}/there"
    assert load_recipe("~/mine.yaml", ["transfer_set.uri=file://~/set"]).transfer_set.uri == f"{home}/set"


@pytest.mark.parametrize("form", ["file://{}", "local://{}", "{}", "./{}", "~/{}", "file://~/{}"])
def test_worker_in_another_folder_means_the_same_places_as_the_driver(form, tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path / "here")
    keys = ("run_dir", "teacher.weights", "teacher.class_names", "transfer_set.uri")
    recipe = load_recipe("fashion-generators", {key: form.format(key) for key in (*keys, "real_data.root")})
    sent = recipe.located().model_dump_json()
    stores = [Store(recipe.transfer_set.uri)]
    monkeypatch.chdir(tmp_path / "there")
    worker = Recipe.model_validate_json(sent)
    stores.append(Store(worker.transfer_set.uri))
    places = (worker.run_dir, worker.teacher.weights, worker.teacher.class_names, worker.transfer_set.uri)
    assert places == tuple(str(tmp_path / "here" / key) for key in keys)
    assert [store.uri for store in stores] == [str(tmp_path / "here/transfer_set.uri")] * 2
    assert "://" not in recipe.real_data.options["root"]


@pytest.mark.parametrize("text", ["a~/b", "~tilde", "s3://~/b", "", "~nobody-of-that-name/x", "~~/x"])
def test_text_that_is_no_users_folder_stays(text):
    assert expand_home(text) == text


@pytest.mark.parametrize("key", ["run_dir", "teacher.weights", "transfer_set.uri"])
def test_folder_of_a_user_who_is_not_there_is_refused(key):
    value = "~nobody-of-that-name/x"
    assert refused("digits-generators", {key: value}).startswith(f"{key} is '{value}': there is no such home folder")


def test_no_classes_at_all_are_refused_by_the_key():
    assert refused("digits-generators", ["transfer_set.classes=[]"]).startswith("transfer_set.classes is []: ")


def test_tilde_that_yaml_takes_for_nothing_is_no_folder_called_none():
    assert refused("digits-generators", ["run_dir=~"]) == "run_dir is null: input should be a valid string"


# Names of classes


def test_classes_are_called_by_their_numbers_unless_named():
    assert load_recipe("digits-generators").class_names == tuple("0123456789")


def test_classes_can_be_named_in_the_recipe_or_in_a_file(tmp_path):
    names = tuple("abcdefghij")
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names) + "\n\n")
    assert load_recipe("digits-generators", {"teacher.class_names": names}).class_names == names
    assert load_recipe("digits-generators", {"teacher.class_names": path}).class_names == names
    assert load_recipe("digits-generators", {"teacher.class_names": path}).located().class_names == names


def test_names_are_as_many_as_classes(tmp_path):
    assert refused("digits-generators", {"teacher.class_names": ["a", "b"]}) == (
        "teacher: class_names has 2 names, but classes is 10; give as many"
    )
    path = tmp_path / "names.txt"
    path.write_text("a\nb\n")
    with pytest.raises(RecipeError, match="which has 2 names, but teacher.classes is 10; give a name a line"):
        _ = load_recipe("digits-generators", {"teacher.class_names": path}).class_names
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        _ = load_recipe("digits-generators", {"teacher.class_names": "nowhere.txt"}).class_names


def test_names_are_part_of_no_digest():
    named = load_recipe("digits-generators", {"teacher.class_names": list("abcdefghij")})
    assert named.made_of("w") == load_recipe("digits-generators").made_of("w")


@pytest.mark.parametrize("value", [3, [], [1, 2]])
def test_names_that_are_no_texts_are_refused(value):
    assert refused("digits-generators", {"teacher.class_names": value}).startswith("teacher.class_names")


# Sizes


@pytest.mark.parametrize(("size", "shape"), [(8, (1, 8, 8)), ([16, 8], (1, 16, 8)), ([8, 8], (1, 8, 8))])
def test_size_is_a_number_or_height_and_width(size, shape):
    space = load_recipe("digits-generators", {"teacher.image_space.size": size}).teacher.image_space
    assert space.shape == shape
    assert (space.height, space.width) == shape[1:]


def test_square_written_as_height_and_width_is_the_same_recipe():
    square = load_recipe("digits-generators", {"teacher.image_space.size": [32, 32]})
    assert square == load_recipe("digits-generators")
    assert square.made_of("w") == load_recipe("digits-generators").made_of("w")


@pytest.mark.parametrize("size", [0, -8, 8.5, "8", [8], [8, 0], [8, 8, 8], [], True, [True, 8], None])
def test_size_of_another_form_is_refused(size):
    message = refused("digits-generators", {"teacher.image_space.size": size})
    assert message.startswith("teacher.image_space.size is ")
    assert message.endswith(": give a number of pixels, or [height, width]")


# Comparing and saving


def differing(one, other):
    """Keys at which two recipes differ."""
    return [line.partition(" is ")[0] for line in differences(one.shown(), other.shown())]


def test_recipes_differ_in_the_keys_that_would_have_to_be_set():
    recipe = load_recipe("digits-generators")
    changes = {
        "seed": 3,
        "synthesis.steps": 9,
        "synthesis.objective.bn_moments.weight": 2.0,
        "distill.augment.affine.degrees": 3,
        "teacher.options": {"widths": [2]},
        "distill.criterion": {"kind": "soft_kl", "temperature": 2.0},
        "transfer_set.uri": "memory://set",
    }
    other = load_recipe("digits-generators", changes)
    expected = changes.keys() - {"teacher.options"} | {"teacher.options.widths"}
    assert set(differing(recipe, other)) == expected
    assert differing(recipe, recipe) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("synthesis.objective", [{"term": "cross_entropy"}]),
        ("synthesis.emissions", None),
        ("budget.synthesis_share", 0.25),
        ("synthesis.conditional", True),
    ],
)
def test_what_one_recipe_does_not_have_differs(key, value):
    recipe = load_recipe("digits-generators")
    other = load_recipe("digits-generators", {key: value})
    assert differing(recipe, other) == differing(other, recipe) == [key]


@pytest.mark.parametrize("name", PACKAGED)
def test_saved_recipe_is_the_recipe(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_saved_recipe_has_no_secrets_and_says_so_when_it_is_read(tmp_path):
    recipe = load_recipe("digits-generators", {"transfer_set.storage_options": {"secret": "hunter2"}})
    assert "hunter2" not in recipe.to_yaml()
    assert differing(recipe, load_recipe("digits-generators", {"transfer_set.storage_options.secret": "x"})) == []
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    message = refused(tmp_path / "recipe.yaml")
    assert message.startswith("transfer_set.storage_options.secret is '***', because a saved recipe has no secrets")
    given = load_recipe(tmp_path / "recipe.yaml", {"transfer_set.storage_options.secret": "hunter2"})
    assert given == recipe


def test_keys_of_a_recipe_are_those_that_can_be_set():
    keys = list(keys_of(Recipe))
    assert {"seed", "teacher.image_space.size", "runtime.workers.max", "synthesis.objective.0.weight"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_loading_a_recipe_imports_no_torch():
    program = (
        "import sys; from raydfkd.config.load import load_recipe; load_recipe('smoke'); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
