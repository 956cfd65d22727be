"""A run that reads real pictures says so wherever somebody looks."""

from __future__ import annotations

import io
import json

from rich.console import Console
from toy import save_pictures, toy_recipe

from raydfkd.commands.inspect import check
from raydfkd.runner.run import report_again, run, synthesize_job


def recipe_with_pictures(folder):
    save_pictures(folder / "pictures", 3)
    return toy_recipe(folder, [f"synthesis.start.images={folder}/pictures"])


def test_run_says_so_in_the_terminal_in_the_report_and_on_the_page(tmp_path):
    said = f"synthesis starts from 3 real pictures in {tmp_path}/pictures"
    console = Console(file=io.StringIO(), width=300)
    run(recipe_with_pictures(tmp_path), console=console)
    terminal = console.file.getvalue()
    assert f"not data-free: {said}" in terminal
    assert "from here on no other real image is read" in terminal
    assert json.loads((tmp_path / "run/report.json").read_text())["not_data_free"] == said
    assert f"Not data-free: {said}." in (tmp_path / "run/report.html").read_text()
    (tmp_path / "run/report.html").unlink()
    report_again(recipe_with_pictures(tmp_path))
    assert f"Not data-free: {said}." in (tmp_path / "run/report.html").read_text()


def test_page_of_pictures_says_so_too(tmp_path):
    made = synthesize_job(recipe_with_pictures(tmp_path))
    assert "Not data-free: synthesis starts from 3 real pictures" in made.page.read_text()


def test_run_without_pictures_says_that_no_real_image_is_read(tmp_path):
    console = Console(file=io.StringIO(), width=300)
    result = run(toy_recipe(tmp_path), console=console)
    assert "from here on no real image is read" in console.file.getvalue()
    assert "data-free" not in console.file.getvalue() + result.page.read_text()
    assert result.report["not_data_free"] is None


def test_check_says_so_also_where_it_opens_nothing(tmp_path, capsys):
    source = tmp_path / "resolved.yaml"
    source.write_text(recipe_with_pictures(tmp_path).to_yaml())
    check(str(source))
    assert f"# not data-free: synthesis starts from 3 real pictures in {tmp_path}/pictures\n" in capsys.readouterr().out
    check(str(source), no_code=True)
    assert "# not data-free: synthesis.start.images names real pictures\n" in capsys.readouterr().out
    source.write_text(toy_recipe(tmp_path).to_yaml())
    check(str(source))
    assert "data-free" not in capsys.readouterr().out
