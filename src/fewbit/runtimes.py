"""Every runtime that a target may name: what it can do, in `RUNTIMES`, and a session for those that run here."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fewbit.core.record import normalized_inside, pixels_of
from fewbit.errors import BadFile, CannotRun, FewbitError, UnknownName, stopped
from fewbit.folder import check_utf8
from fewbit.onnx_file import DATA, is_external, load_proto, with_outputs
from fewbit.said import said

TYPES = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16, "tensor(double)": np.float64}  # what is no float32
AS_WRITTEN = "onnxruntime"  # runs any file as written: the default, and the stand-in for a runtime that is not installed


class Session(Protocol):
    """A loaded model: its inputs in the order of the file to its outputs by name; `outputs` are values that are given beside
    them.

    `script`: two pieces of Python for a process of its own: what imports the runtime, and what loads `path` with `threads`
    threads and leaves a function `run` that takes the inputs by name.
    """

    runtime: ClassVar[str]
    script: ClassVar[tuple[str, str]]

    def __init__(self, path: Path, *, threads: int = 0, precision: str = "f32", outputs: Sequence[str] = ()) -> None: ...

    @classmethod
    def supports(cls, precision: str) -> bool:
        """Whether this processor computes float ops in a precision."""

    def feed(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """What the file takes: the inputs in its types, and of normalized images their pixels where it normalizes inside."""

    def run(self, *inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """The outputs by name. Raises CannotRun where the runtime cannot compute them."""

    def call(self, inputs: Sequence[NDArray[Any]]) -> None: ...


def _refused(runtime: str, path: Path, error: Exception) -> BadFile:
    """What is raised where a runtime does not load a file."""
    if not path.exists():
        return BadFile(f"{path} is not there, which {runtime} was to load: something removed it. Run the same command again.")
    return BadFile(f"{runtime} cannot load {path}: {said(error, path)}")


@contextmanager
def _running(runtime: str, path: Path) -> Iterator[None]:
    """Raise CannotRun for what a runtime says about the numbers that it is given."""
    try:
        yield
    except Exception as error:
        if halt := stopped(error):
            raise halt from error
        raise CannotRun(f"{path} cannot be run by {runtime} on some of the images: {said(error).rstrip('. ')}.") from error


class OnnxRuntime:
    """onnxruntime's CPU provider. Spinning is off, so that two sessions in one process do not steal each other's cores."""

    runtime: ClassVar[str] = "onnxruntime"
    script: ClassVar[tuple[str, str]] = (
        "import onnxruntime as ort",
        """
options = ort.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
run = lambda inputs: session.run(None, inputs)
""",
    )

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        precision: str = "f32",
        outputs: Sequence[str] = (),
        optimise: bool = True,
        save_optimised: Path | None = None,
    ) -> None:
        import onnxruntime as ort

        check_utf8(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_optimised is not None:
            options.optimized_model_filepath = str(save_optimised)
            if is_external(path):
                options.add_session_config_entry(
                    "session.optimized_model_external_initializers_file_name", save_optimised.name + DATA
                )
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.absolute().parent))
        model: str | bytes = with_outputs(path, outputs).SerializeToString() if outputs else str(path)
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _refused("onnxruntime", path, error) from error
        self._path = path
        self._names, ports = [output.name for output in self._session.get_outputs()], self._session.get_inputs()
        self._inputs = [port.name for port in ports]
        self.feed = feed_of(path, [np.dtype(TYPES.get(port.type, np.float32)) for port in ports])

    @classmethod
    def supports(cls, precision: str) -> bool:
        return precision == "f32"

    def run(self, *inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        feeds = dict(zip(self._inputs, self.feed(*inputs), strict=True))
        with _running("onnxruntime", self._path):
            found = self._session.run(None, feeds)
        return dict(zip(self._names, found, strict=True))

    def call(self, inputs: Sequence[NDArray[Any]]) -> None:
        """Run on inputs of any type, in the order of the file, and discard the outputs."""
        self._session.run(None, dict(zip(self._inputs, inputs, strict=True)))


class OpenVino:
    """openvino's CPU plugin. `precision` is that of float ops: f32, or bf16 where the processor has it."""

    runtime: ClassVar[str] = "openvino"
    script: ClassVar[tuple[str, str]] = (
        "import openvino as ov",
        """
config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
core = ov.Core()
request = core.compile_model(core.read_model(path), "CPU", config).create_infer_request()
run = lambda inputs: request.infer(inputs)
""",
    )

    def __init__(self, path: Path, *, threads: int = 0, precision: str = "f32", outputs: Sequence[str] = ()) -> None:
        import openvino as ov

        check_utf8(path)
        core, beside = ov.Core(), outputs and is_external(path)
        source = with_outputs(path, outputs).SerializeToString() if outputs and not beside else str(path)
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(source)
            if beside:  # bytes have no folder in which their weights lie
                model.add_outputs(list(outputs))
            self.compiled = core.compile_model(model, "CPU", config)
        except Exception as error:
            raise _refused("openvino", path, error) from error
        self._path, self._request = path, self.compiled.create_infer_request()
        self.feed = feed_of(path, [np.dtype(port.get_element_type().to_dtype()) for port in self.compiled.inputs])

    @classmethod
    def supports(cls, precision: str) -> bool:
        import openvino as ov

        return precision == "f32" or precision.upper() in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def run(self, *inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        feeds = self.feed(*inputs)
        with _running("openvino", self._path):
            outputs = self._request.infer(feeds)
        return {name: array for port, value in outputs.items() for array in [np.array(value)] for name in port.get_names()}

    def call(self, inputs: Sequence[NDArray[Any]]) -> None:
        """Run on inputs of any type, in the order of the file, and discard the outputs."""
        self._request.infer(list(inputs))

    def precisions(self) -> Counter[str]:
        """How many nodes of the compiled model run in each precision, by layer type: `FullyConnected u8`."""
        model = self.compiled.get_runtime_model()
        infos = (node.get_rt_info() for node in model.get_ops())
        return Counter(f"{info['layerType'].astype(str)} {info['runtimePrecision'].astype(str)}" for info in infos)


@dataclass(frozen=True)
class Runtime:
    """What fewbit knows about a runtime.

    session           None: it does not run here, and `AS_WRITTEN` computes its files
    precisions        what it can compute float ops in beside f32 where the processor can: the session `openvino-bf16`
    fusions           names of the fused operators that it has and does not make by itself (realize/fuse/)
    domain            that of operators of its own, which no other runtime loads
    kernels           the integer kernels of its optimised graph are counted
    quantizes_inside  its kernels make the codes that they read: no time of their own in a table of costs
    examples          the examples in C++ and JavaScript (deploy/templates/) load its files
    """

    name: str
    session: type[Session] | None = None
    precisions: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()
    domain: str = ""
    kernels: bool = False
    quantizes_inside: bool = False
    examples: bool = False

    @property
    def variants(self) -> dict[str, str]:
        """The name of a session -> its precision, where that is not f32."""
        return {f"{self.name}-{precision}": precision for precision in self.precisions}


RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "onnxruntime",
            OnnxRuntime,
            fusions=("matmul_bias", "multi_head_attention", "joint_qkv", "qattention", "quick_gelu", "factors_in_rows"),
            domain="com.microsoft",
            kernels=True,
            examples=True,
        ),
        Runtime(
            "openvino",
            OpenVino,
            precisions=("bf16",),
            fusions=(
                "scale_by_channel",
                "quantize_before_reshape",
                "quantize_rows",
                "quantize_before_concat",
                "clip_before_quantize",
                "scale_before_norm",
                "reduce_keeping_axes",
            ),
            quantizes_inside=True,
        ),
        Runtime("tensorrt"),
        Runtime("other"),  # a machine that only its target file describes
    )
}
RUNNABLE = {name: runtime for name, runtime in RUNTIMES.items() if runtime.session is not None}


def runtime_names() -> tuple[str, ...]:
    """The runtimes that are installed."""
    return tuple(name for name in RUNNABLE if importlib.util.find_spec(name) is not None)


def runtimes_for(path: Path) -> tuple[str, ...]:
    """The installed runtimes that load a file: one alone where it has operators of that runtime's own."""
    domains = {opset.domain for opset in load_proto(path, data=False).opset_import}
    owners = {name for name, runtime in RUNTIMES.items() if runtime.domain and runtime.domain in domains}
    return tuple(name for name in runtime_names() if owners <= {name} and _loads(name, path))


def _loads(runtime: str, path: Path) -> bool:
    try:
        open_session(runtime, path)
    except BadFile as error:
        if halt := stopped(error):
            raise halt from error
        return False
    return True


def timed(path: Path) -> tuple[str, ...]:
    """The sessions to time a file in: each runtime, and its other precisions where the processor has them."""
    names = runtimes_for(path)
    sessions = [(RUNNABLE[name].session, RUNNABLE[name].variants) for name in names]
    return (*names, *(n for session, variants in sessions for n, p in variants.items() if session and session.supports(p)))


def open_session(runtime: str, path: Path, *, threads: int = 0, outputs: Sequence[str] = ()) -> Session:
    """A session by the name of its runtime; `openvino-bf16` computes float ops in bf16. Raises UnknownName, or
    FewbitError where the package is not installed.
    """
    sessions = {name: (r, "f32") for name, r in RUNNABLE.items()}
    sessions |= {name: (r, precision) for r in RUNNABLE.values() for name, precision in r.variants.items()}
    if runtime not in sessions:
        raise UnknownName("runtime", runtime, tuple(sessions))
    entry, precision = sessions[runtime]
    if entry.name not in runtime_names() or entry.session is None:
        raise FewbitError(f"{entry.name} is not installed: pip install 'fewbit[{entry.name}]'.")
    return entry.session(path, threads=threads, precision=precision, outputs=outputs)


def feed_of(path: Path, types: Sequence[np.dtype[Any]]) -> Callable[..., list[NDArray[Any]]]:
    """What makes the inputs of a file: real numbers in their types, and pixels of images where it normalizes inside. Raises
    BadFile, when it is called, for real numbers to a file of pixels that does not say how.
    """
    of_pixels = any(dtype == np.uint8 for dtype in types)
    numbers = normalized_inside({e.key: e.value for e in load_proto(path, data=False).metadata_props}) if of_pixels else None

    def taken(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        if x.dtype.kind != "f":
            return x
        if dtype == np.uint8 and numbers is None:
            raise BadFile(f"{path} takes uint8 and does not say how it normalizes; give a file that takes floats.")
        return pixels_of(x, *numbers) if numbers and dtype == np.uint8 else x.astype(dtype, copy=False)

    return lambda *inputs: [taken(x, dtype) for x, dtype in zip(inputs, types, strict=True)]
