"""`predict.py` of a run: its pieces in one file, without what they import from fewbit."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from fewbit.errors import BadFile

PIECES = "fewbit.deploy.python"
SHARED = {"prepare": "fewbit.data"}  # which fewbit itself uses


def program(docstring: str, pieces: Sequence[str]) -> str:
    """The pieces one behind the other: their imports first, then what each defines under the first line of its docstring."""
    sources = {name: files(SHARED.get(name, PIECES)).joinpath(f"{name}.py").read_text(encoding="utf-8") for name in pieces}
    trees = {name: ast.parse(text) for name, text in sources.items()}
    imports = sorted({line for tree in trees.values() for line in _imports(tree)})
    own, others = ([line for line in imports if _is_of_python(line) is own] for own in (True, False))
    parts = [f"# {_title(trees[name])}\n\n{_body(sources[name], trees[name])}" for name in pieces]
    head = "\n".join([f'"""{docstring}"""', "", "from __future__ import annotations", "", *own, "", *others])
    return "\n\n\n".join([head, *parts]) + "\n"


def _imports(tree: ast.Module) -> Iterator[str]:
    """The imports of a piece, one name each."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (f"import {ast.unparse(alias)}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("fewbit", "__future__")):
            yield from (f"from {node.module} import {ast.unparse(alias)}" for alias in node.names)


def _is_of_python(line: str) -> bool:
    """Whether a line imports a module that comes with Python."""
    return line.split()[1].partition(".")[0] in sys.stdlib_module_names


def _title(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").splitlines()[0]


def _body(source: str, tree: ast.Module) -> str:
    """What stands behind the imports."""
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(source.splitlines()[last:]).strip("\n")


def loaded(pieces: Sequence[str]) -> SimpleNamespace:
    """What a program of these pieces defines: of fewbit's own, whatever lies in the run's folder. Raises BadFile for others."""
    if unknown := [name for name in pieces if name not in _known()]:
        raise BadFile(f"task.json names a piece {unknown[0]!r} of predict.py that fewbit does not have; write the run again.")
    names: dict[str, Any] = {"__name__": "predict", "__file__": "predict.py"}
    exec(compile(program("", pieces), "predict.py", "exec"), names)
    return SimpleNamespace(**names)


def answers(pieces: Sequence[str]) -> bool:
    """Whether fewbit has these pieces, and they make an answer of the outputs."""
    return _known().issuperset(pieces) and callable(getattr(loaded(pieces), "answer", None))


def _known() -> set[str]:
    return {*SHARED, *(path.name.removesuffix(".py") for path in files(PIECES).iterdir() if path.name.endswith(".py"))}
