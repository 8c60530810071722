"""What every node of a graph costs: shapes for one image, and multiply-accumulates as torch's own counter has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fewbit.core.fx import aten
from fewbit.core.inputs import Input, example, fed, image_among

Shape = Sequence[int]


class Costs(ShapeProp):
    """Runs a module on zeros and notes in `meta` of each node its shape and, as `macs`, its multiply-accumulates."""

    def __init__(self, module: GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.counter = counter

    def run_node(self, n: Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        n.meta["macs"] = (self.counter.get_total_flops() - before) // 2
        return result


def count_costs(module: GraphModule, inputs: Sequence[Input], batch: int = 1) -> None:
    """Shapes and multiply-accumulates of every node, for one image; `batch` of them run, where a model takes no fewer."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_beside()) as counter:
        Costs(module, counter).propagate(*fed(inputs, example(inputs, torch.zeros(batch, *image_among(inputs).shape))))
    for node in module.graph.nodes if batch > 1 else ():
        node.meta["macs"] //= batch
        if "tensor_meta" in node.meta:
            node.meta["tensor_meta"] = _for_one(node.meta["tensor_meta"], batch)


def _for_one(meta: Any, batch: int) -> Any:
    """What shape propagation has recorded for a batch, of a tensor or several, with the first dimension of one image."""
    if not hasattr(meta, "shape"):
        return type(meta)(_for_one(part, batch) for part in meta) if isinstance(meta, tuple | list) else meta
    whole = bool(meta.shape) and meta.shape[0] % batch == 0
    return meta._replace(shape=torch.Size((meta.shape[0] // batch, *meta.shape[1:]))) if whole else meta


def _beside() -> dict[Any, Callable[..., int]]:
    """Products that torch's counter does not know, each with the operations (two a product) from the shapes of its tensors."""
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
        aten.mv: lambda a, b, **kwargs: 2 * math.prod(a),
        aten.dot: lambda a, b, **kwargs: 2 * math.prod(a),
        aten._trilinear: _trilinear,
        aten.mkldnn_rnn_layer: _lstm,
    }
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # there once a model has imported torchvision
        formulas[torch.ops.torchvision.deform_conv2d] = _deformable
    return formulas


def _deformable(x: Shape, weight: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _lstm(x: Shape, inner: Shape, outer: Shape, *args: Any, **kwargs: Any) -> int:
    """What torch makes of a layer of an LSTM in one direction on a processor: x (time, batch, inputs), and the weights of its
    gates (4 hidden, inputs) and (4 hidden, hidden).
    """
    return 2 * math.prod(x[:-1]) * (math.prod(inner) + math.prod(outer))


def _trilinear(a: Shape, b: Shape, c: Shape, *new: Any, **kwargs: Any) -> int:
    """What torch.bilinear is made of: a, b and c with new dimensions at so many places, multiplied."""
    whole = [list(shape) for shape in (a, b, c)]
    for shape, places in zip(whole, new, strict=False):
        for place in places:
            shape.insert(place, 1)
    return 2 * math.prod(map(max, *whole))
