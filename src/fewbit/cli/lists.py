"""`fewbit targets` and `fewbit recipes`."""

from __future__ import annotations

import platform

from rich.table import Table

from fewbit.cli.app import command, out
from fewbit.errors import UnknownName


@command
def targets() -> None:
    """The targets that come with fewbit."""
    from fewbit.target import detect, load_target, target_names
    from fewbit.target.load import processor_flags
    from fewbit.verify import runtime_names

    flags, installed = processor_flags(), runtime_names()
    try:
        here = detect()
    except UnknownName:  # a machine that no target fits has no default
        here = ""
    table = Table("target", "runtime", "runs here", "ops in integers", "about")
    for name in target_names():
        target = load_target(name)
        marks = {"integer": "", "float": " (float is faster)", "follow": ""}
        kinds = ", ".join(dict.fromkeys(rule.kind + marks[rule.runs] for rule in target.op)) or "none"
        if target.runtime not in installed:
            runs = f"as written, in {target.runs_in}"
        else:
            runs = "yes" if target.fits(platform.machine(), flags) else f"needs {target.processor}"
        table.add_row(f"{name} (this machine)" if name == here else name, target.runtime, runs, kinds, target.about)
    out.print(table)


@command
def recipes() -> None:
    """The recipes that have a name."""
    from fewbit.recipes import DEFAULT, RECIPES, RECOMMENDED

    table = Table("recipe", "about", "settings")
    for name, recipe in RECIPES.items():
        settings = ", then ".join(map(repr, (*filter(None, [recipe.equalize]), *recipe.passes)))
        mark = " (default, recommended)" if name == DEFAULT else " (recommended)" if name in RECOMMENDED else ""
        table.add_row(name + mark, recipe.about, settings)
    out.print(table)
