"""Peak memory of judging pictures of 224 px: ``python tests/report/judging_memory.py 500 20000``.

Each count is measured in a process of its own, on class folders of links to a hundred JPEG files of 400 x 300 pixels.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, FILES, SIZE = 10, 100, 224


def write_folder(root: Path, count: int) -> None:
    """Class folders with ``count`` pictures in all."""
    rng = np.random.default_rng(0)
    (root / "files").mkdir(parents=True)
    for number in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((400, 300)).save(root / "files" / f"{number}.jpg")
    for label in range(CLASSES):
        (root / "classes" / str(label)).mkdir(parents=True)
    for number in range(count):
        os.link(
            root / "files" / f"{number % FILES}.jpg", root / "classes" / str(number % CLASSES) / f"{number:06d}.jpg"
        )


def measure(root: Path) -> None:
    """Judge two tiny networks on the pictures; print how many there were, seconds and MiB at the peak."""
    import torch
    from torch import nn

    from raydfkd.config.schema import ImageSpace, PluginSpec
    from raydfkd.distillation.evaluate import batch_size, judge
    from raydfkd.images.pixels import PixelRange
    from raydfkd.images.real_data import open_real_data

    torch.set_num_threads(1)
    space = ImageSpace(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = open_real_data(PluginSpec(kind="image_folder", root=str(root)), space, CLASSES)
    networks = [nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3 * 49, CLASSES)) for _ in range(2)]
    started = time.perf_counter()
    batches = data.load("test").batches(batch_size(space))
    found = judge(networks[0], networks[1], batches, PixelRange(space), classes=CLASSES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{found.images:8,} pictures   {time.perf_counter() - started:7.1f} s   {peak:6.0f} MiB at the peak")  # noqa: T201


def main(counts: list[int]) -> None:
    """Measure each count."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), count)
            subprocess.run([sys.executable, __file__, "--measure", f"{folder}/classes"], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        main([int(count) for count in sys.argv[1:]] or [500, 20_000])
