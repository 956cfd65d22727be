"""Speed of pixel synthesis beside the loop as published, a fair one, and what the hardware could do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch

from raydfkd.bench.cases import Case, build_teacher, choose_cases, missing_package, recipe_of
from raydfkd.bench.ceilings import Ceilings, cost_of_step, measure_ceilings, synchronize
from raydfkd.bench.published import fair_loop, published_loop
from raydfkd.bench.table import Row, alternate_all
from raydfkd.devices import cpu_threads, device_name, dtype_of, keep_freed_memory, pick_device
from raydfkd.synthesis.build import build_synthesizer
from raydfkd.units import Request

logger = logging.getLogger(__name__)
THEIR_SHARE = 5
"""Our steps in a round for each step of the slower loops."""


def bench_synthesis(*, rounds: int = 7, device: str = "auto", cases: tuple[str, ...] = ()) -> Iterator[Row]:
    """One row a case, single-threaded on CPU.

    Ours are the steps of a whole batch, work that is done once for it included, in bfloat16 where the device has it.

    Raises:
        RecipeError: no such case or device.
    """
    target = pick_device(device, where="--device")
    chosen = choose_cases(cases, target)
    if target.type == "cpu":
        keep_freed_memory()
    with cpu_threads(1):
        precision = dtype_of("bfloat16", target)
        ceilings = measure_ceilings(target, precision)
        for name, case in chosen.items():
            missing = missing_package(case)
            if missing:
                logger.warning("case %s is skipped: it needs %s; pip install 'raydfkd[bench]'", name, missing)
            else:
                yield _measure(name, case, target, precision, ceilings, rounds)


def _measure(
    name: str, case: Case, device: torch.device, precision: torch.dtype, ceilings: Ceilings, rounds: int
) -> Row:
    batch, steps = case.batch(device), case.steps(device)
    recipe = recipe_of(case, device, precision=str(precision).removeprefix("torch."))
    teacher = build_teacher(recipe, device)
    synthesizer = build_synthesizer(recipe, teacher, device)
    classes = tuple(range(math.gcd(case.classes, batch)))
    request = Request(classes=classes, images_per_class=batch // len(classes), seed=0, class_seeds=classes)
    targets = torch.tensor(classes, device=device).repeat_interleave(request.images_per_class)
    images = torch.randn(request.count, *recipe.teacher.image_space.shape, device=device)

    def ours() -> int:
        list(synthesizer.produce(request, lambda _: None))
        return steps

    published = published_loop(teacher, images, targets, lr=0.1)
    fair = fair_loop(teacher, images, targets, lr=0.1, precision=precision)
    theirs = [_round_of(loop, steps // THEIR_SHARE, device) for loop in (published, fair)]
    speed, [ratio_published, ratio_fair] = alternate_all(ours, theirs, rounds=rounds)
    least = ceilings.least_seconds(cost_of_step(teacher, images, precision=precision))
    return Row(
        case=f"synthesis {name} batch {request.count}",
        device=device_name(device),
        steps_per_s=round(speed, 3),
        ratio_published=ratio_published,
        ratio_fair=ratio_fair,
        share_of_ceiling=round(least * speed, 3),
        note=f"ours and fair in {recipe.synthesis.precision}",
    )


def _round_of(loop: Callable[[], object], steps: int, device: torch.device) -> Callable[[], int]:
    def work() -> int:
        for _ in range(steps):
            loop()
        synchronize(device)
        return steps

    return work
