"""A case: what is typed, what was put in its folder before, what happens meanwhile, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Right:
    """The exit codes that are right. `says` are words of the message, in any case; of a tuple of words one is enough.

    After exit code 0 `holds` looks at the folder and returns what is wrong there, or nothing.
    """

    codes: tuple[int, ...]
    says: tuple[str | tuple[str, ...], ...] = ()
    holds: Callable[[Path], str] | None = None
    silent: bool = False  # nobody may be there to read a message


def refused(*says: str | tuple[str, ...]) -> Right:
    """Exit code 2 and one message that names these."""
    return Right((2,), says)


def done(holds: Callable[[Path], str] | None = None) -> Right:
    """Exit code 0; the result is right."""
    return Right((0,), (), holds)


def either(*says: str | tuple[str, ...], holds: Callable[[Path], str] | None = None) -> Right:
    """Refused with a message that names these, or a right result."""
    return Right((0, 2), says, holds)


def caught(*says: str | tuple[str, ...]) -> Right:
    """The proof failed (1) or the file was refused (2); never a yes."""
    return Right((1, 2), says)


@dataclass(frozen=True)
class Case:
    """`does` is what is typed behind `fewbit`, or a function, which runs in the folder of the case and is handed nothing.

    `before` puts the bad input into the folder, `meanwhile` is handed the process and the folder once it runs. `keeps` are
    names in the folder that a refusal may leave changed; anything else has to be as it was.
    """

    name: str
    does: tuple[str, ...] | Callable[[], object]
    right: Right = field(default_factory=refused)
    before: Callable[[Path], object] | None = None
    meanwhile: Callable[[int, Path], object] | None = None
    keeps: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 60.0  # of work
    memory: int = 6 * GIB
    fast: bool = False  # also in the fast part
    needs: tuple[str, ...] = ()  # what of the place is copied beside net.py and flat

    @property
    def typed(self) -> str:
        return " ".join(self.does) if isinstance(self.does, tuple) else getattr(self.does, "__name__", "a call")


def quantize(*more: str, model: str = "net.py:model", images: str = "flat", out: str = "out") -> tuple[str, ...]:
    """The command that is right but for what is added."""
    where = ("--images", images) if images else ()
    return ("quantize", model, *where, "--no-labels", "--out", out, "--seconds", "0.01", *more)


def search(*more: str, evaluations: str = "3") -> tuple[str, ...]:
    own = () if "--evaluations" in more else ("--evaluations", evaluations)
    return ("search", "net.py:model", "--images", "flat", "--no-labels", "--out", "out", "--calibration", "4", *own, *more)


def sensitivity(*more: str) -> tuple[str, ...]:
    return ("sensitivity", "net.py:model", "--images", "flat", "--no-labels", "--out", "out", "--calibration", "4", *more)


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file of the folder."""

    def put(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def each(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Several preparations, in order."""

    def put(folder: Path) -> None:
        for step in steps:
            step(folder)

    return put
