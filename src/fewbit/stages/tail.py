"""What stays as it is behind the layers of an ONNX file: fitted to the target's files, written beside a run, read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.core.graph import Tail
from fewbit.errors import BadFile, BadModel
from fewbit.files import write_atomic
from fewbit.load import Loaded
from fewbit.onnx_file import load_proto
from fewbit.onnx_reader.cut import first_of, of_opset, tail_of
from fewbit.runtimes import AS_WRITTEN, open_session
from fewbit.said import ELSEWHERE, OTHERWISE
from fewbit.verify.tail import written

TAIL = "tail.onnx"


def fitted(loaded: Loaded, opset: int, runtime: str) -> Loaded:
    """The model with its tail, if it has one, in the opset of the files, and a sentence about it.

    Raises BadModel where onnx cannot convert it, or where it cannot be run and so nothing behind it be looked at.
    """
    if loaded.tail is None:
        return loaded
    tail, count, named = of_opset(loaded.tail, opset, loaded.ref), len(loaded.tail.nodes), first_of(loaded.tail)
    with written(tail) as path:
        for name in dict.fromkeys((AS_WRITTEN, runtime)):
            try:
                open_session(name, path)
            except BadFile as error:
                reason = str(error).partition(f"{path}: ")[2].replace(str(path), loaded.ref)
                reason = reason.removesuffix(ELSEWHERE).removesuffix(OTHERWISE).rstrip(". ")
                ports = [[one.name for one in some] for some in (loaded.inputs, loaded.outputs)]
                raise BadModel(
                    f"{loaded.ref} has {named}, which torch cannot express and {name} cannot run: {reason}. Choose a target of "
                    "another runtime, or cut the file in front of it: "
                    f"onnx.utils.extract_model({loaded.ref!r}, 'front.onnx', {ports[0]}, {ports[1]})."
                ) from error
    ends = [one.name for one in tail.turned.values()]
    if len(ends) == count:
        several = f"outputs {', '.join(ends)} have" if len(ends) > 1 else f"output {ends[0]} has"
        note = f"{loaded.ref}: its {several} the batch elsewhere than in front, as before; compared and rated by image."
        return replace(loaded, tail=tail, notes=(*loaded.notes, note))
    nodes = f"{count} nodes stay, {named} and those about it," if count > 1 else f"{named} stays"
    note = f"{loaded.ref}: {nodes} in float behind what is quantized; what is chosen there comes from integers."
    return replace(loaded, tail=tail, notes=(*loaded.notes, note))


def write_tail(tail: Tail | None, folder: Path) -> None:
    """Write it, if there is one."""
    if tail is not None:
        write_atomic(folder / TAIL, lambda file: file.write_bytes(tail.model))


def read_tail(folder: Path) -> Tail | None:
    """The same from its file."""
    return tail_of(load_proto(folder / TAIL)) if (folder / TAIL).exists() else None
