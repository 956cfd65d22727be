from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from toy import FAMILIES, shipped

from raydfkd.commands.catalog import show
from raydfkd.commands.completion import complete_name, complete_override, complete_recipe, plugin_names
from raydfkd.config.load import load_recipe, packaged_jobs, packaged_recipes
from raydfkd.errors import RecipeError


def test_names_of_plugins_are_read_as_they_are_registered():
    assert plugin_names() == sorted({name for registry in FAMILIES.values() for name in shipped(registry)})


def test_recipes_jobs_and_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "deep.yml").touch()
    assert complete_recipe("digits-") == [name for name in packaged_recipes() if name.startswith("digits-")]
    assert complete_recipe("m") == ["mine.yaml", "more/"]
    assert complete_recipe("more/") == ["more/deep.yml"]
    assert complete_recipe("nowhere/x") == []
    assert set(complete_recipe("")) == {*packaged_recipes(), *packaged_jobs(), "mine.yaml", "more/"}


def test_keys_and_their_closed_values_are_completed():
    assert complete_override("distill.teacher_l") == ["distill.teacher_logits="]
    both = ["distill.teacher_logits=live", "distill.teacher_logits=stored"]
    assert complete_override("distill.teacher_logits=") == both
    assert complete_override("distill.teacher_logits=s") == both[1:]
    assert complete_override("nosuch") == complete_override("nosuch=") == []


def complaint(override: str) -> str:
    try:
        load_recipe("digits-generators", [override])
    except RecipeError as error:
        return str(error)
    return ""


def test_every_completed_override_is_one_that_the_schema_knows():
    for key in complete_override(""):
        for override in complete_override(key):
            assert not re.search("unknown key|input should", complaint(override))


def test_every_completed_name_is_explained():
    for name in complete_name(""):
        assert list(show(name)), name
    assert complete_name("bn_") == ["bn_moments"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [("raydfkd run qui", "quickstart"), ("raydfkd show bn_", "bn_moments"), ("raydfkd run smoke --set see", "seed=")],
)
def test_shell_gets_completions_without_the_import_of_torch(words, offered, tmp_path):
    program = (
        "import sys, atexit; from raydfkd.cli import main; sys.argv = ['raydfkd']\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    )
    variables = {
        "_RAYDFKD_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert offered in answer.stdout.split()
    assert answer.stderr.split()[-1] == "False"
