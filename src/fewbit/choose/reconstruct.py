"""Reconstruction on a graph: the plan of a recipe, then the codes of its weights again, unit by unit, for the float outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbit.choose.blocks import Part, parts
from fewbit.choose.choose import W8A8, Choosing, choosing
from fewbit.choose.fisher import output_weights
from fewbit.choose.layers import few_enough, too_many
from fewbit.choose.learn import Learner, Lesson
from fewbit.choose.recipe import Recipe
from fewbit.choose.soft_codes import Reconstruct
from fewbit.choose.weights import sums_are_safe
from fewbit.core.bits import Bits
from fewbit.core.grid import QParams
from fewbit.core.values import Choice, Graph, Json, Plan
from fewbit.errors import BadImages
from fewbit.execute.overlay import Overlay, Stream
from fewbit.execute.samples import ChannelSample, OpSample, PairSample
from fewbit.files import Journal, write_atomic
from fewbit.observe.stats import Stats
from fewbit.target.spec import Target

HELD = 4  # every so many an image is kept to judge a unit by


def reconstruct(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    images: Iterable[Tensor],
    *,
    name: str = "",
    bits: Bits = W8A8,
    keep_float: Sequence[str] = (),
    everything: bool = False,
    samples: Mapping[str, OpSample | PairSample] | None = None,
    channels: Mapping[str, ChannelSample] = MappingProxyType({}),
    seed: int = 0,
    journal: Journal | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan of a recipe whose weights were learnt again, unit by unit. `images` are batches of calibration images.

    `journal` and `folder` have the units that a killed run has done; give both or neither. Raises BadImages where there are too
    few images to hold any back.
    """
    settings = recipe.rebuild
    assert settings is not None
    journal, given = journal or Journal(), list(images)
    work = choosing(
        graph, stats, target, recipe, name=name, bits=bits, keep_float=keep_float, everything=everything, samples=samples,
        channels=channels, images=given,
    )  # fmt: skip
    work.stream = work.layers = None  # their images are at the end
    batches = few_enough(graph, given)
    work.fallbacks = [*dict.fromkeys((*work.fallbacks, *too_many(given, batches)))]
    if sum(map(len, batches)) < HELD:
        raise BadImages(f"reconstruction holds every {HELD}th image back: give {HELD} calibration images or more.")
    walk = Walk(work, settings, batches)
    rows: list[Json] = []
    for i, part in enumerate(walk.parts):
        file = None if folder is None else folder / f"{i}.safetensors"
        values = walk.lesson(part)
        found: list[Found] = []

        def compute(i: int = i, values: Lesson = values, found: list[Found] = found, file: Path | None = file) -> float:
            found.append(walk.learnt(i, values, journal, torch.Generator().manual_seed(seed * 1_000_003 + i)))
            if file is not None:
                found[0].save(file)
            return float(found[0].row["after"])

        journal.value(f"{part.name} {settings!r}", compute)
        if not found:  # a killed run has done it
            assert file is not None
            found.append(Found.load(file))
            walk.put(part, found[0])
        rows.append(found[0].row)
        progress(part.name)
    plan = work.plan()
    record = {"units": rows, "seconds": settings.seconds, "images": sum(map(len, batches)), "held": walk.held}
    return replace(plan, extra={**plan.extra, "rebuilt": record})


@dataclass(frozen=True)
class Found:
    """What was learnt of a part: codes by weight site, steps by activation site, biases (c_out,) by op, and its row."""

    codes: Mapping[str, Tensor]
    steps: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    row: Mapping[str, Json]

    def save(self, path: Path) -> None:
        groups = {"codes": self.codes, "steps": self.steps, "biases": self.biases}
        tensors = {f"{group}/{name}": t.contiguous() for group, found in groups.items() for name, t in found.items()}
        write_atomic(path, lambda part: save_file(tensors, part, {"row": json.dumps(self.row)}))

    @staticmethod
    def load(path: Path) -> Found:
        groups: dict[str, dict[str, Tensor]] = {"codes": {}, "steps": {}, "biases": {}}
        with safe_open(path, framework="pt") as file:
            row = json.loads(file.metadata()["row"])
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        return Found(groups["codes"], groups["steps"], groups["biases"], row)


class Walk:
    """The images on their way through the quantized model and the float one, part by part; what is found goes into the work."""

    def __init__(self, work: Choosing, settings: Reconstruct, batches: Sequence[Tensor]) -> None:
        self.work, self.settings = work, settings
        graph, integer = work.graph, work.allowed.integer_ops
        self.parts: list[Part] = parts(graph, integer, settings.scope)
        floats = work.biases()
        overlay = Overlay(graph, integer, work.choices)
        for op, bias in floats.items():
            overlay.set_bias(op, bias)
        self._batch = len(batches[0])
        reads = [read for part in self.parts for read in (*part.reads, *part.counts)]
        self.quantized = Stream(overlay, batches, reads)
        self.exact = Stream(Overlay(graph, ()), batches, [*reads, *(part.output for part in self.parts)])
        count = sum(map(len, batches))
        self.fit = torch.tensor([i for i in range(count) if i % HELD != HELD - 1])
        self.outside = torch.arange(HELD - 1, count, HELD)
        self.held = len(self.outside)
        names = [part.output.name for part in self.parts]
        self._weights = output_weights(graph, names, batches) if settings.fisher else {}

    def lesson(self, part: Part) -> Lesson:
        """What a part reads, in the model quantized so far and in float, and its float output; all streams stand there then."""
        read = {node: torch.cat(self.quantized.at(node)) for node in part.reads}
        counts = {node: self.quantized.at(node)[0] // self._batch for node in part.counts}
        exact = {node: torch.cat(self.exact.at(node)) for node in part.reads}
        weight = self._weights.get(part.output.name)
        return Lesson(part, read, exact, torch.cat(self.exact.at(part.output)), counts, weight)

    def learnt(self, i: int, lesson: Lesson, journal: Journal, generator: torch.Generator) -> Found:
        """The part learnt, in its share of the time that is left, and put into the work where that is better on held images."""
        part, began, overlay = lesson.part, journal.seconds, self.quantized.overlay
        share = None
        if self.settings.seconds is not None:
            left = max(self.settings.seconds - began, 0.0)
            share = left * part.macs / max(sum(later.macs for later in self.parts[i:]), 1)
        before = lesson.error(overlay, self.outside)
        learner = Learner(self.work, self.settings, lesson, overlay)
        steps = learner.learn(self.fit, share, lambda: journal.seconds - began, generator)
        found = Found(learner.codes(), learner.steps(), learner.biases(), {})
        row = {"unit": part.name, "ops": list(part.ops), "steps": steps, "before": before, "after": before, "kept": False}
        if not steps:
            return Found({}, {}, {}, row)
        start = self._state(part)
        found = self.put(part, found)
        after = lesson.error(overlay, self.outside)
        if not after < before:
            self._back(part, start)
            return Found({}, {}, {}, {**row, "tried": after})
        return replace(found, row={**row, "after": after, "kept": True})

    def put(self, part: Part, found: Found) -> Found:
        """Let the work and the stream have what was found, but for weights whose codes would not be safe; what they got."""
        work = self.work
        start = self._state(part)
        for name, scale in found.steps.items():
            work.choices[name] = self._marked(
                replace(work.choices[name], qparams=QParams(scale, work.choices[name].qparams.zero))
            )
        work.tuned.update(found.biases)
        codes = {}
        for name, q in found.codes.items():
            old = work.choices[name]
            made = self._marked(replace(old, codes=q.to(old.grid.container)))
            if self._is_safe(made):
                work.choices[name], codes[name] = made, q
            elif not self._is_safe(old):
                self._back(part, start)
                return Found({}, {}, {}, found.row)
        self._shown(part)
        return replace(found, codes=codes)

    def _marked(self, choice: Choice) -> Choice:
        return replace(choice, method=f"{choice.method}, {self.settings!r}")

    def _is_safe(self, choice: Choice) -> bool:
        work, site = self.work, self.work.graph.site(choice.site)
        bias = work.tuned.get(site.readers[0][0])
        return sums_are_safe(work.graph, site, choice, work.choices, work.allowed.sites[site.name], bias)

    def _state(self, part: Part) -> tuple[dict[str, Choice], dict[str, Tensor]]:
        """What the work has of a part's sites and biases."""
        sites = {site for op in part.ops for site in self.work.graph.op(op).operands.values()}
        sites |= {s.name for s in self.work.graph.sites if any(reader in part.ops for reader, _ in s.readers)}
        inner = {n.name for n in part.nodes}
        sites |= {s.name for s in self.work.graph.sites if any(self.work.graph.op(r).node in inner for r, _ in s.readers)}
        kept = {name: self.work.choices[name] for name in sites if name in self.work.choices}
        return kept, {op: self.work.tuned[op] for op in part.ops if op in self.work.tuned}

    def _back(self, part: Part, state: tuple[dict[str, Choice], dict[str, Tensor]]) -> None:
        """Take back what was put since a state."""
        choices, tuned = state
        self.work.choices |= choices
        for op in part.ops:
            self.work.tuned.pop(op, None)
        self.work.tuned.update(tuned)
        self._shown(part)

    def _shown(self, part: Part) -> None:
        """Let the stream compute a part with what the work has of it."""
        work, overlay = self.work, self.quantized.overlay
        for op in part.ops:
            bias = work.bias(work.graph.op(op))
            if isinstance(bias, Choice):
                work.choices[bias.site] = bias
            overlay.set_bias(op, None if isinstance(bias, Choice) else bias)
        choices, _ = self._state(part)
        for choice in choices.values():
            overlay.set(choice)
