"""How the pipeline says what it is doing; the command line draws it, everything else is silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Batch = TypeVar("Batch", bound=Sized)


class Progress:
    """Says nothing, and keeps the seconds of each stage. The command line subclasses the three empty methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: a bar, and its seconds."""
        start = time.perf_counter()
        self.begin(name, None)
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def begin(self, name: str, total: int | None) -> None:
        """A stage, or a part of one that takes long, starts."""

    def expect(self, total: int) -> None:
        """The current bar will advance so often."""

    def advance(self, steps: int = 1, text: str = "") -> None:
        """Steps of the current bar are done."""

    def counted(self, batches: Collection[Batch]) -> Counted[Batch]:
        """The batches, each counted by its images once it has been worked on."""
        return Counted(batches, self.advance)


class Counted(Collection[Batch]):
    """Batches, as they are, that tell a progress of each that has been worked on."""

    def __init__(self, batches: Collection[Batch], advance: Callable[[int], None]) -> None:
        self.batches, self.advance = batches, advance

    def __len__(self) -> int:
        return len(self.batches)

    def __contains__(self, batch: object) -> bool:
        return batch in self.batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch
            self.advance(len(batch))
