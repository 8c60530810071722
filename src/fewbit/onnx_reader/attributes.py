"""Attributes that nobody read: a node with one would be computed without it, so it is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from fewbit.errors import BadModel
from fewbit.onnx_reader.values import Node

# what changes no number here: types to compute in, rules for float8, and what training alone reads
ANYWHERE = {"round_mode", "saturate", "softmax_precision", "stash_type"}
IDLE: dict[str, set[str]] = {
    "Attention": {"kv_num_heads", "mask_filter_value", "past_present_share_buffer", "q_num_heads", "rotary_embedding_dim"},
    "BatchNormalization": {"momentum"},
    "Conv": {"kernel_shape"},  # the weight has it
    "ConvTranspose": {"kernel_shape", "pads"},  # the weight has the former, output_shape takes the place of the latter
    "DeformConv": {"group", "kernel_shape", "offset_group"},  # the sizes of what it reads say them
    "Dropout": {"ratio", "seed"},
    "FusedConv": {"kernel_shape"},
    "FusedGemm": {"activation_gamma"},  # of activations that are not taken
    "MaxPool": {"storage_order"},  # of the places, which are written where they are read
    "MultiHeadAttention": {"mask_filter_value"},  # read where there is a mask
    "Pad": {"value"},  # read where it is padded with one
    "Resize": {  # each read where the mode has it
        "cubic_coeff_a", "exclude_outside", "extrapolation_value", "keep_aspect_ratio_policy", "nearest_mode",
    },
    "RotaryEmbedding": {"num_heads", "rotary_embedding_dim"},  # the sizes of what it reads say them
    "Split": {"num_outputs"},  # its outputs say it
    "TopK": {"sorted"},  # in order is as good as in any order; where what the runtime gives shows its own, that is said
}  # fmt: skip


def refuse_unread(node: Node) -> None:
    """Raise BadModel where a node that was computed has an attribute that nobody read, except where it has no part in what was
    computed or its value is the default of the operator.
    """
    for name in node.attributes.keys() - node.seen - ANYWHERE - IDLE.get(node.op, set()):
        value = node.attributes[name]
        if value != defaults(node.op, node.domain, node.opset).get(name):
            said = np.array2string(value, threshold=6) if isinstance(value, np.ndarray) else repr(value)
            raise BadModel(
                f"node {node} has attribute '{name}' = {said}, which is not read here: without it the node computes other "
                "numbers. Export the network again with this part written in other operators."
            )


@cache
def defaults(op: str, domain: str, opset: int) -> dict[str, Any]:
    """The values that attributes of a standard operator have where a file leaves them out."""
    if domain or not onnx.defs.has(op, opset, domain):
        return {}
    given = onnx.defs.get_schema(op, opset, domain).attributes.items()
    values = {
        n: onnx.helper.get_attribute_value(a.default_value)
        for n, a in given
        if a.default_value.type != AttributeProto.UNDEFINED
    }
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
