"""Constants for the inputs of a model that are no image: from the command line, from files, from Python."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import BadFile, BadValues, FewbitError

ALLOWED = "as in --input size=640,480, --input 'size=[[640, 480]]' or --input mask=mask.npy"


def constants(given: Any) -> dict[str, Any]:
    """Tensors by name, from texts NAME=VALUE or from a dict whose values may be nested; None in it stands for the image.

    VALUE is a number, a list of numbers or a .npy or .npz file. Raises FewbitError that names the input.
    """
    if isinstance(given, Mapping):
        return {str(name): _tree(value, str(name)) for name, value in given.items()}
    found: dict[str, Any] = {}
    for text in given if isinstance(given, list | tuple) else (given,):
        name, equals, value = str(text).partition("=")
        if not (isinstance(text, str) and name and equals and value):
            raise FewbitError(f"--input {text} is not NAME=VALUE; type it {ALLOWED}.")
        if name in found:
            raise FewbitError(f"--input {name} is given twice; leave one of them out.")
        found[name] = _tensor(_read(value, name) if value.endswith((".npy", ".npz")) else _numbers(value, name), name)
    return found


def text_of(name: str, value: Any) -> str:
    """NAME=VALUE of a constant as it can be typed; of one that is long or nested a placeholder."""
    short = isinstance(value, Tensor) and value.numel() <= 64
    return f"{name}={json.dumps(value.tolist()) if short else 'FILE.npy'}"


def _tree(value: Any, name: str) -> Any:
    """Arrays, numbers and lists of numbers as tensors; dicts and tuples around them stay."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: _tree(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple) and any(one is None or isinstance(one, Tensor | np.ndarray | Mapping) for one in value):
        return type(value)([_tree(inner, f"{name}.{i}") for i, inner in enumerate(value)])
    return _tensor(value, name)


def _tensor(value: Any, name: str) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise FewbitError(
            f"--input {name}: {type(value).__name__} is not an array of numbers; give numbers, {ALLOWED}."
        ) from error
    if tensor.is_complex() or tensor.is_quantized or tensor.layout is not torch.strided:
        raise FewbitError(f"--input {name} has type {tensor.dtype} and layout {tensor.layout}; give a plain array of numbers.")
    if not tensor.numel():
        raise FewbitError(f"--input {name} has shape {tuple(tensor.shape)}, without a number; give at least one.")
    if bool(tensor.isnan().any()):
        raise BadValues(f"--input {name} holds NaN; only numbers can be computed with. Fix it.")
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _numbers(text: str, name: str) -> Any:
    for whole in (text, f"[{text}]"):
        try:
            return json.loads(whole)
        except (ValueError, RecursionError):
            continue
    raise FewbitError(f"--input {name}={text} is not a number, list of numbers or .npy file; type it {ALLOWED}.")


def _read(path: str, name: str) -> Any:
    """The array of a .npy file, or the one of this name, or alone, in a .npz file."""
    if not os.path.isfile(path):
        raise BadFile(f"--input {name}: {path} does not exist or is not a file; give the path of a .npy or .npz file.")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {key: loaded[key] for key in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else {name: loaded}
    except Exception as error:  # NumPy raises whatever zip, pickle and the header parser raise
        raise BadFile(f"--input {name}: {path} is not a readable NumPy file: {error}. Write it with numpy.save.") from error
    if name not in arrays and len(arrays) != 1:
        raise BadFile(
            f"--input {name}: {path} has the arrays {', '.join(arrays)}; name one of them '{name}', or give a .npy file."
        )
    return arrays.get(name, next(iter(arrays.values())))
