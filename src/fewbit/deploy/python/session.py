"""A file in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Run = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]


def session(path: Path, names: Sequence[str], runtime: str) -> Run:
    """A function from inputs by name to the outputs `names`."""
    return {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](path, names)


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
