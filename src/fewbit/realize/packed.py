"""The plan as two files: plan.json, for people, and plan.safetensors, with every number exactly.

plan.safetensors holds for each weight `<site>.codes` (bit-packed to the bits of its grid), for every site `<site>.scale` and
`<site>.zero`, for every op whose bias the plan has `<op>.bias` (int32 codes, or float32), and as `float.<name>` the tensors
of the graph that stayed float. Together with the program's structure this is the whole quantized model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.fx import Node

from fewbit.core.fx import argument, constant, is_constant
from fewbit.core.graph import Graph
from fewbit.core.grid import Grid, QParams, of_bias, values
from fewbit.core.plan import Bias, Choice, Fallback, Fixed, Own, PassLog, Plan, SameAs, ScaleSource, SharedWith
from fewbit.errors import AGAIN, BadFile
from fewbit.files import pack, read_json, read_tensors, unpack, write_atomic, write_json
from fewbit.folder import NUMBERS, PLAN

SCHEMA = 1


def save_plan(graph: Graph, plan: Plan, folder: Path) -> None:
    """Write plan.safetensors and then plan.json into a folder; both whole or not at all."""
    content = save(plan_tensors(graph, plan), metadata={"fewbit": str(SCHEMA)})  # save_file hides a full disk in another error
    write_atomic(folder / NUMBERS, lambda part: part.write_bytes(content))
    write_json(folder / PLAN, plan_json(graph, plan))


def plan_tensors(graph: Graph, plan: Plan) -> dict[str, Tensor]:
    """The numbers of plan.safetensors, by name."""
    tensors: dict[str, Tensor] = {}
    for choice in plan.choices.values():
        if choice.codes is not None:
            tensors[f"{choice.site}.codes"] = _encode(choice.codes, choice.grid)
        tensors[f"{choice.site}.scale"] = choice.qparams.scale.contiguous().clone()
        if bool((choice.qparams.zero != choice.qparams.zero.flatten()[0]).any()) or choice.codes is None:
            tensors[f"{choice.site}.zero"] = choice.qparams.zero.contiguous().clone()
    for name, bias in plan.biases.items():  # the scale of an integer bias is the product of two that are there
        tensor = bias.real if bias.integer is None else bias.integer.codes
        assert tensor is not None
        tensors[f"{name}.bias"] = tensor.contiguous().clone()
    quantized = {graph.site(name).tensor for name, choice in plan.choices.items() if choice.codes is not None}
    replaced = {graph.op(name).node for name in plan.biases}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr" and _is_replaced(node, replaced):
            continue
        if is_constant(node) and node.name not in quantized:
            tensors[f"float.{node.target}"] = constant(graph.module, node).contiguous().clone()
    return tensors


def plan_json(graph: Graph, plan: Plan) -> dict[str, Any]:
    """The plan without its large tensors: what `diff` compares and people read."""
    return {
        "schema": SCHEMA,
        "target": plan.target,
        "recipe": plan.recipe,
        "bits": plan.bits,
        "exemptions": list(plan.exemptions),
        "integer_ops": list(plan.integer_ops),
        "choices": [_choice_json(choice) for choice in plan.choices.values()],
        "fallbacks": [asdict(fallback) for fallback in plan.fallbacks],
        "biases": [_bias_json(name, bias) for name, bias in plan.biases.items()],
        "log": [asdict(entry) for entry in plan.log],
        "model": plan.model,
        "settings": plan.settings,
    }


def load_plan(graph: Graph, folder: Path) -> Plan:
    """The plan of a run folder. Raises BadFile where a file is truncated, or does not belong to the graph.

    Some numbers stand in both files or in the graph as well: what was read must give both files again.
    """
    record, path = read_json(folder / PLAN), folder / NUMBERS
    tensors = read_tensors(path)
    sites = {site.name: site for site in graph.sites}
    choices: dict[str, Choice] = {}
    try:
        for row in record["choices"]:
            grid, site = _grid(row["grid"]), row["site"]
            data = tensors[f"{site}.codes"] if row["role"] == "weight" else None
            codes = None if data is None else _decode(data, grid, sites[site].shape)
            scale, zero = tensors[f"{site}.scale"], tensors.get(f"{site}.zero")
            qparams = QParams(scale, torch.full(scale.shape, row["zero"], dtype=torch.int32) if zero is None else zero)
            source = _source(row["source"])
            choices[site] = Choice(
                site, row["role"], grid, qparams, row["method"], codes, row["all_readers"], row["why"], source
            )
        read = {operand for name in record["integer_ops"] for operand in graph.op(name).operands.values()}
        if unread := [site for site, choice in choices.items() if choice.codes is None and site not in read]:
            raise ValueError(f"none of the integer ops reads {unread[0]}")
        biases = {row["op"]: _bias(graph, row, tensors, choices) for row in record["biases"]}
        log = tuple(PassLog(e["name"], e["settings"], tuple(e["rows"]), e["summary"], e["about"]) for e in record["log"])
        plan = Plan(
            record["target"], record["recipe"], record["bits"], choices, tuple(record["integer_ops"]),
            tuple(Fallback(**fallback) for fallback in record["fallbacks"]), tuple(record["exemptions"]), biases, log,
            record["model"], record["settings"],
        )  # fmt: skip
        again = json.loads(json.dumps(plan_json(graph, plan))), plan_tensors(graph, plan)
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise BadFile(
            f"{folder / PLAN} and plan.safetensors do not fit each other or this model "
            f"({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    wrong = next(_unlike(record, again[0], PLAN), None) or next(_unlike_tensors(tensors, again[1]), None)
    if wrong is not None:
        raise BadFile(f"{folder}: {wrong}; {AGAIN}")
    return plan


def stored_numbers(folder: Path) -> dict[str, Tensor]:
    """The numbers (n,) of a run's plan.safetensors by their names there, codes one by one and zero points of every site: what
    two plans are compared by, without their models. Behind packed codes may stand a few of the lowest. Raises BadFile.
    """
    record, tensors = read_json(folder / PLAN), read_tensors(folder / NUMBERS)
    numbers = {name: tensor.flatten() for name, tensor in tensors.items()}
    try:
        for row in record["choices"]:
            site, grid = row["site"], _grid(row["grid"])
            scale = numbers[f"{site}.scale"]
            numbers.setdefault(f"{site}.zero", torch.full(scale.shape, row["zero"], dtype=torch.int32))
            if f"{site}.codes" in numbers:
                numbers[f"{site}.codes"] = _one_by_one(numbers[f"{site}.codes"], grid)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{folder / PLAN} and plan.safetensors do not fit each other ({error}); {AGAIN}") from error
    return numbers


def _one_by_one(packed: Tensor, grid: Grid) -> Tensor:
    """The codes (n,) that `_encode` packed, in its order."""
    if not grid.widths:
        if grid.bits in (8, 16, 32):
            return packed
        return unpack(packed, grid.bits, grid.low, (8 * len(packed) // grid.bits,))
    groups = [(len(rows), like) for rows, like in _alike(grid)]
    each = 8 * len(packed) // max(sum(count * like.bits for count, like in groups), 1)  # codes of a channel, at most
    while sum(sizes := [-(-count * each * like.bits // 8) for count, like in groups]) > len(packed):
        each -= 1
    parts = zip(packed.split(sizes), groups, strict=True)
    return torch.cat([unpack(part, like.bits, like.low, (8 * len(part) // like.bits,)) for part, (_, like) in parts])


def _unlike(found: Any, expected: Any, place: str) -> Iterator[str]:
    """Where two JSON values differ, and how."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key not in found or key not in expected:
                yield f"{place} has {'an unknown' if key in found else 'no'} {key}"
            else:
                yield from _unlike(found[key], expected[key], f"{place}, {key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, pair in enumerate(zip(found, expected, strict=True)):
            site = pair[1].get("site") if isinstance(pair[1], dict) else None
            yield from _unlike(*pair, f"{place} of {site}" if site else f"{place} {i}")
    elif found != expected or type(found) is not type(expected):
        yield f"{place} is {found!r:.60}, where plan.safetensors and the model have {expected!r:.60}"


def _unlike_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            yield f"plan.safetensors has {'an unknown' if name in found else 'no'} tensor {name}"
        elif found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name]):
            yield f"plan.safetensors: {name} is not that of the model in exported.pt2"


def _is_replaced(constant: Node, ops: set[str]) -> bool:
    """A bias that nothing reads but ops whose bias was corrected."""
    return bool(constant.users) and all(user.name in ops and argument(user, 2, "bias") is constant for user in constant.users)


def _bias(graph: Graph, row: dict[str, Any], tensors: dict[str, Tensor], choices: dict[str, Choice]) -> Bias:
    name, tensor = row["op"], tensors[f"{row['op']}.bias"]
    op = graph.op(name)
    channels = graph.site(op.operands["weight"]).shape[0]
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"a bias of shape {tuple(tensor.shape)} for {channels} channels")
    if row["grid"] is None:
        return Bias(tensor)
    grid = _grid(row["grid"])
    qparams = of_bias(choices[op.operands["input"]].qparams, choices[op.operands["weight"]].qparams, channels)
    integer = Choice(f"{name}:bias", "bias", grid, qparams, "derived", codes=tensor)
    return Bias(values(tensor.to(torch.int32), qparams, grid), integer)


def _bias_json(name: str, bias: Bias) -> dict[str, Any]:
    return {"op": name, "grid": None if bias.integer is None else asdict(bias.integer.grid)}


def _grid(fields: dict[str, Any]) -> Grid:
    return Grid(**{**fields, "widths": tuple(fields.get("widths", ()))})


SOURCES = {"own": Own, "same_as": SameAs, "shared_with": SharedWith, "fixed": Fixed}  # name in plan.json -> type


def _source(record: dict[str, Any]) -> ScaleSource:
    """Whose scale a site has, from plan.json."""
    kind, value = next(iter(record.items()))
    if kind == "shared_with":
        return SharedWith(tuple(value))
    return SameAs(value) if kind == "same_as" else SOURCES[kind]()  # type: ignore[return-value]


def _source_json(source: ScaleSource) -> dict[str, Any]:
    kind = next(name for name, cls in SOURCES.items() if isinstance(source, cls))
    return {kind: source.site if isinstance(source, SameAs) else list(source.sites) if isinstance(source, SharedWith) else None}


def _encode(codes: Tensor, grid: Grid) -> Tensor:
    """Whole bytes are stored as they are, anything else packed; channels of different widths together with their like."""
    if grid.widths:
        return torch.cat([pack(codes[rows], like.bits, like.low) for rows, like in _alike(grid)])
    return codes.to(grid.container).contiguous() if grid.bits in (8, 16, 32) else pack(codes, grid.bits, grid.low)


def _alike(grid: Grid) -> list[tuple[Tensor, Grid]]:
    """The channels of each width above 0, narrowest first, and their grid."""
    widths = torch.tensor(grid.widths)
    indices = [(widths == bits).nonzero().flatten() for bits in sorted({b for b in grid.widths if b})]
    return [(rows, grid.of_channel(int(rows[0]))) for rows in indices]


def _decode(packed: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    if grid.widths:
        codes, rest = torch.zeros(shape, dtype=torch.int32), packed
        for rows, like in _alike(grid):
            part = codes[rows]
            size = -(-part.numel() * like.bits // 8)
            codes[rows] = unpack(rest[:size], like.bits, like.low, tuple(part.shape))
            rest = rest[size:]
        if len(rest):
            raise ValueError(f"{len(rest)} bytes too many for channels of {grid.widths} bits")
        return codes.to(grid.container)
    if grid.bits not in (8, 16, 32):
        return unpack(packed, grid.bits, grid.low, shape).to(grid.container)
    if tuple(packed.shape) != shape:
        raise ValueError(f"codes of shape {tuple(packed.shape)} for a tensor of shape {shape}")
    return packed


def _choice_json(choice: Choice) -> dict[str, Any]:
    scale, zero = choice.qparams.scale, choice.qparams.zero
    return {
        "site": choice.site,
        "role": choice.role,
        "bits": choice.grid.bits,
        "grid": asdict(choice.grid),
        "scale": scale.item() if scale.ndim == 0 else {"min": scale.min().item(), "max": scale.max().item()},
        "zero": int(zero.flatten()[0]),
        "method": choice.method,
        "all_readers": choice.all_readers,
        "why": choice.why,
        "source": _source_json(choice.source),
    }
