"""Reconstruction: the codes of a plan's weights learned again, block by block, for the float outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewbit.capture.residual import Block, blocks
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context, few_enough
from fewbit.choose.fisher import output_weights
from fewbit.choose.gptq import left_out
from fewbit.choose.headroom import sums_are_safe, unsafe_codes
from fewbit.choose.learn import Learner, Lesson
from fewbit.core.device import CPU, on
from fewbit.core.grid import QParams
from fewbit.core.inputs import Batch
from fewbit.core.inputs import count as count_in
from fewbit.core.plan import Bias, Choice, Fallback, Json, PassLog, Plan, described
from fewbit.core.shelf import count_of
from fewbit.errors import BadImages
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.files import Journal, read_state, write_state

HELD_OUT = 4  # one of so many images is held out to evaluate a block


@dataclass(frozen=True)
class Reconstruct:
    """The codes, and more, of all weights of a block, learned together for the block's float output.

        minimise   E ‖f(x) − f̂(x̂)‖² / E₀  +  rounding_weight · mean(1 − |2h − 1|^β)      E₀ the error at the start

    AdaRound (Nagel et al. 2020): a weight is (⌊w/s⌋ + h(V)) s, h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1), and β falls from
    `beta_start` to `beta_end` behind a share `warmup` of the iterations. With `rounding` = `straight` the weight is a number
    that begins at its code and is rounded in every iteration, with a gradient of 1 through the rounding (no rounding loss);
    Adam moves it by `lr` at most, so it leaves its code only where the gradients of many iterations agree. BRECQ (Li et al.
    2021): `scope` = `block` is an attention module, MLP or residual block with the addition behind it; with `fisher` an error
    weighs as much as the square of the model's gradient there. QDrop (Wei et al. 2022): each element of an activation is its
    float value with probability `drop`. `learn_scales` learns scales of activations along (Esser et al. 2020, LSQ),
    `learn_biases` the biases; without `learn_codes` the codes stay as they are.

    Adam with `lr` for V (in codes for `straight`), `scale_lr` for the logarithm of a scale and `bias_lr` for a bias, in units
    of the spread of its output; all but that of V fall along half a cosine. `iterations` of `batch` images for each block,
    fewer where `seconds` (None: no limit) are spent. The papers have 20,000 iterations of 32 images at 1e-3, scales at 4e-5,
    warm-up 0.2, β from 20 to 2; their rounding weight of 0.01 is on a sum beside an error that is not relative.
    """

    iterations: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    scope: Literal["op", "block"] = "block"
    rounding: Literal["sigmoid", "straight"] = "sigmoid"
    drop: float = 0.0
    fisher: bool = False
    learn_codes: bool = True
    learn_scales: bool = False
    learn_biases: bool = False
    scale_lr: float = 4e-5
    bias_lr: float = 1e-3
    rounding_weight: float = 1.0
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    seconds: float | None = None

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        what = "rounding and scales" if self.learn_scales else "rounding"
        return f"{what} of each {'layer' if self.scope == 'op' else self.scope}, learned for its float output"

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch < 1 or not 0 <= self.drop <= 1 or not 0 <= self.warmup < 1:
            raise ValueError(f"iterations >= 0, batch >= 1, drop in [0, 1] and warmup in [0, 1) are allowed, not {self}")
        if (
            min(self.lr, self.scale_lr, self.bias_lr) <= 0
            or self.rounding_weight < 0
            or not 0 < self.beta_end <= self.beta_start
        ):
            raise ValueError(f"learning rates > 0, rounding_weight >= 0 and 0 < beta_end <= beta_start are allowed, not {self}")
        if self.seconds is not None and self.seconds < 0:
            raise ValueError(f"seconds >= 0 or None is allowed, not {self.seconds}")

    def beta(self, progress: float) -> float | None:
        """β at a share of the iterations; None before the end of the warm-up, where there is no rounding loss."""
        if progress < self.warmup:
            return None
        return self.beta_end + (self.beta_start - self.beta_end) * (1 - (progress - self.warmup) / (1 - self.warmup))

    def check(self, context: Context) -> None:
        """Raises FewbitError where the target has groups, BadImages where there are too few images to hold any back."""
        context.refuse_groups(self)
        context.refuse_fixed_batch(self)
        context.need_images()
        if context.count < HELD_OUT:
            raise BadImages(f"reconstruction holds every {HELD_OUT}th image back: give {HELD_OUT} calibration images or more.")

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the learned values of each block whose error on held-out images is smaller with them.

        The context's journal and folder have the blocks that a killed run has done.
        """
        batches, journal = few_enough(context.graph, context.batches), context.journal
        self.check(context)
        walk = _Walk(plan, context, self, batches)
        walk.builder.fallbacks += left_out(context.batches, batches)
        rows: list[Mapping[str, Json]] = []
        for i, block in enumerate(walk.blocks):
            file = None if context.folder is None else context.folder / f"{i}.safetensors"
            lesson = walk.lesson(block)
            results: list[Learnt] = []

            def compute(
                i: int = i, lesson: Lesson = lesson, results: list[Learnt] = results, file: Path | None = file
            ) -> float:
                seed = torch.Generator().manual_seed(context.seed * 1_000_003 + i)
                results.append(walk.learn(i, lesson, journal, seed))
                if file is not None:
                    results[0].save(file)
                return float(results[0].row["after"])

            journal.value(f"{block.name} {self!r}", compute)
            if not results:  # a killed run has done it
                assert file is not None
                results.append(Learnt.load(file))
                walk.builder.fallbacks += walk.put(block, results[0])
            rows.append(results[0].row)
            context.progress(block.name)
        summary = {"seconds": self.seconds, "images": count_of(batches), "held": walk.held_out}
        return walk.builder.plan(PassLog.of("reconstruct", self, rows, summary))


@dataclass(frozen=True)
class Learnt:
    """What was learned of a block: codes by weight site, scales by activation site, biases (c_out,) by op, and its row."""

    row: Mapping[str, Json]
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        groups = {"codes": self.codes, "scales": self.scales, "biases": self.biases}
        tensors = {f"{group}/{name}": t for group, members in groups.items() for name, t in members.items()}
        write_state(path, on(tensors, CPU), self.row)

    @staticmethod
    def load(path: Path) -> Learnt:
        groups: dict[str, dict[str, Tensor]] = {"codes": {}, "scales": {}, "biases": {}}
        tensors, row = read_state(path)
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        return Learnt(row, **groups)


class _Walk:
    """The images on their way through the quantized model and the float one, block by block."""

    def __init__(self, plan: Plan, context: Context, settings: Reconstruct, batches: Sequence[Batch]) -> None:
        graph, self.settings = context.graph, settings
        self.blocks: list[Block] = blocks(graph, plan.integer_ops, settings.scope)
        self.tuned: dict[str, Tensor] = {}  # biases that were learned: their sums are safe with these, not with the graph's
        overlay = Executor.of(graph, plan)
        self.builder = PlanBuilder(plan, context, overlay)
        self._batch = count_in(batches[0])
        reads = [read for block in self.blocks for read in (*block.reads, *block.counts)]
        self.quantized = Stream(overlay, batches, reads, context.folder)
        outputs = [block.output for block in self.blocks]
        self.exact = Stream(Executor(graph, ()), batches, [*reads, *outputs], context.folder)
        count = count_of(batches)
        self.fit = torch.tensor([i for i in range(count) if i % HELD_OUT != HELD_OUT - 1])
        self.outside = torch.arange(HELD_OUT - 1, count, HELD_OUT)
        self.held_out = len(self.outside)
        self._weights = output_weights(graph, [node.name for node in outputs], batches) if settings.fisher else {}

    def lesson(self, block: Block) -> Lesson:
        """What a block reads, in the model quantized so far and in float, and its float output."""
        read = {node: self.quantized.at(node) for node in block.reads}
        counts = {node: self.quantized.at(node)[0] // self._batch for node in block.counts}
        exact = {node: self.exact.at(node) for node in block.reads}
        weight = self._weights.get(block.output.name)
        return Lesson(block, read, exact, self.exact.at(block.output), counts, weight)

    def learn(self, i: int, lesson: Lesson, journal: Journal, generator: torch.Generator) -> Learnt:
        """The block learned, in its share of the time that is left, and put into the plan where that is better."""
        block, started, overlay = lesson.block, journal.seconds, self.quantized.overlay
        share = None
        if self.settings.seconds is not None:
            remaining = max(self.settings.seconds - started, 0.0)
            share = remaining * block.macs / max(sum(later.macs for later in self.blocks[i:]), 1)
        before = lesson.error(overlay, self.outside)
        learner = Learner(self.builder, self.settings, lesson, overlay)
        iterations = learner.learn(self.fit, share, lambda: journal.seconds - started, generator)
        row = {
            "block": block.name,
            "ops": list(block.ops),
            "iterations": iterations,
            "before": before,
            "after": before,
            "kept": False,
        }
        if not iterations:
            return Learnt(row)
        start = self._state(block)
        result = Learnt({}, learner.codes(), learner.scales(), learner.biases())
        unsafe = self.put(block, result)
        after = lesson.error(overlay, self.outside)
        if not after < before:
            self._restore(block, start)
            return Learnt({**row, "tried": after})
        self.builder.fallbacks += unsafe
        return replace(result, row={**row, "after": after, "kept": True})

    def put(self, block: Block, result: Learnt) -> list[Fallback]:
        """Put learned values into the plan, except codes that would not be safe; a fallback for each weight that keeps its own.

        Nothing is put where those would not be safe either with what else was learned.
        """
        builder, start = self.builder, self._state(block)
        for name, scale in result.scales.items():
            qparams = QParams(scale, builder.choices[name].qparams.zero)
            builder.choices[name] = self._with_method(replace(builder.choices[name], qparams=qparams))
        self.tuned.update(result.biases)
        unsafe = []
        for name, q in sorted(result.codes.items()):  # in one order, also from a file
            old = builder.choices[name]
            new = self._with_method(replace(old, codes=q.to(old.grid.container)))
            if self._is_safe(new):
                builder.choices[name] = new
            elif self._is_safe(old):
                unsafe.append(unsafe_codes(builder.graph, new, builder.choices, builder.allowed.sites[name], "learned"))
            else:
                self._restore(block, start)
                return []
        self._show(block)
        return unsafe

    def _with_method(self, choice: Choice) -> Choice:
        return replace(choice, method=f"{choice.method}; {described(self.settings)}")

    def _is_safe(self, choice: Choice) -> bool:
        builder = self.builder
        bias = self.tuned.get(builder.graph.site(choice.site).readers[0][0])
        return sums_are_safe(builder.graph, choice, builder.choices, builder.allowed.sites[choice.site], bias)

    def _sites(self, block: Block) -> set[str]:
        """The sites of a block's ops, and those that its nodes read."""
        graph, inner = self.builder.graph, {n.name for n in block.nodes}
        sites = {site for op in block.ops for site in graph.op(op).operands.values()}
        return sites | {s.name for s in graph.sites if any(r in block.ops or graph.op(r).node in inner for r, _ in s.readers)}

    def _state(self, block: Block) -> tuple[dict[str, Choice], dict[str, Bias | None], dict[str, Tensor]]:
        """The choices and biases of a block."""
        builder, sites = self.builder, self._sites(block)
        choices = {name: builder.choices[name] for name in sites if name in builder.choices}
        tuned = {op: self.tuned[op] for op in block.ops if op in self.tuned}
        return choices, {op: builder.biases.get(op) for op in block.ops}, tuned

    def _restore(self, block: Block, state: tuple[dict[str, Choice], dict[str, Bias | None], dict[str, Tensor]]) -> None:
        """Undo all changes since a state."""
        choices, biases, tuned = state
        for op in block.ops:
            self.tuned.pop(op, None)
        self.tuned.update(tuned)
        self.builder.restore(choices, biases)

    def _show(self, block: Block) -> None:
        """Let the stream compute a block with the choices and biases that it has now."""
        builder = self.builder
        for op in block.ops:
            if op in self.tuned:
                builder.correct(op, self.tuned[op])
            else:
                builder.decide_bias(builder.graph.op(op))
        for name in self._sites(block):
            if name in builder.choices:
                self.quantized.overlay.set(builder.choices[name])
