"""What a runtime selects (top-k, sorting, the place of the largest), which may differ where scores are nearly equal.

A float sum in another order turns the order of two scores that differ by less than it moves them; other rows are gathered then,
and all codes behind them differ. So the runtime's places are read out, and the simulation computes on with them, as it does
with codes. They are judged by the simulation's own scores: sorting moves numbers apart no further than they were moved, so the
score at the runtime's j-th place is the j-th best one but for twice what rounding moves a score, and no place comes twice. What
rounding moves is measured as for outputs (outputs.py).

A score moves by what rounding does in the sums before it, whatever its size, and by a few units of its own last digit. They are
told apart, so that a mask of -1e9 among the scores, whose last digit is 64, excuses nothing among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.selections import SELECTORS, places_of, selections
from fewbit.capture.sites import path_of
from fewbit.core.values import SelectionCheck
from fewbit.execute.executor import Executor
from fewbit.realize.qdq import CHOSEN
from fewbit.verify.outputs import MARGIN, STEP

OWN = 4 * STEP  # the share of its size by which a score moves where a few ops in a row round it


def shown_places(executor: Executor, outputs: Sequence[str], values: Collection[str]) -> dict[str, str]:
    """By node that selects, the value that has its places, of all `values` of a file; `outputs` are the names of the graph's.
    A node whose places the file does not show is left out.
    """
    given = dict(zip(executor.results, outputs, strict=True))
    nodes = {node: cast(Node, places_of(node)) for node in selections(executor.module.graph)}
    names = {node.name: given.get(places, node.name + CHOSEN) for node, places in nodes.items()}
    return {node: name for node, name in names.items() if name in values}


@dataclass
class _Seen:
    """Scores (rows, n) that a node read in each run, the places (rows, k) that it chooses by itself and those of the runtime;
    None where these are no places among so many.
    """

    scores: list[Tensor]
    own: Tensor
    theirs: Tensor | None
    largest: bool
    ordered: bool


class Selected:
    """The places that a runtime chose for a batch, by node. `calls`, for `Executor.__call__`, choose the same.

    The first run with them has the scores that count, the others tell how far they move.
    """

    def __init__(self, executor: Executor, places: Mapping[str, Tensor]) -> None:
        self._nodes = [executor.nodes[name] for name in places]
        self._places, self._seen = places, dict[str, _Seen]()
        self.calls: Mapping[str, Callable[..., Any]] = {node.name: self._call(node) for node in self._nodes}

    def _call(self, node: Node) -> Callable[..., Any]:
        target, kind = cast(Any, node.target), SELECTORS[node.target]
        arguments = target._schema.arguments

        def call(*args: Any, **kwargs: Any) -> Any:
            asked = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), args, strict=False))
            asked |= kwargs
            x, dim, own = asked["self"], asked["dim"], target(*args, **kwargs)
            own_places = own if isinstance(own, Tensor) else own[1]
            theirs = self._places[node.name]
            usable = theirs.numel() == own_places.numel()
            theirs = theirs.reshape(own_places.shape).to(own_places.dtype) if usable else own_places
            count = x.numel() if dim is None or not x.ndim else x.shape[dim]
            usable = usable and bool(((theirs >= 0) & (theirs < count)).all())

            def wide(places: Tensor) -> Tensor:
                return places.unsqueeze(dim) if dim is not None and places.ndim < x.ndim else places

            def rows(y: Tensor) -> Tensor:
                return y.reshape(1, -1) if dim is None or not y.ndim else y.movedim(dim, -1).reshape(-1, y.shape[dim])

            if node.name in self._seen:
                self._seen[node.name].scores.append(rows(x))
            else:
                largest = asked.get("largest", asked.get("descending")) if kind.largest is None else kind.largest
                shown = rows(wide(theirs)) if usable else None
                seen = _Seen([rows(x)], rows(wide(own_places)), shown, bool(largest), asked.get("sorted", True))
                self._seen[node.name] = seen
            if not usable:
                return own
            if isinstance(own, Tensor):
                return theirs
            return x.gather(dim, wide(theirs)).reshape(own[0].shape), theirs

        return call

    def checks(self) -> tuple[SelectionCheck, ...]:
        """The check of each node, after two runs with `calls` or more."""
        return tuple(_checked(node, self._seen[node.name]) for node in self._nodes)


def _checked(node: Node, seen: _Seen) -> SelectionCheck:
    scores, theirs, own = seen.scores[0].double(), seen.theirs, seen.own
    name = ".".join(part for part in (path_of(node), node.name) if part)
    if theirs is None:
        return SelectionCheck(name, len(own), 0, len(own), float("inf"), 0.0)
    best = scores.sort(1, descending=seen.largest).values[:, : own.shape[1]]
    found = scores.gather(1, theirs)
    if not seen.ordered:
        found, theirs, own = found.sort(1, descending=seen.largest).values, theirs.sort(1).values, own.sort(1).values
    apart = torch.where((found == best) | (found.isnan() & best.isnan()), 0.0, (found - best).abs())
    limit = torch.zeros_like(apart)
    if seen.scores[0].is_floating_point():
        sums = [_finite((other.double() - scores).abs()) - OWN * _finite(scores.abs()) for other in seen.scores[1:]]
        moved = max((float(each.max()) for each in sums if each.numel()), default=0.0)
        limit = 2 * MARGIN * max(moved, 0.0) + OWN * (_finite(found.abs()) + _finite(best.abs()))
    places = theirs.sort(1).values
    worse = ~(apart <= limit)  # a NaN is, too
    wrong = worse.any(1) | (places[:, 1:] == places[:, :-1]).any(1)
    near, (far, most) = (own != theirs).any(1) & ~wrong, (0.0, 0.0)
    if bool(worse.any()):
        over = (apart - limit)[worse].nan_to_num(float("inf")).argmax()
        far, most = float(apart[worse][over].nan_to_num(float("inf"))), float(limit[worse][over])
    return SelectionCheck(name, len(own), int(near.sum()), int(wrong.sum()), far, most)


def _finite(x: Tensor) -> Tensor:
    """Zero instead of what is no finite number: the infinities of a mask are exact."""
    return x.nan_to_num(0.0, 0.0, 0.0)
