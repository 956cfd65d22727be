"""From what a network answers to logits [N, K]: records, single logits and probabilities become what is trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_NAMES = ("logits", "out", "output", "outputs", "pred", "preds", "prediction")
"""Keys and attributes under which records of answers carry their logits, the likeliest first."""


class NoLogitsError(ValueError):
    """An answer that holds no logits; the message says what it is."""


class AnswerScale(Enum):
    """What the numbers of an answer are."""

    LOGITS = "logits"
    LOG_PROBABILITIES = "log_probabilities"
    """Logits but for a number an image; the one with which they add up to zero, as logits about do, is taken."""
    PROBABILITIES = "probabilities"
    """Of classes that exclude each other; their logarithm is taken, and then the same."""
    SIGMOIDS = "sigmoid"
    """One probability a class, or one for the second of two; what the sigmoid was taken of is recovered."""

    def holds(self, low: float, high: float) -> bool:
        """Whether such answers can go from ``low`` to ``high``."""
        if self is AnswerScale.LOGITS:
            return True
        return high <= 0 if self is AnswerScale.LOG_PROBABILITIES else low >= 0 and high <= 1


def logits_of(answer: Any, classes: int | None = None, *, images: int | None = None) -> Tensor:
    """The logits in what a network answered: [N, K], as they are where it answered those.

    A record (dict, dataclass, named tuple) is asked for its ``logits`` or ``out``, a tuple for its first tensor that
    is one number a class. [N, K, 1, 1] loses its ones, and one number an image is the second of two classes' against
    a first of zero. Without ``classes`` the first tensor is taken as it is.

    Args:
        answer: of the network.
        classes: K.
        images: N, which tells [K] of one image from [N] of one number each.

    Raises:
        NoLogitsError: nothing in the answer is one number a class.
    """
    found = list(_tensors(answer))
    if classes is None and found:
        return found[0]
    for tensor in found:
        shaped = _by_class(tensor, classes or 0, images)
        if shaped is not None:
            return shaped
    raise NoLogitsError(_description(answer))


def _tensors(answer: Any) -> Iterator[Tensor]:
    """Every tensor in an answer, likely logits first."""
    if isinstance(answer, Tensor):
        yield answer
        return
    named = dict(answer) if isinstance(answer, Mapping) else _attributes(answer)
    for name in sorted(named, key=lambda name: LOGITS_NAMES.index(name) if name in LOGITS_NAMES else len(LOGITS_NAMES)):
        yield from _tensors(named[name])
    if isinstance(answer, Sequence) and not isinstance(answer, str) and not named:
        for part in answer:
            yield from _tensors(part)


def _attributes(answer: Any) -> dict[str, Any]:
    if hasattr(answer, "_asdict"):
        return dict(answer._asdict())
    fields = getattr(answer, "__dataclass_fields__", None) or getattr(answer, "__dict__", {})
    return {name: getattr(answer, name) for name in fields}


def _by_class(tensor: Tensor, classes: int, images: int | None) -> Tensor | None:
    rows = images if images is not None else tensor.shape[0] if tensor.ndim else 1
    if tensor.shape == (rows, classes):
        return tensor
    if not tensor.is_floating_point():
        return None
    if tensor.numel() == rows * classes and (tensor.ndim > 2 or rows == 1):
        return tensor.reshape(rows, classes) if tensor.shape[0] in (rows, classes) else None
    if classes == 2 and tensor.numel() == rows:
        second = tensor.reshape(rows)
        return torch.stack([torch.zeros_like(second), second], 1)
    return None


def _description(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return str(list(answer.shape))
    shapes = [str(list(tensor.shape)) for tensor in _tensors(answer)]
    return f"{type(answer).__name__} of {', '.join(shapes)}" if shapes else type(answer).__name__


def scale_of(network: nn.Module, images: Tensor, answer: Any, logits: Tensor) -> AnswerScale:
    """What the numbers of ``network``'s ``answer`` to ``images`` are, whose ``logits`` [N, K] were taken as they stand.

    A softmax shows in the values, whoever computed it; a sigmoid only in the last step of the graph, because numbers
    between zero and one may be logits too.
    """
    values = logits.detach().double().cpu()
    raw = next(_tensors(answer))
    is_single = raw.numel() == len(logits)
    ones = torch.ones(len(values), dtype=torch.float64)
    if not values.isfinite().all():
        return AnswerScale.LOGITS
    if not is_single and values.min() >= 0 and torch.allclose(values.sum(1), ones, rtol=0, atol=1e-3):
        return AnswerScale.PROBABILITIES
    if not is_single and torch.allclose(values.exp().sum(1), ones, rtol=0, atol=1e-3):
        return AnswerScale.LOG_PROBABILITIES
    if not (raw.min() >= 0 and raw.max() <= 1):
        return AnswerScale.LOGITS
    trial = copy.deepcopy(network).eval()
    with torch.enable_grad():
        last = _last_step(next(_tensors(trial(images.clone().requires_grad_()))))
    return AnswerScale.SIGMOIDS if last == "SigmoidBackward0" else AnswerScale.LOGITS


def _last_step(tensor: Tensor) -> str:
    """Name of the last step of a graph that computes; views and copies do not."""
    step = tensor.grad_fn
    while step is not None and step.name().startswith(_MOVES):
        step = step.next_functions[0][0]
    return "" if step is None else step.name()


_MOVES = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice"),
    *("Clone", "ToCopy", "Alias", "AsStrided"),
)


class _AsUsed(torch.autograd.Function):
    """The first of several answers; the others take a gradient of zero.

    So every weight has a gradient, which data parallelism relies on.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)


@dataclass(slots=True, kw_only=True)
class AnswersLogits:
    """A forward hook through which a network answers logits [N, K], whatever its author had it answer."""

    classes: int
    scale: AnswerScale = AnswerScale.LOGITS
    temperature: float = 1.0
    """What they are divided by."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], answer: Any) -> Tensor | None:
        """The logits in ``answer``; None, which leaves it as it is, where it is nothing else."""
        logits = self._logits(module, inputs, answer)
        if self.temperature == 1:
            return logits
        tempered: Tensor = (answer if logits is None else logits) / self.temperature
        return tempered

    def _logits(self, module: nn.Module, inputs: tuple[Any, ...], answer: Any) -> Tensor | None:
        # sizes of the batch are shape[0] and not len(), which would fix them in an exported graph
        is_plain = isinstance(answer, Tensor) and answer.ndim == 2 and answer.shape[1] == self.classes
        if is_plain and self.scale is AnswerScale.LOGITS:
            return None
        logits = logits_of(answer, self.classes, images=inputs[0].shape[0] if inputs else None)
        if module.training and not isinstance(answer, Tensor) and logits.requires_grad:
            others = [tensor for tensor in _tensors(answer) if tensor is not logits and tensor.requires_grad]
            logits = _AsUsed.apply(logits, *others)
        if self.scale is AnswerScale.PROBABILITIES:
            return _centred(logits.float().clamp_min(torch.finfo(torch.float32).tiny).log())
        if self.scale is AnswerScale.LOG_PROBABILITIES:
            return _centred(logits.float())
        if self.scale is AnswerScale.SIGMOIDS:
            return _logits_of_sigmoids(answer, logits)
        return logits


def _centred(logits: Tensor) -> Tensor:
    """Without the mean of each image: criteria that compare logits themselves expect those of a linear layer."""
    return logits - logits.mean(1, keepdim=True)


def _logits_of_sigmoids(answer: Any, logits: Tensor) -> Tensor:
    recovered = logits.float().logit(eps=torch.finfo(torch.float32).eps)
    if next(_tensors(answer)).numel() == logits.shape[0]:  # the first of two is no sigmoid but the zero put beside it
        return torch.cat([torch.zeros_like(recovered[:, :1]), recovered[:, 1:]], 1)
    return recovered


def adapter_of(network: nn.Module) -> AnswersLogits | None:
    """The hook that makes ``network`` answer logits, if it has one."""
    return next((hook for hook in network._forward_hooks.values() if isinstance(hook, AnswersLogits)), None)
