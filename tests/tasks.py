"""Functions that tests give to workers of other processes, which import them from here."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fewbit.errors import UnknownName
from fewbit.workers import Local

Marked = tuple[int, str]  # a number, and the folder in which each try leaves a file


def square(x: int) -> int:
    return x * x


def tried(item: Marked) -> int:
    """How often the item has been tried, this one counted."""
    number, folder = item
    count = len(list(Path(folder).glob(f"{number}-*"))) + 1
    (Path(folder) / f"{number}-{count}").write_text(str(os.getpid()))
    return count


def dies_once(item: Marked) -> int:
    """The square of an even number; of an odd one at the second try alone."""
    if tried(item) == 1 and item[0] % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(item[0])


def dies(item: Marked) -> int:
    """The square; 3 ends its process each time."""
    tried(item)
    if item[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(item[0])


def waits_once(item: Marked) -> int:
    """The square, at the first try when the file `go` is there."""
    if tried(item) == 1:
        while not (Path(item[1]) / "go").exists():
            time.sleep(0.05)
    return square(item[0])


def later_ones_sooner(indices: range) -> Iterator[int]:
    """Squares, those of odd numbers below 0."""
    time.sleep(0.5 if 0 in indices else 0)
    for k in indices:
        yield -k * k if k % 2 else k * k


def fails(item: int) -> int:
    raise UnknownName("recipe", "fats", ["fast"])


def where(item: object) -> str:
    return os.getcwd()


class Apart(Local):
    """Two other processes, as far as a function can tell: each has it from its pickle, and the last item comes first."""

    def each(self, function: Callable[[range], Iterable[Any]], count: int, size: int) -> Iterator[Any]:
        both = [pickle.loads(pickle.dumps(function)) for _ in range(2)]
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        found = {k: list(both[k % 2](parts[k])) for k in reversed(range(len(parts)))}
        return (one for k in range(len(parts)) for one in found[k])
