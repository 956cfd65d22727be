from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import raydfkd
from raydfkd.bench.engine import code_digest, engine, measured_with
from raydfkd.bench.quality import TEACHING
from raydfkd.errors import RecipeError


def test_engine_is_known_by_the_content_of_its_files_and_not_by_where_or_when_they_are(tmp_path, monkeypatch):
    before = code_digest()
    copy = tmp_path / "elsewhere"
    shutil.copytree(Path(raydfkd.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(raydfkd, "__file__", str(copy / "__init__.py"))
    found, of_networks, of_teaching = [], [], []
    for changed in (None, "losses/moments.py", "networks/small.py"):
        if changed is not None:
            with (copy / changed).open("a") as file:
                file.write("# a change\n")
        code_digest.cache_clear()
        found.append(code_digest())
        of_networks.append(code_digest("networks"))
        of_teaching.append(code_digest("runner/teach.py", "networks/small.py"))
    code_digest.cache_clear()
    assert found[0] == before
    assert len(set(found)) == 3
    for parts in (of_networks, of_teaching):
        assert parts[0] == parts[1] != parts[2], "of some parts the others do not count"
    assert of_networks[0] != of_teaching[0]


def test_code_that_a_teacher_depends_on_is_there():
    folder = Path(raydfkd.__file__).parent
    assert all((folder / part).exists() for part in TEACHING)


def test_line_above_a_table_says_versions_and_device():
    assert measured_with("cpu").startswith(f"raydfkd {raydfkd.__version__}+{code_digest()}, torch ")
    assert measured_with("cpu").endswith(" CPU")
    assert set(engine()) == {"raydfkd", "torch"}


def test_line_above_a_table_refuses_a_device_that_is_not_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RecipeError, match="cuda"):
        measured_with("cuda")
