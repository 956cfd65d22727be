"""Files of weights as people have them."""

from __future__ import annotations

import argparse
import http.server
import json
import logging
import pathlib
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from raydfkd.errors import RecipeError
from raydfkd.networks.weights import load_weights, save_bytes, weights_exist


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


@pytest.fixture
def trained():
    torch.manual_seed(0)
    network = Net()
    network(torch.randn(8, 1, 8, 8))
    return network


def under(prefix, state):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def without_counters(state):
    return {key: value for key, value in state.items() if "num_batches" not in key}


TRAINING = {"epoch": 90, "best_acc1": torch.tensor(0.9), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
FORMS = {
    "state_dict": (lambda state: {"state_dict": state, **TRAINING}, "the weights are its entry 'state_dict'"),
    "model": (lambda state: {"model": state, "epoch": 3}, "the weights are its entry 'model'"),
    "nested": (lambda state: {"state": {"net": state}}, "the weights are its entry 'state.net'"),
    "with arguments": (
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("x"))},
        "the weights are its entry 'model'",
    ),
    "with numbers of numpy": (
        lambda state: {"net": state, "acc": np.float64(0.9), "curve": np.arange(3.0)},
        "the weights are its entry 'net'",
    ),
    "two networks": (
        lambda state: {"generator": {"a": torch.zeros(3)}, "classifier": state},
        "the weights are its entry 'classifier'",
    ),
    "data parallel": (lambda state: under("module", state), "names are taken without module."),
    "compiled": (lambda state: under("_orig_mod", state), "names are taken without _orig_mod."),
    "compiled and parallel": (
        lambda state: {"net": under("module._orig_mod", state), "acc": 99.6},
        "the weights are its entry 'net'; names are taken without _orig_mod., module.",
    ),
    "lightning": (
        lambda state: {"state_dict": under("model.backbone", state), "pytorch-lightning_version": "2.0"},
        "the weights are its entry 'state_dict'; names are taken without model.backbone.",
    ),
    "compiled inside": (
        lambda state: {key.replace("features.", "features._orig_mod."): value for key, value in state.items()},
        "names are taken without _orig_mod.",
    ),
    "averaged": (
        lambda state: {"n_averaged": torch.tensor(3), **under("module", state)},
        "names are taken without module.",
    ),
    "no counters": (without_counters, ""),
    "profiled": (lambda state: {**state, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)}, ""),
    "arrays of numpy": (lambda state: {key: value.numpy() for key, value in state.items()}, ""),
    "half": (lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_is_found_in_a_checkpoint_and_what_was_done_for_it_is_logged(tmp_path, trained, form, caplog):
    make, notice = FORMS[form]
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(make(trained.state_dict()), path)
    network = Net()
    with caplog.at_level(logging.INFO, "raydfkd"):
        load_weights(network, str(path), where="teacher.weights")
    tolerance = 1e-3 if form == "half" else 0
    for key, value in without_counters(trained.state_dict()).items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=tolerance, atol=tolerance)
    assert [record.message for record in caplog.records] == ([f"teacher.weights: {notice}"] if notice else [])


def test_plain_weights_fit_a_network_that_is_wrapped(tmp_path, trained):
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(trained))
    network = nn.DataParallel(Net())
    load_weights(network, str(tmp_path / "weights.safetensors"), where="teacher.weights")
    assert torch.equal(network.module.fc.weight, trained.fc.weight)


def refusal(network, path):
    before = save_bytes(network)
    with pytest.raises(RecipeError) as error:
        load_weights(network, str(path), where="teacher.weights")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"teacher.weights is '{path}': ")
    assert save_bytes(network) == before or "not finite" in message
    return message


def test_checkpoint_with_two_state_dicts_that_fit_is_refused_naming_both(tmp_path, trained):
    torch.save({"first": trained.state_dict(), "second": trained.state_dict()}, tmp_path / "two.pt")
    assert "several of its entries fit the network (first, second)" in refusal(Net(), tmp_path / "two.pt")


@pytest.mark.parametrize("key", ["state_dict_ema", "ema", "model_ema", "shadow_params"])
def test_averaged_weights_are_taken_where_both_are_there(tmp_path, trained, key, caplog):
    last = {name: value * 2 if value.is_floating_point() else value for name, value in trained.state_dict().items()}
    torch.save({"model": last, key: trained.state_dict()}, tmp_path / "two.pt")
    network = Net()
    with caplog.at_level(logging.INFO, "raydfkd"):
        load_weights(network, str(tmp_path / "two.pt"), where="teacher.weights")
    assert torch.equal(network.fc.weight, trained.fc.weight)
    assert f"the weights are its entry {key!r}" in caplog.text


def test_network_is_found_in_the_state_of_a_whole_training(tmp_path, trained, caplog):
    state = {**under("net.backbone", trained.state_dict()), "loss.weight": torch.ones(3), "metric.count": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    network = Net()
    with caplog.at_level(logging.INFO, "raydfkd"):
        load_weights(network, str(tmp_path / "last.ckpt"), where="teacher.weights")
    assert torch.equal(network.fc.weight, trained.fc.weight)
    assert "names are taken without net.backbone.; 2 other tensors are left out (loss.weight, ...)" in caplog.text


def test_training_with_two_networks_that_fit_is_refused_naming_both(tmp_path, trained):
    state = {**under("student", trained.state_dict()), **under("teacher", trained.state_dict())}
    torch.save(state, tmp_path / "both.pt")
    assert "it has several parts that fit: student., teacher." in refusal(Net(), tmp_path / "both.pt")


class Wrapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Net()


def test_weights_of_a_network_fit_one_that_has_it_under_a_name(tmp_path, trained, caplog):
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(trained))
    network = Wrapping()
    with caplog.at_level(logging.INFO, "raydfkd"):
        load_weights(network, str(tmp_path / "weights.safetensors"), where="teacher.weights")
    assert torch.equal(network.backbone.fc.weight, trained.fc.weight)
    assert "names are taken with backbone. before them" in caplog.text


def sharded(folder, state, index="model.safetensors.index.json"):
    names = list(state)
    files = {name: f"model-{1 + position // 4:05}-of-00002.safetensors" for position, name in enumerate(names)}
    for file in set(files.values()):
        (folder / file).write_bytes(save({name: state[name] for name in names if files[name] == file}))
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return folder / index


def test_sharded_weights_are_read_by_their_index(tmp_path, trained):
    network = Net()
    digest = load_weights(network, str(sharded(tmp_path, trained.state_dict())), where="teacher.weights")
    for key, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    changed = {**trained.state_dict(), "fc.bias": trained.fc.bias.detach() + 1}
    assert load_weights(Net(), str(sharded(tmp_path, changed)), where="teacher.weights") != digest


def test_shard_that_is_missing_is_named(tmp_path, trained):
    index = sharded(tmp_path, trained.state_dict())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RecipeError, match="model-00002-of-00002.safetensors': no such file"):
        load_weights(Net(), str(index), where="teacher.weights")


def test_index_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"fc.bias": "../../etc/passwd"}}))
    assert "an index that names '../../etc/passwd'" in refusal(Net(), tmp_path / "index.json")


def test_folder_is_refused_with_what_may_be_meant(tmp_path):
    assert "a folder; give a file in it, such as model.safetensors" in refusal(Net(), tmp_path)


@pytest.mark.parametrize("prefix", ["module", "model"])
def test_prefix_is_kept_where_the_weights_do_not_fit_without_it_either(tmp_path, trained, prefix):
    state = under(prefix, trained.state_dict())
    del state[f"{prefix}.fc.bias"]
    torch.save(state, tmp_path / "weights.pt")
    assert "weights of another network (fc.bias is missing" in refusal(Net(), tmp_path / "weights.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["features.1.running_var", "fc.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, trained, key, value):
    trained.state_dict()[key].view(-1)[1] = value
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(trained))
    message = refusal(Net(), tmp_path / "weights.safetensors")
    assert f"1 of the {trained.state_dict()[key].numel()} values of {key} are not finite" in message
    with pytest.raises(RecipeError, match="not finite"):
        load_weights(trained, "random", where="teacher.weights")


def test_mask_may_be_infinite(tmp_path):
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.full((2, 2), -torch.inf))
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(network))
    load_weights(network, str(tmp_path / "weights.safetensors"), where="teacher.weights")


class TwoNames(Net):
    """A layer under two names, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.first = self.features[0]
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.fc.weight


def test_tensors_with_two_names_are_saved_and_come_back(tmp_path):
    network, fresh = TwoNames(), TwoNames()
    (tmp_path / "weights.safetensors").write_bytes(save_bytes(network))
    load_weights(fresh, str(tmp_path / "weights.safetensors"), where="teacher.weights")
    assert torch.equal(fresh.tied.weight, network.fc.weight)
    assert fresh.first is fresh.features[0]


def test_file_that_has_a_shared_tensor_once_is_taken(tmp_path):
    network, fresh = TwoNames(), TwoNames()
    state = {key: value for key, value in network.state_dict().items() if key not in ("tied.weight", "first.weight")}
    (tmp_path / "weights.safetensors").write_bytes(save(state | {"first.bias": network.first.bias.clone()}))
    load_weights(fresh, str(tmp_path / "weights.safetensors"), where="teacher.weights")
    assert torch.equal(fresh.tied.weight, network.fc.weight)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights", "weights.bin"])
@pytest.mark.parametrize("is_safetensors", [True, False])
def test_format_is_told_by_the_content(tmp_path, trained, name, is_safetensors):
    path = tmp_path / name
    if is_safetensors:
        path.write_bytes(save_bytes(trained))
    else:
        torch.save(trained.state_dict(), path)
    network = Net()
    load_weights(network, str(path), where="teacher.weights")
    assert torch.equal(network.fc.weight, trained.fc.weight)


def test_legacy_file_is_read(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "legacy.t7", _use_new_zipfile_serialization=False)
    load_weights(Net(), str(tmp_path / "legacy.t7"), where="teacher.weights")


def test_whole_pickled_network_is_refused_naming_its_class(tmp_path, trained):
    torch.save(trained, tmp_path / "whole.pth")
    message = refusal(Net(), tmp_path / "whole.pth")
    assert "not a state dict of tensors (it holds a pickled " in message
    assert f"{Net.__module__}.Net" in message


def test_torchscript_file_is_refused_for_what_it_is_without_a_warning(tmp_path, trained):
    torch.jit.trace(trained.eval(), torch.zeros(2, 1, 8, 8)).save(str(tmp_path / "scripted.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            "a TorchScript file, which is code, not a state dict of tensors; give network: torchscript:FILE"
            in refusal(Net(), tmp_path / "scripted.pt")
        )


def test_exported_program_is_refused_for_what_it_is(tmp_path, trained):
    torch.export.save(torch.export.export(trained.eval(), (torch.zeros(2, 1, 8, 8),)), tmp_path / "program.pt2")
    assert "an exported program, which is code, not a state dict of tensors; give network: export:FILE" in refusal(
        Net(), tmp_path / "program.pt2"
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!doctype html><html><title>Sign in</title></html>", "a web page, perhaps one that asks to sign in"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS"),
    ],
)
def test_file_that_is_something_else_is_refused_for_what_it_is(tmp_path, content, kind):
    (tmp_path / "weights.pt").write_bytes(content)
    assert kind in refusal(Net(), tmp_path / "weights.pt")


def test_keys_of_a_file_without_tensors_are_named(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "weights.pt")
    assert "not a state dict of tensors (its keys: epoch, optimizer)" in refusal(Net(), tmp_path / "weights.pt")


# From a hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` at every path, but for those that name an error or a redirection."""

    content = b""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer(self.content)

    def answer(self, body=b""):
        path = self.path.split("?")[0]
        if path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", "/cdn/0a1b2c?name=x")
        elif path.startswith("/status/"):
            self.send_response(int(path.split("/")[2]))
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(trained, monkeypatch):
    monkeypatch.setattr(Hub, "content", save_bytes(trained))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "path", ["/weights.safetensors", "/resolve/main/weights.safetensors?download=true", "/moved/weights.pt", "/x"]
)
def test_weights_of_a_hub_are_read_whatever_their_address_ends_in(hub, trained, path):
    network = Net()
    assert weights_exist(hub + path, where="teacher.weights")
    load_weights(network, hub + path, where="teacher.weights")
    assert torch.equal(network.fc.weight, trained.fc.weight)


@pytest.mark.parametrize(("status", "reason"), [(403, "403"), (401, "401"), (500, "500")])
def test_hub_that_refuses_is_not_a_missing_file(hub, status, reason):
    for function in (lambda uri: weights_exist(uri, where="teacher.weights"), lambda uri: refusal(Net(), uri)):
        try:
            message = function(f"{hub}/status/{status}/weights.pt")
        except RecipeError as error:
            message = str(error)
        assert "cannot be read" in message
        assert reason in message


def test_file_that_a_hub_does_not_have_is_missing(hub):
    assert not weights_exist(f"{hub}/status/404/weights.pt", where="teacher.weights")
    assert "no such file" in refusal(Net(), f"{hub}/status/404/weights.pt")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/teacher.pt", "http://no-such-host.invalid/teacher.pt"])
def test_host_that_does_not_answer_is_not_a_missing_file(uri):
    assert "cannot be read (Cannot connect to host" in refusal(Net(), uri)
    with pytest.raises(RecipeError, match="cannot be read"):
        weights_exist(uri, where="teacher.weights")


def test_store_without_credentials_is_told_where_they_come_from(monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    message = refusal(Net(), "s3://mine/teacher.pt")
    assert "transfer_set.storage_options do not count here" in message
    assert "AWS_ENDPOINT_URL" in message
