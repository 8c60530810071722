"""fewbit: a trained vision model and a few images in, the smallest integer model that still gives the same answers out.

What is in `__all__` is public; docs/api.md shows it. Everything else may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbit.errors import FewbitError, FewbitFailed

if TYPE_CHECKING:
    from fewbit.choose import Context, Pass, Recipe
    from fewbit.core.plan import PassLog, Plan
    from fewbit.core.task import Rating, Task
    from fewbit.data.collection import Data
    from fewbit.recipes import RECIPES, recipe_named
    from fewbit.request import Request
    from fewbit.run import Result, Run, quantize
    from fewbit.target import Target, load_target

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "Context",
    "Data",
    "FewbitError",
    "FewbitFailed",
    "Pass",
    "PassLog",
    "Plan",
    "Rating",
    "Recipe",
    "Request",
    "Result",
    "Run",
    "Target",
    "Task",
    "__version__",
    "load_target",
    "quantize",
    "recipe_named",
]
_LATER = {
    "RECIPES": "fewbit.recipes",
    "Context": "fewbit.choose",
    "Data": "fewbit.data.collection",
    "Pass": "fewbit.choose",
    "PassLog": "fewbit.core.plan",
    "Plan": "fewbit.core.plan",
    "Rating": "fewbit.core.task",
    "Recipe": "fewbit.choose",
    "Request": "fewbit.request",
    "Result": "fewbit.run",
    "Run": "fewbit.run",
    "Target": "fewbit.target",
    "Task": "fewbit.core.task",
    "load_target": "fewbit.target",
    "quantize": "fewbit.run",
    "recipe_named": "fewbit.recipes",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used (PEP 562): `import fewbit` loads neither torch nor a runtime."""
    if name not in _LATER:
        raise AttributeError(f"module 'fewbit' has no attribute '{name}'")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
