"""The same request gives the same bytes: in other folders, orders of files, thread counts, locales, time zones, hash seeds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from doors.case import Case, done, quantize, search
from doors.kinds.kills import _silent, as_the_run, as_the_twin, differing
from doors.serve import apart, typed


def cases() -> Iterator[Case]:
    for name, variables in ENVIRONMENTS.items():
        yield Case(f"a process with {name}", started(variables), done(as_the_run), needs=("run",), seconds=200)
    for name, before in FOLDERS.items():
        yield Case(name, quantize(), done(as_the_run), before=before, needs=("run",))
    for n in (1, 2, 4, 7):
        yield Case(f"--threads {n}", quantize("--threads", str(n)), done(as_the_run), needs=("run",))
    yield Case(
        "other order of options",
        ("quantize", "--seconds", "0.02", "--out", "out", "--no-labels", "--images", "flat", "net.py:model"),
        done(as_the_run),
        needs=("run",),
    )
    yield Case("absolute names", absolute, done(as_the_run_but_its_name), needs=("run",))
    yield Case("another folder to stand in", elsewhere, done(as_the_run_but_its_name), needs=("run",))
    yield Case("from Python", from_python, done(as_the_run), needs=("run",))
    yield Case("a narrow terminal", quantize(), done(as_the_run), environment={"COLUMNS": "20"}, needs=("run",))
    yield Case("a umask of 077", umask, done(as_the_run), needs=("run",))
    for recipe in ("minmax", "percentile", "kl", "fast"):
        yield Case(f"{recipe}, twice", twice("--recipe", recipe), done(as_the_twin))
    for more in (
        ("--bits", "w4a8"),
        ("--bits", "mixed:6"),
        ("--keep-float", "head"),
        ("--target", "openvino-x86"),
        ("--seed", "5"),
        ("--everything",),
    ):
        yield Case(f"{' '.join(more)}, twice", twice(*more), done(as_the_twin))
    for name, variables in {"1 thread and 2": {"OMP_NUM_THREADS": "2"}, "another hash seed": {"PYTHONHASHSEED": "77"}}.items():
        yield Case(f"fast, {name}", started(variables, "--recipe", "fast", twin=True), done(as_the_twin), seconds=200)
    yield Case("search, twice", searched, done(_same_points), seconds=200)


ENVIRONMENTS: dict[str, Mapping[str, str]] = {
    "hash seed 0": {"PYTHONHASHSEED": "0"}, "hash seed 1": {"PYTHONHASHSEED": "1"},
    "hash seed 12345": {"PYTHONHASHSEED": "12345"}, "2 threads": {"OMP_NUM_THREADS": "2"},
    "locale C": {"LC_ALL": "C"}, "locale POSIX, no UTF-8": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "locale de_DE": {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"},
    "locale tr_TR": {"LC_ALL": "tr_TR.UTF-8"}, "time zone of Kiritimati": {"TZ": "Pacific/Kiritimati"},
    "no HOME": {"HOME": "/nonexistent"}, "optimised bytecode": {"PYTHONOPTIMIZE": "1"},
}  # fmt: skip


def _reversed(folder: Path) -> None:
    """The same pictures, written in the opposite order."""
    shutil.copytree(folder / "flat", folder / "old")
    shutil.rmtree(folder / "flat")
    (folder / "flat").mkdir()
    for path in sorted((folder / "old").iterdir(), reverse=True):
        shutil.copyfile(path, folder / "flat" / path.name)


def _touched(folder: Path) -> None:
    for i, path in enumerate(sorted((folder / "flat").iterdir())):
        os.utime(path, (10**9 - i, 10**9 - i))


def _linked(folder: Path) -> None:
    (folder / "flat").rename(folder / "there")
    (folder / "flat").symlink_to("there")


def _others(folder: Path) -> None:
    (folder / "flat" / "notes.txt").write_text("not a picture")
    (folder / "flat" / ".hidden.png").write_bytes(b"")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "pictures written in reverse": _reversed, "pictures of other dates": _touched, "pictures behind a link": _linked,
    "other files beside the pictures": _others,
    "an older run of the same name": lambda folder: shutil.rmtree(folder / "out", ignore_errors=True),
}  # fmt: skip


def started(variables: Mapping[str, str], *more: str, twin: bool = False) -> Callable[[], None]:
    """The command in a fresh process with these variables; with `twin` also without."""

    def call() -> None:
        if twin:
            apart(lambda: (_silent(), typed(quantize(*more, out="twin")))[0])
        command = [sys.executable, "-m", "fewbit", *quantize(*more)]
        raise SystemExit(subprocess.run(command, env=os.environ | variables, check=False).returncode)

    return call


def twice(*more: str) -> Callable[[], None]:
    def call() -> None:
        apart(lambda: (_silent(), typed(quantize(*more, out="twin")))[0])
        typed(quantize(*more))

    return call


def as_the_run_but_its_name(folder: Path) -> str:
    """The plan has the model's name as it was typed."""
    path = folder / "out" / "plan.json"
    path.write_text(path.read_text().replace(f"{folder.resolve()}/net.py", "net.py"))
    return as_the_run(folder)


def absolute() -> None:
    here = Path.cwd()
    typed(quantize(model=f"{here}/net.py:model", images=f"{here}/flat", out=f"{here}/out"))


def elsewhere() -> None:
    here = Path.cwd()
    os.chdir("/")
    typed(quantize(model=f"{here}/net.py:model", images=f"{here}/flat", out=f"{here}/out"))


def from_python() -> None:
    import fewbit

    fewbit.quantize("net.py:model", "flat", labels=False, out="out", seconds=0.01)


def umask() -> None:
    os.umask(0o077)
    typed(quantize())


def searched() -> None:
    command = search()
    apart(lambda: (_silent(), typed(tuple("twin" if word == "out" else word for word in command)))[0])
    typed(command)


def _same_points(folder: Path) -> str:
    """The points of two searches; their times differ."""
    names = [
        sorted(str(p.relative_to(folder / run)) for p in (folder / run).glob("points/**/plan.json")) for run in ("twin", "out")
    ]
    if names[0] != names[1]:
        return f"other points: {names}"
    return next(filter(None, (differing((folder / "twin" / n).parent, (folder / "out" / n).parent) for n in names[0])), "")
