from __future__ import annotations

import json
import shlex
from importlib.resources import files

import jsonschema
import pytest
import typer.main
from manifests import CLUSTER, filled, load
from ray.autoscaler._private.util import prepare_config, validate_config

from raydfkd.cli import app

LAUNCHERS = ["launcher.aws.yaml", "launcher.gcp.yaml"]
SCHEMA = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_is_what_rays_schema_and_loader_accept(name):
    config = load(name)

    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(("key", "misspelt"), [("\nmax_workers:", "\nmax_worker:"), ("  resources:", "  resource:")])
def test_schema_finds_a_misspelt_key(name, key, misspelt):
    config = load(name, lambda text: text.replace(key, misspelt))

    with pytest.raises(jsonschema.ValidationError, match=misspelt.strip(" :\n")):
        jsonschema.validate(config, SCHEMA)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_is_installed_over_the_image(name):
    config = prepare_config(load(name))

    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert not [command for command in commands if "pip install" in command]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_nodes_ask_for_the_token_that_is_sent_to_them(name):
    config = load(name)

    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "HOME=/home/ray" in (CLUSTER / "Dockerfile").read_text()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_machine_mounts_the_folder_of_the_runs(name):
    config = load(name)
    mount = next(command for command in config["initialization_commands"] if "/mnt/runs" in command)

    assert filled("${NFS_EXPORT}") in mount
    assert "-v /mnt/runs:/runs" in config["docker"]["run_options"]
    for node in config["available_node_types"].values():
        assert mount in node.get("initialization_commands", [mount])


def test_only_the_spot_machines_are_spot():
    aws, gcp = (load(name)["available_node_types"] for name in LAUNCHERS)

    assert [name for name, node in aws.items() if "InstanceMarketOptions" in node["node_config"]] == ["spot"]
    schedulings = {name: node["node_config"].get("scheduling", {}) for name, node in gcp.items()}
    assert [name for name, scheduling in schedulings.items() if "provisioningModel" in scheduling] == ["spot"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_maximum_of_all_groups_together_is_the_global_maximum(name):
    config = load(name)

    groups = config["available_node_types"].values()
    assert config["max_workers"] == sum(group.get("max_workers", 0) for group in groups)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_worker_watches_for_the_notice_of_its_own_cloud_and_the_head_for_none(name):
    config = prepare_config(load(name))
    (command,) = config["worker_setup_commands"]
    shell, _, ours = command.partition(" raydfkd ")

    assert shell.startswith("setsid --fork flock -n "), "it outlives the launcher's shell, and there is one a machine"
    arguments = shlex.split(ours.partition("<")[0])
    assert arguments == ["node-watch", "--provider", config["provider"]["type"]]
    typer.main.get_command(app).commands["node-watch"].make_context("node-watch", arguments[1:])
    assert "raydfkd" not in " ".join(config["head_setup_commands"] + config["head_start_ray_commands"])
    for node in config["available_node_types"].values():
        assert "worker_setup_commands" not in node, "which would replace it"
