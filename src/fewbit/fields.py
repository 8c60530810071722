"""The types of options: their limits, how a text becomes their value, and the message for one that is not allowed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo

from fewbit.errors import BadFile, FewbitError


def option(name: str) -> str:
    """The name of a field on the command line."""
    return {"labels": "--no-labels", "inputs": "--input"}.get(name, f"--{name.replace('_', '-')}")


def pixel_check(check: Callable[[Any, str], Any]) -> BeforeValidator:
    """A check of core/pixels.py as that of a field, under the option's name."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        return None if value is None else check(value, option(str(info.field_name)))

    return BeforeValidator(validate)


def as_tuple(value: Any) -> Any:
    """A list, or a single text, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def as_file(value: Any, info: ValidationInfo) -> Any:
    path = as_path(value)
    if isinstance(path, Path) and not os.path.isfile(path):
        raise BadFile(f"{option(str(info.field_name))} {path} does not exist or is no file; give the path of a file.")
    return tuple(path) if isinstance(path, list) else path


def as_constants(value: Any) -> Any:
    if not value:
        return {}
    from fewbit.data.constants import constants

    return constants(value)


def as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) or (isinstance(value, int) and not isinstance(value, bool)) else value


def check_time(value: str | None) -> None:
    from fewbit.choose.powell import parse_time

    if value is not None:
        parse_time(value)


Channels = tuple[float, ...]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Count = Annotated[int, Ge(1), Le(10**9)]
Threads = Annotated[int, Ge(1), Le(1024)]
Seconds = Annotated[float, Ge(0.001), Le(86_400)]
Points = Annotated[float, Ge(0), Le(100)]
Share = Annotated[float, Ge(0), Le(1)]
Batches = Annotated[tuple[Annotated[int, Ge(1), Le(4096)], ...], BeforeValidator(as_tuple)]
Out = Annotated[Path | None, BeforeValidator(as_path), Field(description="The folder to write.")]
Duration = Annotated[str | None, Field(examples=["10min"])]


def checked(name: str, value: Any, kind: Any) -> Any:
    """A value in the limits of a type of this file, for what is no field of a request. Raises FewbitError with the option."""
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        row = error.errors()[0]
        raise FewbitError(f"{not_allowed(option(name), row)}: give such a number, or leave it out.") from None


def not_allowed(flag: str, row: Any) -> str:
    return f"{flag} {row['input']!r} is not allowed; it should be {row['msg'].removeprefix('Input should be ')}"
