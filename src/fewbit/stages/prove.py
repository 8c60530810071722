"""Realize, verify, evaluate, bench: write the files, and compare them in the runtime with simulation and float model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbit import verify as proofs
from fewbit.core.values import Checks, Graph, Plan
from fewbit.data.images import Images
from fewbit.files import write_atomic
from fewbit.progress import Progress
from fewbit.realize import float_onnx
from fewbit.realize import realize as write_onnx
from fewbit.request import Batches, Request, Seconds, Threads, checked
from fewbit.runtimes import RUNTIMES
from fewbit.verify import Latency, Load, Score

MODEL, TWIN, SAMPLE = "model.onnx", "float.onnx", "images.safetensors"
CHECKED = 8  # images on which codes are compared


def realize(
    graph: Graph, exact: Graph, plan: Plan, scored: Images, request: Request, folder: Path, progress: Progress
) -> tuple[Path, Path, Tensor]:
    """model.onnx, float.onnx, and the few images (n, c, h, w) to compare codes on."""
    progress.expect(2)
    target, (model, twin) = request.hardware, (folder / MODEL, folder / TWIN)
    if not model.exists():
        write_onnx(graph, plan, model, **target.file_format)
    progress.advance()
    if not twin.exists():
        float_onnx(exact, twin, opset=target.opset)
    progress.advance()
    sample = scored.batches(CHECKED)[0].contiguous()
    write_atomic(folder / SAMPLE, lambda file: save_file({"images": sample}, file))
    return model, twin, sample


def realized(folder: Path) -> tuple[Path, Path, Tensor]:
    """The same, loaded from the files."""
    return folder / MODEL, folder / TWIN, load_file(folder / SAMPLE)["images"]


def verify(graph: Graph, plan: Plan, model: Path, sample: Tensor, runtime: str, progress: Progress) -> Checks:
    """Compare codes and outputs of model.onnx on a few images; also optimised where onnxruntime is the plan's runtime."""
    progress.expect(3)
    optimised = RUNTIMES[runtime].kernels and not stands_in(plan)
    return proofs.compare(
        graph, plan, model, sample.split(4), optimised=optimised, progress=lambda text: progress.advance(1, text)
    )


def stands_in(plan: Plan) -> bool:
    """Whether the plan is for a runtime that cannot run here, and another one computes its file as written."""
    return any(fallback.kind == "runtime" for fallback in plan.fallbacks)


def evaluate(model: Path, twin: Path, scored: Images, runtime: str, threads: int, progress: Progress) -> Score:
    """Accuracy of model.onnx and float.onnx in the runtime, on images that are not used for calibration."""
    threads = checked("threads", threads, Threads)
    progress.expect(len(scored))
    return proofs.evaluate(twin, model, scored, runtime=runtime, threads=threads, progress=progress.advance)


def bench(
    model: Path, twin: Path, threads: int, seconds: float, progress: Progress, runtimes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8), repeats: int = 1,
) -> tuple[list[Latency], list[Load]]:  # fmt: skip
    """Latency and load time in the installed runtimes, or in `runtimes`.

    Each runtime and batch is measured for `seconds`; each file is loaded by `repeats` processes.
    """
    batches, threads = checked("batch", batches, Batches), checked("threads", threads, Threads)
    seconds = checked("seconds", seconds, Seconds)
    timed = list(proofs.timed(model)) if runtimes is None else list(runtimes)
    whole = [name for name in proofs.runtimes_for(model) if runtimes is None or name in timed]
    progress.expect(len(timed) * len(batches) + len(whole))
    dims = onnx.load(str(twin), load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    files = twin, model, (dims[1].dim_value, dims[2].dim_value, dims[3].dim_value)
    times = proofs.bench(
        *files, runtimes=timed, batches=batches, threads=threads, seconds=seconds,
        progress=lambda text: progress.advance(1, text),
    )  # fmt: skip
    return times, proofs.loads(
        *files, runtimes=whole, threads=threads, runs=repeats, progress=lambda text: progress.advance(1, text)
    )
