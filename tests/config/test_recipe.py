from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from raydfkd.config.load import load_recipe, packaged_jobs, packaged_recipes
from raydfkd.config.recipe import Recipe
from raydfkd.config.schema import LogitsSpec, PluginSpec, TermSpec
from raydfkd.data.logits import largest
from raydfkd.errors import RecipeError

TOY = """
name: toy
teacher:
  network: convnet
  options: {widths: [4, 8]}
  classes: 4
  image_space: {channels: 1, size: 8, mean: [0.4], std: [0.3]}
student: {network: convnet}
synthesis:
  synthesizer: generator
  steps: 6
  generator: {kind: conv, latent: 4}
  augment: [flip, {kind: jitter, pixels: 1}]
  objective:
    - cross_entropy
    - {term: bn_moments, form: kl, weight: 1e-4}
    - {term: image_l2, name: dark}
transfer_set:
  images_per_class: 12
  unit: {classes: 2, images_per_class: 4}
distill:
  steps: 6
  criterion: {kind: soft_kl, temperature: 2.0}
  optimizer: {lr: 1e-2}
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture
def written(tmp_path):
    """Writes recipes; returns a path."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refusal(load, *args):
    with pytest.raises(RecipeError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "0.1e-3", "1.e-4", ".1e-3"])
def test_number_in_scientific_notation_is_a_number(toy, text):
    assert toy(f"synthesis.objective.dark.weight={text}").synthesis.objective[2].weight == pytest.approx(1e-4)


def test_date_is_text(toy):
    assert toy("teacher.options={day: 2001-01-01}").teacher.options == {"day": "2001-01-01"}


def test_yaml_that_is_not_plain_data_is_refused(toy):
    assert "is not plain data" in refusal(toy, "teacher.options={a: !!binary aGVsbG8=}")


def test_python_objects_in_yaml_are_never_built(toy, tmp_path):
    canary = tmp_path / "canary"
    refusal(toy, f"seed=!!python/object/apply:os.system ['touch {canary}']")
    assert not canary.exists()


def test_key_given_twice_is_refused_with_its_line(written):
    message = refusal(load_recipe, written("name: a\nteacher:\n  network: x\n  network: y\n"))
    assert message == "network: given twice, again in line 4; keep one of them"


def test_key_given_twice_in_an_override_is_refused(toy):
    message = refusal(toy, "student={network: a, network: b}")
    assert message.startswith("--set student={network: a, network: b}: network: given twice")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student={network:convnet}", "network: no space after its colon; write one before the value"),
        ("student.options={widths:[4]}", "'{widths:[4]}' is not a YAML value; write a space after each colon"),
        ("student.options={widths: [4}", "'{widths: [4}' is not a YAML value; quote it"),
    ],
)
def test_missing_space_after_a_colon_is_named(toy, override, message):
    assert refusal(toy, override) == f"--set {override}: {message}"


def test_section_that_is_a_text_since_a_space_is_missing_says_what_is_wanted(toy):
    message = refusal(toy, 'student="network:convnet"')
    assert message == 'student is "network:convnet": input should be keys, each with a colon and a space after it'


def test_anchor_can_be_merged(written):
    recipe = load_recipe(written(TOY.replace("{lr: 1e-2}", "{<<: &rate {lr: 1e-2}, momentum: 0.5}")))
    assert (recipe.distill.optimizer.lr, recipe.distill.optimizer.momentum) == (0.01, 0.5)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"- a\n- b\n", "is not a recipe: the top of the file must be keys like `teacher:`"),
        (b"", "is not a recipe: the top of the file must be keys like `teacher:`"),
        (b"a: [1\nb: 2", "is not valid YAML: "),
        (b"\xff\xfe\x00\x80", "cannot be read as a recipe: it is not text"),
    ],
)
def test_file_that_is_no_recipe_is_named(tmp_path, content, complaint):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert refusal(load_recipe, path).startswith(f"{path} {complaint}")


def test_missing_file_is_named_with_the_packaged_recipes():
    message = refusal(load_recipe, "nowhere/recipe.yaml")
    assert message == (
        "nowhere/recipe.yaml: no such file; give a recipe file or one of: "
        f"{', '.join([*packaged_recipes(), *packaged_jobs()])}"
    )


def test_misspelled_packaged_recipe_is_named_with_the_closest_one():
    assert refusal(load_recipe, "digit-generators") == (
        "digit-generators: no such recipe; did you mean digits-generators?"
    )


# Strictness


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed='3'", 'seed is "3": input should be a valid integer'),
        ("seed=1.5", "seed is 1.5: input should be a valid integer"),
        ("name=3", "name is 3: input should be a valid string"),
        ("distill.steps=true", "distill.steps is true: input should be a valid integer"),
        ("distill.steps=0", "distill.steps is 0: input should be greater than or equal to 1"),
        ("teacher.classes=1", "teacher.classes is 1: input should be greater than or equal to 2"),
        (
            "teacher.image_space.size=[8]",
            "teacher.image_space.size is [8]: give a number of pixels, or [height, width]",
        ),
        ("distill.optimizer.lr=-1", "distill.optimizer.lr is -1: input should be greater than 0"),
        ("distill.optimizer.lr=.inf", "distill.optimizer.lr is Infinity: input should be a finite number"),
        ("distill.optimizer.momentum=2", "distill.optimizer.momentum is 2: input should be less than 1"),
        ("synthesis.objective.0.weight=.nan", "synthesis.objective.0.weight is NaN: input should be a finite number"),
        ("transfer_set.classes=some", "transfer_set.classes is \"some\": input should be 'all' or a valid array"),
        ("transfer_set.uri=''", 'transfer_set.uri is "": string should have at least 1 character'),
        ("run_dir=''", 'run_dir is "": string should have at least 1 character'),
        ("teacher=null", "teacher is null: input should be keys, each with a colon and a space after it"),
    ],
)
def test_value_of_the_wrong_type_or_range_is_refused_with_its_key(toy, override, message):
    assert refusal(toy, override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed: unknown key; did you mean seed?"),
        ("teacher.clases=4", "teacher.clases: unknown key; did you mean classes?"),
        ("teacher.image_space.sizes=4", "teacher.image_space.sizes: unknown key; did you mean size?"),
        ("transfer_set.unit.class=4", "transfer_set.unit.class: unknown key; did you mean classes?"),
        ("runtime.workers.maxx=4", "runtime.workers.maxx: unknown key; did you mean max?"),
    ],
)
def test_misspelled_key_is_named_with_the_closest_one(toy, override, message):
    assert refusal(toy, override) == message


def test_required_key_that_is_misspelled_is_not_called_missing(written):
    message = refusal(load_recipe, written(TOY.replace("  classes: 4\n", "  clases: 4\n")))
    assert message == "teacher.clases: unknown key; did you mean classes?"


def test_missing_key_is_named(written):
    assert refusal(load_recipe, written(TOY.replace("  classes: 4\n", ""))) == "teacher.classes is required and missing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=a b"], "name is 'a b'; use letters, digits, dash, dot and underscore"),
        (["name=../up"], "name is '../up'; use letters, digits, dash, dot and underscore"),
        (["teacher.image_space.mean=[0, 0]"], "teacher.image_space: mean has 2 values; channels is 1, give as many"),
        (["teacher.train={epochs: 1}"], "teacher.train needs real_data; say which, or drop train and give weights"),
        (
            ["synthesis.objective=[image_l2, image_l2]"],
            "synthesis: two terms are called image_l2; give one of them another `name:`",
        ),
        (
            ["distill.teacher_logits=stored", "distill.augment=[flip]"],
            'distill: teacher_logits "stored" belongs to the bare image; use "live" or drop augment',
        ),
        (
            ["distill.teacher_logits=stored", "transfer_set.encoding={kind: webp, quality: 99}"],
            'distill.teacher_logits is "stored", but transfer_set.encoding webp changes the pixels that those logits '
            'belong to; use "live", or raw, png or {kind: webp, quality: 100}',
        ),
        (
            ["transfer_set.logits={kind: top_k, k: 4}"],
            "transfer_set.logits.k is 4, but teacher.classes is 4; use at most 3, or float16",
        ),
        (
            ["transfer_set.logits=top_k"],
            "transfer_set.logits.k is 10, but teacher.classes is 4; use at most 3, or float16",
        ),
        (
            ["distill.optimizer={kind: sgd, lr: 0.1, momentum: 0}"],
            "distill.optimizer: momentum is 0, but sgd's is Nesterov's; give one above 0, such as 0.9",
        ),
        (["runtime.workers={min: 3, max: 2}"], "runtime.workers: min 3 is more than max 2; raise max or lower min"),
        (
            ["runtime.student_workers={min: 0, max: 2}"],
            "runtime: student_workers.min is 0, but the student needs at least 1 worker",
        ),
        (
            ["transfer_set.unit.classes=5"],
            "transfer_set.unit.classes is 5, but there are only 4 classes; use at most that",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_a_remedy(toy, overrides, message):
    assert refusal(toy, *overrides) == message


@pytest.mark.parametrize("classes", ["[0, 4]", "[0, -1]", "[1, 0, 1]"])
def test_class_that_is_not_the_teachers_or_there_twice_is_refused(toy, classes):
    message = refusal(toy, f"transfer_set.classes={classes}")
    assert message.startswith(f"transfer_set.classes has {yaml.safe_load(classes)[-1]}, which is twice there")
    assert message.endswith("use each of 0 to 3 at most once")


@pytest.mark.parametrize(("images", "remedy"), [(10, "try 8 or 12"), (3, "try 4"), (13, "try 12 or 16")])
def test_number_of_images_must_be_a_multiple_of_a_units(toy, images, remedy):
    assert refusal(toy, f"transfer_set.images_per_class={images}") == (
        f"transfer_set: images_per_class {images} is not a multiple of unit.images_per_class 4; {remedy}"
    )


def test_stored_logits_go_with_encodings_that_keep_every_pixel(toy):
    for encoding in ("raw", "png", "{kind: webp, quality: 100}"):
        recipe = toy("distill.teacher_logits=stored", f"transfer_set.encoding={encoding}")
        assert not recipe.transfer_set.encoding.is_lossy


def test_digests_know_of_the_form_of_logits_only_where_it_is_another_than_it_was_always(toy):
    assert toy().trained_by().keys() == {"classes", "images_per_class", "encoding", "student", "distill"}
    assert toy().transfer_set.stored_as() == {"encoding": {"kind": "raw", "quality": 95}}
    few = toy("transfer_set.logits={kind: top_k, k: 2}")
    assert few.trained_by() == {**toy().trained_by(), "logits": {"kind": "top_k", "k": 2}}
    assert few.made_of("w") == toy().made_of("w"), "of the rows as they are made, as the encoding of pixels is not"


@pytest.mark.parametrize(("k", "classes", "size"), [(1, 4, 6), (10, 1000, 42), (10, 32_768, 42), (10, 32_769, 62)])
def test_bytes_of_logits_are_two_for_each_and_for_the_others_and_of_the_numbers_of_classes(k, classes, size):
    assert LogitsSpec(kind="top_k", k=k).bytes_of(classes) == size
    kept, which = largest(torch.zeros(1, classes), k)
    assert kept.nbytes + which.nbytes == size
    assert LogitsSpec().bytes_of(classes) == 2 * classes


def test_recipe_is_frozen(toy):
    recipe = toy()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.distill.optimizer.lr = 3.0  # type: ignore[misc]


def test_plugin_and_term_can_be_a_bare_name(toy):
    recipe = toy("distill.criterion=logit_l1")
    assert recipe.distill.criterion == PluginSpec(kind="logit_l1")
    assert recipe.synthesis.augment[0] == PluginSpec(kind="flip")
    assert recipe.synthesis.objective[0] == TermSpec(term="cross_entropy", weight=1.0, name="cross_entropy")


def test_keys_beyond_a_plugins_own_are_its_options(toy):
    recipe = toy()
    assert recipe.synthesis.options == {"steps": 6, "generator": {"kind": "conv", "latent": 4}}
    assert recipe.synthesis.augment[1].options == {"pixels": 1}
    assert recipe.synthesis.objective[1].options == {"form": "kl"}


# Overrides


def test_override_replaces_a_value_and_makes_sections_that_are_not_there(toy):
    recipe = toy("seed=3", "runtime.workers.max=2", "runtime.workers.min=1", "teacher.options.widths=[2]")
    assert (recipe.seed, recipe.runtime.workers.max, recipe.teacher.options) == (3, 2, {"widths": [2]})


def test_later_override_wins(toy):
    assert toy("seed=3", "seed=4").seed == 4


@pytest.mark.parametrize("entry", ["bn_moments", "1"])
def test_entry_of_a_list_is_addressed_by_name_or_position(toy, entry):
    terms = toy(f"synthesis.objective.{entry}.weight=7").synthesis.objective
    assert [term.weight for term in terms] == [1.0, 7.0, 1.0]
    assert terms[1].options == {"form": "kl"}


def test_entry_of_a_list_is_addressed_by_the_name_given_to_it(toy):
    assert toy("synthesis.objective.dark.weight=7").synthesis.objective[2].weight == 7.0


def test_entry_that_is_a_bare_name_can_be_given_options(toy):
    recipe = toy("synthesis.objective.cross_entropy.weight=7", "synthesis.augment.flip.probability=0.25")
    assert recipe.synthesis.objective[0] == TermSpec(term="cross_entropy", weight=7.0, name="cross_entropy")
    assert recipe.synthesis.augment[0].options == {"probability": 0.25}


def test_entry_of_a_list_can_be_replaced(toy):
    assert toy("synthesis.augment.0={kind: jitter, pixels: 3}").synthesis.augment[0].options == {"pixels": 3}


def test_value_may_hold_an_equals_sign(toy):
    assert toy("transfer_set.uri=memory://a?b=c").transfer_set.uri == "memory://a?b=c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as key=value, such as seed=1"),
        ("=3", "write it as key=value, such as seed=1"),
        ("seed=[1", "'[1' is not a YAML value; quote it"),
        ("synthesis.objective.bn_moment.weight=1", "synthesis.objective has no entry 'bn_moment'; did you mean "),
        ("synthesis.objective.3.weight=1", "synthesis.objective has no entry '3'; known: bn_moments, cross_entropy"),
        ("synthesis.stages.2.steps=1", "synthesis.stages has no entry '2'; known: 0, 1"),
        ("name.first=1", "name is 'toy', which has no keys inside"),
    ],
)
def test_override_that_leads_nowhere_is_quoted(toy, override, message):
    assert refusal(toy, "synthesis.stages=[{steps: 3}, {steps: 4}]", override).startswith(
        f"--set {override}: {message}"
    )


def test_run_dir_argument_wins_over_the_recipe(tmp_path, written):
    assert load_recipe(written(TOY), ["run_dir=there"], str(tmp_path)).run_dir == str(tmp_path)


# Bases


def test_recipe_takes_from_its_base_what_it_does_not_say(toy, written):
    changes = "name: child\nseed: 3\ndistill: {steps: 9}\nruntime: {executor: local}"
    recipe = load_recipe(written(f"recipe: {written(TOY, 'base.yaml')}\n{changes}"))
    base = toy("name=child")
    assert recipe.distill == base.distill.model_copy(update={"steps": 9})
    assert (recipe.seed, recipe.runtime.executor) == (3, "local")
    assert (recipe.teacher, recipe.synthesis) == (base.teacher, base.synthesis)


def test_packaged_recipe_can_be_a_base(written):
    recipe = load_recipe(written("recipe: digits-generators\nname: mine\n"))
    assert recipe.synthesis == load_recipe("digits-generators").synthesis


def test_lists_of_a_base_are_replaced_whole(toy, written):
    recipe = load_recipe(written(f"recipe: {written(TOY, 'base.yaml')}\nsynthesis: {{objective: [cross_entropy]}}"))
    assert [term.term for term in recipe.synthesis.objective] == ["cross_entropy"]


def test_naming_another_plugin_drops_the_options_of_the_bases(written):
    base = written(TOY, "base.yaml")
    recipe = load_recipe(written(f"recipe: {base}\ndistill: {{criterion: {{kind: logit_l1}}}}"))
    assert recipe.distill.criterion == PluginSpec(kind="logit_l1")
    same = load_recipe(written(f"recipe: {base}\ndistill: {{criterion: {{kind: soft_kl, hard: 0.5}}}}"))
    assert same.distill.criterion.options == {"temperature": 2.0, "hard": 0.5}


def test_naming_another_synthesizer_replaces_the_section(written):
    base = written(TOY, "base.yaml")
    recipe = load_recipe(written(f"recipe: {base}\nsynthesis: {{synthesizer: pixels, objective: [cross_entropy]}}"))
    assert recipe.synthesis.options == {}
    assert recipe.synthesis.augment == ()


def test_naming_another_network_drops_its_options_and_keeps_the_image_space(toy, written):
    recipe = load_recipe(written(f"recipe: {written(TOY, 'base.yaml')}\nteacher: {{network: lenet5}}"))
    assert recipe.teacher.options == {}
    assert recipe.teacher.image_space == toy().teacher.image_space


def test_bases_that_go_in_a_circle_are_refused(tmp_path, written):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"recipe: {two}")
    two.write_text(f"recipe: {one}")
    assert refusal(load_recipe, str(one)) == f"recipe: {one} -> {two} -> {one} goes in a circle; name another base"


# Placeholders and paths


def test_placeholders_stand_for_name_and_run_dir(toy):
    recipe = toy("name=mine", "run_dir=out/${name}/", "transfer_set.uri=s3://bucket/${name}")
    assert recipe.run_dir == "out/mine"
    assert recipe.teacher.weights == "out/mine/teacher.safetensors"
    assert recipe.transfer_set.uri == "s3://bucket/mine"
    assert toy().transfer_set.uri == "runs/toy/transfer_set"


def test_placeholder_works_inside_lists(toy):
    assert toy("teacher.options={a: [x, '${name}']}").teacher.options == {"a": ["x", "toy"]}


def test_unknown_placeholder_is_refused(toy):
    assert refusal(toy, "transfer_set.uri=${run_dri}/set") == (
        "transfer_set.uri is '${run_dri}/set': unknown placeholder; did you mean run_dir?"
    )


def test_located_recipe_has_absolute_local_paths_and_leaves_urls_alone(toy):
    recipe = toy("run_dir=out", "teacher.weights=random").located()
    assert recipe.run_dir == str(Path.cwd() / "out")
    assert recipe.transfer_set.uri == str(Path.cwd() / "out/transfer_set")
    assert recipe.teacher.weights == "random"
    remote = toy("transfer_set.uri=memory://set", "teacher.weights=s3://bucket/teacher.pt", "run_dir=/out").located()
    assert (remote.transfer_set.uri, remote.teacher.weights) == ("memory://set", "s3://bucket/teacher.pt")
    assert remote.run_dir == "/out"


def test_folders_of_pictures_are_places(toy, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = toy("synthesis.start.images=~/pictures", "synthesis.statistics=file://${run_dir}/some")
    folders = {"synthesis.start.images": "/home/me/pictures", "synthesis.statistics": f"{recipe.run_dir}/some"}
    assert recipe.picture_folders == folders
    located = toy("synthesis.start.images=pictures", "synthesis.statistics=some").located()
    assert list(located.picture_folders.values()) == [str(Path.cwd() / "pictures"), str(Path.cwd() / "some")]
    assert toy().located().picture_folders == toy().picture_folders == {}


# Digest


CHANGES_PIXELS = [
    "seed=1",
    "teacher.network=lenet5",
    "teacher.options={widths: [4, 4]}",
    "teacher.image_space.mean=[0.5]",
    "teacher.classes=5",
    "synthesis.objective.bn_moments.weight=2e-4",
    "synthesis.objective.bn_moments.form=norm",
    "synthesis.steps=7",
    "synthesis.generator.latent=5",
    "synthesis.augment=[]",
    "synthesis.targets=none",
    "synthesis.precision=bfloat16",
    "synthesis.threads=2",
    "transfer_set.unit.classes=4",
    "transfer_set.unit.images_per_class=2",
]
CHANGES_NO_PIXEL = [
    "teacher.temperature=1",
    "name=other",
    "run_dir=elsewhere",
    "teacher.weights=elsewhere.safetensors",
    "real_data=digits",
    "transfer_set.uri=memory://elsewhere",
    "transfer_set.storage_options={key: secret}",
    "transfer_set.images_per_class=40",
    "transfer_set.classes=[0, 1]",
    "transfer_set.part_rows=7",
    "student.network=lenet5",
    "distill.steps=7",
    "distill.criterion=logit_l1",
    "runtime={executor: local, device: cpu, workers: {min: 2, max: 4}, max_attempts: 9, max_losses: 9}",
]


@pytest.mark.parametrize("override", CHANGES_PIXELS)
def test_digest_changes_with_what_affects_pixels(toy, override):
    assert toy(override).made_of("w") != toy().made_of("w")


def test_digest_changes_with_the_temperature_and_stays_where_there_is_none(toy):
    assert toy("teacher.temperature=2").made_of("w") != toy().made_of("w")
    assert "temperature" not in toy().made_of("w")["teacher"]


def test_temperature_of_a_teacher_that_is_trained_here_is_refused(toy):
    with pytest.raises(RecipeError, match="temperature is 2, but a network that train is to train would learn"):
        toy("teacher.temperature=2", "teacher.train={epochs: 1}")


def test_digest_changes_with_the_teachers_weights(toy):
    assert toy().made_of("w") != toy().made_of("v")


@pytest.mark.parametrize("override", CHANGES_NO_PIXEL)
def test_digest_stays_with_what_affects_no_pixel(toy, override):
    assert toy(override).made_of("w") == toy().made_of("w")


def test_digest_of_a_recipe_without_pictures_knows_nothing_of_them(toy):
    synthesis = toy("synthesis.start=null", "synthesis.statistics=null").made_of("w")["synthesis"]
    assert not {"start", "statistics"} & synthesis.keys()


def test_digest_knows_of_a_selection_where_there_is_one(toy):
    assert "select" not in toy("synthesis.select=null").made_of("w")["synthesis"]
    selected = [toy(f"synthesis.select={{kind: random, candidates: {count}}}").made_of("w") for count in (1.5, 2)]
    assert selected[0] != selected[1]


def test_digest_is_of_what_pictures_hold_and_not_of_their_place(toy):
    def made(folder, start, statistics, noise=0.5):
        settings = [f"synthesis.start={{images: {folder}/a, noise: {noise}}}", f"synthesis.statistics={folder}/b"]
        return toy(*settings).made_of(
            "w", pictures={"synthesis.start.images": start, "synthesis.statistics": statistics}
        )

    assert made("here", "x", "y") == made("there", "x", "y")
    others = [made("here", "y", "y"), made("here", "x", "x"), made("here", "x", "y", noise=0.0)]
    assert made("here", "x", "y") not in others
    assert made("here", "x", "y")["synthesis"]["start"] == {"images": "x", "noise": 0.5}


def test_digest_stays_when_a_recipe_goes_through_json(toy):
    recipe = toy("teacher.options={a: [1, 2.5, x]}")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()).made_of("w") == recipe.made_of("w")


# What is shown


def test_shown_recipe_names_storage_options_without_their_values(toy):
    recipe = toy("transfer_set.storage_options={key: hunter2, client_kwargs: {token: hunter3}}")
    shown = recipe.shown()
    assert "hunter" not in json.dumps(shown)
    assert shown["transfer_set"]["storage_options"] == {"key": "***", "client_kwargs": "***"}
    assert recipe.transfer_set.storage_options["key"] == "hunter2"


@pytest.mark.parametrize("name", packaged_recipes())
def test_shown_recipe_is_a_recipe(name, written):
    recipe = load_recipe(name)
    assert load_recipe(written(yaml.safe_dump(recipe.shown(), sort_keys=False))) == recipe


# Plan


@pytest.mark.parametrize("unit", ["{classes: 1, images_per_class: 1}", "{classes: 3, images_per_class: 4}"])
@pytest.mark.parametrize("classes", ["all", "[3, 0, 2]"])
def test_plan_makes_every_class_exactly_as_often_as_asked(toy, unit, classes):
    recipe = toy(f"transfer_set.unit={unit}", f"transfer_set.classes={classes}")
    units = recipe.plan()
    made = dict.fromkeys(range(4), 0)
    for planned in units:
        assert len(planned.request.classes) <= recipe.transfer_set.unit.classes
        for label in planned.request.classes:
            made[label] += planned.request.images_per_class
    wanted = range(4) if classes == "all" else [3, 0, 2]
    assert made == {label: 12 if label in wanted else 0 for label in range(4)}
    assert len({planned.id for planned in units}) == len(units)


# Documentation


def sections(model, path="recipe"):
    yield path, model
    for name, field in model.model_fields.items():
        stack = [field.annotation]
        while stack:
            annotation = stack.pop()
            stack += getattr(annotation, "__args__", ())
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from sections(annotation, f"{path}.{name}")


@pytest.mark.parametrize(("path", "model"), list(sections(Recipe)))
def test_every_field_of_a_recipe_is_described(path, model):
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_base_recipe_is_looked_for_beside_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("recipe: digits-generators\nseed: 5\n")
    (tmp_path / "folder" / "mine.yaml").write_text("recipe: base.yaml\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("folder/mine.yaml").seed == 5


def test_run_dir_that_is_a_url_is_refused():
    with pytest.raises(RecipeError, match=r"run_dir is 's3://bucket/run'; it must be a folder"):
        load_recipe("digits-generators", (), "s3://bucket/run")
