"""The runtimes in process: onnxruntime and openvino behind one small interface."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from fewbit.errors import BadFile, FewbitError, UnknownName

BF16 = "openvino-bf16"  # openvino with bf16 in place of f32


class Session(Protocol):
    """A loaded model: float32 images (b, c, h, w) to its outputs by name."""

    runtime: str

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]: ...

    def call(self, inputs: Sequence[NDArray[Any]]) -> None: ...


class OnnxRuntime:
    """onnxruntime's CPU provider. Spinning is off, so that two sessions in one process do not steal each other's cores."""

    runtime = "onnxruntime"

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        optimise: bool = True,
        outputs: Sequence[str] = (),
        save_optimised: Path | None = None,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_optimised is not None:
            options.optimized_model_filepath = str(save_optimised)
        model: str | bytes = with_outputs(path, outputs).SerializeToString() if outputs else str(path)
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadFile(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
        self._names = [output.name for output in self._session.get_outputs()]
        self._input = self._session.get_inputs()[0].name

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        return dict(zip(self._names, self._session.run(None, {self._input: images}), strict=True))

    def call(self, inputs: Sequence[NDArray[Any]]) -> None:
        """Run on inputs of any type in the order of the file; what comes of it is dropped."""
        self._session.run(None, {given.name: x for given, x in zip(self._session.get_inputs(), inputs, strict=True)})


class OpenVino:
    """openvino's CPU plugin. `precision` is that of what stays float: f32, or bf16 where the processor has it."""

    runtime = "openvino"

    def __init__(self, path: Path, *, threads: int = 0, precision: str = "f32") -> None:
        import openvino as ov

        core = ov.Core()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            self.compiled = core.compile_model(core.read_model(str(path)), "CPU", config)
        except Exception as error:
            raise BadFile(f"openvino cannot load {path}: {str(error).splitlines()[0]}") from error
        self._request = self.compiled.create_infer_request()

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        found = self._request.infer([images])
        return {port.get_any_name(): np.array(value) for port, value in found.items()}

    def call(self, inputs: Sequence[NDArray[Any]]) -> None:
        """Run on inputs of any type in the order of the file; what comes of it is dropped."""
        self._request.infer(list(inputs))

    def precisions(self) -> Counter[str]:
        """How many nodes of the compiled model run in each precision, by layer type: `FullyConnected u8`."""
        model = self.compiled.get_runtime_model()
        infos = (node.get_rt_info() for node in model.get_ops())
        return Counter(f"{info['layerType'].astype(str)} {info['runtimePrecision'].astype(str)}" for info in infos)


def runtime_names() -> tuple[str, ...]:
    """The runtimes that are installed."""
    return tuple(name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None)


def runtimes_for(path: Path) -> tuple[str, ...]:
    """The installed runtimes that can load a file: onnxruntime alone where it has operators of onnxruntime's own."""
    opsets = onnx.load(str(path), load_external_data=False).opset_import
    own = any(opset.domain == "com.microsoft" for opset in opsets)
    return tuple(name for name in runtime_names() if name == "onnxruntime" or not own)


def timed(path: Path) -> tuple[str, ...]:
    """The runtimes to time a file in: openvino also with bf16 for what stays float, where the processor has it."""
    names = runtimes_for(path)
    if "openvino" not in names:
        return names
    import openvino as ov

    return (*names, BF16) if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else names


def open_session(runtime: str, path: Path, *, threads: int = 0) -> Session:
    """A session for a runtime by name; `openvino-bf16` computes in bf16 what stays float. Raises UnknownName, or FewbitError
    where the package is not installed.
    """
    if runtime not in ("onnxruntime", "openvino", BF16):
        raise UnknownName("runtime", runtime, ("onnxruntime", "openvino", BF16))
    package = runtime.removesuffix("-bf16")
    if package not in runtime_names():
        raise FewbitError(f"{package} is not installed: pip install 'fewbit[{package}]'.")
    if package == "onnxruntime":
        return OnnxRuntime(path, threads=threads)
    return OpenVino(path, threads=threads, precision="bf16" if runtime == BF16 else "f32")


def with_outputs(path: Path, names: Sequence[str]) -> onnx.ModelProto:
    """The model with more of its values as outputs. Raises BadFile for a broken file."""
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise BadFile(
            f"{path} is not a readable ONNX file ({error}); write the run again with fewbit quantize --force."
        ) from error
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model
