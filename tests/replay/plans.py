"""What a plan decides, by name of net, target and recipe: the one file here that knows how a plan is made and laid out.

`plan_of` goes the pipeline's way with its own functions; `decisions` makes plain rows of what came out. When names or layouts
move, these two follow and the hashes stay.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit import nodata, pipeline
from fewbit.capture import Loaded, capture, load_model
from fewbit.capture.fx import constant
from fewbit.choose import LabelledImages, parse_bits
from fewbit.choose.ranges import EntropyRange, MseRange
from fewbit.core.grid import Grid
from fewbit.core.values import Graph, Plan
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.equalize import Equalize
from fewbit.errors import FewbitError
from fewbit.observe import Stats
from fewbit.progress import Progress
from fewbit.recipes import RECIPES, Recipe
from fewbit.run import STANDS_IN, THIS_MACHINE, Request
from fewbit.target import load_target
from fewbit.target.spec import processor_flags
from replay.nets import CLASSES, SIZE, images, net

COUNT = 16  # calibration images
STEPS = 4  # of training, and of the generator before it
ERRORS = (FewbitError, ValueError)  # what a combination that does not go together may raise
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "sve")  # kernels differ by these
LATE = ("sums that may leave them", "those before")  # what is given where codes or biases were not safe
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
    """A net as the pipeline has it before it chooses."""

    loaded: Loaded
    graph: Graph
    images: Images
    stats: Stats


@cache
def observed(name: str) -> Net:
    """Captured and observed, once in a process."""
    loaded = load_model(net(name), overrides={"input_size": SIZE})
    graph, seen = capture(loaded), open_images(images(COUNT, 0), Preprocess(SIZE))
    with tempfile.TemporaryDirectory() as part:
        stats, _ = pipeline._observe(graph, loaded, seen, Path(part), Progress())
    return Net(loaded, graph, seen, stats)


@cache
def equalized(name: str, target: str, method: Equalize, bits: str, everything: bool) -> tuple[Graph, Stats]:
    """The graph and its statistics behind the stage before choose."""
    ready, request = observed(name), Request(name, target, bits=bits, everything=everything)
    with tempfile.TemporaryDirectory() as part:
        graph, stats, _ = pipeline._equalize(
            ready.graph, load_target(target), method, parse_bits(bits), request, ready.images, Path(part), Progress()
        )
    return graph, stats


def shortened(recipe: Recipe) -> Recipe:
    """The same steps in the same order, few of each, strong enough that codes move; no clock decides."""
    for slot in ("activations", "weights"):
        method = getattr(recipe, slot)
        if isinstance(method, EntropyRange):
            recipe = replace(recipe, **{slot: replace(method, bins=320)})
        elif isinstance(method, MseRange):
            recipe = replace(recipe, **{slot: replace(method, steps=6)})
    searches = {
        slot: replace(search, candidates=10, rounds=2, finalists=4)
        for slot in ("search", "then")
        if (search := getattr(recipe, slot)) is not None
    }
    recipe = replace(recipe, **searches)
    if recipe.module is not None:
        recipe = replace(recipe, module=replace(recipe.module, candidates=5, rounds=2, images=4))
    if recipe.joint is not None:
        recipe = replace(recipe, joint=replace(recipe.joint, points=3, tolerance=0.1, evaluations=100, seconds=None))
    if recipe.rebuild is not None:
        rates = {"rate": 0.05, "step_rate": 0.01, "bias_rate": 0.01}
        recipe = replace(recipe, rebuild=replace(recipe.rebuild, steps=8, batch=4, seconds=None, **rates))
    if recipe.tune is not None:
        tune = recipe.tune.in_steps(STEPS)
        made = replace(tune.images, channels=8, batch=8)
        recipe = replace(recipe, tune=replace(tune, rate=tune.rate * 1e2, batch=8, pool=16, images=made))
    return recipe


@cache
def lots(name: str, recipe: str) -> tuple[LabelledImages | None, LabelledImages | None]:
    """The images that training sees, synthetic ones among them."""
    ready = observed(name)
    with tempfile.TemporaryDirectory() as part:
        return nodata.lots(
            shortened(RECIPES[recipe]), ready.loaded, ready.images, CLASSES, False, Request(name, ""), Path(part), Progress()
        )


def plan_of(name: str, target: str, recipe: str, bits: str, *, everything: bool = False) -> tuple[Graph, Plan]:
    """The plan that the pipeline makes, and the graph that it is for. Raises one of ERRORS where they do not go together."""
    ready, hardware, method = observed(name), load_target(target), shortened(RECIPES[recipe])
    request, asked = Request(name, target, recipe, bits, everything=everything), parse_bits(bits)
    pipeline.check_bits(hardware, asked)
    graph, stats, seen = ready.graph, ready.stats, None
    if method.tune is not None:
        nodata.refuse_training(ready.loaded, CLASSES)
    if method.equalize is not None:
        graph, stats = equalized(name, target, method.equalize, bits, everything)
    if method.tune is not None:
        seen = lots(name, recipe)
    with tempfile.TemporaryDirectory() as part:
        return graph, pipeline._choose(
            graph, stats, hardware, method, asked, request, ready.images, Path(part), Progress(), seen
        )


def decisions(graph: Graph, plan: Plan) -> tuple[Rows, Rows]:
    """What a plan decides, as (structure, numbers): rows that know no field's name, container or file.

    Structure: sites in order, their roles and grids and readers, integer biases, integer ops, fallbacks. Numbers: steps, zero
    points, codes, biases (which ops have one in float follows from what was better), constants of the graph, which equalizing
    moves, and fallbacks of codes that were found. Widths of mixed precision and of channels are structure: float sums decide,
    but hardly ever by their last bits.
    """
    chosen = [choice for choice in plan.choices.values() if choice.role != "bias"]
    biases = {site: choice for site, choice in plan.choices.items() if choice.role == "bias"}
    structure = [(c.site, _digest((c.site, c.role, _grid(c.grid), c.all_readers))) for c in chosen]
    numbers = [(c.site, _numbers(c.qparams.scale, c.qparams.zero, c.codes)) for c in chosen]
    for op in graph.ops:
        own = biases.get(op.operands.get("bias", ""))
        if own is not None:
            structure.append((f"bias of {op.name}", _digest(("integer", _grid(own.grid)))))
            numbers.append((f"bias of {op.name}", _numbers(own.qparams.scale, own.qparams.zero, own.codes)))
        elif op.name in plan.biases:
            numbers.append((f"bias of {op.name}", _numbers(plan.biases[op.name])))
    said = sorted({(r.site, r.requested, r.actual) for r in plan.fallbacks if r.site not in (STANDS_IN, THIS_MACHINE)})
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
