"""The plan as two files: plan.json, for people, and plan.safetensors, with every number exactly.

plan.safetensors holds, for each weight or bias site, `<site>.codes` (bit-packed to the bits of its grid), for every site
`<site>.scale` and `<site>.zero`, for every op with a corrected float bias `<op>.bias`, and as `float.<name>` the tensors of
the graph that stayed float. Together with the program's structure this is the whole quantized model.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.fx import Node

from fewbit.capture.fx import argument, constant, is_constant
from fewbit.core.grid import Grid, QParams, of_bias
from fewbit.core.values import Choice, Fallback, Graph, Plan
from fewbit.errors import BadFile
from fewbit.files import pack, read_json, unpack, write_atomic, write_json

SCHEMA = 1


def save_plan(graph: Graph, plan: Plan, folder: Path) -> None:
    """Write plan.safetensors and then plan.json into a folder; both whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for choice in plan.choices.values():
        if choice.codes is not None:
            tensors[f"{choice.site}.codes"] = _stored(choice.codes, choice.grid)
        if choice.method != "derived":  # a derived step is a product of two that are there
            tensors[f"{choice.site}.scale"] = choice.qparams.scale.clone()
            if bool((choice.qparams.zero != choice.qparams.zero.flatten()[0]).any()) or choice.codes is None:
                tensors[f"{choice.site}.zero"] = choice.qparams.zero.clone()
    quantized = {graph.site(name).tensor for name, choice in plan.choices.items() if choice.codes is not None}
    tensors |= {f"{name}.bias": bias.contiguous().clone() for name, bias in plan.biases.items()}
    replaced = {graph.op(name).node for name in plan.biases}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr" and _is_replaced(node, replaced):
            continue
        if is_constant(node) and node.name not in quantized:
            tensors[f"float.{node.target}"] = constant(graph.module, node).contiguous().clone()
    content = save(tensors, metadata={"fewbit": str(SCHEMA)})  # save_file hides a full disk in an error of its own
    write_atomic(folder / "plan.safetensors", lambda part: part.write_bytes(content))
    write_json(folder / "plan.json", plan_json(graph, plan))


def plan_json(graph: Graph, plan: Plan) -> dict[str, Any]:
    """The plan without its large tensors: what `diff` compares and people read."""
    return {
        "schema": SCHEMA,
        "target": plan.target,
        "recipe": plan.recipe,
        "bits": plan.bits,
        "exemptions": list(plan.exemptions),
        "integer_ops": list(plan.integer_ops),
        "choices": [_choice_json(graph, choice) for choice in plan.choices.values()],
        "fallbacks": [asdict(fallback) for fallback in plan.fallbacks],
        "biases": list(plan.biases),
        "extra": dict(plan.extra),
    }


def load_plan(graph: Graph, folder: Path) -> Plan:
    """The plan of a run folder. Raises BadFile where a file is truncated, or does not belong to the graph."""
    record, path = read_json(folder / "plan.json"), folder / "plan.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"{path} is not readable ({error}); write the run again with fewbit quantize --force.") from error
    sites = {site.name: site for site in graph.sites}
    choices: dict[str, Choice] = {}
    try:
        for row in record["choices"]:
            grid = Grid(**{**row["grid"], "widths": tuple(row["grid"].get("widths", ()))})
            shape = sites[row["site"]].shape
            stored = tensors[f"{row['site']}.codes"] if row["role"] in ("weight", "bias") else None
            codes = None if stored is None else _restored(stored, grid, shape)
            qparams = _qparams(graph, row, grid, tensors, choices)
            choices[row["site"]] = Choice(
                row["site"], row["role"], grid, qparams, row["method"], codes, row["all_readers"], row["why"]
            )
        fallbacks = tuple(Fallback(**fallback) for fallback in record["fallbacks"])
        biases = {name: _bias(graph, name, tensors[f"{name}.bias"]) for name in record.get("biases", [])}
        return Plan(
            record["target"],
            record["recipe"],
            record["bits"],
            choices,
            tuple(record["integer_ops"]),
            fallbacks,
            tuple(record["exemptions"]),
            record["extra"],
            biases,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(
            f"{folder / 'plan.json'} and plan.safetensors do not fit each other or this model "
            f"({type(error).__name__}: {error}); write the run again with fewbit quantize --force."
        ) from error


def _is_replaced(constant: Node, ops: set[str]) -> bool:
    """A bias that nothing reads but ops whose bias was corrected."""
    return bool(constant.users) and all(user.name in ops and argument(user, 2, "bias") is constant for user in constant.users)


def _bias(graph: Graph, name: str, bias: Tensor) -> Tensor:
    channels = graph.site(graph.op(name).operands["weight"]).shape[:1]
    if tuple(bias.shape) != channels:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} for {channels[0]} channels")
    return bias


def _qparams(graph: Graph, row: dict[str, Any], grid: Grid, tensors: dict[str, Tensor], choices: dict[str, Choice]) -> QParams:
    name = row["site"]
    if row["method"] == "derived":
        op = graph.op(graph.site(name).readers[0][0])
        return of_bias(choices[op.operands["input"]].qparams, choices[op.operands["weight"]].qparams, graph.site(name).shape[0])
    scale = tensors[f"{name}.scale"]
    zero = tensors.get(f"{name}.zero")
    return QParams(scale, torch.full(scale.shape, row["zero"], dtype=torch.int32) if zero is None else zero)


def _stored(codes: Tensor, grid: Grid) -> Tensor:
    """Whole bytes are stored as they are, anything else packed; channels of different widths together with their like."""
    if grid.widths:
        return torch.cat([pack(codes[rows], like.bits, like.low) for rows, like in _alike(grid)])
    return codes.to(grid.container).contiguous() if grid.bits in (8, 16, 32) else pack(codes, grid.bits, grid.low)


def _alike(grid: Grid) -> list[tuple[Tensor, Grid]]:
    """The channels of each width above 0, narrowest first, and their grid."""
    widths = torch.tensor(grid.widths)
    found = [(widths == bits).nonzero().flatten() for bits in sorted({b for b in grid.widths if b})]
    return [(rows, grid.of_channel(int(rows[0]))) for rows in found]


def _restored(stored: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    if grid.widths:
        codes, rest = torch.zeros(shape, dtype=torch.int32), stored
        for rows, like in _alike(grid):
            part = codes[rows]
            size = -(-part.numel() * like.bits // 8)
            codes[rows] = unpack(rest[:size], like.bits, like.low, tuple(part.shape))
            rest = rest[size:]
        if len(rest):
            raise ValueError(f"{len(rest)} bytes too many for channels of {grid.widths} bits")
        return codes.to(grid.container)
    if grid.bits not in (8, 16, 32):
        return unpack(stored, grid.bits, grid.low, shape).to(grid.container)
    if tuple(stored.shape) != shape:
        raise ValueError(f"codes of shape {tuple(stored.shape)} for a tensor of shape {shape}")
    return stored


def _choice_json(graph: Graph, choice: Choice) -> dict[str, Any]:
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
    }
