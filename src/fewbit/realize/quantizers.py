"""Whether the QuantizeLinear nodes that torch.onnx wrote are those of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import onnx_ir as ir
import torch

from fewbit.core.plan import Choice
from fewbit.errors import Fault

LISTED = 8  # sites in a message


def check_quantizers(quantizers: Sequence[ir.Node], choices: Sequence[Choice]) -> None:
    """Raise Fault where the nodes are not those of the choices, in their order: another number of them, or another scale. Sites
    that have none are named where scales tell which they are.
    """
    if len(quantizers) != len(choices):
        lacking = without_quantizer(quantizers, choices)
        named = (
            f" There is none for {', '.join(lacking[:LISTED])}{', ...' if len(lacking) > LISTED else ''}." if lacking else ""
        )
        wrote = f"torch.onnx wrote {len(quantizers)} QuantizeLinear nodes for {len(choices)} activation sites."
        raise Fault(wrote + named, lacking)
    for node, choice in zip(quantizers, choices, strict=True):
        if not _has_scale(node, choice):
            raise Fault(f"The QuantizeLinear written for {choice.site} has another scale than the plan.", [choice.site])


def without_quantizer(quantizers: Sequence[ir.Node], choices: Sequence[Choice]) -> list[str]:
    """The sites in whose places among the quantizers, by their scales, none stands; nothing where the scales do not tell."""
    left, lacking = list(quantizers), list[str]()
    for choice in choices:
        if left and _has_scale(left[0], choice):
            left.pop(0)
        else:
            lacking.append(choice.site)
    return [] if left else lacking


def _has_scale(node: ir.Node, choice: Choice) -> bool:
    """Whether a quantizer has the scale of a choice."""
    scale, wanted = ir.convenience.get_const_tensor(cast(Any, node.inputs[1])), choice.qparams.scale.cpu().flatten()
    return scale is not None and torch.equal(torch.from_numpy(scale.numpy().copy()).flatten(), wanted)
