"""What is printed, and the progress that is drawn meanwhile."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from fewbit.errors import Stopped
from fewbit.progress import Lines, Progress

PLAIN = str.maketrans({"→": "->", "×": "x", "−": "-", "\u00a0": " "})  # for a terminal that has no more than ASCII


def plain(text: str) -> str:
    """A text without anything that a terminal obeys: what is no printable character is written as its escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def escape_what_is_lacking() -> None:
    """Let standard output and error write characters that their encoding lacks as escapes, whoever prints: typer's help too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            with suppress(OSError):  # whoever started this process has put a pipe in the place of its file
                stream.reconfigure(errors="backslashreplace")


class Terminal(Console):
    """The one place that prints: names of files, sites and classes are shown as they are, never as markup or control codes."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        written = plain(text).encode(self.encoding, "backslashreplace").decode(self.encoding)  # so that tables stay aligned
        return super().render_str(written, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Raises Stopped where standard output cannot be written, BrokenPipeError where nobody reads it."""
        try:
            super().print(*objects, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Stopped(f"standard output cannot be written: {error.strerror}. Send it elsewhere.") from error

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


out, err = Terminal(), Terminal(stderr=True)


class BarProgress(Progress):
    """A line per stage on standard error, with a bar where the number of steps is known."""

    def __init__(self) -> None:
        super().__init__()
        columns = (
            SpinnerColumn("dots" if err.encoding.startswith("utf") else "line"),
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, TextColumn("{task.fields[note]}", markup=False), console=err)
        self._task: Any = None

    def begin(self, name: str, total: int | None) -> None:
        self._finish()
        self._bars.start()
        self._task = self._bars.add_task(name, total=total, note="")

    def expect(self, total: int) -> None:
        self._bars.update(self._task, total=total)

    def advance(self, steps: int = 1, text: str = "") -> None:
        self._bars.update(self._task, advance=steps, note=plain(text[-40:]))

    def say(self, line: str) -> None:
        err.print(line, style="yellow", soft_wrap=True)

    def close(self) -> None:
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=total, completed=total, note="")


@contextmanager
def drawn() -> Iterator[Progress]:
    """Progress that is shown while the block runs: bars on a terminal, else a line for each stage."""
    progress = BarProgress() if err.is_terminal else Lines()
    try:
        yield progress
    finally:
        progress.close()
