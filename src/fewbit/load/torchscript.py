"""Reading TorchScript (.pt): what `torch.jit.trace` or `torch.jit.script` saved, written as an ONNX file that is then read.

TorchScript is code in a language of its own, which cannot call Python. What it can do beside computing (write files, read them,
run operators of libraries) is refused from its text, before it is loaded. The ONNX file is compared with it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from fewbit.errors import BadFile, BadModel, reason, stopped
from fewbit.files import is_archive
from fewbit.load.archive import NAMESPACES
from fewbit.load.contexts import quiet
from fewbit.load.ports import tensors_in
from fewbit.load.trials import all_alike, noise_of

SOURCE = re.compile(r"code/.+\.py")
PICKLE = re.compile(r"[^/]+\.pkl")
DISK = re.compile(r"\b(save|from_file)\b")  # functions that touch it
LOADING = re.compile(r"__setstate__")  # code that runs while a file is loaded
OPERATOR = re.compile(r"\bops\b[\s\\]*\.[\s\\]*(\w+)[\s\\]*\.[\s\\]*(\w+)")
PRIMITIVES = ("NumToTensor", "data", "device", "dtype", "layout", "shape", "min", "max", "abs", "unchecked_unwrap_optional")
NATIVE = "torch.classes"  # objects of libraries, which are made while a file is loaded
OPSET = 17
IMAGE = "images"
INSTEAD = "Give the module that it was made from (file.py:function), or its weights: NAME --weights FILE."


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that torch.jit.save wrote."""
    if not is_archive(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "constants.pkl" in {name.partition("/")[2] for name in archive.namelist()}


@contextmanager
def as_onnx(path: Path, size: Sequence[int]) -> Iterator[tuple[Path, torch.jit.ScriptModule, int | None]]:
    """The model of a file for images of (channels, height, width) as an ONNX file that is there meanwhile, itself, and the
    batch that is written in it, if one is. Raises BadFile for what does more than compute, BadModel for what torch.onnx cannot
    write, or what is not a function of images.
    """
    inspect_script(path)
    try:
        with quiet():
            model = torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:
        raise BadFile(f"{path} cannot be loaded as TorchScript: {reason(error)} Save it again with torch.jit.save.") from error
    if not isinstance(model, torch.jit.ScriptModule):
        raise BadModel(f"{path} is a function of TorchScript and no module. {INSTEAD}")
    takes = [argument.name for argument in cast(Any, model.forward).schema.arguments[1:]]
    if len(takes) != 1:
        raise BadModel(
            f"{path} is TorchScript that takes {', '.join(takes) or 'nothing'}; it has to take images alone. {INSTEAD}"
        )
    batch = _batch(path, model, size)
    with TemporaryDirectory() as folder:
        file, count = Path(folder, f"{path.stem}.onnx"), len(tensors_in(model(noise_of(batch, size))))
        names = [IMAGE, *(f"output_{i}" if i else "output" for i in range(count))]
        rows = {} if batch else {name: {0: "batch"} for name in names}
        try:
            with quiet():
                torch.onnx.export(
                    model, (noise_of(batch, size),), file, dynamo=False, input_names=names[:1], output_names=names[1:],
                    dynamic_axes=rows, opset_version=OPSET,
                )  # fmt: skip
        except Exception as error:
            raise BadModel(f"{path} is TorchScript that torch.onnx cannot write: {reason(error)} {INSTEAD}") from error
        yield file, model, batch


def refuse_others(path: Path, script: Any, program: Any, batch: int | None, size: Sequence[int]) -> None:
    """Raise BadModel where the program that was read of the ONNX file gives something else than the TorchScript."""
    images = noise_of(batch, size)
    with torch.no_grad():
        want, got = tensors_in(script(images)), tensors_in(program(images))
    if not all_alike(want, got):
        raise BadModel(f"{path} is TorchScript that torch.onnx writes as another function: its numbers differ. {INSTEAD}")


def inspect_script(path: Path) -> None:
    """Raise BadFile where a file is damaged, or its code could do more than compute."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise BadFile(f"{path} is refused: its table of contents is ambiguous. Save it again with torch.jit.save.")
            for name in names:
                inside = name.partition("/")[2]
                if SOURCE.fullmatch(inside) or PICKLE.fullmatch(inside):
                    found = _more_than_computes(archive.read(name).decode("utf-8" if inside.endswith(".py") else "latin-1"))
                    if found:
                        raise BadFile(f"{path} is refused: {inside} has {found}, which can do more than compute. {INSTEAD}")
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise BadFile(f"{path} is damaged: {reason(error)} Copy it again, or save it again with torch.jit.save.") from error


def _more_than_computes(text: str) -> str | None:
    """What in the text of TorchScript, or in a pickle, is not known to compute and nothing else. It is read as a text, not as a
    tree, so that no other reading of it hides anything; a comment, which torch writes none of, could part a name.
    """
    if NATIVE in text:
        return f"an object of {NATIVE}"
    found = LOADING.search(text) or DISK.search(text)
    if found:
        return found[0]
    for space, name in OPERATOR.findall(text):
        if space not in NAMESPACES and not (space == "prim" and name in PRIMITIVES):
            return f"ops.{space}.{name}"
    return None


def _batch(path: Path, model: torch.jit.ScriptModule, size: Sequence[int]) -> int | None:
    """None where each image of two has the outputs that it has alone, else 1. Raises BadModel where not even one is taken."""
    one, two = noise_of(1, size), noise_of(2, size)
    one[0] = two[-1]
    with torch.no_grad():
        try:
            alone = tensors_in(model(one))
        except Exception as error:
            shown = ", ".join(map(str, (1, *size)))
            raise BadModel(
                f"{path} is TorchScript that does not take one image ({shown}): {_last(error)} Give the size that it was "
                "traced for, --input-size 3,224,224, and trace it with one image."
            ) from error
        if not all_alike(alone, tensors_in(model(one))):
            raise BadModel(f"{path} gives other numbers each time: it was traced in training. Trace model.eval().")
        try:
            return None if all_alike(alone, [value[-1:] for value in tensors_in(model(two))]) else 1
        except Exception as error:
            if halt := stopped(error):
                raise halt from error
            return 1


def _last(error: Exception) -> str:
    """What torch says behind its trace through the code of TorchScript."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1].removeprefix('RuntimeError: ').rstrip('.') if lines else type(error).__name__}."
