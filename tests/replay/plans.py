"""What a plan decides, by name of net, target and recipe: the one file here that knows how a plan is made and laid out.

`plan_of` goes the way of the stages with their own functions; `decisions` makes plain rows of what came out. When names or
layouts move, these two follow and the hashes stay.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.ablations import ABLATIONS
from bench.module_search import ModuleSearch
from torch import Tensor

from fewbit.capture import capture
from fewbit.choose import Recipe
from fewbit.choose.distill import Distill
from fewbit.choose.entropy_range import EntropyRange
from fewbit.choose.finetune import Finetune
from fewbit.choose.joint_search import JointSearch
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.ranges import MseRange, Ranges
from fewbit.choose.recipe import Pass
from fewbit.choose.reconstruct import Reconstruct
from fewbit.core.fx import constant
from fewbit.core.graph import Graph
from fewbit.core.grid import Grid
from fewbit.core.plan import Plan
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms
from fewbit.errors import FewbitError
from fewbit.load import load_model
from fewbit.observe import Stats
from fewbit.progress import Progress
from fewbit.request import Request
from fewbit.stages import choose as choose_stage
from fewbit.stages import equalize as equalize_stage
from fewbit.stages import observe as observe_stage
from fewbit.stages.load import Inputs
from fewbit.target import load_target
from fewbit.target.load import processor_flags
from fewbit.task import recognise
from fewbit.workers import LOCAL
from replay.nets import SIZE, images, net

LATE = ("sums that may leave them", "those before")  # the fallback where codes or biases were not safe
COUNT = 16  # calibration images
STEPS = 4  # of training, and of the generator before it
ERRORS = (FewbitError, ValueError)  # what a combination that does not go together may raise
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "sve")  # kernels differ by these
Rows = Sequence[tuple[str, str]]  # names of what is decided, each with the digest of its value


@cache
def processor() -> str:
    """What sums of floats depend on: their order in the kernels that this processor gets, and whose kernels they are."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^vendor_id\s*:\s*(\S+)", info.read_text() if info.exists() else "", re.MULTILINE)
    flags = " ".join(flag for flag in FLAGS if flag in processor_flags())
    kernels = f"{torch.backends.cpu.get_cpu_capability()} {found[1] if found else 'unknown'} {flags}"
    return f"{kernels} torch {torch.__version__.partition('+')[0]} numpy {np.__version__}"


@dataclass(frozen=True)
class Net:
    """A net as the stages have it before it is equalized."""

    inputs: Inputs
    graph: Graph
    images: Images
    stats: Stats


@cache
def observed(name: str) -> Net:
    """Captured and observed, once in a process."""
    loaded = load_model(net(name), overrides={"input_size": SIZE})
    graph, preprocess = capture(loaded), Preprocess(SIZE)
    seen = open_images(images(COUNT, 0), preprocess)
    inputs = Inputs(loaded, preprocess, None, recognise(loaded.outputs), seen, seen)
    with tempfile.TemporaryDirectory() as part:
        stats, _ = observe_stage.observe(graph, inputs, seen, Request(model="demo"), Path(part), Progress(), None)
    return Net(inputs, graph, seen, stats)


@cache
def equalized(name: str, target: str, recipe: str, bits: str, everything: bool) -> tuple[Graph, Stats, Any]:
    """The graph and its statistics behind the stage before choose."""
    ready, request = observed(name), request_of(target, recipe, bits, everything=everything)
    with tempfile.TemporaryDirectory() as part:
        return equalize_stage.equalize(ready.graph, ready.stats, ready.images, request, Path(part), Progress())


def request_of(target: str, recipe: str, bits: str, *, everything: bool) -> Request:
    """What `fewbit quantize` would be asked; the images are other ones."""
    method = shortened(ABLATIONS[recipe])
    return Request(model="demo", target=target, recipe=method, bits=bits, everything=everything)


def shortened(recipe: Recipe) -> Recipe:
    """The same steps in the same order, few of each, strong enough that codes move; no clock decides."""
    return replace(recipe, passes=tuple(map(fewer, recipe.passes)))


def fewer(one: Pass) -> Pass:
    """A pass with few steps."""
    if isinstance(one, Ranges):
        return replace(one, activations=coarser(one.activations), weights=coarser(one.weights))
    if isinstance(one, OutputSearch):
        start = None if one.start is None else fewer(one.start)
        return replace(one, candidates=10, rounds=2, finalists=4, start=start)
    if isinstance(one, ModuleSearch):
        return replace(one, candidates=5, rounds=2, images=4)
    if isinstance(one, JointSearch):
        return replace(one, start=fewer(one.start), points=3, tolerance=0.1, evaluations=100, seconds=None)
    if isinstance(one, Reconstruct):
        return replace(one, iterations=8, batch=4, seconds=None, lr=0.05, scale_lr=0.01, bias_lr=0.01)
    if isinstance(one, Distill):
        return replace(one, steps=8, batch=4, checks=2, seconds=None)
    if isinstance(one, Finetune):
        one = one.in_steps(STEPS)
        generator = replace(one.images, channels=8, batch=8)
        return replace(one, lr=one.lr * 1e2, batch=8, pool=16, images=generator)
    return one


def coarser(method: Any) -> Any:
    if isinstance(method, EntropyRange):
        return replace(method, bins=320)
    return replace(method, steps=6) if isinstance(method, MseRange) else method


def plan_of(name: str, target: str, recipe: str, bits: str, *, everything: bool = False) -> tuple[Graph, Plan]:
    """The plan that the stages make, and the graph that it is for. Raises one of ERRORS where they do not go together."""
    ready, request = observed(name), request_of(target, recipe, bits, everything=everything)
    if any(isinstance(one, Finetune) for one in request.method.passes):
        refuse_without_norms(Teacher(ready.inputs.loaded.program))
    graph, stats, moved = equalized(name, target, recipe, bits, everything)
    with tempfile.TemporaryDirectory() as part:
        return graph, choose_stage.choose(
            graph, stats, moved, ready.images, ready.inputs, request, Path(part), Progress(), LOCAL
        )


def decisions(graph: Graph, plan: Plan) -> tuple[Rows, Rows]:
    """What a plan decides, as (structure, numbers): rows that know no field's name, container or file.

    Structure: sites in order, their roles and grids and readers, integer biases, integer ops, fallbacks. Numbers: scales, zero
    points, codes, biases (which ops have one in float follows from what was better), constants of the graph, which equalizing
    moves, and fallbacks that follow from codes. Widths of mixed precision and of channels are structure: float sums decide,
    but hardly ever by their last bits.
    """
    chosen = list(plan.choices.values())
    structure = [(c.site, _digest((c.site, c.role, _grid(c.grid), c.all_readers))) for c in chosen]
    numbers = [(c.site, _numbers(c.qparams.scale, c.qparams.zero, c.codes)) for c in chosen]
    for op in graph.ops:
        bias = plan.biases.get(op.name)
        if bias is None:
            continue
        has_type = any(rule.types("bias") for rule in load_target(plan.target).rules(op.kind))
        integer = bias.integer if has_type and "bias" in op.operands else None  # else what the kernel adds, as numbers
        if integer is None:
            numbers.append((f"bias of {op.name}", _numbers(bias.values)))
        else:
            structure.append((f"bias of {op.name}", _digest(("integer", _grid(integer.grid)))))
            numbers.append((f"bias of {op.name}", _numbers(integer.qparams.scale, integer.qparams.zero, integer.codes)))
    said = sorted({(f.site, f.requested, f.actual) for f in plan.fallbacks if f.kind not in ("runtime", "machine")})
    late, early = ([row for row in said if (row[2] in LATE) == is_late] for is_late in (True, False))
    structure += [("integer ops", _digest(plan.integer_ops)), ("refusals", _digest(early))]
    nodes = [node for node in graph.module.graph.nodes if node.op == "get_attr"]
    numbers.append(("constants of the graph", _numbers(*(constant(graph.module, node) for node in nodes))))
    numbers.append(("refusals of codes", _digest(late)))
    return structure, numbers


def _grid(grid: Grid) -> tuple[object, ...]:
    """A grid as plain numbers: its codes, their zero, where steps differ, and how codes are kept."""
    codes = (grid.bits, grid.low, grid.high, grid.signed, grid.symmetric)
    axis = -1 if grid.axis is None else grid.axis
    return (*map(int, codes), axis, *grid.widths, "blocks", grid.group_size, grid.multiples, grid.container.itemsize)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _numbers(*tensors: Tensor | None) -> str:
    """Every bit of some tensors, whatever integers or floats hold them; a step of a block is one number behind the other."""
    return _digest([piece for tensor in tensors for piece in _bytes(tensor)])


def _bytes(tensor: Tensor | None) -> Iterator[bytes | str]:
    if tensor is None:
        yield "none"
        return
    wide = torch.float64 if tensor.is_floating_point() else torch.int64
    yield tensor.detach().to(wide).contiguous().numpy().tobytes()
