"""One stream: batches of images on their way through an executor, all at the same node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fewbit.core.fx import between, is_constant
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch
from fewbit.core.shelf import Shelf, count_of
from fewbit.execute.executor import Env, Executor, last_reads

KEPT_BYTES = 1 << 30  # most bytes of intermediate values where `to` stops

NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class _Fed(Sequence[Tensor]):
    """What the input at a place takes in each batch."""

    executor: Executor
    batches: Sequence[Batch]
    place: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: Any) -> Any:
        return self.executor.fed(self.batches[i])[self.place]


class Stream:
    """Batches of images that stand before the node at `place`; only the values that are read from there on are kept.

    Nodes before the place used the choices that `overlay` had when they were passed; `overlay` may be another executor of the
    same graph at any time. `reads_ahead`: nodes that `at` will be called with, once per occurrence, in any order. Values are
    in files in `folder`, those of one batch in memory.
    """

    def __init__(
        self, overlay: Executor, batches: Sequence[Batch], reads_ahead: Iterable[Node] = (), folder: Path | None = None
    ) -> None:
        self.overlay = overlay
        self.order = [node for node in overlay.order if not is_constant(node)]
        self.index = {node: i for i, node in enumerate(self.order)}
        self._batches, self._pending, self._folder = batches, Counter(reads_ahead), folder
        self._results = {node for node in overlay.results if not is_constant(node)}
        self._spent = {
            node: [r for r in reads if r not in self._results] for node, reads in last_reads(self.order[:-1]).items()
        }
        self._last = {read: self.index[node] for node, reads in self._spent.items() for read in reads}
        self.back()

    def back(self) -> None:
        """To the images."""
        self.place = 0
        self._values: dict[Node, Sequence[Any]] = {  # by node, for each batch
            source: _Fed(self.overlay, self._batches, place) for place, source in enumerate(self.overlay.sources)
        }

    def at(self, node: Node) -> Shelf:
        """The value in each batch of a node in `reads_ahead`, or read after the place; the stream stands behind it then."""
        self._forward(max(self.index[node] + 1, self.place))
        values = self._values[node]
        self._pending[node] -= 1
        if self._pending[node] <= 0 and self._last.get(node, -1) < self.place and node not in self._results:
            self._values.pop(node)
        return values if isinstance(values, Shelf) else Shelf.of(values, self._folder)

    def to(self, place: int) -> None:
        """Forward to the last node, at most the one at `place`, before which no more than KEPT_BYTES are held."""
        fits = np.flatnonzero(self._bytes[self.place : place + 1] <= KEPT_BYTES)
        self._forward(self.place + int(fits[-1]) if len(fits) else self.place)

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """The model's outputs for each batch, computed from the place on; the stream stays where it is."""
        for i in range(len(self._batches)):
            env = {node: values[i] for node, values in self._values.items()}
            with torch.no_grad():
                self.overlay.run(self.order[self.place :], env, self._spent)
                outputs = self.overlay.outputs(env)
            yield outputs

    def outputs_from(self, place: int) -> Iterator[tuple[Tensor, ...]]:
        """The outputs after a change of the executor that the first `place` nodes do not see."""
        if place < self.place:
            self.back()
        self.to(place)  # the next change is likely to be there as well
        return self.outputs()

    def _forward(self, place: int) -> None:
        nodes = self.order[self.place : place]
        spent = {node: [read for read in self._spent.get(node, ()) if self._pending[read] <= 0] for node in nodes}
        before = {read: self._values[read] for node in nodes for read in node.all_input_nodes if read in self._values}
        after: dict[Node, Shelf] = {}
        for i in range(len(self._batches) if nodes else 0):
            env = {node: values[i] for node, values in before.items()}
            with torch.no_grad():
                self.overlay.run(nodes, env, spent)
            for node in env.keys() - before.keys():
                after.setdefault(node, Shelf(self._folder)).append(env[node])
        for read in (read for reads in spent.values() for read in reads):
            self._values.pop(read, None)
        self._values |= after
        self.place = place

    @cached_property
    def _bytes(self) -> NDArrayInt:
        """For each place the bytes of the values that are read from there on, in all batches."""
        sizes = np.zeros(len(self.order) + 1, np.int64)
        for node, last in {**self._last, **dict.fromkeys(self._results, len(self.order) - 1)}.items():
            if node not in self.overlay.sources:
                sizes[self.index[node] + 1 : last + 1] += _size(node.meta.get("tensor_meta"))
        return sizes * count_of(self._batches)


def _size(meta: Any) -> int:
    """The bytes of a value, from what shape propagation has recorded."""
    if hasattr(meta, "shape"):
        return 4 * int(torch.Size(meta.shape).numel())
    return sum(map(_size, meta)) if isinstance(meta, tuple | list) else 0


def walked(
    graph: Graph, groups: Sequence[tuple[Sequence[str], Sequence[str]]], batches: Sequence[Batch]
) -> Iterator[tuple[list[Node], list[Env], tuple[Tensor, ...]]]:
    """For groups of ops, each with the names of output nodes: the nodes from the ops to these outputs, the float values that
    they read in each batch (and those outputs that do not depend on the ops), and the float outputs of all; one group's values
    at a time.
    """
    executor = Executor(graph)
    parts = []
    for ops, names in groups:
        outputs = [executor.nodes[name] for name in names]
        inner, reads = between(outputs, [executor.nodes[graph.op(name).node] for name in ops])
        parts.append((outputs, inner, [*reads, *(one for one in outputs if one not in {*inner, *reads})]))
    stream = Stream(executor, batches, [read for _, _, reads in parts for read in reads])
    for outputs, inner, reads in parts:
        values = {read: stream.at(read) for read in reads}
        given: list[Env] = [{read: shelf[i] for read, shelf in values.items()} for i in range(len(batches))]
        yield inner, given, joined_values(executor, outputs, inner, given)


def joined_values(
    executor: Executor, outputs: Sequence[Node], inner: Sequence[Node], given: Sequence[Env]
) -> tuple[Tensor, ...]:
    """The values of `outputs` for all batches together, computed from what `inner` reads in each."""
    columns = zip(*(executor.values(outputs, inner, env) for env in given), strict=True)
    return tuple(torch.cat(column) for column in columns)
