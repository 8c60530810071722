"""fewbit: a trained vision model and a few images in, the smallest integer model that still gives the same answers out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbit.errors import FewbitError, FewbitFailed

if TYPE_CHECKING:
    from fewbit.pipeline import Result, quantize
    from fewbit.run import Run

__version__ = "0.1.0"
__all__ = ["FewbitError", "FewbitFailed", "Result", "Run", "__version__", "quantize"]
_LATER = {"Result": "fewbit.pipeline", "quantize": "fewbit.pipeline", "Run": "fewbit.run"}  # these import torch


def __getattr__(name: str) -> Any:
    """What is imported when it is first asked for (PEP 562): the command line and the report answer without torch."""
    if name not in _LATER:
        raise AttributeError(f"module 'fewbit' has no attribute '{name}'")
    return getattr(import_module(_LATER[name]), name)
