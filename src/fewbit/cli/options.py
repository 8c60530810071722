"""Options of a command, built from the fields of a request: names, types, limits, defaults and help are declared there."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from fewbit.request.types import Asked, option

HIDDEN = ("command",)


def options(kind: type[Asked], **defaults: Any) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """A command with an option for each field of a request class; its function gets the request. `defaults` replace those
    of the fields on the command line.
    """
    fields = {name: field for name, field in kind.model_fields.items() if name not in HIDDEN}

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            settings = {name: not value if name == "labels" else value for name, value in values.items() if value is not None}
            if "command" in kind.model_fields:
                settings["command"] = "fewbit " + shlex.join(sys.argv[1:])
            function(kind(**settings))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        parameters = [
            _argument(name, field) if name in kind.ARGUMENTS else _option(name, field, defaults.get(name, field.default))
            for name, field in fields.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _argument(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field that has no name on the command line."""
    value, _ = _plain(field.annotation, [])
    return inspect.Parameter(name, KEYWORD, annotation=Annotated[value, typer.Argument(help=field.description)])


def _option(name: str, field: FieldInfo, default: Any) -> inspect.Parameter:
    """The option of a field. A flag that is true by default becomes one that turns it off."""
    value, limits = _plain(field.annotation, list(field.metadata))
    low = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    high = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    numbers: dict[str, Any] = {"min": low, "max": high} if value in (int, float) else {}
    about = typer.Option(option(name), help=field.description, **numbers)
    if value is bool:
        return inspect.Parameter(name, KEYWORD, default=False, annotation=Annotated[bool, about])
    if field.is_required():
        return inspect.Parameter(name, KEYWORD, annotation=Annotated[value, about])
    empty = None if default in ((), {}) else default
    return inspect.Parameter(name, KEYWORD, default=empty, annotation=Annotated[value | None, about])  # type: ignore[operator]


def _plain(annotation: Any, limits: list[Any]) -> tuple[Any, list[Any]]:
    """The type to parse on the command line, and numeric limits: the first of a union, text for any other type."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _plain(inner, [*limits, *more])
    if get_origin(annotation) is dict:
        return list[str], limits
    if get_origin(annotation) is tuple:
        kind, _ = _plain(get_args(annotation)[0], [])
        return (str if kind is float or Ellipsis not in get_args(annotation) else list[kind]), limits  # type: ignore[valid-type]
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if kinds:
        return _plain(kinds[0], limits)
    return (annotation if annotation in (bool, int, float, str, Path) else str), limits
