"""Write docs/methods.md: every packaged method with its paper's number, reruns of released code, ours, and the command.

    raydfkd bench methods --teacher PAIR --budget 360s --full --split test --json > tests/report/PAIR.json
    python tests/report/methods.py

PAIR is fashion-lenet or fashion-resnet. Puts what was measured into the head of each method's page too. Numbers of
others are typed in here, each with where it stands; ours come from the files.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from raydfkd.config.load import RECIPES, packaged_methods

ROOT = Path(__file__).parents[2]
BUDGET = 360
"""Device-seconds of the page's figures; others are in benchmarks.md."""
PAIRS = {"fashion-lenet": "LeNet-5 -> half", "fashion-resnet": "ResNet-20 -> ResNet-8"}
PAPERS = {
    "adaptive_deepinversion": "CIFAR-10 RN34-RN18 93.26 (CMI README)",
    "cda": "ImageNet 50 images a class, RN18 53.5 (README)",
    "cmi": "CIFAR-10 RN34-RN18 94.84 (README)",
    "cudfkd": "CIFAR-10 RN34-RN18 95.28 (README)",
    "dafl": "MNIST LeNet-5-half 98.20; CIFAR-10 RN34-RN18 92.22 (README)",
    "deepinversion_cifar": "none that was seen in a source",
    "deepinversion_imagenet": "ImageNet RN50-RN50 68.0 (FastDFKD README)",
    "dfad": "MNIST LeNet-5-half 98.3; CIFAR-10 RN34-RN18 93.3 (README)",
    "dfq": "CIFAR-10 RN34-RN18 94.61 (CMI README); a rerun 88.89",
    "fast_meta": "CIFAR-10 RN34-RN18, ten steps 94.05, two 92.62 (README)",
    "large_scale_generators": "CIFAR-10 RN34-RN18 95.02 (abstract)",
    "low_resolution": "ImageNet in 9 GPU hours 24.25 (a reviewer's quotation of MUSE)",
    "nayer": "CIFAR-100 WRN40-2-16-2, 300 epochs 71.7 (authors' figure)",
    "soft_targets": "MNIST LeNet-5-half 99.08 (secondary)",
    "sre2l": "ImageNet 50 images a class, RN18 46.8 (README)",
    "vit_patch_similarity": "DeiT-B W8A8 79.10 of 81.85 (PSAQ-ViT README)",
    "zeroq": "RN50 W8A8 77.67 of 77.72 (README)",
    "zskd": "MNIST LeNet-5-half 98.77; Fashion-MNIST 79.62 (papers, as copied)",
    "zskt": "CIFAR-10 RN34-RN18 93.32 (CMI README)",
}
"""Published top-1 in per cent, with where it stands; none of them was measured here."""
RELEASED = {
    ("dafl", "fashion-lenet"): "60.2",
    ("dfad", "fashion-lenet"): "36.1, best seen 45.6",
    ("fast_meta", "fashion-resnet"): "50.0",
    ("cmi", "fashion-resnet"): "32.1",
    ("deepinversion_cifar", "fashion-resnet"): "19.5 in 300 s",
    ("dafl", "fashion-resnet"): "10.0 in 300 s",
    ("zskt", "fashion-resnet"): "10.5 in 300 s, mended",
}
"""Released code on the same pairs, 360 CPU seconds unless said, its settings scaled; measured once, as here."""

PAGE = """# Methods

Each is a page of YAML that a recipe begins with (`recipe: dafl`), and none has Python of its own. `raydfkd show NAME`
prints the page with a line on each of its parts, `raydfkd show --for RECIPE` says which suit a teacher, and `raydfkd
bench methods --teacher RECIPE --budget 360s` puts them side by side on it.

Top-1 in per cent. Published numbers are for other data and budgets, and were not measured here. Released code and
ours: Fashion-MNIST, 10,000 test images that judge once, 360 CPU seconds of one core for synthesis and student
together; seeds, machine and commit in [benchmarks.md](../benchmarks.md). `gaussian_noise` is the other control.

{table}

`raydfkd bench methods NAME --teacher fashion-lenet --budget 360s --full --split test` (or `fashion-resnet`) repeats a
cell; this page is made by `python tests/report/methods.py`{about}.
"""


def results_of(pair: str) -> dict[str, object]:
    """What was measured on a pair; nothing where there is no file."""
    path = ROOT / "tests" / "report" / f"{pair}.json"
    return json.loads(path.read_text()) if path.is_file() else {"results": [], "left_out": {}}


def ours(found: dict, method: str) -> str:
    """Mean and range of the method's runs of ``BUDGET``, or why there is none."""
    runs = [entry for entry in found["results"] if entry["method"] == method and entry["budget_s"] == BUDGET]
    if not runs:
        reason = found["left_out"].get(method)
        return "-" if reason is None else "does not suit" if "needs" in reason else "failed"
    top1 = [100 * entry["student_top1"] for entry in runs]
    mean = f"{statistics.mean(top1):.1f}"
    return mean if len(top1) == 1 else f"{mean} ({min(top1):.1f}-{max(top1):.1f})"


def note(method: str, cells: dict[str, str]) -> None:
    """Put what was measured into the head of the method's page."""
    path = RECIPES / "methods" / f"{method}.yaml"
    text = re.sub(r"# Measured: .*\n", "", path.read_text())
    measured = [f"{PAIRS[pair]} {cell} %" for pair, cell in cells.items() if cell[0].isdigit()]
    if measured:
        line = f"# Measured: {'; '.join(measured)}, Fashion-MNIST test, 360 CPU seconds (benchmarks.md).\n"
        head = re.match(r"(#.*\n)+", text)
        text = head[0] + line + text[head.end() :]
    path.write_text(text)


def main() -> None:
    found = {pair: results_of(pair) for pair in PAIRS}
    rows = []
    for method in packaged_methods():
        cells = {pair: ours(found[pair], method) for pair in PAIRS}
        note(method, cells)
        first = (RECIPES / "methods" / f"{method}.yaml").read_text().partition("\n")[0].lstrip("# ")
        released = "; ".join(f"{PAIRS[pair]} {RELEASED[method, pair]}" for pair in PAIRS if (method, pair) in RELEASED)
        columns = [f"[`{method}`](../raydfkd/recipes/methods/{method}.yaml)", first, PAPERS.get(method, "-")]
        rows.append(f"| {' | '.join([*columns, released or '-', *cells.values()])} |")
    controls = [
        f"| {title} | | | | {' | '.join(ours(found[pair], method) for pair in PAIRS)} |"
        for method, title in (("real_images", "*control: random real images with the teacher's answers*"),)
    ]
    engines = {entry["versions"]["raydfkd"] for pair in PAIRS for entry in found[pair]["results"]}
    about = f" of {', '.join(sorted(engines))}" if engines else ""
    table = [
        f"| method | what it does | published | released code here | {' | '.join(PAIRS.values())} |",
        "|---|---|---|---|---|---|",
        *rows,
        *controls,
    ]
    page = PAGE.format(table="\n".join(table), about=about)
    (ROOT / "docs" / "methods.md").write_text(page)


if __name__ == "__main__":
    main()
