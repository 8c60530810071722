"""`fewbit lint`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.app import command
from fewbit.cli.table import Table
from fewbit.cli.terminal import out
from fewbit.errors import FewbitError, FewbitFailed, UnknownName
from fewbit.request.types import Share, checked

if TYPE_CHECKING:
    from fewbit.target import Target

OWN_TARGET = (
    "See `fewbit targets`; the default is the one that the file says it was made for, else the one that fits this machine."
)


@command
def lint(
    file: Path,
    target: Annotated[str | None, typer.Option(help=OWN_TARGET)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every node, not only the worst.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every node to this file.")] = None,
    min_integer: Annotated[float | None, typer.Option(help="Exit with 1 where a smaller share (0 to 1) is integer.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the file here too and show where the rules are wrong.")] = False,
) -> None:
    """Which nodes of a Q/DQ ONNX file run in integers on a target, by which rule, and what to change."""
    from fewbit import lint as linter
    from fewbit.files import write_json
    from fewbit.folder import check_beside

    min_integer = checked("min_integer", min_integer, Share | None)
    check_beside(file)
    hardware, why = _hardware(file, target)
    result = linter.lint(file, hardware)
    rows = result.worst() if not everything else list(result.rows)
    table = Table("node", "op", "MACs", "integer", "rule", "change")
    for row in rows if everything else rows[:20]:
        share = f"{100 * row.share:.1f} %" if row.macs else "-"
        table.add_row(row.name, row.op, share, "yes" if row.integer else "no", row.rule, row.change)
    out.print(table)
    if len(rows) > 20 and not everything:
        out.print(f"... and {len(rows) - 20} more nodes; --all shows every one.")
    if why:
        out.print(f"No --target was given: {result.target} is {why}.", soft_wrap=True)
    out.print(f"{result.file} on {result.target}: {result.summary()}", soft_wrap=True)
    if json_file is not None:
        write_json(json_file, result.to_json())
    wrong = linter.disagreements(file, result, hardware) if check else []
    for row, kernel in wrong:
        out.print(f"Ran otherwise: {row.op} {row.name} as {kernel.kernel}; the rule said: {row.rule}", soft_wrap=True)
    if check:
        out.print(f"{hardware.runtime} runs {len(rows) - len(wrong)} of {len(rows)} nodes as predicted.")
    if min_integer is not None and result.integer_share < min_integer:
        share = f"{result.integer_share:.3f} of the multiply-accumulates run in integers"
        raise FewbitFailed(f"{share}; --min-integer asks for {min_integer:g}.")


def _hardware(file: Path, name: str | None) -> tuple[Target, str]:
    """The target by its name, or that of the file or the machine and which of these it is."""
    from fewbit.deploy.stamp import target_of
    from fewbit.target import detect, load_target

    if name is not None:
        return load_target(name), ""
    if not (own := target_of(file)):
        return load_target(detect()), "the one that fits this machine"
    try:
        return load_target(own), "the one that the file says it was made for"
    except UnknownName as error:
        raise FewbitError(
            f"{file} was made for {own}, which is no target of fewbit's own; give its file, as in --target my.toml, or another "
            "one of `fewbit targets`."
        ) from error
