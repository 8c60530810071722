"""`fewbit quantize`."""

from __future__ import annotations

from pathlib import Path

from fewbit.cli.answers import fail_on_wrong, show_answers
from fewbit.cli.app import command
from fewbit.cli.options import options
from fewbit.cli.terminal import drawn, out
from fewbit.folder import PAGE
from fewbit.request import Request


@command
@options(Request, out=Path("run"))
def quantize(request: Request) -> None:
    """Quantize a model, verify it in the runtime and write a run folder with its report."""
    from fewbit.report.goals import fail_on_missed
    from fewbit.run import execute

    with drawn() as progress:
        result = execute(request, progress)
    show_answers(dict(result.report))
    out.print(f"Report: {result.folder / PAGE}")
    fail_on_wrong(result.report["verify"], result.report)
    fail_on_missed(result.report)
