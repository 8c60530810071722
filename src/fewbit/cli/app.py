"""The app: how commands are registered, what they share, and their exit codes.

Exit codes: 0 success, 1 the file is not right, not good enough or does not pay, 2 the request was invalid or the machine
stopped the work (disk, memory), 128 + its number for a signal (130 Ctrl-C). Libraries are imported inside the commands that
need them, so that --help and a mistyped option are answered at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from fewbit import __version__
from fewbit.cli.limits import check_limits
from fewbit.errors import FewbitError, FewbitFailed, Signalled, Stopped, stopped
from fewbit.progress import Lines, Progress


class Advised:
    """A command whose errors all know which command they are of, so that each says how to get help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # typer's parser of options knows none
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class Words(Advised, TyperGroup):
    """The group of all commands, which takes no empty word: where a path is asked for it would be this folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "" in args:
            before = args[args.index("") - 1] if args.index("") else ""
            if before.startswith("-"):
                ctx.fail(f"{before} '' is empty; give a value, or leave it out.")
            behind = f" behind {before}" if before else ""
            ctx.fail(f"The argument ''{behind} is empty; give the name of a model, a file or a folder in its place.")
        return super().parse_args(ctx, args)


class Single(Advised, TyperCommand):
    """One command."""


app = typer.Typer(
    cls=Words,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def plain(text: str) -> str:
    """A text without anything that a terminal obeys: what is no printable character is written as its escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class Terminal(Console):
    """The one place that prints: names of files, sites and classes are shown as they are, never as markup or control codes."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(plain(text), **options)

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

TargetOption = Annotated[str | None, typer.Option(help="See `fewbit targets`; the default fits this machine.")]
AGAIN = 2.0

Threads = Annotated[int, typer.Option(help="Threads of the runtime.")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Post-training quantization of vision models."""


class BarProgress(Progress):
    """A line per stage on standard error, with a bar where the number of steps is known."""

    def __init__(self) -> None:
        super().__init__()
        columns = (
            SpinnerColumn(),
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

    def close(self) -> None:
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=total, completed=total, note="")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: what a user can mend, or has stopped, gives one message and an exit code, not a traceback."""

    @app.command(cls=Single)
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with ending():
            check_limits()
            function(*args, **kwargs)

    return run


@contextmanager
def ending() -> Iterator[None]:
    """What ends the block is told in one line, and SystemExit has its exit code; a fault of fewbit's own goes on."""
    try:
        with _signals():
            yield
    except (Exception, KeyboardInterrupt, Signalled) as error:
        told = _told(error)
        if told is None:
            raise
        message, code = told
        _open_output()
        with suppress(Stopped, BrokenPipeError):
            text = " ".join([message, *getattr(error, "__notes__", ())]).replace("\n", "\\n")  # a name may have one
            err.print(text, style="bold red", soft_wrap=True)
        raise SystemExit(code) from None


def _told(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of what ends a command; None for a fault of fewbit's own, whose traceback is needed."""
    if isinstance(error, BrokenPipeError):
        return "Nothing reads the output any more (broken pipe).", 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 128 + signal.SIGINT
    if isinstance(error, Signalled):
        return f"Ended by {signal.Signals(error.exit_code - 128).name}.", error.exit_code
    halt = stopped(error) if isinstance(error, Exception) else None
    if halt is None and isinstance(error, OSError):
        found = f"{error.filename or 'a file'}: {error.strerror or error}"
        halt = Stopped(f"{found}. Mend that (is it there, and may you use it?) and give the same command again.")
    known = halt or error
    if isinstance(known, FewbitError | FewbitFailed):
        return f"{type(known).__name__}: {known}", known.exit_code
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block, each again after `AGAIN` seconds where a library has swallowed it."""

    owner, came = os.getpid(), 0

    def end(number: int, frame: object) -> None:
        nonlocal came
        if os.getpid() != owner:  # a process that a library has forked, and ends in this way
            os._exit(128 + number)
        came = came if number == signal.SIGALRM else number
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise KeyboardInterrupt if came == signal.SIGINT else Signalled(came)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    hook, default = sys.unraisablehook, (signal.SIG_DFL, signal.default_int_handler)

    def told(missed: Any) -> None:  # raised where Python cannot pass it on: it comes again
        if not isinstance(missed.exc_value, KeyboardInterrupt | Signalled):
            hook(missed)

    handled = [number for number, handler in before.items() if handler in default]  # nohup ignores SIGHUP
    for number in handled:
        signal.signal(number, end)
    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in handled:
            signal.signal(number, before[number])


def _open_output() -> None:
    """Where standard output cannot be written, let Python's own flush at the end find a file that takes everything."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def drawn() -> Iterator[Progress]:
    """Progress that is shown while the block runs: bars on a terminal, else a line for each stage."""
    progress = BarProgress() if err.is_terminal else Lines()
    try:
        yield progress
    finally:
        progress.close()


PLAIN = str.maketrans({"→": "->", "×": "x", "−": "-", "\u00a0": " "})  # for a terminal that has no more than ASCII


def show(report: dict[str, Any]) -> None:
    """The four answers on the terminal, in the words of the report."""
    from fewbit.report.answers import answers

    table = Table(show_header=False, title=f"{report['model']} on {report['target']}, {report['recipe']}, {report['bits']}")
    warnings: list[str] = []
    for card in answers(report, {}):
        head = f"{card.word}: {card.big} {card.small}" if card.word else f"{card.big} {card.small}"
        wrong = card.loud if card.mood == "bad" else ()
        table.add_row(card.question, "\n".join((head.strip(), *card.lines, *wrong)).translate(PLAIN))
        warnings += [] if wrong else card.loud
    out.print(table)
    for warning in warnings:
        out.print(f"Warning: {warning}".translate(PLAIN), style="yellow", soft_wrap=True)


def fail_on_wrong(check: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Exit code 1 where the run is not right; `report` is its report.json."""
    if check["problems"]:
        message = "The run is not right. " + "; ".join(check["problems"]) + "."
        for fallback in report["fallbacks"]:
            if fallback["kind"] == "machine":
                message += f" {report['target']} needs {fallback['requested']}; `fewbit targets` lists what fits this machine."
        raise FewbitFailed(message)
