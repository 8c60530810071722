"""ONNX files: read, with the weights that stand in a file beside them, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.errors import BadFile, shortened

if TYPE_CHECKING:
    import onnx

DATA = ".data"  # of the file beside an ONNX file that has its large weights


def is_external(path: Path) -> bool:
    """Whether weights of an ONNX file stand in a file beside it."""
    return path.with_name(path.name + DATA).exists()


def bytes_of(path: Path) -> int:
    """The bytes of a file, and of the one beside it."""
    return path.stat().st_size + (path.with_name(path.name + DATA).stat().st_size if is_external(path) else 0)


def load_proto(path: Path, *, data: bool = True) -> onnx.ModelProto:
    """An ONNX file, with the weights that stand in a file beside it, or without. Raises BadFile for a broken one."""
    import onnx

    if not path.exists():
        raise BadFile(f"{path} is not there; give an ONNX file or the folder of a finished run, as in run/model.onnx or run.")
    try:
        return onnx.load(str(path), load_external_data=data)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadFile(
            f"{path} is not a readable ONNX file ({shortened(said, 200)}). Give an ONNX file or the folder of a finished "
            "run, as in run/model.onnx or run; a run whose own file is broken is written again with fewbit quantize --force."
        ) from error


def with_outputs(path: Path, names: Sequence[str]) -> onnx.ModelProto:
    """The model with additional values as outputs. Raises BadFile for a broken file."""
    import onnx

    model = load_proto(path, data=False)
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model
