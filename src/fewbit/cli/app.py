"""The app: how commands are registered, what they share, and their exit codes.

Exit codes: 0 success, 1 verification or an accuracy limit failed, 2 the request was invalid. Libraries are imported inside
the commands that need them, so that --help and a mistyped option are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from fewbit.errors import FewbitError, FewbitFailed
from fewbit.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training quantization of vision models.",
)
out, err = Console(), Console(stderr=True)

TargetOption = Annotated[str | None, typer.Option(help="See `fewbit targets`; the default fits this machine.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime.")]


class BarProgress(Progress):
    """A line per stage on standard error, with a bar where the number of steps is known."""

    def __init__(self) -> None:
        super().__init__()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, TextColumn("{task.fields[note]}"), console=err)
        self._task: Any = None

    def begin(self, name: str, total: int | None) -> None:
        self._finish()
        self._bars.start()
        self._task = self._bars.add_task(name, total=total, note="")

    def expect(self, total: int) -> None:
        self._bars.update(self._task, total=total)

    def advance(self, steps: int = 1, text: str = "") -> None:
        self._bars.update(self._task, advance=steps, note=text[-40:])

    def close(self) -> None:
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=total, completed=total, note="")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: errors that a user can fix give one message and an exit code, not a traceback."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (FewbitError, FewbitFailed) as error:
            err.print(f"{type(error).__name__}: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None

    return run


@contextmanager
def drawn() -> Iterator[BarProgress]:
    """A progress bar that is shown while the block runs."""
    progress = BarProgress()
    try:
        yield progress
    finally:
        progress.close()


def show(report: dict[str, Any]) -> None:
    """The four answers on the terminal."""
    accuracy, size, check = report["accuracy"], report["size"], report["verify"]
    table = Table(show_header=False, title=f"{report['model']} on {report['target']}, {report['recipe']}, {report['bits']}")
    counts = f"{check['codes_wrong']} of {check['codes_compared']:,} codes wrong at {check['sites']} sites"
    right = f"yes: {counts} ({check['codes_differing']} ties); weights and outputs are the plan's"
    table.add_row("Is it right?", Text("\n".join(("NO:", *check["problems"])) if check["problems"] else right))
    low, high = accuracy["interval"]
    if accuracy["quantized"] is not None:
        good = f"{accuracy['float']:.2f} % -> {accuracy['quantized']:.2f} % top-1 ({low:.2f} to {high:.2f}), "
    else:
        good = ""
    good += f"agreement {accuracy['agreement']:.2f} %, cosine {accuracy['cosine']:.4f}"
    table.add_row("Is it good?", f"{good}, {report['images']['scored']} images in {accuracy['runtime']}")
    faster = ", ".join(f"{name} {row['ratio']:.2f} x faster" for name, row in report["latency"].items())
    times = size["float_bytes"] / size["onnx_bytes"]
    table.add_row("Is it small and fast?", f"{size['onnx_bytes'] / 1e6:.2f} MB, {times:.2f} x smaller; {faster}")
    share = 100 * report["integer_share"]
    table.add_row("What did we not get?", f"{len(report['fallbacks'])} fallbacks; {share:.1f} % of the work runs in integers")
    out.print(table)
    for warning in (*report.get("notes", ()), *(report.get("calibration") or {}).get("warnings", ())):
        out.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def fail_on_wrong(check: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Exit code 1 where the run is not right; `report` is its report.json."""
    if check["problems"]:
        message = "The run is not right. " + "; ".join(check["problems"]) + "."
        for fallback in report["fallbacks"]:
            if fallback["kind"] == "machine":
                message += f" {report['target']} needs {fallback['requested']}; `fewbit targets` lists what fits this machine."
        raise FewbitFailed(message)
