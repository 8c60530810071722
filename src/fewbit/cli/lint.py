"""`fewbit lint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewbit.cli.app import command
from fewbit.cli.terminal import out
from fewbit.errors import FewbitFailed
from fewbit.request.types import TARGET, Share, checked


@command
def lint(
    file: Path,
    target: Annotated[str | None, typer.Option(help=TARGET)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every node, not only the worst.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every node to this file.")] = None,
    min_integer: Annotated[float | None, typer.Option(help="Exit with 1 where a smaller share (0 to 1) is integer.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the file here too and show where the rules are wrong.")] = False,
) -> None:
    """Which nodes of a Q/DQ ONNX file run in integers on a target, by which rule, and what to change."""
    from fewbit import lint as linter
    from fewbit.files import write_json
    from fewbit.folder import check_beside
    from fewbit.target import detect, load_target

    min_integer = checked("min_integer", min_integer, Share | None)
    check_beside(file)
    hardware = load_target(detect() if target is None else target)
    result = linter.lint(file, hardware)
    rows = result.worst() if not everything else list(result.rows)
    table = Table("node", "op", "MACs", "integer", "rule", "change")
    for row in rows if everything else rows[:20]:
        share = f"{100 * row.share:.1f} %" if row.macs else "-"
        table.add_row(row.name, row.op, share, "yes" if row.integer else "no", row.rule, row.change)
    out.print(table)
    if len(rows) > 20 and not everything:
        out.print(f"... and {len(rows) - 20} more nodes; --all shows every one.")
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
