"""Everything that a user can get wrong. Each message names the place, what was found, what is allowed, what to type next.

FewbitError                     exit code 2: the request was wrong
├── UnknownName                 a target, recipe, option or site that does not exist; offers the nearest ones
├── BadModel                    a model that cannot be loaded or exported
│   └── CannotRun               a file that a runtime loads and cannot run on some images
├── BadImages                   images or labels that cannot be used
├── BadValues                   NaN or infinite weights or activations
├── BadFile                     a target, plan or run file that is broken, or an output folder in the way
│   └── InUse                   a folder that another process works in
└── Stopped                     a full disk, no memory, a file that may not be written: the request may be right
FewbitFailed                    exit code 1: the work was done and the result is not good enough
└── Fault                       a fault of fewbit's own: the same request ends in it again
"""

from __future__ import annotations

import difflib
import errno
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

AGAIN = "write the run again with fewbit quantize --force."  # what to do about a file of a run that is not right


class FewbitError(Exception):
    """The request was wrong; the command line prints the message alone and exits with 2."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        one_stop = re.sub(r"(?<=[\w)`'\"])\.\.(?=\s|$)", ".", message)  # behind what a library said with a full stop of its own
        short_words = re.sub(r"\S{240,}", lambda word: f"{word[0][:120]}...{word[0][-60:]}", one_stop)
        super().__init__(short_words)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as its class and message, whatever it was made from: tasks of other processes raise it, too."""
        return _again, (type(self), str(self))


def _again(kind: type[FewbitError], message: str) -> FewbitError:
    error = kind.__new__(kind)
    FewbitError.__init__(error, message)
    return error


class UnknownName(FewbitError):
    """A name that is not in a list: `kind` is what was looked for, `allowed` what there is."""

    def __init__(self, kind: str, name: str, allowed: Iterable[str], hint: str = "") -> None:
        names = sorted(allowed)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        found = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
        super().__init__(f"unknown {kind} '{name}'. {found}" + (f" {hint}" if hint else ""))


class BadModel(FewbitError):
    """A model that cannot be loaded or exported."""


class CannotRun(BadModel):
    """A file that a runtime loads and cannot run on some images; the message begins with the file."""


class BadImages(FewbitError):
    """Images or labels that cannot be used."""


class BadValues(FewbitError):
    """NaN or infinite numbers; the message names the site."""


class BadFile(FewbitError):
    """A file or folder that is broken, missing or in the way."""


class InUse(BadFile):
    """A folder that another process works in."""


class Stopped(FewbitError):
    """The machine stopped the work, not the request: what is done is kept, and the same request goes on from there."""


class Signalled(BaseException):
    """A signal (SIGTERM, SIGHUP) ends the process; like KeyboardInterrupt no handler of errors may take it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too large here"}
NO_MEMORY = re.compile(  # what Python, torch, numpy, onnxruntime, openvino and the loader of libraries say
    r"(allocat\w* (failed|memory)|can(no|')t allocate|failed to allocate|bad.?alloc|out of memory|not enough memory"
    r"|failed to map segment|can't start new thread)",
    re.IGNORECASE,
)


def stopped(error: BaseException) -> Stopped | None:
    """What an exception is where it, or one that it came from, means a full disk or no memory; None for any other."""
    for one in _causes(error):
        number, file = (one.errno, target_of(one)) if isinstance(one, OSError) else (None, None)
        if isinstance(one, Stopped):
            return one
        if isinstance(one, MemoryError) or number == errno.ENOMEM or NO_MEMORY.search(str(one)):
            found = f" ({type(one).__name__}: {shortened(str(one).strip().splitlines()[0], 160)})" if str(one).strip() else ""
            return Stopped(
                f"there is not enough memory{found}. Close other programs, raise the limit (ulimit -v), or take a smaller "
                "--input-size or fewer images: --calibration 32."
            )
        if number in FULL:
            return Stopped(f"{FULL[number]}{f': {file}' if file else ''}. Free some space.")
    return None


def full(error: BaseException) -> str | None:
    """What is said of a full disk where an exception, or one that it came from, means one."""
    return next((FULL[one.errno] for one in _causes(error) if isinstance(one, OSError) and one.errno in FULL), None)


def target_of(error: OSError) -> str | None:
    """The file that an error of the operating system is about: of a copy or a move the one that it goes to."""
    return error.filename2 or error.filename


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on; each once, as one can be raised from itself."""
    seen = list[BaseException]()
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class FewbitFailed(Exception):
    """Verification or a floor failed; the command line prints the message and exits with 1."""

    exit_code = 1


def shortened(text: str, most: int) -> str:
    """Words of others on one line, of at most so many characters; what is longer ends behind a word, in dots."""
    return textwrap.shorten(text, most, placeholder=" ...")


def reason(error: BaseException) -> str:
    """The first informative line of an exception and, where it says so, the line of the model; without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {shortened(lines[0], 400) if lines else 'no message'}".rstrip(". ")
    return reason + place(error) + "."


def place(error: BaseException) -> str:
    """Where an exception says that a model's code is, behind a comma; nothing where it does not say so."""
    places = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', str(error))
    if not places:
        return ""
    file, line, source = places[-1]
    return f", at {Path(file).name}:{line}: {source.strip()}"


class Fault(FewbitFailed):
    """A fault of fewbit's own, so that the same request ends in it again: what was found, with what to try instead."""

    def __init__(self, found: str, sites: Iterable[str] = ()) -> None:
        keep = "".join(f"--keep-float '{site}' " for site in list(sites)[:3])
        other = f"{keep.strip()}, or another" if keep else "another"
        super().__init__(
            f"{found} This is a fault of fewbit, and the same command ends here again. Try {other} recipe (--recipe mse) or "
            "target (--target NAME)."
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as its message."""
        return _fault, (str(self),)


def _fault(message: str) -> Fault:
    error = Fault.__new__(Fault)
    FewbitFailed.__init__(error, message)
    return error
