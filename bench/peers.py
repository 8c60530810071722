"""Stock flows on the float twin of a run, with the run's own calibration images, beside the run itself.

    python bench/peers.py RUN --images CALIBRATION --score SCORED --out peers/

onnxruntime's static quantizer (u8 activations, s8 weights per channel; min-max and percentile), the same on the inputs of
linear layers only, and NNCF for openvino (needs `pip install nncf`). Writes the models, and their accuracy in the runtime
that they are made for; bench/latency.py times them.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from fewbit import Run
from fewbit.files import write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.export import ExportedProgram

    from fewbit.data.images import Images


def stock(float_path: Path, batches: Iterable[Tensor], out: Path, *, method: str, linear_only: bool = False) -> None:
    """onnxruntime.quantization.quantize_static as its documentation recommends for x86."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        whole = Path(folder) / "whole.onnx"  # weights that lie in a file beside the model are not taken along
        onnx.save(onnx.load(str(float_path)), str(whole))
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        constants = {i.name for i in graph.initializer}
        name = next(port.name for port in graph.input if port.name not in constants)
        products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]
        activations_only = [n.name for n in products if n.input[1] not in constants]
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"] if linear_only else None,
            nodes_to_exclude=activations_only if linear_only else None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile if method == "percentile" else CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]} if linear_only else {},
        )


def has_attention(float_path: Path) -> bool:
    """Whether a float file is a transformer's, for which NNCF has options of its own."""
    return any(node.op_type == "Softmax" for node in onnx.load(str(float_path)).graph.node)


def pixels(images: Images) -> list[NDArray[Any]]:
    """What the model takes, an image at a time."""
    return [batch.numpy() for batch in images.batches(1)]


def with_nncf(float_path: Path, images: Images, out: Path, *, transformer: bool) -> None:
    """nncf.quantize with its defaults; the model is an openvino file."""
    import nncf
    import openvino as ov

    dataset = nncf.Dataset(pixels(images))
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    model = nncf.quantize(ov.Core().read_model(str(float_path)), dataset, model_type=kind, subset_size=len(images))
    ov.save_model(model, str(out), compress_to_fp16=False)


def with_torchao(program: ExportedProgram, batches: Iterable[Tensor]) -> Any:
    """torchao's post-training quantization for x86, as its documentation has it, for Inductor to compile; of the batches those
    of the program's size calibrate.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    size = len(program.example_inputs[0][0])
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(program.module(), quantizer)
        for images in batches:
            if len(images) == size:
                prepared(images)
        return convert_pt2e(prepared)


def main() -> None:
    from fewbit.task.task import recognise
    from fewbit.verify import evaluate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--score", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scored", type=int, help="score on so many images at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run.open(args.run)
    images = run.images(args.images, limit=run.record["request"]["calibration"], labels=False)
    scored = run.images(args.score, limit=args.scored)
    source, outputs = args.run / "float.onnx", run["exact"].outputs
    attention = has_attention(source)
    made: list[tuple[str, Path, str]] = [("fewbit", args.run / "model.onnx", "onnxruntime")]
    for method in ("minmax", "percentile"):
        path = args.out / f"onnxruntime_{method}.onnx"
        stock(source, images.batches(16), path, method=method)
        made.append((f"onnxruntime static, {method}", path, "onnxruntime"))
    if attention:
        path = args.out / "linear_only.onnx"
        stock(source, images.batches(16), path, method="minmax", linear_only=True)
        made.append(("onnxruntime static, linear inputs only", path, "onnxruntime"))
    if importlib.util.find_spec("nncf"):
        path = args.out / "nncf.xml"
        with_nncf(source, images, path, transformer=attention)
        made.append(("NNCF", path, "openvino"))
    rows = []
    for name, path, runtime in made:
        score = evaluate(source, path, scored, outputs, recognise(outputs), runtime=runtime)
        rows.append({"flow": name, "images": score.images, **score.to_json()})
        rating = score.rating
        before, after = rating.float_score, rating.score
        drop = "unknown" if before is None or after is None else f"{before - after:+.2f}"
        print(f"{name:40} drop {drop}  agreement {rating.agreement:.2f} %", flush=True)
    write_json(args.out / "peers.json", rows)


if __name__ == "__main__":
    main()
