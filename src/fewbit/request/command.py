"""A request as it is typed: the `fewbit quantize` of a search's point, or of a row of a sensitivity."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.request import Options, Request, SensitivityRequest
from fewbit.request.types import option

APART = ("model", "target", "out", "force", "command", "seconds", "curve", "max_drop", "must_pay", "workers", "ray")


def quantize_command(request: Options, *more: str) -> str:
    """The command with every option of a request that is not the default of `fewbit quantize`, and with more words.

    The recipe is always said: where it is not it follows the bits, which may be among the words.
    """
    words = ["fewbit", "quantize", request.ref, "--target", request.target or request.hardware.name]
    for name, field in Request.model_fields.items():
        value = getattr(request, name, field.default)
        if name not in APART and name not in request.OWN and not _is(value, field.default):
            words += _words(name, value)
    return shlex.join([*words, *more])


def sensitivity_command(command: str) -> str:
    """The `fewbit sensitivity` of the same model and images as a `fewbit quantize`, in the options that mean the same; nothing
    of another command.
    """
    if not command.startswith("fewbit quantize "):
        return ""
    words, kept, taken = shlex.split(command), ["fewbit", "sensitivity"], True
    known = {option(name) for name in SensitivityRequest.model_fields} - {"--out", "--force", "--scored", "--workers", "--ray"}
    for word in words[2:]:
        taken = word in known if word.startswith("--") else taken
        kept += [word] if taken else []
    return shlex.join(kept)


def _is(value: Any, default: Any) -> bool:
    """Whether an option has its default; images may be an array, which compares its elements."""
    return value is default or (type(value) is type(default) and bool(value == default))


def _words(name: str, value: Any) -> list[str]:
    """An option and its value; a list of names is an option each."""
    if isinstance(value, bool):
        return [option(name)]
    if isinstance(value, Mapping):
        from fewbit.data.constants import text_of

        return [word for key, one in value.items() for word in (option(name), text_of(key, one))]
    if name == "keep_float":
        return [word for one in value for word in (option(name), one)]
    if isinstance(value, tuple):
        return [option(name), ",".join(map(str, value))]
    return [option(name), str(value) if isinstance(value, (str, Path, int, float)) else name.upper()]
