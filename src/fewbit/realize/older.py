"""Files in an older opset than torch.onnx writes: the same nodes, where an older version of each operator says the same.

A node keeps what it is where its operator is in that opset and takes its inputs and attributes; attributes that came later go
where they have their default, and axes that became an input become an attribute again. What was computed is compared in the
runtime afterwards, as for every file.
"""

from __future__ import annotations

from typing import Any, cast

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema, SchemaError, get_schema

from fewbit.errors import BadModel

IR, OLDEST = 10, 18  # the IR version, and the oldest opset, of those that torch.onnx writes
REDUCES = "Reduce"  # how operators are called whose axes, the second input, were an attribute once


def in_opset(model: ir.Model, opset: int, ir_version: int) -> ir.Model:
    """The model in an opset and an IR version, in place. Raises BadModel that names the operator that it lacks."""
    written = model.opset_imports[""]
    if opset < written:
        for node in model.graph:
            if node.domain == "":
                _rewrite(model, node, written, opset)
        model.opset_imports[""] = opset
    model.ir_version = ir_version
    return model


def _rewrite(model: ir.Model, node: ir.Node, written: int, opset: int) -> None:
    try:
        old, new = (get_schema(node.op_type, version, "") for version in (opset, written))
    except SchemaError as error:
        since = min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == node.op_type)
        raise BadModel(
            f"the file needs {node.op_type} ({node.name}), which is in opset {since} and later; give --opset {since} or more, "
            "or leave it out."
        ) from error
    if node.op_type.startswith(REDUCES) and "axes" in old.attributes:
        _axes_as_attribute(model, node)
    for name, value in list(node.attributes.items()):
        if name not in old.attributes and _says_nothing(node, new, name, value.value):
            del node.attributes[name]
    lacks = [f"attribute {name}" for name in node.attributes if name not in old.attributes]
    lacks += [f"{len(node.inputs)} inputs"] * (len(node.inputs) > old.max_input)
    if lacks:
        raise BadModel(
            f"the file needs {node.op_type} ({node.name}) with {lacks[0]}, which opset {opset} does not have; give a "
            f"later one, up to --opset {new.since_version}, or leave it out."
        )


def _axes_as_attribute(model: ir.Model, node: ir.Node) -> None:
    """Make axes that are a constant an attribute, and drop the constant where nobody else reads it."""
    source = node.inputs[1] if len(node.inputs) == 2 else None
    axes = None if source is None else ir.convenience.get_const_tensor(source)
    if source is None or axes is None:
        return
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    node.resize_inputs(1)
    if source.is_initializer() and not source.consumers():
        del model.graph.initializers[str(source.name)]


def _says_nothing(node: ir.Node, schema: OpSchema, name: str, value: Any) -> bool:
    """Whether an attribute has its default, or allows a size of 0 in a shape that has none."""
    if name == "allowzero":
        shape = ir.convenience.get_const_tensor(cast(ir.Value, node.inputs[1]))
        return not value or (shape is not None and 0 not in shape.numpy())
    default = onnx.helper.get_attribute_value(schema.attributes[name].default_value)
    return bool(value == (default.decode() if isinstance(default, bytes) else default))
