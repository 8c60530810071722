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
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.selections import SELECTORS, places_of, selections
from fewbit.capture.sites import path_of
from fewbit.core.checks import SelectionCheck
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


@dataclass
class _Seen:
    """What was asked first, the scores (rows, n) that a node read in each run, and the places (rows, k) that it chooses by
    itself and those of the runtime; None where these are no places among so many.
    """

    asked: _Asked
    scores: list[Tensor]
    own: Tensor
    theirs: Tensor | None


class Selected:
    """The places that a runtime chose for a batch, by node. `calls`, for `Executor.__call__`, choose the same.

    The first run with them has the scores that count, the others tell how far they move.
    """

    def __init__(self, executor: Executor, places: Mapping[str, Tensor]) -> None:
        self._nodes = [executor.nodes[name] for name in places]
        self._places, self._seen = places, dict[str, _Seen]()
        self.calls: Mapping[str, Callable[..., Any]] = {node.name: partial(self._call, node) for node in self._nodes}

    def _call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        asked, own = _Asked.of(node, args, kwargs), cast(Any, node.target)(*args, **kwargs)
        own_places, theirs = own if isinstance(own, Tensor) else own[1], self._places[node.name]
        usable = theirs.numel() == own_places.numel() and asked.has(theirs)
        theirs = theirs.reshape(own_places.shape).to(own_places) if usable else own_places
        if node.name in self._seen:
            self._seen[node.name].scores.append(asked.rows(asked.x))
        else:
            shown = asked.rows(theirs) if usable else None
            self._seen[node.name] = _Seen(asked, [asked.rows(asked.x)], asked.rows(own_places), shown)
        if isinstance(own, Tensor):
            return theirs
        values = own[0] if asked.dim is None else asked.x.gather(asked.dim, asked.wide(theirs)).reshape(own[0].shape)
        return values, theirs

    def checks(self) -> tuple[SelectionCheck, ...]:
        """The check of each node, after two runs with `calls` or more."""
        return tuple(_checked(node, self._seen[node.name]) for node in self._nodes)


def _checked(node: Node, seen: _Seen) -> SelectionCheck:
    scores, theirs, own = seen.scores[0].double(), seen.theirs, seen.own
    name = ".".join(part for part in (path_of(node), node.name) if part)
    if theirs is None:
        return SelectionCheck(name, len(own), 0, len(own), float("inf"), 0.0)
    best = scores.sort(1, descending=seen.asked.largest).values[:, : own.shape[1]]
    found = scores.gather(1, theirs)
    if not seen.asked.ordered:
        found, theirs, own = found.sort(1, descending=seen.asked.largest).values, theirs.sort(1).values, own.sort(1).values
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
    """Zero instead of what is not a finite number: the infinities of a mask are exact."""
    return x.nan_to_num(0.0, 0.0, 0.0)
