"""The page that explains the house knows every room, once; and the house has no more doors than it should."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydfkd"


def modules():
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
    return sorted(str(path.with_suffix("")) for path in paths)


def test_every_module_is_on_the_page_once():
    page = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"^\| `([a-z_/0-9]+)` \|", page, flags=re.MULTILINE)
    assert sorted(named) == modules()


def test_few_doors_lead_into_the_package():
    doors = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    assert len(doors) <= 23, sorted(doors)


def test_ray_is_tested_where_the_makefile_looks_for_it():
    tests = ROOT / "tests"
    marked = {
        path.relative_to(tests).parts[0] for path in tests.rglob("*.py") if "pytest.mark." + "ray" in path.read_text()
    }
    assert marked == {"distributed"}
    assert '-m "ray and not cluster" tests/distributed' in (ROOT / "Makefile").read_text()
