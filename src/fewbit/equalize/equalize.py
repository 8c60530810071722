"""All rewrites of a graph whose statistics are known: of constants, channels by powers of two, rows of attention by maxima."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.residual import conv_pairs, residual
from fewbit.capture.structure import Heads, heads, norms
from fewbit.core.fx import constant
from fewbit.core.graph import Graph, Json, Op
from fewbit.core.grid import Grid
from fewbit.core.pages import give_back
from fewbit.equalize.attention_rows import flat_rows
from fewbit.equalize.channels import WORTH, evened, places, steps
from fewbit.equalize.cross_layer import balanced, for_weight
from fewbit.equalize.migrate import STRENGTHS, Migration, balanced_keys, middle_and_reach, migrated, varies
from fewbit.equalize.replaced import difference_of, output_of, replaced, same_function
from fewbit.equalize.rotate import can_rotate, rotated, rotated_heads
from fewbit.equalize.samples import Extremes, sample_tensors
from fewbit.execute.executor import Executor

TOLERANCE = 1e-4  # of the largest output, on a random image


@dataclass(frozen=True)
class Equalized:
    """The graph with other constants, those constants by name, and a row for each place: kind, op, strength, errors.

    A constant with the name of a site is what its channels are multiplied by (equalize/channels.py); an empty one with that of
    a site of probabilities says that their rows are divided by their maxima (equalize/attention_rows.py).
    """

    graph: Graph
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    record: tuple[Mapping[str, Json], ...] = ()


@dataclass(frozen=True)
class Equalize:
    """What is equalized, each place with its own strength, "off" among them.

    `channels`: what depthwise convolutions read and what float nodes read of convolutions, by powers of two for each channel;
    `norms`: scale and shift of a layer norm into the layers behind it (SmoothQuant, RepQ-ViT); `values`: of values into the
    layer behind attention (rows of probabilities sum to one, so a shift is a bias there); `keys`: queries against keys, and a
    shift of keys (which moves all logits of a query alike, so the softmax does not see it); `convolutions`: across a ReLU;
    `probabilities`: below 8 bits, rows of a softmax by their maxima, which the product of attention is multiplied by.
    `rotate` turns the residual stream by a random orthogonal matrix, first of all, and with `rotate_heads` values, and queries
    with keys, in each head (equalize/rotate.py). `rows` are sampled of each tensor over all images; where a tensor has fewer,
    one half of them judges what the other would choose, since channels that just fill a range do not stay in it.
    """

    channels: bool = True
    norms: bool = True
    values: bool = True
    keys: bool = True
    convolutions: bool = True
    probabilities: bool = True
    strengths: tuple[float, ...] = STRENGTHS
    rows: int = 1024
    of_maps: int = 512
    of_rows: int = 64
    rotate: bool = False
    rotate_heads: bool = False
    seed: int = 0

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        turned = ", behind random rotations" if self.rotate or self.rotate_heads else ""
        return f"ranges made alike from channel to channel{turned}"

    def images(self, graph: Graph, grids: Mapping[str, Grid]) -> int:
        """How many images it looks at: `of_maps` where it sees the extremes of maps, which each further image may raise; of
        rows of tokens as many as give `rows` of the longest tensors, `of_rows` at least.
        """
        work = _Work(graph, grids, self.strengths)
        if work.maps(self):
            return self.of_maps
        ops = [norm.layers[0] for norm in norms(graph) if self.norms]
        ops += [op for h in work.heads for op in (h.behind, h.value, h.query, h.key) if op and (self.values or self.keys)]
        shapes = [graph.site(op.operands["input"]).shape for op in ops]
        each = max((math.prod(shape[1:-1]) for shape in shapes), default=self.rows)
        return min(max(self.of_rows, -(-self.rows // each)), self.of_maps)

    def __call__(self, graph: Graph, batches: Collection[Tensor], grids: Mapping[str, Grid]) -> Equalized:
        """The graph equalized for the grids of its sites (by name; a site without one is unchanged).

        A place whose rewrite changes the function by more than 1e-4 is left out and says so. Raises BadImages without a batch.
        """
        state = self._constants(graph, batches, grids)
        rows = list(flat_rows(state.graph, grids)) if self.probabilities else []
        return _append(state, "probabilities", "attention", {site.name: torch.empty(0) for site in rows}) if rows else state

    def _constants(self, graph: Graph, batches: Collection[Tensor], grids: Mapping[str, Grid]) -> Equalized:
        """The graph with other constants, without new nodes but products by channel."""
        base = self._rotate(graph)
        work = _Work(base.graph, grids, self.strengths)
        graph, work.new, work.record = base.graph, dict(base.constants), [dict(row) for row in base.record]
        watched, maps = work.watched(self), work.maps(self)
        if not watched and not maps:
            return work.result()
        work.samples, work.extremes = sample_tensors(graph, batches, watched, self.rows, maps)
        work.rows = self.rows
        work.output = output_of(Executor(graph))
        for flag, rewrite in (
            (self.channels, work.channels),
            (self.norms, work.layer_norms),
            (self.values, work.value_scales),
            (self.keys, work.query_scales),
            (self.convolutions, work.convolutions),
        ):
            if flag:
                work.together(rewrite)
        return work.result()

    def _rotate(self, graph: Graph) -> Equalized:
        """The graph after the rotations, each a row; one that would change the function is left out."""
        state = Equalized(graph)
        if self.rotate:
            stream = residual(graph)
            able = stream is not None and can_rotate(graph, stream)
            changes = rotated(graph, stream, self.seed) if stream is not None and able else {}
            state = _append(state, "rotation", "residual stream", changes)
        for op, changes in rotated_heads(state.graph, self.seed) if self.rotate_heads else ():
            state = _append(state, "rotation", op.name, changes)
        return state


def _append(state: Equalized, kind: str, name: str, changes: Mapping[str, Tensor]) -> Equalized:
    """The state after one more change, if the function is the same with it."""
    graph = replaced(state.graph, changes)
    difference = same_function(state.graph, graph)
    moved = bool(changes) and difference <= TOLERANCE
    row: dict[str, Json] = {"kind": kind, "op": name, "strength": None, "before": 0.0, "after": 0.0}
    record = (*state.record, {**row, "difference": difference, "shift": False, "moved": moved})
    return (
        Equalized(graph, {**state.constants, **changes}, record) if moved else Equalized(state.graph, state.constants, record)
    )


class _Work:
    """Constants that have changed so far, and samples of the tensors between."""

    def __init__(self, graph: Graph, grids: Mapping[str, Grid], strengths: tuple[float, ...]) -> None:
        self.graph, self.grids, self.strengths = graph, grids, strengths
        self.nodes: dict[str, Node] = {node.name: node for node in graph.module.graph.nodes}
        self.new: dict[str, Tensor] = {}
        self.output: tuple[Tensor, ...] = ()  # with the constants that have changed so far
        self.running: Executor | None = None  # with them as well
        self.record: list[dict[str, Json]] = []
        self.samples: dict[str, Tensor] = {}
        self.extremes: dict[str, Extremes] = {}
        self.rows = 0  # asked for of each tensor
        self.heads: list[Heads] = heads(graph)
        self.places = list(places(graph, grids))
        self.evened: set[str] = set()  # sites whose channels have had their factors
        self.one_by_one = False  # each change is looked at alone, and left out if it changes the function

    def watched(self, settings: Equalize) -> set[str]:
        """The nodes of which rows are sampled."""
        names = {norm.node.name for norm in norms(self.graph)} if settings.norms else set()
        for h in self.heads if settings.values else ():
            names |= {op.node for op in (h.value,) if op} | ({self._input(h.behind).name} if h.behind else set())
        for h in self.heads if settings.keys else ():
            names |= {op.node for op in (h.query, h.key) if op}
        return names

    def maps(self, settings: Equalize) -> set[str]:
        """The nodes whose channels are looked at."""
        names = {place.site.tensor for place in self.places} if settings.channels else set()
        return names | ({p.between.name for p in conv_pairs(self.graph)} if settings.convolutions else set())

    def together(self, rewrite: Callable[[], None]) -> None:
        """A rewrite of many places, with one look at the outputs behind all; place by place where that finds a difference."""
        before, rows = dict(self.new), len(self.record)
        rewrite()
        changed = [row for row in self.record[rows:] if row["moved"] and "difference" not in row]
        if not changed:
            return
        output = output_of(Executor(replaced(self.graph, self.new)))
        difference = difference_of(self.output, output)
        if difference <= TOLERANCE:
            self.output = output
            for row in changed:
                row["difference"] = difference
            return
        self.new, self.one_by_one = before, True
        del self.record[rows:]
        rewrite()
        self.one_by_one, self.running = False, None

    def channels(self) -> None:
        """All places at once: powers of two round nothing, so one look at the outputs is enough."""
        before, rows = dict(self.new), list[dict[str, Json]]()
        for place in self.places:
            seen = self.extremes[place.site.tensor]
            low, high, squares = seen.low, seen.high, seen.squares
            scale = evened(low, high, squares)
            gain = steps(low, high, scale)
            if gain["after"] * (WORTH if place.multiplied else 1.0) >= gain["before"]:
                continue
            if place.writer is not None:
                self.new |= self._divide(place.writer, scale, torch.zeros_like(scale))
            for op in place.readers:
                self.new[self._name(self.nodes[op.node], 1)] = (w := self._constant(op, 1)) * for_weight(scale, w)
            if place.multiplied:
                self.new[place.site.name] = 1 / scale if place.writer is None else scale
            self.evened.add(place.site.name)
            op = place.writer or place.readers[0]
            rows.append({"kind": "channels", "op": op.name, "strength": None, **gain})
        if not rows:
            return
        output = output_of(Executor(replaced(self.graph, self.new)))
        difference = difference_of(self.output, output)
        moved = difference <= TOLERANCE
        self.new, self.output = (self.new, output) if moved else (before, self.output)
        self.record += [{**row, "difference": difference, "shift": False, "moved": moved} for row in rows]

    def layer_norms(self) -> None:
        for norm in norms(self.graph):
            activation = self.grids.get(norm.layers[0].operands["input"])
            others = [self.grids.get(op.operands["weight"]) for op in norm.layers]
            if activation is None or others[0] is None or any(o is None for o in others) or activation.axis is not None:
                continue
            w = torch.cat([self._constant(op, 1) for op in norm.layers])
            biased = all("bias" in op.operands for op in norm.layers)
            x = self.samples[norm.node.name]
            if not varies(x):
                continue
            move = migrated(x, w, activation, others[0], self.strengths, shift=biased, few=self._few(x))
            changes = {self._name(norm.node, 2): self._at(norm.node, 2) / move.scale}
            changes[self._name(norm.node, 3)] = (self._at(norm.node, 3) - move.shift) / move.scale
            for op in norm.layers:
                changes |= self._multiply(op, move)
            self._change("norm", norm.layers[0], move, changes)

    def value_scales(self) -> None:
        for h in self.heads:
            if h.value is None or h.behind is None or "bias" not in h.behind.operands or "bias" not in h.value.operands:
                continue
            activation, weight = (self.grids.get(h.behind.operands[operand]) for operand in ("input", "weight"))
            if activation is None or weight is None or activation.axis is not None:
                continue
            values, mixed = self.samples[h.value.node], self.samples[self._input(h.behind).name]
            if values.shape[1] != mixed.shape[1] or not varies(values):
                continue
            middle, _ = middle_and_reach(values)
            w, few = self._constant(h.behind, 1), self._few(mixed)
            move = migrated(mixed - middle, w, activation, weight, self.strengths, shift=False, few=few)
            move = Migration(move.scale, middle, move.strength, move.before, move.after)
            changes = self._divide(h.value, move.scale, middle) | self._multiply(h.behind, move)
            self._change("value", h.value, move, changes)

    def query_scales(self) -> None:
        for h in self.heads:
            if h.query is None or h.key is None or h.scores is None or "bias" not in h.key.operands:
                continue
            query, key = (self.grids.get(h.scores.operands[side]) for side in ("query", "key"))
            if query is None or key is None:
                continue
            q, k = self.samples[h.query.node], self.samples[h.key.node]
            if q.shape[1] != k.shape[1] or not varies(k):
                continue
            middle, _ = middle_and_reach(k)
            codes = (query.high - query.low, key.high - key.low) if self._few(k) else None
            move = balanced_keys(q, k - middle, (None, *self.strengths), codes)
            before = balanced_keys(q, k, (None,), codes).after
            changes = self._divide(h.key, move.scale, middle) | self._divide(h.query, 1 / move.scale, torch.zeros_like(middle))
            self._change("key", h.key, Migration(move.scale, middle, move.strength, before, move.after), changes)

    def convolutions(self) -> None:
        for pair in conv_pairs(self.graph):
            op = pair.second
            activation, weight = (self.grids.get(op.operands[operand]) for operand in ("input", "weight"))
            if activation is None or weight is None or activation.axis is not None or op.operands["input"] in self.evened:
                continue
            w = self._constant(op, 1)
            move = balanced(self.extremes[pair.between.name], w, activation, weight)
            changes = self._divide(pair.first, move.scale, move.shift)
            changes[self._name(self.nodes[op.node], 1)] = w * for_weight(move.scale, w)
            self._change("convolution", pair.first, move, changes)

    def result(self) -> Equalized:
        return Equalized(replaced(self.graph, self.new), self.new, tuple(self.record))

    def _change(self, kind: str, op: Op, move: Migration, changes: Mapping[str, Tensor]) -> None:
        """Apply changed constants; where changes are looked at one by one, if the function is the same with them."""
        row: dict[str, Json] = {"kind": kind, "op": op.name, "strength": move.strength, "before": move.before}
        moved = move.strength is not None or bool(move.shift.any())
        if moved and not self.one_by_one:
            self.new |= changes
        elif moved:
            output = self._tried(changes)
            row["difference"] = difference = difference_of(self.output, output)
            if difference <= TOLERANCE:
                self.new |= changes
                self.output = output
            else:
                moved = False
                self.running = None
            give_back()
        after = move.after if moved else move.before
        self.record.append({**row, "shift": moved and bool(move.shift.any()), "moved": moved, "after": after})

    def _tried(self, changes: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the graph gives with more constants changed."""
        if self.running is None:
            self.running = Executor(replaced(self.graph, self.new))
        self.running.replace(changes)
        return output_of(self.running)

    def _divide(self, op: Op, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """The weight and bias of a layer whose output is to be (y - shift) / scale."""
        w = self._constant(op, 1)
        changes = {self._name(self.nodes[op.node], 1): w / scale.view(-1, *[1] * (w.ndim - 1))}
        if "bias" in op.operands:
            changes[self._name(self.nodes[op.node], 2)] = (self._constant(op, 2) - shift) / scale
        return changes

    def _multiply(self, op: Op, move: Migration) -> dict[str, Tensor]:
        """The weight and bias of a layer that is to read (x - shift) / scale in place of x."""
        w = self._constant(op, 1)
        changes = {self._name(self.nodes[op.node], 1): w * move.scale}
        if "bias" in op.operands:
            changes[self._name(self.nodes[op.node], 2)] = self._constant(op, 2) + w @ move.shift
        return changes

    def _few(self, sample: Tensor) -> bool:
        """Whether fewer rows than were asked for could be had."""
        return len(sample) < self.rows

    def _input(self, op: Op) -> Node:
        return cast(Node, self.nodes[op.node].args[0])

    def _name(self, node: Node, place: int) -> str:
        return cast(str, cast(Node, node.args[place]).target)

    def _at(self, node: Node, place: int) -> Tensor:
        name = self._name(node, place)
        return self.new[name] if name in self.new else constant(self.graph.module, cast(Node, node.args[place]))

    def _constant(self, op: Op, place: int) -> Tensor:
        return self._at(self.nodes[op.node], place)
