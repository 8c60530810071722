"""How the pipeline says what it is doing; the command line draws it, everything else is silent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Says nothing, and keeps the seconds of each stage. The command line subclasses the two empty methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """A stage with a word of its own; `total` steps, or None where nobody knows."""
        start = time.perf_counter()
        self.begin(name, total)
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def begin(self, name: str, total: int | None) -> None:
        """A stage starts."""

    def advance(self, steps: int = 1, text: str = "") -> None:
        """Steps of the current stage are done."""
