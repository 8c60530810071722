"""Faults of the machine: a full disk, no memory, no permission, closed pipes, signals, two processes with one folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, Right, done, quantize, refused, search
from doors.kinds.images import has_run
from doors.kinds.runs import COMMANDS
from doors.serve import apart, typed

MB = 1 << 20
NOBODY = os.path.join(tempfile.gettempdir(), "doors-nobody")  # where a user who may write nowhere else writes
FULL = ("full", "space", "too large", "cannot be written")


def cases() -> Iterator[Case]:
    yield from _disks()
    yield from _memory()
    yield from _permissions()
    yield from _pipes()
    yield from _signals()
    yield from _vanished()
    yield from _together()


def _disks() -> Iterator[Case]:
    for size in (4, 16, 32, 64, 96, 128, 192, 256, 320, 384):  # a whole run has 512
        yield Case(f"a disk of {size} kB", on_a_disk(size << 10, quantize(out="disk/out")), refused(FULL), keeps=("disk",))
    yield Case(
        "search on a disk of 256 kB",
        on_a_disk(1 << 18, (*search()[:6], "disk/out", *search()[7:])),
        refused(FULL),
        keeps=("disk",),
    )
    yield Case(
        "a full temporary folder",
        on_a_disk(4096, quantize(), temporary=True),
        Right((0, 2), (FULL,)),
        keeps=("disk", "out.part"),
    )
    yield Case(
        "a disk that is read only", on_a_disk(1 << 20, quantize(out="disk/out"), flags=1), refused("disk"), keeps=("disk",)
    )
    for size in (1, 64, 128):  # the largest has 192
        yield Case(
            f"files of {size} kB at most",
            limited(resource.RLIMIT_FSIZE, size << 10, quantize()),
            refused(FULL),
            keeps=("out.part",),
        )
    for command in ("report", "diff"):
        words = ("diff", "run", "run", "--json", "disk/x.json") if command == "diff" else ("report", "disk/run")
        yield Case(
            f"{command} on a full disk",
            on_a_disk(0, words, fill=True),
            refused(FULL),
            needs=("run",),
            keeps=("disk",),
        )
    for count in (8, 12, 20):
        yield Case(
            f"{count} open files at most",
            limited(resource.RLIMIT_NOFILE, count, quantize(), fresh=True),
            refused(("ulimit",)) if count < 20 else Right((0, 2)),
            keeps=("out.part",),
        )


def on_a_disk(
    size: int, command: tuple[str, ...], *, flags: int = 0, temporary: bool = False, fill: bool = False
) -> Callable[[], None]:
    """A command with a small disk mounted at `disk`, which only its own process sees."""

    def call() -> None:
        os.mkdir("disk")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):
            limited(resource.RLIMIT_FSIZE, size, command)()  # no disk can be mounted here: a limit for each file
            return
        run = sorted(Path("run").rglob("*")) if fill and "disk/run" in command else []
        pages = sum(2 + path.stat().st_size // 4096 for path in run)  # room for these and little else
        assert libc.mount(b"tmpfs", b"disk", b"tmpfs", flags, f"size={max(size, 4096 * (1 + pages))}".encode()) == 0
        if temporary:
            os.environ["TMPDIR"] = str(Path("disk").resolve())
        if run:
            shutil.copytree("run", "disk/run")
        if fill:
            with contextlib.suppress(OSError), open("disk/filler", "wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        typed(command)

    return call


def limited(what: int, value: int, command: tuple[str, ...], *, fresh: bool = False) -> Callable[[], None]:
    """A command under a limit of the system; a file that grows over it is an error, not a signal. `fresh`: in an interpreter
    of its own, which has not opened or imported anything.
    """

    def call() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "fewbit", *command])
        typed(command)

    return call


def _memory() -> Iterator[Case]:
    for size in (8, 24, 48, 96, 160, 256, 400):
        yield Case(f"{size} MB more at most", quantize(), Right((0, 2), ("memory",)), memory=size * MB, keeps=("out.part",))
    for name, command in COMMANDS.items():
        if name in ("verify", "evaluate", "report"):
            yield Case(
                f"{name}: 24 MB more at most",
                command,
                Right((0, 2), ("memory",)),
                memory=24 * MB,
                needs=("run", "classes"),
                keeps=("run",),
            )
    huge = quantize("--input-size", "3,16000,16000")
    yield Case("images of 3 GB each", huge, refused(("memory", "--input-size")), keeps=("out.part",), memory=2048 * MB)


def _permissions() -> Iterator[Case]:
    """As a user who may not; root may everything, so root becomes nobody."""
    if os.geteuid() != 0:
        return

    def nobody(command: tuple[str, ...], closed: str = "") -> Callable[[], None]:
        def call() -> None:
            os.chmod(os.environ["TMPDIR"], 0o777)
            for path in Path("run").rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            if closed:
                os.chmod(closed, 0)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            typed(command)

        return call

    yield Case("a folder that is not ours to write", nobody(quantize()), refused(("out", "permission")), needs=("run",))
    for closed, command, says in (
        ("net.py", quantize(out=os.devnull + "x"), "net.py"), ("flat/3.png", quantize(), "3.png"),
        ("flat", quantize(), "flat"), ("run", ("verify", "run"), "run"),
        ("run/run.json", ("verify", "run"), "run.json"), ("run/model.onnx", ("verify", "run"), "model.onnx"),
        ("run/plan.json", ("diff", "run", "run"), "plan.json"),
        ("run/exported.pt2", ("verify", "run"), "exported.pt2"), ("run/model.onnx", ("lint", "run/model.onnx"), "model.onnx"),
        ("run/report.html", ("report", "run"), "report.html"),
        ("run/tables.json", ("report", "run"), "tables.json"),
    ):  # fmt: skip
        words = tuple(NOBODY if word == "out" or word.startswith(os.devnull) else word for word in command)
        yield Case(
            f"{' '.join(words[:1])}: {closed} may not be read",
            nobody(words, closed),
            refused(says),
            keeps=(closed.split("/")[0],),
            needs=("run",),
        )


def _pipes() -> Iterator[Case]:
    """Nobody reads what is printed: no traceback, and no "all is well" where the work was not done."""

    def printed_to(command: tuple[str, ...], number: int, full: bool) -> Callable[[], None]:
        def call() -> None:
            if full:
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            else:
                signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
                read, write = os.pipe()
                os.close(read)
                os.dup2(write, number)
            typed(command)
            (sys.stdout, sys.stderr)[number - 1].flush()

        return call

    right = Right((0, 1, 2, 74, 120, 141, -13), silent=True)
    commands = {
        "targets": ("targets",),
        "recipes": ("recipes",),
        "--help": ("--help",),
        **{k: COMMANDS[k] for k in ("verify", "evaluate", "report", "diff", "lint")},
    }
    commands |= {"quantize": quantize(), "a refusal": quantize("--recipe", "nope")}
    for name, command in commands.items():
        for number, stream in ((1, "stdout"), (2, "stderr")):
            for full in (True, False):
                what = "full" if full else "a broken pipe"
                yield Case(
                    f"{name}: {stream} is {what}",
                    printed_to(command, number, full),
                    right,
                    needs=("run",),
                    keeps=("run", "out", "out.part"),
                )


def until(path: Path, seconds: float = 60) -> None:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


def _signals() -> Iterator[Case]:
    for name, number in (("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM), ("SIGHUP", signal.SIGHUP)):
        for file in ("request.json", "stats.safetensors", "plan.json", "model.onnx", "float.onnx"):

            def stop(pid: int, folder: Path, file: str = file, number: int = number) -> None:
                until(folder / "out.part" / file)
                os.kill(pid, number)

            says = () if number == signal.SIGHUP else (("same command", "again", "go on", "goes on"),)
            yield Case(
                f"{name} after {file}",
                quantize(),
                Right((128 + number, -number, 2), says, silent=number == signal.SIGHUP),
                meanwhile=stop,
                keeps=("out.part",),
            )

    def early(pid: int, folder: Path) -> None:
        time.sleep(0.05)
        os.kill(pid, signal.SIGINT)

    yield Case("Ctrl-C at once", quantize(), Right((130, -2, 2), silent=True), meanwhile=early, keeps=("out.part",))


def _vanished() -> Iterator[Case]:
    """What a run reads or writes goes away while it runs."""
    for name, trigger, gone, says in (
        ("the images", "request.json", "flat", ("flat", ".png")),
        ("the working folder", "request.json", "out.part", ("out.part", "out")),
        ("the working folder, late", "plan.json", "out.part", ("out.part", "out")),
        ("the statistics", "plan.json", "out.part/stats.safetensors", ("stats.safetensors", "out.part")),
        ("the exported program", "plan.json", "out.part/exported.pt2", ("exported.pt2", "out.part")),
    ):  # fmt: skip

        def take(pid: int, folder: Path, trigger: str = trigger, gone: str = gone) -> None:
            until(folder / "out.part" / trigger)
            os.kill(pid, signal.SIGSTOP)
            path = folder / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            os.kill(pid, signal.SIGCONT)

        yield Case(f"{name} go away", quantize(), Right((0, 2), (says,), has_run), meanwhile=take, keeps=("out.part", "flat"))


def _together() -> Iterator[Case]:
    """Two processes with one folder: the second is refused, the first ends well."""

    def both(second: tuple[str, ...], kill: bool = False) -> Callable[[], None]:
        def call() -> None:
            def meanwhile(pid: int) -> None:
                until(Path("out.part/request.json"))
                os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
                if not kill:
                    codes.append(apart(lambda: typed(second)))
                    os.kill(pid, signal.SIGCONT)

            codes: list[int] = []
            error = os.dup(2)
            first = apart(lambda: (os.dup2(os.open(os.devnull, os.O_WRONLY), 2), typed(quantize()))[0], meanwhile)
            os.dup2(error, 2)
            if kill:
                typed(second)
            assert first == 0, f"the first process ended with {first}"
            assert not has_run(Path.cwd()), has_run(Path.cwd())
            raise SystemExit(codes[0])

        return call

    for name, second in {
        "the same request": quantize(),
        "another request": quantize("--seed", "3"),
        "--force": quantize("--force"),
        "a search": search(),
    }.items():
        yield Case(f"two at once: {name}", both(second), refused(("out", "running", "process")), keeps=("out", "out.part"))
    yield Case("the first was killed", both(quantize(), kill=True), done(has_run))
