"""The types of options: their limits, how a text becomes their value, and the message for one that is not allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo

from fewbit.core.duration import parse_time
from fewbit.core.limit import parse
from fewbit.core.pixels import FIELDS
from fewbit.errors import BadFile, FewbitError, UnknownName

TYPED = {"labels": "no_labels", "inputs": "input"}  # fields whose option has another name, with _ for -


def option(name: str) -> str:
    """The name of a field on the command line."""
    return {"file": "FILE", "run": "RUN"}.get(name, f"--{TYPED.get(name, name).replace('_', '-')}")


def by_field(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names of fields, where some may have the names that they are typed by: no_labels, input. Raises
    FewbitError for one that is given under both names.
    """
    named = dict(options)
    for field, typed in TYPED.items():
        if typed not in named:
            continue
        if field in named:
            raise FewbitError(f"{field} and {typed} are one option, {option(field)}; leave one of them out.")
        value = named.pop(typed)
        named[field] = not value if field == "labels" and isinstance(value, bool) else value
    return named


def names_of(fields: Iterable[str]) -> list[str]:
    """What options are called where they are given: by what is typed, with _ for -."""
    return [TYPED.get(name, name) for name in fields if name != "command"]


def as_pixels(value: Any, info: ValidationInfo) -> Any:
    """A field of core/pixels.py, checked under the option's name."""
    name = str(info.field_name)
    return None if value is None else FIELDS[name].check(value, option(name))


def as_tuple(value: Any) -> Any:
    """A list, or a single text, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def as_file(value: Any, info: ValidationInfo) -> Any:
    path = as_path(value)
    if isinstance(path, Path) and not os.path.isfile(path):
        raise BadFile(f"{option(str(info.field_name))} {path} does not exist or is not a file; give the path of a file.")
    return tuple(path) if isinstance(path, list) else path


def as_constants(value: Any) -> Any:
    if not value:
        return {}
    from fewbit.data.constants import constants

    return constants(value)


def path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else path_as_text(value)


def check_time(value: str | None) -> None:
    if value is not None:
        parse_time(value)


def check_memory(value: str | None) -> str | None:
    if value is not None:
        parse(value)
    return value


Channels = tuple[float, ...]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Count = Annotated[int, Ge(1), Le(10**9)]
Threads = Annotated[int, Ge(1), Le(1024), Field(description="Threads of the runtime.")]
Seconds = Annotated[float, Ge(0.001), Le(86_400), Field(description="Seconds to measure each runtime and batch.")]
Points = Annotated[float, Ge(0), Le(100)]
Share = Annotated[float, Ge(0), Le(1)]
Batches = Annotated[tuple[Annotated[int, Ge(1), Le(4096)], ...], BeforeValidator(as_tuple)]
OUT = "The folder to write."
Out = Annotated[Path | None, BeforeValidator(as_path), Field(description=OUT)]
RunFolder = Annotated[Path, BeforeValidator(as_path)]
KNOWN = (
    "What is known of the scored images: boxes (COCO .json, a folder of YOLO .txt or Pascal VOC .xml), or a folder of masks "
    "(PNG), depth maps (.npy, PNG) or target pictures, under the images' names."
)
Annotations = Annotated[Path | None, BeforeValidator(as_path), Field(description=KNOWN)]
SkipBad = Annotated[bool, Field(description="Skip unreadable images; those inside a DataLoader it cannot.")]
Labels = Annotated[bool, Field(description="Ignore labels.")]
TARGET = "See `fewbit targets`; the default fits this machine."
Duration = Annotated[str | None, Field(examples=["10min"])]
WORKERS = "Do independent work in so many tasks of Ray on this machine at once."
RAY = "Do independent work on the cluster of Ray with this head, HOST:PORT, or auto."
WorkerCount = Annotated[Count | None, Field(description=WORKERS, examples=[2])]
Address = Annotated[str | None, Field(description=RAY, examples=["10.0.0.1:6379"])]


def checked(name: str, value: Any, kind: Any) -> Any:
    """A value in the limits of a type of this file, for what no field of a request is. Raises FewbitError with the option."""
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        row = error.errors()[0]
        raise FewbitError(f"{not_allowed(option(name), row)}: give such a number, or leave it out.") from None


def not_allowed(flag: str, row: Any) -> str:
    allowed = row["msg"].removeprefix("Input should be ").replace("an instance of Path", "a path")
    return f"{flag} {row['input']!r} is not allowed; it should be {allowed}"


class Asked(BaseModel):
    """The options of a command."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ()  # those that have no name on the command line

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def __init__(self, **options: Any) -> None:
        """Raises FewbitError that names the option, the value and what is allowed."""
        options = by_field(options)
        for name, value in options.items():
            if isinstance(value, str) and not value:
                raise FewbitError(f"{option(name)} '' is empty; give a value, or leave it out.")
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise _invalid(type(self), error) from None


def _invalid(kind: type[Asked], error: ValidationError) -> FewbitError:
    """pydantic's errors as one message: the option, its value, what is allowed, what to type next."""
    messages = []
    for row in error.errors():
        name = str(row["loc"][0])
        if row["type"] == "extra_forbidden":
            command = kind.__name__.removesuffix("Request").lower() or "quantize"
            hint = f"`fewbit {command} --help` says what each is, with - for _."
            return UnknownName("option", name, names_of(kind.model_fields), hint)
        field, flag = kind.model_fields[name], option(name)
        example = next(iter(field.examples or [field.default]))
        typed = flag if isinstance(example, bool) else f"{flag} {example}"
        again = "leave it out" if example in (None, ()) else f"type {typed}, or leave it out"
        messages.append(f"{not_allowed(flag, row)}: {again}.")
    return FewbitError(" ".join(dict.fromkeys(messages)))
