"""Distillation: codes, scales and biases of the whole quantized model learned together for the float model's answers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context, counts_of
from fewbit.choose.finetune import cropped
from fewbit.choose.headroom import sums_are_safe, unsafe_codes
from fewbit.choose.loss import ModelLoss
from fewbit.choose.soft_codes import Rounded, cosine, soft_fake
from fewbit.core.device import CPU, has_bfloat16, on
from fewbit.core.graph import Op
from fewbit.core.grid import TINY, Grid, QParams
from fewbit.core.inputs import images_of
from fewbit.core.plan import Choice, Json, PassLog, Plan, SameAs
from fewbit.core.shelf import Shelf
from fewbit.errors import BadImages, BadValues
from fewbit.execute.executor import Executor
from fewbit.files import read_state, write_state
from fewbit.target.load import processor_flags
from fewbit.task import task_of

STATE = "distill.safetensors"
MEMORY = 2 << 30  # bytes of the activations of a step, of which each is kept for about three gradients
ADAM = ("exp_avg", "exp_avg_sq", "step")  # what it remembers of a parameter
TRIED = 3  # steps after which what fits into the time is said


@dataclass(frozen=True)
class Distill:
    """Codes, scales and biases of the whole model, learned together for the float model's answers.

        minimise   E d(f(x) / T, f̂(x) / T)        d the divergence of the model's task: of a classifier KL, T the temperature

    A weight is a number that begins at its code; it is rounded whenever it is read, with a gradient of 1 through the rounding
    (the straight-through estimator: Bengio et al. 2013), so that a code changes where the gradients of many steps agree. Scales
    of activations are learned as logarithms (Esser et al. 2020, LSQ, equation 3), biases in units of the spread of their op's
    output. `codes`, `scales` and `biases` are how far each of them can move in the whole course, however many steps that
    has: Adam's rate is that by the number of steps, and falls along half a cosine.

    Each step takes `batch` of the images (fewer where their activations would take more than 2 GB), cropped to a random part of
    `area` and mirrored, and no labels. Products are made in bfloat16 where the processor has them. `checks` times the loss on
    images that were set aside, and that no pass has seen, is looked at; the best state is taken, if it is better than the
    start. `steps` are the most that are made, fewer where `seconds` (None: no limit) are spent.
    """

    steps: int = 20_000
    batch: int = 32
    temperature: float = 2.0
    codes: float = 1.5
    scales: float = 0.02
    biases: float = 0.05
    area: tuple[float, float] = (0.5, 1.0)
    checks: int = 8
    seconds: float | None = 600.0

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        limit = "" if self.seconds is None else f", in at most {self.seconds:g} s"
        return f"codes, scales and biases of the whole model, learned for the float model's answers{limit}"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.checks) < 1 or min(self.codes, self.scales, self.biases, self.temperature) <= 0:
            raise ValueError(f"counts of at least 1, ways and a temperature above 0 are allowed, not {self}")

    def in_steps(self, steps: int) -> Distill:
        """The same in so many steps, without the limit of time that nobody asked for."""
        return replace(self, steps=steps, seconds=None if self.seconds == Distill.seconds else self.seconds)

    def check(self, context: Context) -> None:
        """Raises FewbitError where the target has groups or the model a fixed batch, BadImages where no image was set aside or
        something comes with each image.
        """
        context.refuse_groups(self)
        context.refuse_fixed_batch(self)
        context.need_images()
        if any(one.each for one in context.graph.inputs):
            raise BadImages("this recipe crops images, and what comes with each of them would not fit; take --recipe fast.")
        if not context.aside:
            raise BadImages("this recipe sets one of 8 calibration images aside to judge what it learns: give 16 or more.")

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with what was learned, if its loss on the images that were set aside is smaller. A weight whose new codes
        would not be safe in the accumulator keeps its old ones, which is a fallback.
        """
        self.check(context)
        student = LearnedPlan(plan, context)
        record = Course(student, context, self).run()
        learned, unchanged = student.quantized() if record["kept"] else (plan, [])
        log = PassLog.of("distill", self, summary={**record, "unchanged": unchanged})
        return replace(learned, log=(*plan.log, log))


class Course:
    """The steps, and the state that a killed run goes on from."""

    def __init__(self, student: LearnedPlan, context: Context, settings: Distill) -> None:
        self.student, self.context, self.settings = student, context, settings
        self.images = Shelf.of(map(images_of, context.images), context.folder)
        self.exact, self.task = Executor(context.graph), task_of(context.graph)
        self.measure = ModelLoss.of(context.graph, context.aside)
        self.random = torch.Generator().manual_seed(context.seed)
        groups = zip(student.groups(), (settings.codes, settings.scales, settings.biases), strict=True)
        self.optimizer = torch.optim.Adam([{"params": some, "way": way} for some, way in groups if some])
        self.budget = None if settings.seconds is None else max(settings.seconds - context.journal.seconds, 0.0)
        self.file = None if context.folder is None else context.folder / STATE
        self.step, self.spent, self.checked = 0, 0.0, 0
        self.losses: list[float] = []
        self.short = halves_are_faster(context.graph.device)
        self.batch = min(settings.batch, self.images.firsts[-1], max(MEMORY // (3 * 4 * sum(counts_of(context.graph))), 1))

    @property
    def progress(self) -> float:
        """The share of the steps, or of the time, that is over."""
        share = 0.0 if self.budget is None else self.spent / max(self.budget, 1e-9)
        return max(self.step / self.settings.steps, share)

    def run(self) -> dict[str, Json]:
        """Learn; the student has the best state afterwards."""
        student = self.student
        if self.file is not None and self.file.exists():
            best, kept = self.resume(self.file)
        else:
            best, kept = self.held(), student.state()
        start = self.losses[0]
        while self.progress < 1:
            began = time.monotonic()
            self.advance()
            self.spent += time.monotonic() - began
            if self.step == TRIED:
                self.context.progress(self.forecast())
            if self.progress >= min((self.checked + 1) / self.settings.checks, 1):
                self.checked = math.floor(min(self.progress, 1) * self.settings.checks)
                loss = self.held()
                if loss < best:
                    best, kept = loss, student.state()
                self.context.progress(f"step {self.step}: {loss:.4g} on images set aside, {start:.4g} at the start")
                if self.file is not None:
                    self.save(self.file, best, kept)
        student.load(kept)
        return {
            "steps": self.step, "images": self.images.firsts[-1], "aside": sum(map(len, map(images_of, self.context.aside))),
            "before": start, "after": best, "kept": best < start, "products": "bfloat16" if self.short else "float32",
            "losses": list(self.losses),
        }  # fmt: skip

    def advance(self) -> None:
        """One step."""
        settings = self.settings
        rows = torch.randint(self.images.firsts[-1], (self.batch,), generator=self.random)
        x = cropped(self.images.rows(rows), settings.area, self.random)
        with torch.autocast(self.exact.device.type, torch.bfloat16, enabled=self.short):
            with torch.no_grad():
                exact = self.exact(x)
            outputs = self.student(x)
        loss = self.task.divergence(*(self._softened(on(some, CPU)) for some in (exact, outputs)))
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise BadImages(f"task {self.task.spec} has a divergence without a gradient; take --recipe fast.")
        loss = loss / len(x)
        if not bool(loss.isfinite()):
            raise BadValues(f"distillation diverged at step {self.step + 1}: its loss is not a number. Take --recipe fast.")
        parameters = self.student.parameters()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            parameter.grad = gradient
        share = 1 / self.settings.steps if self.budget is None else self.progress / max(self.step, 1)  # of the course, a step
        for group in self.optimizer.param_groups:
            group["lr"] = group["way"] * 2 * cosine(self.progress) * share
        self.optimizer.step()
        self.step += 1

    def _softened(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """In float32, with logits by the temperature."""
        real = [y.float() if y.is_floating_point() else y for y in outputs]
        return self.task.softened(real, self.settings.temperature)

    def held(self) -> float:
        """The loss on the images that were set aside, of the student as it would be quantized now."""
        loss = self.measure(Executor.of(self.context.graph, self.student.quantized()[0]), self.context.aside)
        self.losses.append(loss)
        return loss

    def forecast(self) -> str:
        """What fits into the time, from the first steps."""
        settings, each = self.settings, self.spent / self.step
        steps = settings.steps if self.budget is None else min(int(self.budget / each), settings.steps)
        images = self.images.firsts[-1]
        return f"{each:.2g} s a step: {steps} steps, {steps * self.batch / images:.1f} times through {images} images"

    def save(self, file: Path, best: float, kept: Sequence[Tensor]) -> None:
        """Everything that the next step depends on."""
        tensors = {f"best.{i}": t for i, t in enumerate(kept)}
        tensors |= {f"now.{i}": t.detach() for i, t in enumerate(self.student.parameters())}
        for i, state in enumerate(self.optimizer.state[p] for p in self.student.parameters()):
            tensors |= {f"adam.{i}.{name}": state[name] for name in ADAM if name in state}
        tensors["random"] = self.random.get_state()
        about: dict[str, Any] = {"step": self.step, "spent": self.spent, "budget": self.budget, "checked": self.checked}
        about |= {"losses": self.losses, "best": best}
        write_state(file, on(tensors, CPU), about)

    def resume(self, file: Path) -> tuple[float, list[Tensor]]:
        """Go on from there; returns the best loss and its state."""
        parameters = self.student.parameters()
        tensors, about = read_state(file)
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"now.{i}"])
            if state := {name: tensors[f"adam.{i}.{name}"] for name in ADAM if f"adam.{i}.{name}" in tensors}:
                moved = {n: x if n == "step" else on(x, parameter.device) for n, x in state.items()}  # counted here
                self.optimizer.state[parameter] = moved
        self.random.set_state(tensors["random"])
        best = [tensors[f"best.{i}"] for i in range(len(parameters))]
        self.step, self.spent, self.budget, self.checked = (about[n] for n in ("step", "spent", "budget", "checked"))
        self.losses = about["losses"]
        return about["best"], best


class LearnedPlan:
    """A plan whose codes, scales and biases are parameters."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan, self.context, self.graph = plan, context, context.graph
        self.executor = Executor.of(self.graph, plan, read=self._read)
        self.codes: dict[str, Rounded] = {}
        self.scales: dict[str, Tensor] = {}
        self.biases: dict[str, tuple[Tensor, float, Tensor]] = {}
        followed = {choice.source.site for choice in plan.choices.values() if isinstance(choice.source, SameAs)}
        for choice in plan.choices.values():
            if choice.role == "weight" and choice.codes is not None:
                self.codes[choice.site] = Rounded(choice.codes.float(), choice.qparams, choice.grid)
            elif choice.codes is None and choice.is_free and choice.site not in followed:
                self.scales[choice.site] = choice.qparams.scale.log().clone().requires_grad_()
        builder = PlanBuilder(plan, context)
        spreads = self._spreads(list(builder.weighted_ops()))
        for op in builder.weighted_ops():
            start = builder.real_bias(op)
            self.biases[op.name] = (start, spreads[op.node], torch.zeros_like(start).requires_grad_())

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters of codes, of scales, and of biases."""
        codes, biases = [soft.parameter for soft in self.codes.values()], [change for _, _, change in self.biases.values()]
        return codes, list(self.scales.values()), biases

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups() for parameter in group]

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs for images, with a gradient."""
        for site, soft in self.codes.items():
            self.executor.give(site, soft.real())
        for op, (start, unit, change) in self.biases.items():
            self.executor.set_bias(op, start + unit * change)
        return self.executor(images)

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def load(self, state: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.data.copy_(value)

    def quantized(self) -> tuple[Plan, list[str]]:
        """The plan with the parameters as they are now, and the weights that keep their codes since new ones are not safe."""
        builder, unchanged = PlanBuilder(self.plan, self.context), list[str]()
        for site, log in self.scales.items():
            old = builder.choices[site]
            builder.set(_distilled(old, qparams=QParams(log.detach().exp().clamp_min(TINY), old.qparams.zero)))
        biases = {op: start + unit * change.detach() for op, (start, unit, change) in self.biases.items()}
        for op, bias in biases.items():
            builder.correct(op, bias)
        for site, soft in self.codes.items():
            old = builder.choices[site]
            new = _distilled(old, codes=soft.codes().to(old.grid.container))
            bias, grids = biases[self.graph.site(site).readers[0][0]], self.context.allowed.sites[site]
            if sums_are_safe(self.graph, new, builder.choices, grids, bias):
                builder.set(new)
            else:
                builder.fallbacks.append(unsafe_codes(self.graph, new, builder.choices, grids, "learned"))
                unchanged.append(site)
        return builder.plan(), unchanged

    def _read(self, x: Tensor, choice: Choice) -> Tensor:
        """An activation as its readers see it, with a gradient for it and for its scale."""
        log = self.scales.get(choice.site)
        scale = choice.qparams.scale.log() if log is None else log
        if choice.qparams.scale.ndim or choice.grid.widths:
            return soft_fake(x.float(), scale.exp(), choice.qparams.zero, choice.grid)
        return cast(Tensor, Learned.apply(x, scale, choice.qparams.zero, choice.grid))  # type: ignore[no-untyped-call]

    def _spreads(self, ops: Sequence[Op]) -> Mapping[str, float]:
        """The standard deviation of the output of each op with a weight, on one batch of the images."""
        spreads: dict[str, float] = {}

        def note(name: str) -> Any:
            return lambda y: spreads.__setitem__(name, max(float(y.float().std()), TINY))

        with torch.no_grad():
            self.executor(self.context.batches[0], {op.node: note(op.node) for op in ops})
        return spreads


def _distilled(choice: Choice, **changes: Any) -> Choice:
    return replace(choice, method=f"{choice.method}; distilled", **changes)


class Learned(torch.autograd.Function):
    """`fake` with one scale, given as its logarithm: the gradient of x is that of a clamp, that of the scale LSQ's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        scale = float(log.exp())
        q = x.float().div(scale).round_().add_(int(zero))
        held = q.clamp(grid.low, grid.high)
        inside = q == held
        y = held.sub_(int(zero)).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, y, inside)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, inside = ctx.saved_tensors
        through = gradients[0] * inside
        step = _dot(gradients[0], y) - _dot(through, x)
        return through, step, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of two tensors of one shape, float32."""
    return torch.dot(a.flatten(), b.flatten()) if a.dtype == b.dtype == torch.float32 else (a * b).sum(dtype=torch.float32)


def halves_are_faster(device: torch.device) -> bool:
    """Whether this processor, or this accelerator, has instructions for products of bfloat16."""
    return has_bfloat16(device) if device != CPU else bool({"amx_bf16", "avx512_bf16"} & set(processor_flags()))
