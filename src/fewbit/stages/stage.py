"""What a stage is: a function from values to values, with the names of what it takes, what it gives and what it writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """`run` takes the values that its parameters name (those with a default only where they are given) and gives the values
    `gives`, a tuple where there are several. `files` lie in the run's folder behind it; where all of them are there `load`, if
    there is one, gives the same from them; with `reuses`, `run` itself does. `scratch` are files that only serve to go on from,
    and go when the run is done.
    Where `when` says no the stage passes values on, or gives `instead` without being run, and is not shown.
    """

    name: str
    run: Callable[..., Any]
    gives: tuple[str, ...]
    files: tuple[str, ...] = ()
    load: Callable[..., Any] | None = None
    scratch: tuple[str, ...] = ()
    when: Callable[[Mapping[str, Any]], bool] | None = None
    instead: tuple[Any, ...] | None = None
    reuses: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether its files serve a run that was killed behind it."""
        return self.reuses or self.load is not None

    @staticmethod
    def takes(function: Callable[..., Any], overrides: Iterable[str] = ()) -> list[str]:
        """The names of the values that a function of a stage takes."""
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.default is inspect.Parameter.empty or p.name in overrides]
