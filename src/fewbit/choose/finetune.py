"""Fine-tuning on a graph: the plan of a recipe, its weights and biases trained, and coded again (FDDA, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.capture.fx import argument, constant, is_constant
from fewbit.choose.choose import Asked, Choosing, choosing
from fewbit.choose.distill import Distill, Straight, cropped
from fewbit.choose.recipe import Recipe
from fewbit.choose.weights import codes_are_safe, finite, recoded
from fewbit.core.grid import QParams
from fewbit.core.values import Choice, Fallback, Graph, Json, Plan, flat_name
from fewbit.errors import BadImages, BadValues
from fewbit.execute.simulate import FakeQuant, simulate
from fewbit.observe.stats import Stats
from fewbit.target.spec import Target


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, c, h, w) and their classes (n,), or None where only the float model's answers are known."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


def finetune(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    real: LabelledImages | None,
    made: LabelledImages | None,
    *,
    images: Iterable[Tensor] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    **asked: Unpack[Asked],
) -> Plan:
    """The plan of a recipe whose weights and biases were trained on real images, synthetic ones, or both.

    Raises BadImages where there are none, or where labels are asked for and missing.
    """
    settings = recipe.tune
    assert settings is not None
    work = choosing(graph, stats, target, recipe, images=images, **asked)
    start = replace(work, choices=dict(work.choices), fallbacks=list(work.fallbacks)).plan()
    student = Student(graph, start)
    record = train(student, graph, settings, [lot for lot in (real, made) if lot is not None], real, seed, progress)
    refused = set_tuned(work, student)
    work.fallbacks += refused
    plan = work.plan()
    return replace(plan, extra={**plan.extra, "tuned": {**record, "kept": [fallback.site for fallback in refused]}})


class Student(nn.Module):
    """A simulation whose weights and biases are trained: the plan's grids and steps, rounding with a straight gradient.

    `weights` are real numbers, before training the float model's; `biases` begin as the plan's. The codes of an integer bias
    follow from it at the end and are too fine to matter meanwhile.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self._sites: dict[str, str] = {}
        self._ops: dict[str, str] = {}
        module = simulate(graph, plan)
        nodes = {node.name: node for node in module.graph.nodes}
        for name, choice in plan.choices.items():
            if choice.role == "weight":
                self._open_weight(module, graph, nodes, choice)
            elif choice.codes is None:
                flat = flat_name(name)
                fixed = cast(FakeQuant, getattr(module, flat))
                setattr(module, flat, _Fake(fixed.qparams, fixed.grid))
        for name in plan.integer_ops:
            self._open_bias(module, graph, nodes, name)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.module(images))

    def tuned_weights(self) -> dict[str, Tensor]:
        return {name: self.weights[key].detach() for name, key in self._sites.items()}

    def tuned_biases(self) -> dict[str, Tensor]:
        return {name: self.biases[key].detach() for name, key in self._ops.items()}

    def _open_weight(self, module: GraphModule, graph: Graph, nodes: Mapping[str, Node], choice: Choice) -> None:
        site = graph.site(choice.site)
        value = nn.Parameter(finite(graph, site).clone())
        flat = flat_name(site.name)
        self.weights[flat], self._sites[site.name] = value, flat
        module.add_submodule(f"{flat}_tuned", _Weight(value, choice))
        for op, _ in site.readers:
            read = nodes[graph.op(op).node]
            with module.graph.inserting_before(read):
                read.update_arg(1, module.graph.call_module(f"{flat}_tuned", ()))

    def _open_bias(self, module: GraphModule, graph: Graph, nodes: Mapping[str, Node], name: str) -> None:
        op = graph.op(name)
        node = nodes[op.node]
        old = argument(node, 2, "bias")
        if "weight" not in op.operands or not is_constant(old):
            return
        flat = flat_name(name) + "_bias"
        value = nn.Parameter(constant(module, old).clone())
        self.biases[flat], self._ops[name] = value, flat
        module.add_submodule(f"{flat}_tuned", _Constant(value))
        with module.graph.inserting_before(node):
            read = module.graph.call_module(f"{flat}_tuned", ())
        node.args = (*node.args[:2], read, *node.args[3:])
        node.kwargs = {key: v for key, v in node.kwargs.items() if key != "bias"}


def train(
    student: Student, graph: Graph, settings: Distill, lots: Sequence[LabelledImages], real: LabelledImages | None, seed: int,
    progress: Callable[[str], None],
) -> Json:  # fmt: skip
    """Train in place; what came of the loss, for the record. Raises BadValues where the loss is not finite."""
    if not lots or not all(len(lot) for lot in lots):
        raise BadImages("no images to fine-tune on; a few of each class are needed: --images DIR, or --images synthetic.")
    if settings.loss == "labels" and any(lot.labels is None for lot in lots):
        raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")
    random = torch.Generator().manual_seed(seed)
    parameters = [*student.weights.values(), *student.biases.values()]
    optimizer = torch.optim.SGD(
        parameters, settings.rate, settings.momentum, weight_decay=settings.decay, nesterov=settings.momentum > 0
    )
    losses: list[float] = []
    for step in range(settings.steps):
        batch, labels = zip(*(_drawn(lot, settings, lot is real, random) for lot in lots), strict=True)
        x = torch.cat(batch)
        with torch.no_grad():
            taught = graph.module(x).flatten(1)
        wanted = taught.argmax(1) if settings.loss == "kl" else torch.cat(cast("tuple[Tensor, ...]", labels))
        loss = settings(taught, student(x).flatten(1), wanted)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise BadValues(
                f"fine-tuning diverged: its loss is {losses[-1]} at step {step + 1} of {settings.steps}. Take a recipe "
                "that does not train (--recipe mse), or a smaller rate: Distill(rate=...)."
            )
        found = torch.autograd.grad(loss, parameters, allow_unused=True)  # and none of the graph's own parameters
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        optimizer.step()
        if step % 10 == 9 or step == settings.steps - 1:
            progress(f"loss {losses[-1]:.4g}")
    span = max(1, len(losses) // 10)
    return {
        "steps": settings.steps,
        "real": 0 if real is None else len(real),
        "synthetic": sum(len(lot) for lot in lots if lot is not real),
        "labels": "of the images" if settings.loss == "labels" else "the float model's answers",
        "first": sum(losses[:span]) / span if losses else None,
        "last": sum(losses[-span:]) / span if losses else None,
    }


def set_tuned(work: Choosing, student: Student) -> list[Fallback]:
    """Put tuned weights, coded again, and tuned biases into what has been chosen.

    A weight whose new codes would not be safe in the accumulator keeps its old ones, and is refused.
    """
    graph, refused = work.graph, []
    work.tuned.update(student.tuned_biases())
    for name, value in student.tuned_weights().items():
        site, choice = graph.site(name), work.choices[name]
        slot, op = work.allowed.sites[name], graph.op(site.readers[0][0])
        moved = replace(choice, method=f"{choice.method}, {work.recipe.tune!r}")
        made = recoded(graph, site, moved, work.recipe, work.choices, slot, tuned=(value, work.tuned.get(op.name)))
        if not codes_are_safe(graph, site, made, work.choices, slot):
            why = f"tuned codes can saturate {slot.pair_bits} bits"
            refused.append(Fallback(name, "tuned weights", "those before", why, op.macs / max(graph.macs, 1)))
            continue
        work.choices[name] = made
    return refused


def _drawn(lot: LabelledImages, settings: Distill, real: bool, random: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """A batch of a lot, cropped, and its labels."""
    rows = torch.randint(len(lot), (settings.batch,), generator=random)
    area = settings.real_crop if real else settings.made_crop
    return cropped(lot.images[rows], area, random), None if lot.labels is None else lot.labels[rows]


class _Fake(nn.Module):
    """An activation site with a straight gradient."""

    def __init__(self, qparams: QParams, grid: Any) -> None:
        super().__init__()
        self._qparams, self._grid = qparams, grid

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, Straight.apply(x, self._qparams, self._grid))  # type: ignore[no-untyped-call]


class _Weight(nn.Module):
    """A weight with a straight gradient."""

    def __init__(self, value: nn.Parameter, choice: Choice) -> None:
        super().__init__()
        self.value, self._qparams, self._grid = value, choice.qparams, choice.grid

    def forward(self) -> Tensor:
        return cast(Tensor, Straight.apply(self.value, self._qparams, self._grid))  # type: ignore[no-untyped-call]


class _Constant(nn.Module):
    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value
