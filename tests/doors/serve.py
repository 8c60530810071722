"""Run a case in a process of its own that is forked from this one, which has imported everything: a case takes a moment."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from doors.case import Case, quantize
from doors.judge import Ended, judge, snapshot
from doors.place import build, lay_out

CACHES = (".ses", "torchinductor_")  # of onnxruntime and torch
WALL = 5  # seconds on the clock for each second of work, on a machine that does other things
# Before torch: a fork copies no threads, so there are none; and nothing is looked up in a network.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


def warm(place: Path, needs: Container[str], *, whole: bool) -> None:
    """Import what a command imports, and build the place; with `whole` import all that a run imports.

    The runtimes are left to each case, as they have threads.
    """
    sys.dont_write_bytecode = True  # a case's folder stays as it was
    import fewbit.__main__  # noqa: F401
    import fewbit.verify as proofs
    import fewbit.verify.bench as bench

    bench._load, timed = lambda *_: (0.0, 1), proofs.timed  # speed is not what is tried here: no fresh processes, one runtime
    proofs.timed = lambda model: list(timed(model))[:1]
    build(place, needs)
    if whole:
        _warm_all(place)
    if "run" in needs:
        ended = fork(Case("place", quantize(out="run"), seconds=600), place, place.parent / "tmp")
        if ended.code != 0:
            raise SystemExit(f"the run that cases begin with failed:\n{ended.err}")


def _warm_all(place: Path) -> None:
    """The modules that stages import when they run, by running them."""
    import onnxruntime  # noqa: F401

    import fewbit.search  # noqa: F401
    from fewbit.request import Request
    from fewbit.run import Run
    from fewbit.stages import STAGES

    run = Run.start(Request(model=f"{place / 'net.py'}:model", images=place / "flat", labels=False, out=place / "warm"), STAGES)
    for name in ("model", "twin"):
        run[name]
    shutil.rmtree(run.folder)


def tried(case: Case, place: Path, folder: Path) -> tuple[str, Ended]:
    """What is wrong with a case, and how it ended. `folder` is made for it and removed."""
    lay_out(place, folder, case.needs)
    scratch = folder.with_name(folder.name + "-tmp")
    try:
        if case.before is not None:
            case.before(folder)
        ended = fork(case, folder, scratch)
        return judge(case, ended, folder), ended
    except Exception as error:  # the harness goes on; the line says whose fault it is
        text = f"the case itself failed: {type(error).__name__}: {error}"
        return text, Ended(None, "", traceback.format_exc(), 0.0, {}, {})
    finally:
        for path in (folder, scratch):
            shutil.rmtree(path, ignore_errors=True)


def fork(case: Case, folder: Path, scratch: Path) -> Ended:
    """Run a case in a folder; its temporary files go to `scratch`, what it prints beside that."""
    scratch.mkdir(parents=True, exist_ok=True)
    texts = [scratch.with_name(f"{scratch.name}-{name}") for name in ("out", "err")]
    before, start = snapshot(folder), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(case, folder, scratch, texts)
    try:
        if case.meanwhile is not None:
            case.meanwhile(pid, folder)
        code = _wait(pid, start + WALL * case.seconds)
    finally:
        if case.meanwhile is not None or _alive(pid):
            _kill(pid)
    seconds = time.monotonic() - start
    out, err = (path.read_text(errors="replace") for path in texts)
    litter = tuple(sorted(path.name for path in scratch.iterdir() if not path.name.startswith(CACHES)))
    for path in texts:
        path.unlink()
    return Ended(code, out, err, seconds, before, snapshot(folder), litter)


def _child(case: Case, folder: Path, scratch: Path, texts: list[Path]) -> None:
    """The forked process: it never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores these
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(folder)
        os.environ |= {"TMPDIR": str(scratch), "MARKER": str(folder / "marker"), **case.environment}
        tempfile.tempdir = None
        time.tzset()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number, path in enumerate(texts, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + case.memory, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(case.seconds), math.ceil(case.seconds)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = _ended(lambda: typed(case.does) if isinstance(case.does, tuple) else _called(case.does))
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:  # what an interpreter prints when it ends
        traceback.print_exc()
    finally:
        os._exit(code)


def typed(arguments: tuple[str, ...]) -> None:
    """`fewbit ARGUMENTS`, as the command line is started."""
    from fewbit.__main__ import main

    sys.argv = ["fewbit", *arguments]
    main()


def apart(work: Callable[[], object], meanwhile: Callable[[int], object] | None = None) -> int:
    """Do something in a process of its own, for cases that need several; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = _ended(work)
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code)
    if meanwhile is not None:
        meanwhile(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _called(function: Callable[[], object]) -> None:
    """A Python call; an error of fewbit is printed as the command line prints it."""
    from fewbit.errors import FewbitError

    try:
        function()
    except FewbitError as error:
        text = f"{type(error).__name__}: {error}"
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)
        raise SystemExit(2) from None


def _ended(work: Callable[[], Any]) -> int:
    """The exit code that an interpreter ends with."""
    try:
        work()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(pid: int, deadline: float) -> int | None:
    """The exit code of a child, None where it did not end in time."""
    pause = 0.002
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(pause)
        pause = min(0.05, 1.2 * pause)
    _kill(pid)
    os.waitpid(pid, 0)
    return None


def _alive(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _kill(pid: int) -> None:
    """End a child and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
