"""The numbers in a file against the plan: codes of weights and biases by the names of their sites, and everything, by name,
against the same plan realized again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from fewbit.core.checks import Deviation, SiteCheck
from fewbit.core.graph import Graph, flat_name
from fewbit.core.grid import along, multiples_of
from fewbit.core.inputs import arrays_of, example
from fewbit.core.plan import Choice, Plan
from fewbit.core.record import MADE
from fewbit.errors import AGAIN, BadFile
from fewbit.realize.chosen import CHOSEN
from fewbit.realize.qdq import CODES
from fewbit.runtimes import OnnxRuntime

Arrays = Mapping[str, NDArray[np.generic]]
OPERANDS = {1: "scale", 2: "zero point"}  # of QuantizeLinear and DequantizeLinear


def stored_codes(graph: Graph, plan: Plan, path: Path, file: onnx.ModelProto) -> tuple[SiteCheck, ...]:
    """Codes of every weight and integer bias of a plan, as its file has them; packed ones as its nodes unpack them."""
    choices = [choice for choice in plan.choices.values() if choice.codes is not None]
    choices += [bias.integer for bias in plan.biases.values() if bias.integer is not None]
    names, arrays = {flat_name(choice.site) for choice in choices}, initializers(file)
    packed = [output for node in file.graph.node for output in node.output if output in names]
    if packed:
        batch = example(graph.inputs, torch.zeros(graph.at_a_time(1), *graph.input_shape))
        arrays |= OnnxRuntime(path, optimise=False, outputs=packed).run(*arrays_of(graph.inputs, batch))
    return tuple(_stored(graph, choice, arrays) for choice in choices)


def _stored(graph: Graph, choice: Choice, arrays: Arrays) -> SiteCheck:
    assert choice.codes is not None
    codes = choice.codes.to(torch.int32)
    if choice.grid.multiples:  # the file has codes times multiple
        codes = codes * along(multiples_of(choice.qparams.scale, choice.grid).to(torch.int32), codes, 0)
    turned = choice.role == "weight" and graph.op(graph.site(choice.site).readers[0][0]).kind == "linear"
    ours = (codes.t() if turned else codes).contiguous()
    found = arrays.get(flat_name(choice.site))
    if found is None:  # torch.onnx writes equal tensors once, under the name of the first
        found = next(
            (array for array in arrays.values() if array.shape == ours.shape and np.array_equal(array, ours.numpy())), None
        )
    if found is not None and np.issubdtype(found.dtype, np.floating):  # a file of real weights
        return _counted(choice.site, choice.real.t() if turned else choice.real, torch.from_numpy(np.array(found)))
    theirs = torch.zeros(0) if found is None else torch.from_numpy(found.astype(np.int32))
    return _counted(choice.site, ours, theirs)


def _counted(site: str, ours: Tensor, theirs: Tensor) -> SiteCheck:
    if ours.shape != theirs.shape:
        return SiteCheck(site, ours.numel(), ours.numel(), 0, ours.numel(), 0)
    difference = (ours - theirs).abs()
    wrong = int((ours != theirs).sum())
    return SiteCheck(site, ours.numel(), wrong, 0, wrong, int(difference.max()) if ours.numel() else 0)


def initializers(file: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Every initializer by name. Raises BadFile for one whose bytes are not those of its type and shape."""
    return {tensor.name: _array(tensor) for tensor in file.graph.initializer}


def _array(tensor: onnx.TensorProto, folder: Path | None = None) -> NDArray[np.generic]:
    """The numbers of an initializer; where they stand beside a file, of the file in `folder`."""
    try:
        return numpy_helper.to_array(tensor, base_dir=str(folder or ""))
    except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
        raise BadFile(f"the ONNX file has a broken tensor ({error}); {AGAIN}") from error


def deviations(
    name: str, found: onnx.ModelProto, expected: onnx.ModelProto, folders: tuple[Path, Path] | None = None
) -> tuple[Deviation, ...]:
    """What a file called `name` has that the same model, realized again, has not: tensors, nodes, inputs, outputs, metadata.
    `folders` are those of both files, where large weights may stand beside them.
    """
    _give_older_names(expected, found)
    alike = found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    if alike and not any(map(uses_external_data, found.graph.initializer)):
        return ()
    wrong = [*_tensors(found, expected, folders or (None, None)), *_nodes(found, expected), *_entries(found, expected)]
    return tuple(Deviation(name, *pair) for pair in wrong) or (() if alike else (Deviation(name, "the header", "is another"),))


def _give_older_names(expected: onnx.ModelProto, found: onnx.ModelProto) -> None:
    """Give what nodes have chosen the names that it has in a file which was written before it had one of its own, in place."""
    theirs = {output for node in found.graph.node for output in node.output}
    names = dict[str, str]()
    for ours, other in zip(expected.graph.node, found.graph.node, strict=False):
        if (ours.op_type, len(ours.output)) == (other.op_type, len(other.output)):
            pairs = zip(ours.output, other.output, strict=True)
            names |= {one: another for one, another in pairs if one.endswith(CHOSEN) and one not in theirs}
    for node in expected.graph.node if names else ():
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in expected.graph.value_info if names else ():
        value.name = names.get(value.name, value.name)


def _tensors(
    found: onnx.ModelProto, expected: onnx.ModelProto, folders: tuple[Path | None, Path | None]
) -> Iterator[tuple[str, str]]:
    theirs, ours = ({tensor.name: tensor for tensor in file.graph.initializer} for file in (found, expected))
    read = _readers(expected)
    for tensor in dict.fromkeys([*ours, *theirs]):
        label = f"{tensor} ({read[tensor]})" if tensor in read else tensor
        if tensor not in theirs or tensor not in ours:
            yield label, "is missing" if tensor in ours else "does not belong there"
            continue
        one, other = _array(theirs[tensor], folders[0]), _array(ours[tensor], folders[1])
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            yield label, f"is {one.dtype} {one.shape}, not {other.dtype} {other.shape}"
        elif (a := one.tobytes()) != (b := other.tobytes()):
            differ = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
            values = int(differ.reshape(max(one.size, 1), -1).any(1).sum())
            yield label, f"has {values} of {one.size} values changed"


def _readers(file: onnx.ModelProto) -> dict[str, str]:
    """What each initializer is, from the first node that reads it."""
    read: dict[str, str] = {}
    for node in file.graph.node:
        for place, tensor in enumerate(node.input):
            of = node.output[0].removesuffix(CODES) if node.op_type == "QuantizeLinear" else node.input[0].removesuffix(CODES)
            quantizer = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            what = OPERANDS.get(place) if quantizer else None
            read.setdefault(tensor, f"{what} of {of}" if what else f"read by {node.name or node.op_type}")
    return read


def _nodes(found: onnx.ModelProto, expected: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    theirs, ours = ({", ".join(n.output): n for n in model.graph.node} for model in (found, expected))
    for output in dict.fromkeys([*ours, *theirs]):
        if output not in theirs or output not in ours:
            yield f"the node of {output}", "is missing" if output in ours else "does not belong there"
        elif theirs[output] != ours[output]:
            yield f"the node of {output} ({ours[output].op_type})", "is another"
    for what in ("input", "output"):
        if list(getattr(found.graph, what)) != list(getattr(expected.graph, what)):
            yield f"the model's {what}s", "are others"


def _entries(found: onnx.ModelProto, expected: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    theirs, ours = ({entry.key: entry.value for entry in model.metadata_props} for model in (found, expected))
    for key in dict.fromkeys([*ours, *theirs]):
        if key not in theirs or key not in ours:
            yield f"metadata entry {key}", "is missing" if key in ours else "does not belong there"
        elif theirs[key] != ours[key]:
            yield f"metadata entry {key}", _other(theirs[key], ours[key]) if key == MADE else "is another"


def _other(theirs: str, ours: str) -> str:
    """In which keys an entry of JSON is another; keys that are in the file alone may be those of another fewbit."""
    try:
        found, expected = (dict(_flat(json.loads(text))) for text in (theirs, ours))
    except ValueError:
        return "is another"
    differ = [name for name, value in expected.items() if name in found and found[name] != value]
    unknown = [name for name in found if name not in expected]
    if unknown or differ != ["sha256"]:  # that of all others follows
        differ = [name for name in differ if name != "sha256"]
    says = [f"has another {', '.join(differ)}"] if differ else []
    if unknown:
        writer = f"{found.get('fewbit')!s:.40}"
        says.append(f"has {', '.join(unknown)}, which this fewbit does not write (it was written by fewbit {writer})")
    return " and ".join(says) or "is another"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of what stands in dicts; names have dots between the keys."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, one in value.items():
        yield from _flat(one, f"{name}.{key}" if name else str(key))
