"""A file whose image comes in whole numbers (uint8, int64), its preparation inside: where to cut it."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto

from fewbit.errors import BadModel
from fewbit.onnx_reader.file import of_fewbit, reads

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
PREPARES = ("Cast", "Transpose", "Identity", "Div", "Mul", "Sub", "Add")


def refuse_whole_images(model: ModelProto, path: Path) -> None:
    """Raise BadModel where no input is a map in floats and one is a map in whole numbers, with the value behind its Cast that
    can be the input instead.
    """
    stored = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in stored]
    maps = [one for one in inputs if len(one.type.tensor_type.shape.dim) == 4]
    if not maps or any(one.type.tensor_type.elem_type in FLOATS for one in maps):
        return
    image = maps[0]
    kind = TensorProto.DataType.Name(image.type.tensor_type.elem_type).lower()
    message = f"the image '{image.name}' of {path} is in {kind}; images in floats are taken."
    made, steps = of_fewbit(model, path), _steps(model, image.name)
    if not any(node.op_type == "Cast" for node in steps):
        raise BadModel(
            f"{message} Export the network without what prepares its image, and give that to --mean and --std.{made}"
        )
    cast = next(i for i, node in enumerate(steps) if node.op_type == "Cast")
    turned = next((i for i, node in enumerate(steps) if node.op_type == "Transpose"), 0)  # channels in front
    last = max(cast, turned)
    plain = all(node.op_type in ("Cast", "Transpose", "Identity") for node in steps[: last + 1])
    given = "the pixels from 0 to 255 are then given with --mean 0 --std 0.00392157"  # one number is for all channels
    others = [one.name for one in inputs if one.name != image.name]
    ends = [one.name for one in model.graph.output]
    raise BadModel(
        f"{message} Make '{steps[last].output[0]}', which {steps[last].op_type} '{steps[last].name}' writes, the input: "
        f"onnx.utils.extract_model({str(path)!r}, 'floats.onnx', {[steps[last].output[0], *others]}, {ends}); "
        f"{given if plain else 'what stands in front of it is then said with --mean and --std'}.{made}"
    )


def _steps(model: ModelProto, name: str) -> list[NodeProto]:
    """The nodes that prepare an image, each the only reader of what the one before wrote."""
    steps: list[NodeProto] = []
    while True:
        readers = [node for node in model.graph.node if name in reads(node)]
        if len(readers) != 1 or readers[0].op_type not in PREPARES or len(readers[0].output) != 1:
            return steps
        steps.append(readers[0])
        name = readers[0].output[0]
