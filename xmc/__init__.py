"""Extreme multi-label classification with sparse output layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xmc import losses
    from xmc.nn.fan_in import FixedFanIn, FixedFanInLinear
    from xmc.serving.evaluate import evaluate
    from xmc.serving.export import export
    from xmc.serving.predictor import Predictor
    from xmc.training.run import train

__all__ = ["FixedFanIn", "FixedFanInLinear", "Predictor", "evaluate", "export", "losses", "train"]

# Loaded at first use: `import xmc` stays quick and pulls in neither numba nor transformers.
_HOME = {
    "FixedFanIn": "xmc.nn.fan_in",
    "FixedFanInLinear": "xmc.nn.fan_in",
    "Predictor": "xmc.serving.predictor",
    "evaluate": "xmc.serving.evaluate",
    "export": "xmc.serving.export",
    "train": "xmc.training.run",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("xmc.losses")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(list(globals()) + __all__)
