"""kill -9 at every stage, write and random moment: the same command again ends with the bytes of a run that nobody killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from doors.case import Case, done, quantize
from doors.kinds.images import has_run
from doors.serve import apart, typed

SAME = (
    "plan.json",
    "plan.safetensors",
    "model.onnx",
    "float.onnx",
    "images.safetensors",
    "exported.pt2",
    "stats.safetensors",
    "calibration.json",
)
STAGES = (
    "load",
    "images",
    "capture",
    "observe",
    "equalize",
    "choose",
    "realize",
    "verify",
    "evaluate",
    "bench",
    "summarize",
    "deploy",
    "report",
)
WRITES = 20
MOMENTS = 16


def cases() -> Iterator[Case]:
    for stage in STAGES:
        yield Case(f"after {stage}", killed(_behind(stage)), done(as_the_run), needs=("run",))
    for n in range(1, WRITES + 1):
        yield Case(f"before write {n}", killed(_at_write(n)), done(as_the_run), needs=("run",))
    for seed in range(MOMENTS):
        yield Case(f"random moment {seed}", killed(_later(seed)), done(as_the_run), needs=("run",))
    for recipe in ("fast", "minmax"):
        for stage in ("observe", "choose", "realize", "verify"):
            more = ("--recipe", recipe)
            yield Case(f"{recipe}, after {stage}", killed(_behind(stage), more, twin=True), done(as_the_twin))
    for seed in range(4):
        yield Case(
            f"killed twice, {seed}",
            killed(_later(2 * seed + 100), again=_later(2 * seed + 101)),
            done(as_the_run),
            needs=("run",),
        )


def killed(
    kill: Callable[[], object], more: tuple[str, ...] = (), *, twin: bool = False, again: Callable[[], object] | None = None
) -> Callable[[], None]:
    """A run that `kill` has arranged the end of, then the same command; with `twin` also one that nobody killed."""

    def call() -> None:
        for arranged in (kill, again):
            if arranged is not None:
                apart(lambda arranged=arranged: (_silent(), arranged(), typed(quantize(*more)))[0])
        if (Path("out") / "report.html").exists():  # it was done before it could be killed
            return
        if twin:
            apart(lambda: (_silent(), typed(quantize(*more, out="twin")))[0])
        typed(quantize(*more))

    return call


def as_the_run(folder: Path) -> str:
    return differing(folder / "run", folder / "out") or has_run(folder)


def as_the_twin(folder: Path) -> str:
    return differing(folder / "twin", folder / "out") or has_run(folder)


def differing(a: Path, b: Path) -> str:
    """The files of two runs that are not the same, byte for byte."""
    names = [name for name in SAME if _bytes(a / name) != _bytes(b / name)]
    return f"other bytes in {', '.join(names)}" if names else ""


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _silent() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _behind(stage: str) -> Callable[[], None]:
    """Die when a stage has ended."""

    def arrange() -> None:
        from fewbit.progress import Progress

        before = Progress.stage

        @contextlib.contextmanager
        def dying(self: Progress, name: str) -> Iterator[None]:
            with before(self, name):
                yield
            if name == stage:
                _die()

        Progress.stage = dying  # type: ignore[method-assign]

    return arrange


def _at_write(n: int) -> Callable[[], None]:
    """Die before the n-th time that something in the working folder is opened to write, moved, made or removed."""

    def arrange() -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree") or (
                event == "open"
                and len(arguments) > 2
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes and "out" in str(arguments[0]):
                count += 1
                if count == n:
                    _die()

        sys.addaudithook(hook)

    return arrange


def _later(seed: int) -> Callable[[], None]:
    """Die after a time that is drawn."""

    def arrange() -> None:
        seconds = random.Random(seed).uniform(0.02, 6)
        if os.fork() == 0:
            parent = os.getppid()
            time.sleep(seconds)
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
            os._exit(0)

    return arrange
