"""Images unlike those that a student learned from, on which it is compared with its teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raydfkd.config.schema import ImageSpace
from raydfkd.distillation.evaluate import batch_size, in_eval_mode
from raydfkd.images.pixels import PixelRange
from raydfkd.images.procedural import MODELS, draw, plain_grounds
from raydfkd.networks.answers import logits_of
from raydfkd.seeds import derive_seed, rng_from
from raydfkd.synthesis.selection import BalancedConfidence

IMAGES, CANDIDATES = 500, 2000
"""Images of a probe, and those that they are chosen from."""
MOST_PIXELS = 48
"""Shorter edge up to which images are drawn as they are; larger ones are drawn like that and enlarged."""


@torch.no_grad()
def drawn_probe(teacher: nn.Module, space: ImageSpace, *, seed: int) -> Tensor:
    """Drawn images, of no data, in which ``teacher`` sees all classes if it can: uint8 [IMAGES, C, H, W].

    Equal parts of each model of ``images.procedural``, chosen as ``BalancedConfidence`` does; the same ones for the
    same teacher and ``seed``.
    """
    rng = rng_from(derive_seed(seed, "probe"))
    scale = min(1.0, MOST_PIXELS / min(space.height, space.width))
    small = space.model_copy(update={"size": (round(scale * space.height), round(scale * space.width))})
    drawn = draw(tuple(MODELS), CANDIDATES, small, rng, plain=plain_grounds(space))
    candidates = (255 * drawn).round().to(torch.uint8)
    device = next(teacher.parameters()).device
    pixels, drawn_pixels = PixelRange(space, device), PixelRange(space, made=small)

    def enlarged(batch: Tensor) -> Tensor:
        return drawn_pixels.enlarged(batch.float()).round().to(torch.uint8)

    batches = candidates.split(batch_size(space))
    with in_eval_mode(teacher):
        answers = [logits_of(teacher(pixels.from_uint8(enlarged(batch).to(device)))).cpu() for batch in batches]
    logits = torch.cat(answers)
    scores = BalancedConfidence().scores(logits.float(), logits.argmax(1), rng)
    best = scores.argsort(descending=True, stable=True)[:IMAGES]
    return torch.cat([enlarged(batch) for batch in candidates[best].split(batch_size(space))])
