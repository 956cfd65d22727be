"""What `raydfkd plan` says of memory and time beside what a run takes: `python tests/report/plan_check.py`.

Each recipe is planned in a fresh process, with a few seconds of timed steps, and made in another one, by
`raydfkd synthesize`. Seconds are those of the processor, one thread, since other work may share the machine; memory is
the most that the process has held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RANDOM = ("teacher.weights=random", "teacher.train=null", "real_data=null")
LOCAL = ("runtime.executor=local", "runtime.device=cpu")
SEEN = """
name: seen
teacher:
  network: {network}
  classes: 1000
  image_space: {{channels: 3, size: {size}, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
  weights: random
student: {{network: "torchvision:mobilenet_v3_small"}}
synthesis:
  synthesizer: pixels
  batch_size: 8
  stages: [{{pool: 2, steps: {steps}, augment: [{{kind: jitter, pixels: 4}}]}}, {{steps: {steps}}}]
  lr: 0.2
  warmup: 10
  augment: [{{kind: jitter, pixels: 8}}, {{kind: flip}}]
  precision: {precision}
  objective:
    - {{term: cross_entropy}}
    - {{term: bn_moments, form: norm, first_layer_scale: 10, weight: 0.01}}
    - {{term: total_variation, weight: 1e-3}}
transfer_set: {{images_per_class: 1, classes: [0, 1, 2, 3, 4, 5, 6, 7], unit: {{classes: 8, images_per_class: 1}}}}
distill: {{steps: 10, batch_size: 8, criterion: soft_kl, optimizer: {{lr: 0.01}}}}
"""
CASES = {
    "digits, generators": ("digits-generators", "transfer_set.images_per_class=160"),
    "digits, pixels": ("digits-deepinversion", "transfer_set.images_per_class=30"),
    "ResNet-18, 96 px": {"network": "torchvision:resnet18", "size": 96, "steps": 25, "precision": "float32"},
    "EfficientNet-Lite0, 96 px": {
        "network": "pypi:efficientnet_lite0",
        "size": 96,
        "steps": 25,
        "precision": "float32",
    },
    "ResNet-50, 224 px": {"network": "torchvision:resnet50", "size": 224, "steps": 8, "precision": "bfloat16"},
}


def arguments_of(case: tuple[str, ...] | dict[str, object], folder: Path) -> tuple[str, list[str]]:
    """A recipe and changes to it."""
    if isinstance(case, dict):
        path = folder / "seen.yaml"
        path.write_text(SEEN.format(**case))
        return str(path), list(LOCAL)
    return case[0], [*RANDOM, *LOCAL, *case[1:]]


def planned(source: str, changes: list[str], seconds: float) -> dict[str, float]:
    """What is foreseen for the synthesis: seconds, and MiB of the process."""
    import time

    from raydfkd.config.load import load_recipe
    from raydfkd.runner.here import time_here
    from raydfkd.runner.memory import memory_of
    from raydfkd.runner.plan import work_of

    recipe = load_recipe(source, changes)
    work_of(recipe)
    memory = memory_of(recipe).synthesis
    here = time_here(recipe, seconds, clock=time.process_time)
    return {
        "seconds": here.unit_s * len(recipe.plan()),
        "tensors": memory.tensors / 2**20,
        "mib": memory.on_host / 2**20,
    }


def made(source: str, changes: list[str], folder: str) -> dict[str, float]:
    """What the synthesis takes: seconds, and MiB of the process."""
    import resource
    import time

    from raydfkd.cli import app
    from raydfkd.runner.local import LocalExecutor

    found, work = {}, LocalExecutor._work

    def timed(*given: object) -> None:
        began = time.process_time()
        work(*given)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before images are looked at
        found.update(seconds=time.process_time() - began, mib=held)

    LocalExecutor._work = timed
    options = [part for change in changes for part in ("--set", change)]
    assert app(["synthesize", source, *options, "--run-dir", folder], standalone_mode=False) == 0
    return found


def in_process(what: str, *given: object) -> dict[str, float]:
    """The result of a function of this file in a fresh process of one thread."""
    command = [sys.executable, __file__, "--do", json.dumps([what, *given])]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of timed steps")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--do", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        what, *given = json.loads(options.do)
        print(json.dumps({"planned": planned, "made": made}[what](*given)))  # noqa: T201
        return
    print("| recipe | seconds planned | taken | ratio | MiB planned | held | ratio |\n|---|---|---|---|---|---|---|")  # noqa: T201
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            source, changes = arguments_of(CASES[name], Path(folder))
            plan = in_process("planned", source, changes, options.seconds)
            run = in_process("made", source, changes, f"{folder}/run")
        print(  # noqa: T201
            f"| {name} | {plan['seconds']:.1f} | {run['seconds']:.1f} | {plan['seconds'] / run['seconds']:.2f} | "
            f"{plan['mib']:.0f} (tensors {plan['tensors']:.0f}) | {run['mib']:.0f} | {plan['mib'] / run['mib']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
