"""The node tests that come with the onnx package, and running one with the reader."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from fewbit.errors import FewbitError
from fewbit.onnx_reader.file import all_nodes, constants_of, domain, nodes_of, opsets, split_constants
from fewbit.onnx_reader.module import OnnxModule
from fewbit.onnx_reader.operators import CONTROL, OPERATORS

NOWHERE = Path("nowhere")  # a folder of external data; these models have none


SLOW = {"averagepool", "lppool", "maxpool"}  # onnx takes seconds to compute what these should give


@cache
def node_tests(*, one_each: bool = False) -> dict[str, Any]:
    """Every node test by name, or the first of each operator without those of SLOW."""
    for name in [name for name in sys.modules if name.startswith("onnx.backend.test")]:
        del sys.modules[name]  # the tests are made when their modules are imported
    from onnx.backend.test.case import base, node

    if one_each:
        node._TargetOpType = _FirstOfEach()
        base.process_snippet = lambda *rest: ("", "")  # text for onnx's documentation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in pkgutil.iter_modules(node.__path__):
            if not one.ispkg and not (one_each and one.name in SLOW):
                importlib.import_module(f"{node.__name__}.{one.name}")
    return {case.name: case for case in node._NodeTestCases}


class _FirstOfEach(str):
    """Equal to the name of each operator once; onnx skips tests of operators that are another than this."""

    seen: ClassVar[set[str]] = set()
    __hash__ = str.__hash__

    def __bool__(self) -> bool:
        return True

    def __eq__(self, operator: object) -> bool:
        first = operator not in self.seen
        self.seen.add(str(operator))
        return first

    def __ne__(self, operator: object) -> bool:
        return not self == operator


def operators_of(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(domain(node), node.op_type) for node in all_nodes(model.graph)}


def is_taken(model: onnx.ModelProto) -> bool:
    """All of its operators are, and it has functions of its own in none of them."""
    return not model.functions and all(
        name in OPERATORS.get(where, {}) or (not where and name in CONTROL) for where, name in operators_of(model)
    )


def array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def module_of(model: onnx.ModelProto, fixed: dict[str, np.ndarray]) -> OnnxModule:
    """The module of a model; inputs that are `fixed` are constants of it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes, constants = split_constants(nodes_of(copy.graph, opsets(copy), NOWHERE, None))
    constants |= constants_of(copy.graph, NOWHERE) | fixed
    free = [i.name for i in model.graph.input if i.name not in constants]
    return OnnxModule(nodes, constants, free, [o.name for o in model.graph.output]).eval()


def run(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> tuple[OnnxModule, list[torch.Tensor], list[np.ndarray]]:
    """The module, the tensors that it takes, what it gives. Integers that torch has to know before are constants."""
    named = dict(zip((i.name for i in model.graph.input), inputs, strict=False))
    whole = {n: v for n, v in named.items() if v.dtype.kind in "iub"}
    last: Exception | None = None
    for fixed in ({}, whole, {n: v for i, (n, v) in enumerate(named.items()) if i}, named):
        try:
            with torch.no_grad():
                fixed = {n: v.astype(np.float32) if v.dtype.kind not in "iub" else v for n, v in fixed.items()}
                module = module_of(model, fixed)
                free = [_tensor(v) for n, v in named.items() if n not in fixed]
                return module, free, [t.numpy() for t in module(*free).values()]
        except FewbitError as error:
            last = error
    raise AssertionError(str(last))


def _tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(value.astype(np.float32) if value.dtype.kind not in "iub" else value.copy())


def check(case: Any) -> None:
    """Run one node test. Raises AssertionError where the numbers are others."""
    half = _step(case)
    for inputs, outputs in case.data_sets:
        _, _, found = run(case.model, [array(i) for i in inputs])
        for got, want in zip(found, [array(o) for o in outputs], strict=True):
            assert got.shape == want.shape, f"shape {got.shape} instead of {want.shape}"
            rtol = max(case.rtol, half)
            want = want if want.dtype.kind in "iub" else want.astype(np.float32)
            np.testing.assert_allclose(got.astype(want.dtype), want, rtol=rtol, atol=max(case.atol, half / 4))


def _step(case: Any) -> float:
    """The relative step of the coarsest type of real numbers in a test: expected numbers are rounded to it, ours are not."""
    ports = (*case.model.graph.input, *case.model.graph.output)
    steps = {onnx.TensorProto.BFLOAT16: 2.0**-7, onnx.TensorProto.FLOAT16: 2.0**-10}
    return max(steps.get(port.type.tensor_type.elem_type, 0.0) for port in ports)
