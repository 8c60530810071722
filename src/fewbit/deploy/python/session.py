"""A file in its runtime."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Run = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]


def session(path: Path, names: Sequence[str], runtime: str) -> Run:
    """A function from inputs by name to the outputs `names`. Raises ValueError where the runtime is not there, or does not load
    the file.
    """
    try:
        return {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](path, names)
    except ImportError as error:
        raise ValueError(f"{runtime} is needed and cannot be imported ({error}); type pip install {runtime}.") from error
    except MemoryError:
        raise
    except Exception as error:  # each runtime has errors of its own, and a path that is not UTF-8 gives a TypeError
        if re.search("[\udc80-\udcff]", str(path)):
            advice = "its path is not UTF-8 to Python here; set PYTHONUTF8=1, or give the folder a name of plain letters"
            raise ValueError(f"{path} cannot be loaded in {runtime}: {advice}.") from error
        why = " ".join(str(error).split())[:300].rstrip(". ")
        raise ValueError(
            f"{path} cannot be loaded in {runtime}: {why}; take the file of the run again, or a newer {runtime}."
        ) from error


def in_onnxruntime(path: Path, names: Sequence[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as it was timed
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: made.run(list(names), dict(feeds))


def in_openvino(path: Path, names: Sequence[str]) -> Run:
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(str(path)), "CPU", config).create_infer_request()

    def run(feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        results = request.infer(dict(feeds))
        return [results[name].copy() for name in names]

    return run
