"""What a runtime selects (top-k, sorting, the largest, thresholds), which may differ where scores are nearly equal.

A float sum in another order turns the order of two scores that differ by less than it moves them; other rows are gathered then,
and all codes behind them differ. So the runtime's places are read out, and the simulation computes on with them, as it does
with codes. They are judged by the simulation's own scores: sorting moves numbers apart no further than they were moved, so the
score at the runtime's j-th place is the j-th best one but for twice what rounding moves a score, and no place comes twice. What
rounding moves is measured as for outputs (outputs.py).

A score moves by what rounding does in the sums before it, whatever its size, and by a few units of its own last digit. They are
told apart, so that a mask of -1e9 among the scores, whose last digit is 64, excuses nothing among the others.

So it is with thresholds, where numbers are judged one by one and what was decided is read out (thresholds.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.selections import SELECTORS, places_of, selections, thresholds
from fewbit.capture.sites import path_of
from fewbit.core.checks import SelectionCheck
from fewbit.execute.executor import Executor
from fewbit.realize.chosen import CHOSEN
from fewbit.verify.outputs import MARGIN
from fewbit.verify.thresholds import OWN, Sides, finite, furthest, moved_by_sums


def shown_places(executor: Executor, outputs: Sequence[str], values: Collection[str]) -> dict[str, str]:
    """By node that selects or compares, the value that has what it chose, of all `values` of a file; `outputs` are
    the names of the graph's. A node whose choice the file does not show is left out.
    """
    given, graph = dict(zip(executor.results, outputs, strict=True)), executor.module.graph
    nodes = {node: cast(Node, places_of(node)) for node in selections(graph)} | {node: node for node in thresholds(graph)}
    names = {node.name: given.get(places, node.name + CHOSEN) for node, places in nodes.items()}
    return {node: name for node, name in names.items() if name in values}


@dataclass(frozen=True)
class _Asked:
    """What a node was asked to select from: numbers, the dimension that is selected along (None: all of them), whether the
    largest come first, and whether there is an order at all.
    """

    x: Tensor
    dim: int | None
    largest: bool
    ordered: bool

    @staticmethod
    def of(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Asked:
        arguments, kind = cast(Any, node.target)._schema.arguments, SELECTORS[node.target]
        given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        given |= {**dict(zip(given, args, strict=False)), **kwargs}
        largest = given.get("largest", given.get("descending")) if kind.largest is None else kind.largest
        x = given["self"]
        return _Asked(x, given["dim"] if x.ndim else None, bool(largest), given.get("sorted", True))

    def rows(self, y: Tensor) -> Tensor:
        """Numbers or places (rows, n), each row a selection of its own."""
        if self.dim is None:
            return y.reshape(1, -1)
        last = self.wide(y).movedim(self.dim, -1)
        return last.reshape(-1, last.shape[-1])

    def wide(self, places: Tensor) -> Tensor:
        """Places with the dimension that a single one goes without."""
        return places if self.dim is None or places.ndim == self.x.ndim else places.unsqueeze(self.dim)

    def has(self, places: Tensor) -> bool:
        """Whether there are such places."""
        count = self.x.numel() if self.dim is None else self.x.shape[self.dim]
        return bool(((places >= 0) & (places < count)).all())


class Selected:
    """What a runtime chose for a batch, by node: places, or sides of thresholds. `calls`, for `Executor.__call__`, do the same.

    The first run with them has the scores that count, the others tell how far they move.
    """

    def __init__(self, executor: Executor, chosen: Mapping[str, Tensor]) -> None:
        nodes = {name: executor.nodes[name] for name in chosen}
        self._choices: dict[Node, _Places | Sides] = {
            node: (_Places if node.target in SELECTORS else Sides)(node, chosen[name]) for name, node in nodes.items()
        }
        self.calls: Mapping[str, Callable[..., Any]] = {node.name: one.call for node, one in self._choices.items()}

    def checks(self) -> tuple[SelectionCheck, ...]:
        """The check of each node, after two runs with `calls` or more."""
        return tuple(one.check(_name(node)) for node, one in self._choices.items())


def _name(node: Node) -> str:
    return ".".join(part for part in (path_of(node), node.name) if part)


class _Places:
    """The places that a runtime chose at a node, and what it chose from.

    Kept are what was asked first, the scores (rows, n) that the node read in each run, and the places (rows, k) that it chooses
    by itself and those of the runtime; None where these are no places among so many.
    """

    def __init__(self, node: Node, places: Tensor) -> None:
        self._node, self._places = node, places
        self._asked: _Asked | None = None
        self._scores = list[Tensor]()
        self._own, self._theirs = places, cast("Tensor | None", None)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the node gives for its arguments where it chooses the runtime's places."""
        asked, own = _Asked.of(self._node, args, kwargs), cast(Any, self._node.target)(*args, **kwargs)
        own_places, theirs = own if isinstance(own, Tensor) else own[1], self._places
        usable = theirs.numel() == own_places.numel() and asked.has(theirs)
        theirs = theirs.reshape(own_places.shape).to(own_places) if usable else own_places
        self._scores.append(asked.rows(asked.x))
        if self._asked is None:
            self._asked, self._own, self._theirs = asked, asked.rows(own_places), asked.rows(theirs) if usable else None
        if isinstance(own, Tensor):
            return theirs
        values = own[0] if asked.dim is None else asked.x.gather(asked.dim, asked.wide(theirs)).reshape(own[0].shape)
        return values, theirs

    def check(self, name: str) -> SelectionCheck:
        """The check of the node, after two runs or more."""
        asked, theirs, own = self._asked, self._theirs, self._own
        assert asked is not None
        if theirs is None:
            return SelectionCheck(name, len(own), 0, len(own), float("inf"), 0.0)
        scores = self._scores[0].double()
        best = scores.sort(1, descending=asked.largest).values[:, : own.shape[1]]
        found = scores.gather(1, theirs)
        if not asked.ordered:
            found, theirs, own = found.sort(1, descending=asked.largest).values, theirs.sort(1).values, own.sort(1).values
        apart = torch.where((found == best) | (found.isnan() & best.isnan()), 0.0, (found - best).abs())
        limit = torch.zeros_like(apart)
        if self._scores[0].is_floating_point():
            moved = max((moved_by_sums(scores, other) for other in self._scores[1:]), default=0.0)
            limit = 2 * MARGIN * moved + OWN * (finite(found.abs()) + finite(best.abs()))
        places = theirs.sort(1).values
        worse = ~(apart <= limit)  # a NaN is, too
        wrong = worse.any(1) | (places[:, 1:] == places[:, :-1]).any(1)
        near = (own != theirs).any(1) & ~wrong
        return SelectionCheck(name, len(own), int(near.sum()), int(wrong.sum()), *furthest(apart, limit, worse))
