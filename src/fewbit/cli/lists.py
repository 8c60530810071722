"""`fewbit targets` and `fewbit recipes`: which to take, and on request what else there is and what is in one."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.app import command
from fewbit.cli.table import Table
from fewbit.cli.terminal import out
from fewbit.errors import UnknownName

if TYPE_CHECKING:
    from fewbit.target import Target

All = Annotated[bool, typer.Option("--all", help="All of them.")]


@command
def targets(
    name: Annotated[str | None, typer.Argument(help="Show what this one has.")] = None, everything: All = False
) -> None:
    """The target for this machine in each runtime, the default first; all with --all, one with its name."""
    from fewbit.runtimes import runtime_names
    from fewbit.target import absent, detect, load_target, target_names

    if name is not None:
        _target(load_target(name))
        return
    best = []
    for runtime in runtime_names():
        with suppress(UnknownName):  # a machine that no target of the runtime fits
            best.append(detect(runtime))
    table = Table("target", "about", *(["runs here"] if everything else []))
    for other in [*best, *(one for one in target_names() if everything and one not in best)]:
        target = load_target(other)
        marked = f"{other} (default)" if other == best[0] else other
        table.add_row(marked, target.about, *([absent(target) or "yes"] if everything else []))
    out.print(table)
    rest = "" if everything else f"{len(target_names()) - len(best)} more, for other hardware and other widths: --all. "
    out.print(f"{rest}fewbit targets NAME shows what is in integers on one.", soft_wrap=True)


def _target(target: Target) -> None:
    """What one has: in words, and a row for each kind of op."""
    from fewbit.target import absent

    runs = {
        "integer": "integers",
        "float": "float, which is faster (--everything: integers)",
        "follow": "integers, where its inputs are",
    }
    out.print(f"{target.name}: {target.about}. Runtime: {target.runtime}. {absent(target) or 'It runs here'}.", soft_wrap=True)
    table = Table("op", "operands", "runs in")
    for rule in target.op:
        operands = ", ".join(f"{operand} {' or '.join(rule.types(operand))}" for operand in rule.operands)
        table.add_row(rule.kind, operands, runs[rule.runs])
    out.print(table if target.op else "It leaves everything in float.")


@command
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show what this one does, pass by pass.")] = None, everything: All = False
) -> None:
    """The recommended recipes; all with --all, the passes of one with its name."""
    from fewbit.core.plan import described
    from fewbit.recipes import RECIPES, RECOMMENDED, recipe_named

    if name is not None:
        recipe = recipe_named(name)
        out.print(f"{name}: {recipe.about}", soft_wrap=True)
        for one in filter(None, (recipe.equalize, *recipe.passes)):
            out.print(f"  {described(one)}", soft_wrap=True)
        return
    table = Table("recipe", "take it", "about")
    for other in [*RECOMMENDED, *(other for other in RECIPES if everything and other not in RECOMMENDED)]:
        table.add_row(other, RECOMMENDED.get(other, ""), RECIPES[other].about)
    out.print(table)
    rest = f"{len(RECIPES) - len(RECOMMENDED)} more: --all. " if not everything else ""
    out.print(f"{rest}fewbit recipes NAME shows the passes of one.")
