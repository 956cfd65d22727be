"""Compiled networks and functions, which go on uncompiled where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)
VERSIONS = 64
"""Versions of a network's code that are compiled at most, one for each shape of its images. Torch counts those of all
networks of a class together and ends at 8, which two stages and batches of two sizes of a teacher and of a student like
it exceed."""


class Compiled:
    """A ``function`` as one graph for each shape of what it is given, made where it is first called with it.

    Where it cannot be compiled that is logged once, with ``name``, and it is called as it is from then on.
    """

    def __init__(self, function: Callable[..., Any], *, name: str) -> None:
        self._function = function
        self._name = name
        self._compiled: Callable[..., Any] | None = None
        self._is_refused = False

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled if that is possible."""
        if not self._is_refused:
            try:
                return self._graph()(*arguments)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                logger.warning("%s cannot be compiled (%s); going on without", self._name, reason)
                self._is_refused = True
        return self._function(*arguments)

    def _graph(self) -> Callable[..., Any]:
        if self._compiled is None:  # made late, because it takes seconds to import what compiles
            torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
            self._compiled = torch.compile(self._function, fullgraph=True, dynamic=False)
        return self._compiled
