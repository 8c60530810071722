"""What does independent work, and the plainest of it: this process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Workers(Protocol):
    """What does independent work."""

    @property
    def count(self) -> int:
        """How many items are worked on at once."""
        ...

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], lost: Callable[[Item, str], Result] | None = None
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) of each item once, as they come. `function` and the items can be pickled.

        `lost` is the result of an item whose worker ended each time it was tried; without it that raises Stopped.
        """
        ...

    def each(self, function: Callable[[range], Iterable[Result]], count: int, size: int) -> Iterator[Result]:
        """All that `function` gives for the indices below `count`, in their order; split, if at all, at multiples of `size`."""
        ...

    def everywhere(self, function: Callable[[Item], Result], item: Item) -> dict[str, Result]:
        """The result on each machine, by its name."""
        ...


@dataclass(frozen=True)
class Local:
    """This process, one item after the other."""

    count: int = 1

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], lost: Callable[[Item, str], Result] | None = None
    ) -> Iterator[tuple[int, Result]]:
        return ((index, function(item)) for index, item in enumerate(items))

    def each(self, function: Callable[[range], Iterable[Result]], count: int, size: int) -> Iterator[Result]:
        yield from function(range(count))

    def everywhere(self, function: Callable[[Item], Result], item: Item) -> dict[str, Result]:
        return {socket.gethostname(): function(item)}


LOCAL = Local()


def in_order(workers: Workers, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The result of each item, in their order, whoever computes it: an item a task, with as many threads of torch as here, so
    that its sums are the same.
    """
    import torch

    return workers.each(partial(_one_by_one, function, items, torch.get_num_threads()), len(items), 1)


def _one_by_one(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, indices: range
) -> Iterator[Result]:  # fmt: skip
    import torch

    for k in indices:
        torch.set_num_threads(threads)
        yield function(items[k])
