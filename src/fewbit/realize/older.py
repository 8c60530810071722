"""Files in an older opset than torch.onnx writes: the same nodes, where an older version of each operator says the same.

A node keeps what it is where its operator is in that opset and takes its inputs and attributes; attributes that came later go
where they have their default, and axes that became an input become an attribute again. What was computed is compared in the
runtime afterwards, as for every file.
"""

from __future__ import annotations

from typing import Any, cast

import onnx.helper
import onnx_ir as ir
from onnx.defs import OpSchema, SchemaError, get_schema

from fewbit.errors import BadModel

IR, OLDEST = 10, 18  # the IR version, and the oldest opset, of those that torch.onnx writes
REDUCES = "Reduce"  # how operators are called whose axes, the second input, were an attribute once


def in_opset(model: ir.Model, opset: int, ir_version: int) -> ir.Model:
    """The model in an opset and an IR version, in place. Raises BadModel that names the oldest opset that it can be in, and the
    operator that needs it.
    """
    written = model.opset_imports[""]
    if opset < written:
        nodes = [node for node in model.graph if node.domain == ""]
        needs = [(_least(node, written, opset), node) for node in nodes]
        least, node = max(needs, key=lambda pair: pair[0], default=(opset, None))
        if node is not None and least > opset:
            lack = _lack(node, written, least - 1)
            raise BadModel(
                f"the file needs {node.op_type} ({node.name}){lack}, which is in opset {least} and later; give "
                f"--opset {least} or more, or leave it out."
            )
        for node in nodes:
            _rewrite(model, node, written, opset)
        model.opset_imports[""] = opset
    model.ir_version = ir_version
    return model


def _least(node: ir.Node, written: int, opset: int) -> int:
    """The oldest opset, from `opset` on, that can say what a node does."""
    return next((older for older in range(opset, written) if _lack(node, written, older) is None), written)


def _lack(node: ir.Node, written: int, opset: int) -> str | None:
    """What of a node an opset lacks: nothing (None), the operator ("") or a part of it."""
    try:
        old, new = (get_schema(node.op_type, version, "") for version in (opset, written))
    except SchemaError:
        return ""
    as_attribute = node.op_type.startswith(REDUCES) and "axes" in old.attributes and _axes(node) is not None
    inputs, names = len(node.inputs) - as_attribute, [name for name in node.attributes if name not in old.attributes]
    lacking = [name for name in names if not _says_nothing(node, new, name, node.attributes[name].value)]
    if lacking:
        return f" with attribute {lacking[0]}"
    return f" with {inputs} inputs" if inputs > old.max_input else None


def _rewrite(model: ir.Model, node: ir.Node, written: int, opset: int) -> None:
    old = get_schema(node.op_type, opset, "")
    if node.op_type.startswith(REDUCES) and "axes" in old.attributes:
        _axes_as_attribute(model, node)
    for name in [name for name in node.attributes if name not in old.attributes]:
        del node.attributes[name]  # its default


def _axes(node: ir.Node) -> ir.TensorProtocol | None:
    """The axes of a node, where they are a constant input."""
    return ir.convenience.get_const_tensor(cast(ir.Value, node.inputs[1])) if len(node.inputs) == 2 else None


def _axes_as_attribute(model: ir.Model, node: ir.Node) -> None:
    """Make axes that are a constant an attribute, and drop the constant where nobody else reads it."""
    axes = _axes(node)
    if axes is None:
        return
    source = cast(ir.Value, node.inputs[1])
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
