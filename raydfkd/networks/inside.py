"""Linear layers of a teacher that soft targets are modelled on: their weights, and what the network makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raydfkd.errors import RecipeError
from raydfkd.networks.answers import logits_of
from raydfkd.networks.observed import frozen_copy
from raydfkd.networks.taps import find_head, layer_at
from raydfkd.seeds import rng_from, seeded

ROWS_AT_ONCE = 256
"""Images that the network runs on at once where only what an inner layer answers counts."""


class TeacherInside:
    """The linear layers of a teacher, looked at when they are first asked for; the teacher itself stays as it is.

    Args:
        network: the teacher.
        image_shape: channels, height and width of its images.
        device: to run it on.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> None:
        self._given, self._device = network, device
        self._pair = torch.randn(2, *image_shape, generator=rng_from(0))
        self._copy: nn.Module | None = None

    @property
    def _network(self) -> nn.Module:
        if self._copy is None:
            self._copy = frozen_copy(self._given).to(self._device)
        return self._copy

    def head(self, who: str) -> Tensor:
        """The weight [K, D], float32 on the CPU, of the linear layer that makes the logits.

        Raises:
            RecipeError: there is none; ``who``, a recipe key and its value, needs it.
        """
        network = frozen_copy(self._given)  # not kept: its memory is wanted for images
        device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
        with seeded(0, device):
            found = find_head(network, self._pair.to(device))
        if found is None:
            raise RecipeError(
                f"{who} needs the weights of a final linear layer, but no linear layer makes the logits of the "
                "teacher; use targets balanced"
            )
        return _rows_of(network.get_submodule(found.path))

    def layer(self, path: str, who: str) -> Tensor:
        """The weight [k, D], float32 on the CPU, of the linear layer at ``path``, on whose output alone logits depend.

        Raises:
            RecipeError: there is no such layer, it is no linear one, or the logits depend on more than its output.
        """
        layer = layer_at(self._network, path, name="teacher", who=who)
        if not isinstance(layer, nn.Linear):
            linear = [name for name, other in self._network.named_modules() if isinstance(other, nn.Linear)]
            raise RecipeError(
                f"{who} names the layer {path!r}, which is a {type(layer).__name__}; name a linear layer: "
                f"{', '.join(linear) or 'the teacher has none'}"
            )
        try:
            first, second = (self._answer(path, torch.eye(2, layer.out_features), image) for image in self._pair)
            depends_on_more = not torch.allclose(first, second, rtol=1e-4, atol=1e-5)
        except _NotOneRowAnImageError:
            depends_on_more = True
        if depends_on_more:
            raise RecipeError(
                f"{who} names the layer {path!r}, but the teacher's logits do not follow from one answer of it an "
                "image; name a linear layer that everything passes through, or drop layer"
            )
        return _rows_of(layer)

    def tail(self, path: str, features: Tensor) -> Tensor:
        """The teacher's logits [N, K] if its linear layer at ``path`` answered ``features`` [N, k]; on the CPU."""
        return torch.cat([self._answer(path, rows, self._pair[0]) for rows in features.split(ROWS_AT_ONCE)])

    @torch.no_grad()
    def _answer(self, path: str, features: Tensor, image: Tensor) -> Tensor:
        def instead(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
            if output.shape != features.shape:
                raise _NotOneRowAnImageError
            return features.to(output)

        hook = self._network.get_submodule(path).register_forward_hook(instead, with_kwargs=True)
        try:
            images = image.to(self._device).repeat(len(features), 1, 1, 1)
            with seeded(0, self._device):
                return logits_of(self._network(images)).float().cpu()
        finally:
            hook.remove()


class _NotOneRowAnImageError(ValueError):
    """A layer answers something else than one row for each image."""


def _rows_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor), "it is a linear layer or a convolution with 1x1 weights"
    return weight.detach().float().flatten(1).cpu()


def cosine_similarity(weight: Tensor) -> Tensor:
    """Cosines [K, K] of the angles between the rows of ``weight`` [K, D], float64; of a row of zeros they are 0."""
    rows = torch.nn.functional.normalize(weight.double(), dim=1)
    return rows @ rows.T
