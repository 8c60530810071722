"""Who may import whom: the arrows of docs/how-it-works.md, checked in the source without running it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

# A room may import itself and the rooms left of it.
ORDER = (
    "onnx_reader",
    "load",
    "capture",
    "execute",
    "task",
    "data",
    "observe",
    "target",
    "equalize",
    "choose",
    "realize",
    "verify",
    "lint",
    "report",
    "deploy",
    "request",
    "pipeline",
    "search",
    "sweep",
    "cli",
)
COMMON = {
    "core",
    "errors",
    "files",
    "folder",
    "onnx_file",
    "progress",
    "runtimes",
    "said",
    "workers",
}  # every room may import these, and they import only each other
HOME = {
    "recipes": "choose",
    "models": "load",
    "tasks": "task",
    "stages": "pipeline",
    "run": "pipeline",
    "unfinished": "pipeline",
    "__main__": "cli",
    "": "pipeline",
}  # what stands beside the rooms; "" is __init__.py
VERSION = "fewbit.__version__"  # a text, for all
DEMO_USERS = {"load", "data", "request", "pipeline", "search", "sweep", "cli"}

ONNX = {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
CLI_LIBRARIES = {"typer", "rich", "click"}


def modules(src: Path) -> dict[str, Path]:
    """Dotted name to file of every module of fewbit under `src`."""
    found = {}
    for path in sorted((src / "fewbit").rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement of a file, also inside functions; relative ones made absolute.

    `from fewbit.core import grid` and `from fewbit.core.grid import QParams` are imports of fewbit.core.grid.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in {*known, VERSION} else base


def place(module: str) -> str:
    """The stage, tool or common file that a module of fewbit belongs to; an unknown file stands beside pipeline."""
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else ""
    top = HOME.get(top, top)
    return top if top in {*ORDER, *COMMON, "demo"} else "pipeline"


def may_import(user: str, used: str) -> bool:
    """Whether a file at place `user` may import one at place `used`."""
    if user == used:
        return True
    if used in COMMON:
        return True
    if user in COMMON:
        return False
    if used == "demo":
        return user in DEMO_USERS
    if user == "demo":
        return False
    return ORDER.index(used) <= ORDER.index(user)


def forbidden(module: str, path: Path) -> dict[str, str]:
    """Libraries that a module of fewbit may not import, each with the reason."""
    stage, found = place(module), {}
    if stage in {"choose", "observe"}:
        found |= dict.fromkeys(ONNX, f"{stage} never imports onnx: a plan is not a file format")
    if stage == "report" and path.name != "rows.py":  # which makes the tables
        found["torch"] = "report never imports torch: it draws tables that are on disk"
    if stage != "cli":
        allowed = {"rich"} if path.name == "progress.py" else set()
        found |= dict.fromkeys(CLI_LIBRARIES - allowed, "only cli imports the command-line library")
    return found


def violations(src: Path) -> list[str]:
    """One line per import statement that goes the wrong way."""
    files, found = modules(src), []
    for module, path in files.items():
        banned = forbidden(module, path)
        for line, imported in imports(module, path, set(files)):
            where = f"{path.relative_to(src)}:{line} imports {imported}"
            library = imported.split(".")[0]
            if library == "fewbit" and imported != VERSION and not may_import(place(module), place(imported)):
                found.append(f"{where}: {place(module)} may not import {place(imported)}")
            elif library == "bench":
                found.append(f"{where}: nothing in the package imports bench")
            elif library in banned:
                found.append(f"{where}: {banned[library]}")
    return found


def test_no_module_imports_against_the_arrows():
    assert not violations(SRC), "\n".join(violations(SRC))


def test_each_file_beside_the_rooms_has_a_place():
    tops = {name.split(".")[1] for name in modules(SRC) if "." in name}
    assert tops == {*ORDER, *COMMON, *HOME, "demo"} - {"pipeline", ""}


def test_the_package_has_modules():
    assert {"fewbit", "fewbit.core.grid", "fewbit.core.graph", "fewbit.errors"} <= set(modules(SRC))


@pytest.mark.parametrize("name", [name for name in modules(SRC) if not name.endswith("__main__")])
def test_module_can_be_imported(name):
    importlib.import_module(name)


# The test of the test.


def tree(src: Path, **files: str) -> Path:
    """A fewbit package in `src` in which a__b="text" is the file fewbit/a/b.py."""
    for name, text in {"__init__": "", "core__grid": "", "cli": "", **files}.items():
        path = src / "fewbit" / (name if name == "__init__" else name.replace("__", "/"))
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return src


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("capture__export", "from fewbit.observe.stats import Stats"),
        ("capture__export", "from ..observe.stats import Stats"),
        ("capture__export", "def f():\n    import fewbit.observe.stats"),
        ("capture__export", "from fewbit.observe import stats"),
        ("execute__stream", "from fewbit.observe import stats"),
        ("equalize__smooth", "from fewbit.choose.ranges import MinMax"),
        ("target__allowed", "from fewbit.choose.choose import choose"),
        ("core__grid", "from fewbit.choose import choose"),
        ("verify__bench", "from fewbit import quantize"),
        ("observe__observe", "from fewbit.recipes import RECIPES"),
        ("choose__choose", "import fewbit.unheard_of"),
        ("demo__model", "from fewbit.load import export"),
        ("load__program", "from fewbit.capture import normalize"),
        ("workers__machines", "from fewbit import quantize"),
        ("request__options", "from fewbit.stages import STAGES"),
        ("choose__choose", "import onnx.helper"),
        ("observe__stats", "from onnxruntime import InferenceSession"),
        ("report__page", "import torch"),
        ("report__tables", "from torch import Tensor"),
        ("pipeline", "import typer"),
        ("verify__bench", "from rich.table import Table"),
        ("pipeline", "from bench.kernels import winograd"),
        ("lint__lint", "from fewbit.report import page"),
    ],
)
def test_a_planted_violation_is_noticed(tmp_path, file, text):
    src = tree(tmp_path, **{file: text, "observe__stats": text if file == "observe__stats" else ""})
    found = violations(src)
    assert len(found) == 1
    assert found[0].startswith(f"fewbit/{file.replace('__', '/')}.py:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("observe__observe", "from fewbit.capture.sites import capture\nfrom . import stats"),
        ("choose__choose", "from fewbit.execute import simulate\nfrom fewbit.core.grid import Grid\nimport fewbit.recipes"),
        ("verify__compare", "from fewbit.execute.simulate import simulate\nimport onnxruntime"),
        ("recipes", "from fewbit.choose import ranges\nfrom fewbit.equalize import smooth"),
        ("data__images", "from fewbit.demo import model"),
        ("report__rows", "from torch import Tensor"),
        ("pipeline", "from fewbit.report import page\nfrom fewbit.unheard_of import x"),
        ("workers__machines", "from fewbit import __version__"),
        ("request__options", "from fewbit.target import load_target\nfrom fewbit.workers import opened"),
        ("lint__truth", "from fewbit.verify import runtimes\nfrom fewbit.core.grid import Grid"),
        ("progress", "from rich.progress import Progress"),
        ("cli", "import typer\nfrom fewbit.run import quantize"),
        ("cli__quantize", "import rich\nimport fewbit"),
    ],
)
def test_an_import_along_the_arrows_is_not_reported(tmp_path, file, text):
    assert violations(tree(tmp_path, **{file: text})) == []


FIRST = """
import importlib, os, sys
import fewbit.cli, fewbit.search  # so that what others wrote is imported once
for name in [name for name in sys.modules if name.partition(".")[0] == "fewbit"]:
    del sys.modules[name]
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
            getattr(importlib.import_module("fewbit"), "Run")
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_room_may_be_the_first_that_is_imported() -> None:
    names = [name for name in modules(SRC) if name.count(".") < 2 and not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", FIRST, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(names) > 20
