"""Data-free knowledge distillation at cluster scale: invert a trained network, distil a student from what it makes.

The library is these names; each is imported when it is first used, so that ``import raydfkd`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydfkd.config.load import load_recipe
    from raydfkd.data.transfer_set import TransferSet
    from raydfkd.errors import RecipeError
    from raydfkd.runner.run import distill, evaluate, run, synthesize

__version__ = "0.1.0"
__all__ = ["RecipeError", "TransferSet", "__version__", "distill", "evaluate", "load_recipe", "run", "synthesize"]

_PLACES = {
    "RecipeError": "raydfkd.errors",
    "TransferSet": "raydfkd.data.transfer_set",
    "distill": "raydfkd.runner.run",
    "evaluate": "raydfkd.runner.run",
    "load_recipe": "raydfkd.config.load",
    "run": "raydfkd.runner.run",
    "synthesize": "raydfkd.runner.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'raydfkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
