"""The app: how commands are registered, and what their parsers share. Exit codes: ending.py.

Libraries are imported inside the commands that need them, so that --help and a mistyped option are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fewbit import __version__
from fewbit.cli.ending import ending
from fewbit.cli.limits import check_folder, check_limits
from fewbit.cli.terminal import out


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


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Post-training quantization of vision models."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: what a user can fix, or has stopped, gives one message and an exit code, not a traceback."""
    return _registered(function, check_limits, check_folder)


def command_without_torch(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that never imports torch, and so goes on where the current folder has been deleted."""
    return _registered(function, check_limits)


def _registered(function: Callable[..., None], *checks: Callable[[], None]) -> Callable[..., None]:
    """Register a command; the checks are made before it."""

    @app.command(cls=Single)
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with ending():
            for check in checks:
                check()
            function(*args, **kwargs)

    return run
