"""The TOML file of a sweep: its lists, the options of all rows, and the rows that they give."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewbit import __version__
from fewbit.core.walk import below
from fewbit.errors import BadFile, FewbitError, UnknownName
from fewbit.load.load import look_up
from fewbit.load.python_file import from_python
from fewbit.models import FUNCTION, form_of
from fewbit.request import Request
from fewbit.request.recipe_options import DEFAULT
from fewbit.request.types import by_field, names_of, option
from fewbit.target import detect
from fewbit.workers.machines import file_of

AXES = {"models": "model", "targets": "target", "recipes": "recipe", "bits": "bits"}
OPTIONS = frozenset(Request.model_fields) - {*AXES.values(), "out", "force", "workers", "ray", "command"}
MOST = 100_000  # rows
EXAMPLE = 'models = ["demo", "net.onnx"]'
FUNCTIONS = ("loader", "task")  # options that may be file.py:function
LISTS = {  # what a list holds, and an example
    "models": ('names of models, or tables {model = "NAME", ...}', EXAMPLE),
    "targets": ("names of targets", 'targets = ["tensorrt"]'),
    "recipes": ("names of recipes", 'recipes = ["fast", "mse"]'),
    "bits": ("whole numbers or texts", 'bits = [8, "w4a8"]'),
}
Text = Annotated[str, Field(min_length=1)]


class _Lists(BaseModel):
    """What the file says. A model is its name, or a table with its name and options of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: list[Text | dict[str, Any]] = Field(min_length=1)
    targets: list[Text] = Field(default_factory=lambda: [detect()], min_length=1)
    recipes: list[Text] = Field(default=[DEFAULT], min_length=1)
    bits: list[Text | int | None] = Field(default=[None], min_length=1)
    options: dict[str, Any] = {}


@dataclass(frozen=True)
class Row:
    """One run: the options of its request, and the name of its folder. `refusal` says why it cannot be, where it cannot."""

    options: Mapping[str, Any]
    name: str
    refusal: str = ""

    def request(self, out: Path, command: str = "fewbit sweep") -> Request:
        """What is asked. Raises FewbitError for a combination that cannot be."""
        return Request(**self.options, out=out, command=command)


def rows_of(path: Path) -> tuple[Row, ...]:
    """The rows of a sweep, in the order of its lists.

    Raises FewbitError for a file that is broken, and for what no row can use: an unknown name, an option that is not allowed. A
    combination that cannot be is a row with its refusal.
    """
    lists = _read(path)
    models = [by_field(model) if isinstance(model, dict) else {"model": model} for model in lists.models]
    shared = by_field(lists.options)
    _check(path, models, shared)
    count = len(models) * len(lists.targets) * len(lists.recipes) * len(lists.bits)
    if count > MOST:
        raise BadFile(f"{path} has {count:,} rows; a sweep has at most {MOST:,}, so make several files of it.")
    files: dict[str, Any] = {}
    rows = []
    for model, target, recipe, bits in product(models, lists.targets, lists.recipes, lists.bits):
        widths = {} if bits is None else {"bits": str(bits)}
        options = {**shared, **model, "target": target, "recipe": recipe, **widths}
        files |= {text: seen(text) for text in options.values() if isinstance(text, str) and text not in files}
        row = Row(options, _name(options, files))
        rows.append(Row(options, row.name, refusal) if (refusal := _refusal(row)) else row)
    _check_rows(path, rows)
    return tuple(rows)


def seen(text: str) -> list[tuple[str, int, int]]:
    """Path, size and time of the file, or of every file in the folder, that an option names; nothing where it names none."""
    path = Path(file_of(text))
    try:
        files = [path / p for p in sorted(below(path)[0])] if path.is_dir() else [path]
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    except OSError:
        return []


def _name(options: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """What a row is, and a digest of all that decides its result: its options and the files that they name."""
    said = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(str(options[key]) for key in AXES.values() if key in options))
    named = [files[text] for text in options.values() if isinstance(text, str)]
    text = json.dumps([__version__, dict(options), named], sort_keys=True, default=str)
    return f"{said.strip('-.')[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _refusal(row: Row) -> str:
    try:
        row.request(Path(row.name))
    except FewbitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _read(path: Path) -> _Lists:
    try:
        return _Lists.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        row = error.errors()[0]
        key = str(row["loc"][0])
        if row["type"] == "extra_forbidden":
            hint = "Options for all rows go below a line [options]."
            raise UnknownName(f"key in {path}", key, _Lists.model_fields, hint) from error
        raise BadFile(f"{path}: {_fault(key, row)}.") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of its text
        raise BadFile(f"{path} is not readable TOML ({error}). Fix it; a sweep begins with {EXAMPLE}.") from error


def _fault(key: str, row: Any) -> str:
    """What is wrong with a list or the table of options, by the first of pydantic's errors, and what to write."""
    if key not in LISTS:
        return f"{key} is {row['input']!r:.80}; it is a table, [{key}], with a line for each option, as in seed = 1"
    holds, example = LISTS[key]
    again = f"write {example}" if key == "models" else f"write {example}, or leave {key} out"
    if row["type"] == "missing":
        return f"{key} is missing; it is a list of {holds}: {again}"
    if len(row["loc"]) > 1:
        return f"{key} has {row['input']!r:.80}; it is a list of {holds}: {again}"
    found = "is an empty list" if row["input"] == [] else f"is {row['input']!r:.80}, which is no list"
    return f"{key} {found}; it is a list of {holds}: {again}"


def _check(path: Path, models: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Raise FewbitError for options that there are not, and for models that are nowhere."""
    for table in (options, *models):
        for name in set(table) - OPTIONS - ({"model"} if table is not options else set()):
            if name in AXES.values():
                raise BadFile(f"{path}: {name} is not an option of all rows; give it as a list beside the models.")
            hint = "`fewbit quantize --help` says what each is, with - for _."
            raise UnknownName(f"option in {path}", name, names_of(OPTIONS), hint)
        if empty := next((name for name, value in table.items() if value == []), None):
            raise BadFile(f"{path}: {empty} is an empty list; give it a value, or leave it out.")
        for name in FUNCTIONS:
            if isinstance(spec := table.get(name), str) and form_of(spec) is FUNCTION:
                from_python(spec, option(name))
    for model in models:
        if not isinstance(model.get("model"), str):
            raise BadFile(f'{path}: a model {dict(model)!r:.80} has no name; write {{model = "NAME", ...}}.')
        look_up(model["model"])


def _check_rows(path: Path, rows: Sequence[Row]) -> None:
    """Raise FewbitError for two rows that are the same, and for a name or width that no row can use, with its first refusal."""
    names = [row.name for row in rows]
    if double := next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None:
        raise BadFile(f"{path} has one row twice: {double}; write each model, target, recipe and width once.")
    if all(row.refusal for row in rows):
        raise FewbitError(f"{path}: no row can be made: {rows[0].refusal}")
    for key, value, refusals in _by_value(rows):
        if all(refusals):
            raise FewbitError(f"{path}: no row can be made with {key} {value}: {refusals[0]}")


def _by_value(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[str]]]:
    """(list, value, refusals of its rows, empty for those that can be) of each value of the lists."""
    for key in AXES.values():
        values = dict.fromkeys(str(row.options[key]) for row in rows if key in row.options)
        for value in values:
            yield key, value, [row.refusal for row in rows if str(row.options.get(key)) == value]
