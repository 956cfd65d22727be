"""Teachers in the forms in which people have them: files of weights, networks of libraries, answers, images.

``make(folder)`` writes the modules and files that the rows of ``ZOO`` name; each row is a call of ``raydfkd init`` in
that folder, and a line of docs/teachers.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 4
SMALL_VIT = "{img_size: 32, patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}"
VIT = "{image_size: 32, patch_size: 16, num_layers: 2, num_heads: 2, hidden_dim: 32, mlp_dim: 64, num_classes: 4}"


class Small(nn.Module):
    """Two convolutions with BatchNorm and a linear layer, and variations of it."""

    def __init__(self, channels: int = 3, answer: str = "logits", outputs: int = CLASSES, stride: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 8, 3, stride=stride, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=stride, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Linear(16, outputs)
        self.answer = answer

    def forward(self, images: Tensor) -> object:
        logits = self.head(self.body(images).mean((2, 3)))
        forms: Mapping[str, Callable[[], object]] = {
            "logits": lambda: logits,
            "tuple": lambda: (logits, images),
            "dict": lambda: {"out": logits, "aux": logits},
            "softmax": lambda: logits.softmax(1),
            "log_softmax": lambda: logits.log_softmax(1),
            "sigmoid": logits.sigmoid,
        }
        return forms[self.answer]()


class Normalized(Small):
    """Normalises its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.45))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.22))

    def forward(self, images: Tensor) -> object:
        return super().forward((images - self.mean) / self.std)


class Bytes(Small):
    """Takes images of 0..255."""

    def forward(self, images: Tensor) -> object:
        return super().forward(images / 255)


class Checkpointed(Small):
    """Computes its layers again in the backward pass."""

    def forward(self, images: Tensor) -> object:
        return self.head(checkpoint(self.body, images, use_reentrant=False).mean((2, 3)))


class Tied(Small):
    """Has a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.body[3]


def stack(layers: list[list[int]]) -> nn.Module:
    """Convolutions of such edges and strides, and a linear layer."""
    channels = [3, *[8] * len(layers)]
    convolutions = (nn.Conv2d(n, 8, *layer) for n, layer in zip(channels, layers, strict=False))
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def frozen() -> nn.Module:
    """All but its last layer takes no gradient."""
    network = Small()
    network.body.requires_grad_(False)
    return network


def hooked() -> nn.Module:
    """Has hooks of its author's."""
    network = Small()
    network.body.register_forward_hook(lambda module, images, features: features + 0)
    return network


def quantized() -> nn.Module:
    """Its linear layer computes with integers."""
    with torch.random.fork_rng():
        return torch.ao.quantization.quantize_dynamic(Small().eval(), {nn.Linear}, dtype=torch.qint8)


def plain(channels: int = 1, size: int = 28) -> nn.Module:
    """Convolutions and a linear layer for images of one size, no normalisation."""
    edge = ((size - 2) // 2 - 2) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * edge * edge, CLASSES)),
    )


def linear(numbers: int = 784, *, flattens: bool = True) -> nn.Module:
    """Linear layers alone, for images of one size or the vectors that they are flattened to."""
    layers = (nn.Linear(numbers, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return nn.Sequential(*([nn.Flatten()] if flattens else []), *layers)


def tall() -> nn.Module:
    """For images of 96x64 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        nn.Linear(8 * 24 * 16, CLASSES),
    )


def trained(network: nn.Module, channels: int = 3, size: tuple[int, int] = (32, 32)) -> nn.Module:
    """The network with statistics and weights unlike those of a fresh one; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter.flatten(1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        network.train()
        with torch.no_grad():
            for _ in range(3):
                network(0.5 * torch.randn(4, channels, *size) + 0.2)
    return network.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A teacher and how `raydfkd init` is called for it."""

    name: str
    arguments: tuple[str, ...]
    write: Callable[[Path], None] = lambda folder: None
    """Writes its files."""
    refused: str = ""
    """What the refusal says; empty where it is taken."""
    space: str = ""
    """Image space that must be found: channels x height x width."""
    method: str = "nayer"
    is_slow: bool = False
    needs: str = ""
    """Package without which it is skipped."""


def _saved(name: str, wrap: Callable[[Mapping[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.save(wrap(trained(Small()).state_dict()), folder / name)

    return write


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def _in(kind: torch.dtype) -> Callable[[Mapping[str, Tensor]], object]:
    return lambda state: {key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()}


def _lightning(state: Mapping[str, Tensor]) -> object:
    return {"state_dict": {**_under("model", state), "loss.weight": torch.ones(4)}, "epoch": 3}


def _sharded(folder: Path) -> None:
    state = trained(Small()).state_dict()
    files = {key: f"model-{1 + (position > 5)}-of-2.safetensors" for position, key in enumerate(state)}
    for file in set(files.values()):
        save_file({key: state[key].contiguous() for key in state if files[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _torchscript(folder: Path) -> None:
    torch.jit.trace(trained(Small()), torch.zeros(2, 3, 32, 32)).save(str(folder / "scripted.pt"))


def _exported(folder: Path) -> None:
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=1024)}}
    program = torch.export.export(
        trained(plain(), 1, (28, 28)), (torch.zeros(2, 1, 28, 28),), dynamic_shapes=(batch["images"],)
    )
    torch.export.save(program, folder / "program.pt2")


def _transformers(folder: Path) -> None:
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    names = {label: name for label, name in enumerate(("cat", "dog", "horse", "bird"))}
    configuration = transformers.ResNetConfig(num_labels=CLASSES, id2label=names, **sizes)
    trained(transformers.ResNetForImageClassification(configuration)).save_pretrained(folder / "birds")
    space = {
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "size": {"height": 48, "width": 48},
    }
    (folder / "birds/preprocessor_config.json").write_text(json.dumps(space))


def _library(network: str, file: str, size: int, **options: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        family, _, name = network.partition(":")
        if family == "timm":
            import timm

            made = timm.create_model(name, num_classes=CLASSES, **options)
        else:
            from torchvision import models

            made = models.get_model(name, num_classes=CLASSES, **options)
        torch.save(trained(made, size=(size, size)).state_dict(), folder / file)

    return write


def _hub(folder: Path) -> None:
    (folder / "clone").mkdir()
    text = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent.parent))\nfrom zoo import Small\n"
    (folder / "clone/hubconf.py").write_text(f"{text}\ndef small(pretrained=False):\n    return Small()\n")


def _weights(network: str, file: str, *more: str) -> tuple[str, ...]:
    return ("--network", network, "--weights", file, *more)


ZOO = (
    # Files of weights, of one network
    Row(name="state dict", arguments=_weights("zoo:Small", "plain.pt"), write=_saved("plain.pt", dict)),
    Row(
        name="checkpoint {state_dict, optimizer, ...}",
        arguments=_weights("zoo:Small", "wrapped.pth.tar"),
        write=_saved("wrapped.pth.tar", lambda state: {"epoch": 9, "state_dict": state, "optimizer": {"lr": 0.1}}),
    ),
    Row(
        name="checkpoint {model, model_ema}",
        arguments=_weights("zoo:Small", "ema.pth"),
        write=_saved("ema.pth", lambda state: {"model": state, "model_ema": state}),
    ),
    Row(name="Lightning .ckpt", arguments=_weights("zoo:Small", "last.ckpt"), write=_saved("last.ckpt", _lightning)),
    Row(
        name="DataParallel and compiled (module._orig_mod.)",
        arguments=_weights("zoo:Small", "parallel.pt"),
        write=_saved("parallel.pt", lambda state: _under("module._orig_mod", state)),
    ),
    Row(name="float16", arguments=_weights("zoo:Small", "half.pt"), write=_saved("half.pt", _in(torch.float16))),
    Row(name="bfloat16", arguments=_weights("zoo:Small", "bf16.pt"), write=_saved("bf16.pt", _in(torch.bfloat16))),
    Row(
        name="without num_batches_tracked",
        arguments=_weights("zoo:Small", "old.pt"),
        write=_saved("old.pt", lambda state: {key: value for key, value in state.items() if "num_batches" not in key}),
    ),
    Row(
        name="sharded safetensors",
        arguments=_weights("zoo:Small", "model.safetensors.index.json"),
        write=_sharded,
    ),
    Row(
        name="whole pickled module",
        arguments=_weights("zoo:Small", "whole.pt"),
        write=lambda folder: torch.save(trained(Small()), folder / "whole.pt"),
        refused="it holds a pickled zoo.Small, and code is never run",
    ),
    # Archives, which are code
    Row(
        name="TorchScript file",
        arguments=("--network", "torchscript:scripted.pt", "--allow-code", "--size", "32"),
        write=_torchscript,
        method="nayer_procedural",
    ),
    Row(
        name="torch.export program",
        arguments=("--network", "export:program.pt2", "--allow-code"),
        write=_exported,
        space="1x28x28",
        method="nayer_procedural",
    ),
    Row(
        name="TorchScript file without permission",
        arguments=("--network", "torchscript:scripted.pt"),
        write=_torchscript,
        refused="set teacher.allow_code: true if you trust it",
    ),
    # Libraries
    Row(
        name="torchvision:resnet18",
        arguments=_weights("torchvision:resnet18", "resnet18.pt", "--size", "32"),
        write=_library("torchvision:resnet18", "resnet18.pt", 32),
        is_slow=True,
    ),
    Row(
        name="torchvision:mobilenet_v3_small",
        arguments=_weights("torchvision:mobilenet_v3_small", "mobilenet.pt", "--size", "64"),
        write=_library("torchvision:mobilenet_v3_small", "mobilenet.pt", 64),
        is_slow=True,
    ),
    Row(
        name="torchvision:vgg11, no BatchNorm",
        arguments=("--network", "torchvision:vgg11", "--weights", "random", "--classes", "4", "--size", "32"),
        method="nayer_procedural",
        is_slow=True,
    ),
    Row(
        name="torchvision's VisionTransformer",
        arguments=_weights("torchvision.models:VisionTransformer", "vit.pt", "--options", VIT),
        write=lambda folder: torch.save(trained(_vit()).state_dict(), folder / "vit.pt"),
        space="3x32x32",
        method="nayer_procedural",
    ),
    Row(
        name="timm:resnet10t",
        arguments=_weights("timm:resnet10t", "resnet10t.pt", "--size", "32"),
        write=_library("timm:resnet10t", "resnet10t.pt", 32),
        is_slow=True,
        needs="timm",
    ),
    Row(
        name="timm:vit_tiny_patch16_224",
        arguments=_weights("timm:vit_tiny_patch16_224", "tiny.pt", "--options", SMALL_VIT),
        write=_library("timm:vit_tiny_patch16_224", "tiny.pt", 32, **yaml.safe_load(SMALL_VIT)),
        space="3x32x32",
        method="nayer_procedural",
        needs="timm",
    ),
    Row(
        name="hf:FOLDER, weights and names included",
        arguments=("--network", "hf:birds"),
        write=_transformers,
        space="3x48x48",
        needs="transformers",
    ),
    Row(name="torchhub:CLONE:NAME", arguments=("--network", "torchhub:clone:small"), write=_hub),
    # Answers
    *(
        Row(name=f"answers {form}", arguments=("--network", "zoo:Small", "--options", f"{{answer: {form}}}"))
        for form in ("tuple", "dict", "softmax", "log_softmax")
    ),
    Row(
        name="answers one logit, two classes",
        arguments=("--network", "zoo:Small", "--options", "{outputs: 1}"),
    ),
    Row(
        name="answers a sigmoid for each of many labels",
        arguments=("--network", "zoo:Small", "--options", "{answer: sigmoid}"),
        refused="as networks for several labels an image do",
    ),
    # Images
    Row(
        name="4 channels",
        arguments=("--network", "zoo:Small", "--options", "{channels: 4}"),
        space="4x32x32",
    ),
    Row(name="28x28, grey", arguments=("--network", "zoo:plain"), space="1x28x28", method="nayer_procedural"),
    Row(name="linear layers alone", arguments=("--network", "zoo:linear"), space="1x28x28", method="nayer_procedural"),
    Row(
        name="takes vectors",
        arguments=("--network", "zoo:linear", "--options", "{flattens: false}"),
        refused="--network takes vectors of 784 numbers and no images; give one that flattens them first",
    ),
    Row(name="96x64", arguments=("--network", "zoo:tall"), space="3x96x64", method="deepinversion"),
    Row(name="normalises by itself", arguments=("--network", "zoo:Normalized")),
    Row(name="takes 0..255", arguments=("--network", "zoo:Bytes", "--mean", "0,0,0", "--std", "0.0039,0.0039,0.0039")),
    # Modules with something about them
    Row(name="partly frozen", arguments=("--network", "zoo:frozen")),
    Row(name="a layer with two names", arguments=("--network", "zoo:Tied")),
    Row(name="hooks of its own", arguments=("--network", "zoo:hooked")),
    Row(name="activation checkpointing", arguments=("--network", "zoo:Checkpointed")),
    Row(
        name="quantised",
        arguments=("--network", "zoo:quantized"),
        refused="as quantised layers do, which have no gradient; give the network as it was before",
    ),
)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(**yaml.safe_load(VIT))


def make(row: Row, folder: Path) -> None:
    """Write what ``row`` names into ``folder``: this module as ``zoo`` and files of weights."""
    (folder / "zoo.py").write_text(Path(__file__).read_text())
    row.write(folder)
