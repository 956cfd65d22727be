"""What holds for every file of cluster/ and its README."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main
import yaml
from manifests import CLUSTER, PLACEHOLDER, REPOSITORY, YAML_FILES
from ray.scripts.scripts import cli as ray_cli

from raydfkd.cli import app

README = (CLUSTER / "README.md").read_text()
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
DOCKERFILE = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")


def values_node(name: str) -> yaml.MappingNode:
    top = dict(children(yaml.compose((CLUSTER / name).read_text())))
    return dict(children(top.get("metadata", yaml.MappingNode("", []))), **top)["values"]


def children(node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value]


def test_every_placeholder_is_in_the_readmes_table_and_the_other_way_round():
    used = {found for path in FILES if path.name != "README.md" for found in PLACEHOLDER.findall(path.read_text())}
    documented = re.findall(r"^\| `(\$\{\w+\})` \|", README, re.MULTILINE)

    assert sorted(documented) == sorted(used)


@pytest.mark.parametrize("name", YAML_FILES)
def test_placeholders_stand_in_the_values_block_only(name):
    node = values_node(name)

    lines = (CLUSTER / name).read_text().splitlines()
    outside = lines[: node.start_mark.line] + lines[node.end_mark.line :]
    assert not [line for line in outside if PLACEHOLDER.search(line)]


@pytest.mark.parametrize("name", YAML_FILES)
def test_every_value_is_used_below(name):
    text = (CLUSTER / name).read_text()

    for key, _ in children(values_node(name)):
        assert re.search(rf"{key}: &{key} ", text)
        assert re.search(rf"\*{key}\b", text)


@pytest.mark.parametrize("name", YAML_FILES)
def test_header_says_the_command_of_its_file(name):
    header = (CLUSTER / name).read_text().partition("\n\n")[0]

    assert re.search(rf"^#   \S.*cluster/{name}", header, re.MULTILINE)


def test_readme_names_every_file_and_only_files_that_are_there():
    named = set(re.findall(r"cluster/([\w.]+\w)", README)) | set(re.findall(r"`([\w.]+\.yaml|Dockerfile)`", README))

    assert named == {path.name for path in FILES} - {"README.md", "Dockerfile.dockerignore"}


def test_commands_that_are_written_down_exist():
    text = " ".join(path.read_text() for path in FILES)
    ours = typer.main.get_command(app).commands

    assert set(re.findall(r"(?:^|[`\"] ?|cluster |lock )raydfkd ([a-z][\w-]*)", text, re.MULTILINE)) <= set(ours)
    assert set(re.findall(r"\bray ([a-z]\S*) (?:-y )?(?:cluster/|--)", text)) <= set(ray_cli.commands)


def test_both_ways_run_the_same():
    (written,) = re.findall(r"^raydfkd submit (.*?) --address \S+(.*)$", README.replace("\\\n", ""), re.MULTILINE)
    (job,) = yaml.safe_load((CLUSTER / "kuberay.job.yaml").read_text())["items"]

    arguments = shlex.split(" ".join(written).replace("$BUCKET", "${BUCKET}"))
    assert ["raydfkd", "run", *arguments] == shlex.split(job["spec"]["entrypoint"])


def test_each_way_is_five_commands():
    blocks = re.findall(r"```\n(docker.*?)```", README, re.DOTALL)

    assert [len(block.replace("\\\n", "").splitlines()) for block in blocks] == [5, 5]


def test_image_is_pinned_not_root_and_comes_with_and_without_cuda():
    stages = {stage.split()[3]: stage for stage in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]}

    for target in ("cpu", "cuda"):
        assert stages[target].rstrip().endswith("USER 1000")
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_image_gets_what_it_installs_and_nothing_else_of_the_repository():
    wanted = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]

    assert all((REPOSITORY / path).exists() for path in wanted)
    assert {"constraints.txt", "pyproject.toml", "raydfkd", "README.md", "LICENSE"} <= set(wanted)


def test_image_has_the_tools_that_ray_and_kuberay_call():
    packages = set(shlex.split(re.search(r"apt-get install (.*?)&&", DOCKERFILE, re.DOTALL)[1]))

    assert {"rsync", "openssh-client", "wget", "gcc"} <= packages


def test_every_option_of_ours_that_is_written_down_exists():
    commands = re.findall(r"^raydfkd ([a-z-]+) (.*)$", README.replace("\\\n", ""), re.MULTILINE)
    ours = typer.main.get_command(app).commands

    assert commands
    for name, rest in commands:
        known = {option for parameter in ours[name].params for option in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", f" {rest.partition('#')[0]}")) <= known
