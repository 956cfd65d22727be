"""Self-attention inside a network, as the functions of torch that compute it are called; whoever wrote its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIN_PATCHES = 3
"""Patches below which a block is left out: their similarities to each other have no distribution."""

_aten = torch.ops.aten
_FUSED = {F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, _aten.softmax.int, _aten._softmax.default}
_PRODUCTS = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
    *(_aten.matmul.default, _aten.bmm.default),
}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention in one block: of R rows (images, or windows of images), H heads and T tokens, P of them patches.

    Tokens that every image has alike when they enter the network (class, distillation, registers) are no patches.
    """

    output: Tensor
    """[R, T, D]: what each token gets, the heads' weighted values side by side; float32."""
    weights: Callable[[], Tensor]
    """Computes ``maps``, which only some terms read."""
    patches: slice
    """The tokens that are patches."""

    @cached_property
    def maps(self) -> Tensor:
        """[R, H, T, T], float32: how much each token (row) takes of each other one.

        Rows add up to 1, except in networks that mix their heads behind the softmax.
        """
        return self.weights()

    @property
    def patch_output(self) -> Tensor:
        """[R, P, D]: ``output`` of the patches."""
        return self.output[:, self.patches]

    @property
    def patch_maps(self) -> Tensor:
        """[R, H, P, P]: ``maps`` from patches to patches."""
        return self.maps[..., self.patches, self.patches]


class AttentionTrace(TorchFunctionMode):
    """While it is entered, self-attention is noted, in the order in which the forward pass meets it.

    Two forms are seen: torch's ``scaled_dot_product_attention``, and a softmax over square maps with the next product
    of such maps. ``torch.nn.MultiheadAttention`` comes to one of the two: under a mode it does not take its fast path,
    and its function is entered here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._notes: list[Attention] | None = None
        self._images = 0
        self._map: Tensor | None = None  # a softmax that waits for its product with values
        self._values: list[Tensor] | None = None
        self._extra: tuple[int, slice] | None = None  # a number of tokens, and which of so many are patches

    @contextmanager
    def noting(self, images: int) -> Iterator[list[Attention]]:
        """Note what a pass of so many ``images`` computes, in the list that is handed out."""
        notes: list[Attention] = []
        self._notes, self._images, self._map = notes, images, None
        try:
            with self:
                yield notes
        finally:
            self._notes, self._map = None, None

    @contextmanager
    def learning_patches(self) -> Iterator[None]:
        """Find out in a pass of two different images inside which tokens are patches, for all passes from then on.

        The values of a patch differ where attention is first met, those of a token that is the same for every image do
        not.
        """
        self._values, self._extra = [], None
        try:
            yield
            if self._values:
                first, second = self._values[0].unflatten(0, (2, -1))
                distance, size = ((x * x).sum((0, 1, 3)).sqrt() for x in (first - second, first))
                differ = distance > 1e-4 * size
                found = differ.nonzero().flatten().tolist() or [0]
                self._extra = len(differ), slice(found[0], found[-1] + 1)
        finally:
            self._values = None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at what attention is made of; everything is computed as it was."""
        named = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _transparent(func)(*args, **named)
        result = func(*args, **named)
        if func in _FUSED:
            self._note_fused(result, *args, **named)
        elif func in _SOFTMAX and _is_map(result, args, named):
            self._map = result
        elif func in _PRODUCTS and len(args) > 1 and self._map is not None and _is_like(args[0], self._map):
            self._note_written_out(args[0].reshape(self._map.shape), args[1], result)
        return result

    def _note_fused(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> None:
        if query.shape[-2] == key.shape[-2]:
            self._note(output, value, partial(_weights, query, key, *args, **named))

    def _note_written_out(self, maps: Tensor, values: Tensor, output: Tensor) -> None:
        self._map = None
        shape = maps.shape[:-1]
        self._note(output.reshape(*shape, -1), values.expand_as(output).reshape(*shape, -1), lambda: maps)

    def _note(self, output: Tensor, values: Tensor, weights: Callable[[], Tensor]) -> None:
        images = self._images
        by_head = _by_head(output, images)
        if self._notes is None or not len(by_head) or len(by_head) % images:
            return
        tokens = by_head.shape[2]
        patches = self._extra[1] if self._extra is not None and self._extra[0] == tokens else slice(0, tokens)
        if self._values is not None:
            self._values.append(_by_head(values.detach().float(), self._images))
        if patches.stop - patches.start < MIN_PATCHES:
            return
        self._notes.append(
            Attention(
                output=by_head.transpose(1, 2).flatten(2).float(),
                weights=lambda: _by_head(weights().float(), images),
                patches=patches,
            )
        )


def _by_head(x: Tensor, images: int) -> Tensor:
    """``x`` [..., H, T, D], or [R * H, T, D] where R is the number of ``images``, as [R, H, T, D]; else no rows."""
    if x.ndim == 3 and len(x) % images == 0:
        return x.reshape(images, -1, *x.shape[1:])
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x[:0, None]


def _is_map(softmax: Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a softmax, called with these, is over the columns of square maps."""
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    return softmax.ndim >= 3 and softmax.shape[-1] == softmax.shape[-2] and dim in (-1, softmax.ndim - 1)


def _is_like(x: Any, known: Tensor) -> bool:
    """Whether ``x`` has the maps of ``known``, if in another arrangement."""
    return isinstance(x, Tensor) and x.shape[-2:] == known.shape[-2:] and x.numel() == known.numel()


def _weights(  # noqa: PLR0913 - torch's signature
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The maps of ``scaled_dot_product_attention`` in float32, without its dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.float() @ key.float().transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask.float()
    return scores.softmax(-1)


@cache
def _transparent(function: Any) -> Any:
    """A function of torch's without its first step, which is to hand itself over to a mode as a whole."""
    names = function.__globals__ | {"has_torch_function": lambda _: False}
    opened = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened
