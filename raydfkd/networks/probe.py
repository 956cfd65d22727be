"""What a look at two random images tells of a teacher, and one training step of a student, before any work."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raydfkd.config.schema import TeacherSpec
from raydfkd.errors import RecipeError, one_line
from raydfkd.networks.answers import AnswerScale, AnswersLogits, NoLogitsError, adapter_of, logits_of
from raydfkd.networks.batchnorm import layers_with_statistics
from raydfkd.networks.observed import frozen_copy
from raydfkd.seeds import rng_from, seeded


def probe_teacher(network: nn.Module, spec: TeacherSpec) -> list[str]:
    """Find out on two random images whether a teacher with its weights can be inverted and distilled from.

    Leaves the network and all random numbers as they are. Returns what the user should know, one line each: answers
    that are taken for logits although they are others, BatchNorm statistics that no training has left.

    Raises:
        RecipeError: it answers what is not finite, otherwise each time, or without a gradient for its input.
    """
    trial = frozen_copy(network)
    name = f"teacher.network {spec.network}"
    images = _random_images(spec, 2).requires_grad_()
    with seeded(0), torch.enable_grad():
        logits = trial(images.clone())
        again = trial(images.clone()).detach()
    if not logits.isfinite().all():
        raise RecipeError(f"{name} answers random images with numbers that are not finite; check teacher.weights")
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
        raise RecipeError(
            f"{name} answers otherwise when asked again: something in it is random in eval mode, such as F.dropout "
            "without training=self.training; make it depend on the mode"
        )
    _refuse_without_gradient(logits, images, name)
    return [*_scale_notice(network, name), *_statistics_notice(trial, name)]


def _random_images(spec: TeacherSpec, count: int) -> Tensor:
    return torch.randn(count, *spec.image_space.shape, generator=rng_from(0))


def _refuse_without_gradient(logits: Tensor, images: Tensor, name: str) -> None:
    remedy = "images are made by this gradient: no @torch.no_grad, .detach() or rounding on the way"
    if not logits.requires_grad:
        raise RecipeError(f"{name} answers without a gradient for its input; {remedy}")
    directions = torch.randn(logits.shape, generator=rng_from(1)).to(logits)
    try:
        (gradient,) = torch.autograd.grad((logits * directions).sum(), images, allow_unused=True)
    except RuntimeError as error:
        raise RecipeError(f"{name} has no gradient for its input ({one_line(error)}); {remedy}") from error
    if gradient is None or not gradient.any():
        raise RecipeError(
            f"{name} has a gradient of zero for its input everywhere; check that training has been over its weights; "
            f"else {remedy}"
        )
    if not gradient.isfinite().all():
        raise RecipeError(f"{name} has a gradient for its input that is not finite; check teacher.weights")


def _scale_notice(network: nn.Module, name: str) -> Iterator[str]:
    adapter = adapter_of(network)
    scale = AnswerScale.LOGITS if adapter is None else adapter.scale
    if scale is AnswerScale.PROBABILITIES:
        yield f"{name} answers probabilities; their logarithm is taken for its logits"
    if scale is AnswerScale.SIGMOIDS:
        yield (
            f"{name} answers sigmoids; what they were taken of is its logits, and classes are taken to exclude each "
            "other"
        )
    if scale is AnswerScale.LOG_PROBABILITIES:
        yield f"{name} answers log-probabilities; they are taken for its logits"


def _statistics_notice(network: nn.Module, name: str) -> Iterator[str]:
    layers = layers_with_statistics(network)
    fresh = [path for path, layer in layers if _is_fresh(layer)]
    if fresh:
        yield (
            f"{name} has BatchNorm statistics of 0 and 1 in {len(fresh)} of {len(layers)} layers ({fresh[0]}, ...), as "
            "before any training; check that its weights came with them"
        )


def _is_fresh(layer: nn.Module) -> bool:
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    assert mean is not None
    assert var is not None
    return not mean.any() and bool((var == 1).all())


def probe_student(network: nn.Module, teacher: TeacherSpec, batch_size: int) -> list[str]:
    """Make one training step's forward and backward pass with a copy of a student.

    On two images, or on one where ``batch_size`` is that, since only a batch of one is unlike others. Returns what the
    user should know, one line each.

    Raises:
        RecipeError: nothing of it learns, or it cannot be trained on such a batch.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RecipeError("student.network has no weights that take a gradient; give one that can learn")
    images = _random_images(teacher, min(batch_size, 2))
    with seeded(0), torch.enable_grad():
        trial = _without_adapter(network).train()
        try:
            answer = trial(images.clone())
            logits = logits_of(answer, teacher.classes, images=len(images))
            loss = logits.float().square().sum()
            gradients = torch.autograd.grad(loss, list(_learning(trial).values()), allow_unused=True)
        except NoLogitsError as error:
            raise RecipeError(
                f"student.network answers {error} for {len(images)} images in training; it must be "
                f"[{len(images)}, {teacher.classes}], or hold that first"
            ) from None
        except Exception as error:  # code of the user's may raise anything
            raise _untrainable(network, teacher, batch_size, error) from error
    reached = {name for name, gradient in zip(_learning(trial), gradients, strict=True) if gradient is not None}
    if isinstance(answer, Tensor):
        return []
    _refuse_untrained_answer(network, images, reached)
    idle = len(_learning(trial)) - len(reached)
    return [
        f"student.network answers a {type(answer).__name__} in training; its logits are trained"
        + (f", {idle} of its {len(reached) + idle} weights serve other answers and are not" if idle else "")
    ]


def _without_adapter(network: nn.Module) -> nn.Module:
    trial = copy.deepcopy(network)
    for key, hook in list(trial._forward_hooks.items()):
        if isinstance(hook, AnswersLogits):
            del trial._forward_hooks[key]
    return trial


def _learning(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _untrainable(network: nn.Module, teacher: TeacherSpec, batch_size: int, error: Exception) -> RecipeError:
    reason = one_line(error)
    if batch_size == 1 and "more than 1 value per channel" in reason:
        return RecipeError(
            f"distill.batch_size is 1, but student.network normalises over the batch ({reason}); use 2 or more"
        )
    shape = "x".join(map(str, teacher.image_space.shape))
    has_side = any(hasattr(network, name) for name in ("aux_logits", "AuxLogits", "aux1"))
    remedy = "student.options={aux_logits: false}, larger images" if has_side else "larger images"
    return RecipeError(
        f"student.network cannot be trained on {shape} images ({type(error).__name__}: {reason}), though it answers "
        f"them in eval mode; use {remedy} or another network"
    )


def _refuse_untrained_answer(network: nn.Module, images: Tensor, reached: set[str]) -> None:
    """Refuse a student whose answer in eval mode depends on weights that the trained one does not reach."""
    trial = copy.deepcopy(network).eval()
    learning = _learning(trial)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        gradients = torch.autograd.grad(trial(images).sum(), list(learning.values()), allow_unused=True)
    used = [name for name, gradient in zip(learning, gradients, strict=True) if gradient is not None]
    untrained = [name for name in used if name not in reached]
    if untrained:
        raise RecipeError(
            f"student.network answers several logits in training and others in eval mode, which depend on "
            f"{untrained[0]} and {len(untrained) - 1} more weights that the first do not; make it answer the same in "
            "both"
        )
