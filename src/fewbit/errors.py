"""Everything that a user can get wrong. Each message names the place, what was found, what is allowed, what to type next.

FewbitError                     exit code 2: the request was wrong
├── UnknownName                 a target, recipe, option or site that does not exist; offers the nearest ones
├── BadModel                    a model that cannot be loaded or exported
├── BadImages                   images or labels that cannot be used
├── BadValues                   NaN or infinite weights or activations
├── BadFile                     a target, plan or run file that is broken, or an output folder in the way
└── IllegalGrid                 a grid that the target does not have
FewbitFailed                    exit code 1: the work was done and the result is not good enough
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewbitError(Exception):
    """The request was wrong; the command line prints the message alone and exits with 2."""

    exit_code = 2


class UnknownName(FewbitError):
    """A name that is not in a list: `kind` is what was looked for, `allowed` what there is."""

    def __init__(self, kind: str, name: str, allowed: Iterable[str], hint: str = "") -> None:
        names = sorted(allowed)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        found = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
        super().__init__(f"unknown {kind} '{name}'. {found}" + (f" {hint}" if hint else ""))


class BadModel(FewbitError):
    """A model that cannot be loaded or exported."""


class BadImages(FewbitError):
    """Images or labels that cannot be used."""


class BadValues(FewbitError):
    """NaN or infinite numbers; the message names the site."""


class BadFile(FewbitError):
    """A file or folder that is broken, missing or in the way."""


class IllegalGrid(FewbitError):
    """A grid that the target does not allow at a site."""

    def __init__(self, site: str, asked: str, allowed: str, target: str) -> None:
        super().__init__(
            f"{site} asks for {asked}; target {target} allows there: {allowed}. "
            f"Pick a target that has it (fewbit targets) or keep it float: --keep-float '{site}'."
        )


class FewbitFailed(Exception):
    """Verification or a floor failed; the command line prints the message and exits with 1."""

    exit_code = 1
