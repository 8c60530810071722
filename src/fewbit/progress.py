"""How the pipeline says what it is doing: not at all, in lines for a log or a notebook, or in bars (the command line)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import TypeVar

Batch = TypeVar("Batch", bound=Sized)


class Progress:
    """Says nothing, and keeps the seconds of each stage. Subclasses say something in the empty methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the work began: what `--time` counts."""
        return time.monotonic() - self._began

    def waited(self, seconds: float) -> None:
        """For so long the work could not begin: `spent` leaves that out."""
        self._began += seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: a bar, and its seconds."""
        start = time.perf_counter()
        self.begin(name, None)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
            self.end(name, seconds)

    def begin(self, name: str, total: int | None) -> None:
        """A stage, or a part of one that takes long, starts."""

    def end(self, name: str, seconds: float) -> None:
        """A stage is over."""

    def say(self, line: str) -> None:
        """A sentence that the user has to read now."""

    def close(self) -> None:
        """Nothing more will come."""

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
            self.advance(len(batch[0] if isinstance(batch, tuple) else batch))


class Lines(Progress):
    """A line on standard error for each stage when it is over, and one every `every` seconds while it takes longer."""

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self._every, self._over = every, threading.Event()
        self._start, self._done, self._total = 0.0, 0, 0

    def begin(self, name: str, total: int | None) -> None:
        self._over.set()
        self._over, self._start, self._done, self._total = threading.Event(), time.perf_counter(), 0, total or 0
        threading.Thread(target=self._beat, args=(name, self._over), daemon=True).start()

    def end(self, name: str, seconds: float) -> None:
        self._over.set()
        failed = " (not finished)" if sys.exc_info()[0] is not None else ""
        self.say(f"{name}: {seconds:.1f} s{failed}")

    def expect(self, total: int) -> None:
        self._total = total

    def advance(self, steps: int = 1, text: str = "") -> None:
        self._done += steps

    def say(self, line: str) -> None:
        """Write a line; a log that cannot be written stops nothing."""
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    def _beat(self, name: str, over: threading.Event) -> None:
        while not over.wait(self._every):
            count = f", {self._done} of {self._total}" if self._done < self._total else ""
            self.say(f"{name}: {time.perf_counter() - self._start:.0f} s so far{count}")
