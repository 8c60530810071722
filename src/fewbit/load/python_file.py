"""A Python file that the user names, and a function of it: the only code that is run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from fewbit.errors import BadFile, BadModel, UnknownName, reason
from fewbit.load.contexts import without_advice
from fewbit.workers import USERS


def from_python(spec: str, what: str) -> tuple[Path, ModuleType, str]:
    """The file of file.py:function, imported, and the name of the function, which it has."""
    path, function = Path(spec[: spec.rindex(".py") + 3]), spec[spec.rindex(".py") + 4 :]
    if not os.path.isfile(path):
        raise BadFile(f"{path} does not exist; {what} as file.py:function needs a Python file.")
    python = _imported(path)
    if not hasattr(python, function):
        functions = [k for k, v in vars(python).items() if callable(v) and getattr(v, "__module__", "") == python.__name__]
        raise UnknownName(f"function in {path.name}", function, functions)
    return path, python, function


def _imported(path: Path) -> ModuleType:
    """A Python file as a module that is in sys.modules (dataclasses look there); its folder is searched meanwhile."""
    spec = importlib.util.spec_from_file_location(f"{USERS}{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    python = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = python
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with without_advice():
            spec.loader.exec_module(python)
    except (Exception, SystemExit) as error:
        raise BadModel(f"{path} cannot be imported: {reason(error)} Fix it; `python {path.name}` shows where.") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return python
