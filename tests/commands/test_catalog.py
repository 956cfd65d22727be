from __future__ import annotations

import subprocess
import sys

import pytest
from toy import FAMILIES, shipped

from raydfkd.commands.catalog import show
from raydfkd.config.describe import choices_in, keyed_options, model_in, options_of, sections_in
from raydfkd.config.load import packaged_jobs, packaged_recipes
from raydfkd.config.recipe import Recipe
from raydfkd.errors import RecipeError

SECTIONS = {"recipe": Recipe, **dict(sections_in(Recipe))}
OPTIONS = keyed_options(Recipe)


def shown(name: str | None) -> str:
    return "\n".join(show(name))


def test_index_names_everything_once_and_says_how_to_go_on():
    lines = shown(None).splitlines()
    words = [line.split()[0] for line in lines if line.startswith("  ")]
    plugins = [name for registry in FAMILIES.values() for name in shipped(registry)]
    for name in (*packaged_recipes(), *packaged_jobs(), *SECTIONS, *plugins):
        assert name in words
    assert "show NAME" in lines[-1]
    assert len(lines) < 210


@pytest.mark.parametrize("key", SECTIONS)
def test_section_is_explained_with_all_its_options(key):
    for name in {key, key.rpartition(".")[2], SECTIONS[key].__name__, SECTIONS[key].__name__.removesuffix("Spec")}:
        text = shown(name)
        for option in options_of(SECTIONS[key]):
            assert f"  {option.name} " in text
            assert option.meaning in text
    assert " ".join(SECTIONS[key].__doc__.split()) in shown(key)


@pytest.mark.parametrize("key", OPTIONS)
def test_option_is_explained_by_its_dotted_key(key):
    text = shown(key)
    assert OPTIONS[key].meaning in text or key in SECTIONS
    assert not key.count(".") or key in text


@pytest.mark.parametrize("key", [key for key, option in OPTIONS.items() if option.choices])
def test_value_of_a_closed_choice_leads_to_its_option_which_explains_it(key):
    for choice in OPTIONS[key].choices:
        assert key in shown(choice)
        assert choice in OPTIONS[key].meaning, "the sentence says what each value does"


def test_every_closed_choice_of_the_schema_is_known_as_one():
    for model in SECTIONS.values():
        for field in model.model_fields.values():
            assert not choices_in(field.annotation) or model_in(field.annotation) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Stage", "pixels.stages"),
        ("stages", "Edge of the squares"),
        ("Renewal", "Share of the old weights"),
        ("renewal", "generator.renewal"),
        ("keep", "generator.renewal.keep"),
        ("synthesis.stages", "Edge of the squares"),
        ("synthesis.lr", "pixels.lr"),
        ("synthesis.objective.bn_moments.form", "bn_moments.form"),
        ("harmonic", "conv.taper"),
        ("kl", "bn_moments.form"),
    ],
)
def test_option_value_or_section_of_a_plugin_is_explained(name, words):
    assert words in shown(name)


@pytest.mark.parametrize("name", [name for registry in FAMILIES.values() for name in shipped(registry)])
def test_whole_docstring_of_a_plugin_is_shown(name):
    text = shown(name)
    for registry in FAMILIES.values():
        if name in registry.names():
            doc = registry.describe(name)[0].replace("``", "`")
            for line in doc.splitlines():
                assert line.strip() in text


def test_types_are_in_plain_words():
    text = "\n".join(map(shown, ["recipe", "teacher", "synthesis", "transfer_set", "distill", "runtime", *FAMILIES]))
    for word in ("Annotated", "Literal", "tuple[", "dict[", "[int", "NoneType", "FieldInfo", "<class"):
        assert word not in text


@pytest.mark.parametrize("name", packaged_jobs())
def test_job_is_shown_as_it_is_and_listed(name):
    assert f"name: {name}\n" in shown(name)
    assert f"  {name} " in shown("jobs")


def test_network_of_torchvision_is_explained_with_what_its_constructor_takes():
    text = shown("torchvision:resnet50")
    assert "zero_init_residual" in text
    assert "num_classes" not in text, "that is teacher.classes"
    with pytest.raises(RecipeError, match=r"torchvision has no 'resnt50'; did you mean resnet50\?"):
        shown("torchvision:resnt50")


def test_every_network_of_torchvision_can_be_shown():
    from torchvision import models

    for name in models.list_models(module=models):
        assert name in shown(f"torchvision:{name}")


def test_data_set_of_torchvision_is_explained_with_its_options():
    text = shown("torchvision:CIFAR10")
    assert "every tenth picture of the training split" in text
    assert "fetch them where they are missing" in text
    assert "torchvision:NAME" in shown("real_data")


def test_plugin_of_ones_own_is_explained_as_those_that_come_along(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        "class Mine:\n"
        '    """Pulls towards blue.\n\n    More of it.\n    """\n\n'
        "    def __init__(self, *, strength: float = 0.5) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = shown("own_losses:Mine")
    assert "Pulls towards blue." in text
    assert "More of it." in text
    assert "strength" in text
    with pytest.raises(RecipeError, match="cannot be imported"):
        shown("own_losses:Yours")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("bn_momets", "did you mean bn_moments?"),
        ("image_spac", "did you mean image_space?"),
        ("window_row", "did you mean window_rows?"),
        ("growin", "did you mean growing?"),
        ("quikstart", "did you mean quickstart?"),
        ("flibbertigibbet", "`raydfkd show` lists what there is"),
        ("distill.flibbertigibbet", "`raydfkd show` lists what there is"),
    ],
)
def test_name_of_nothing_is_answered_with_the_closest_one(name, remedy):
    with pytest.raises(RecipeError) as error:
        shown(name)
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize("name", ["recipe", "runtime", "transfer_set.encoding.kind", "Range", "smoke", "jobs"])
def test_what_the_schema_knows_is_shown_without_torch(name):
    program = (
        f"import sys; from raydfkd.commands.catalog import show; list(show({name!r})); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


@pytest.mark.parametrize("name", ["source", "distill.source", "distill.source.kind"])
def test_key_whose_value_is_a_plugin_is_explained_with_its_family(name):
    text = shown(name)
    for source in ("growing", "snapshot", "live"):
        assert f"  {source} " in text
    assert "complete_by" in text


def test_page_of_a_method_is_followed_by_a_line_on_each_of_its_parts(capsys):
    lines = list(show("rdskd"))
    about = {line.split()[0]: line for line in lines[lines.index("") + 2 :]}
    assert {"generator", "exponential_increment", "one_hot", "class_balance", "mode_seeking", "affine"} <= set(about)
    assert "Cross-entropy of the teacher's answer with its own most likely class" in about["one_hot"]
