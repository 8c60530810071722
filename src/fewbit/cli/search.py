"""`fewbit search`."""

from __future__ import annotations

from fewbit.cli.app import command
from fewbit.cli.options import options
from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, drawn, out
from fewbit.request import SearchRequest


@command
@options(SearchRequest)
def search(request: SearchRequest) -> None:
    """The Pareto front of accuracy, measured latency and size; Ctrl-C ends the search and keeps its best."""
    from fewbit.search import execute

    with drawn() as progress:
        points = execute(request, progress)["points"]
    from fewbit.report.words import is_noise, measured, megabytes, paired_speed, percent, speed

    table = Table("point", "accuracy", "agreement", "ms", "predicted", "than float", "file", "bits", "front")
    sizes = [row["bytes"] for row in points]
    for row in points:
        table.add_row(
            row["point"], measured(row["quantized"], row["unit"]).translate(PLAIN), percent(row["agreement"]).translate(PLAIN),
            f"{row['ms']:.3f}", f"{row['predicted_ms']:.3f}", speed(row["faster"]).translate(PLAIN),
            megabytes(row["bytes"], sizes).translate(PLAIN), f"{row['weight_bits']:.2f}", "yes" if row["front"] else "",
        )  # fmt: skip
    out.print(table)
    for row in points:
        times = row["float_ms"], row["ms"], row["faster"]
        if is_noise(*times):
            out.print(f"{row['point']} beside float: {paired_speed(*times).translate(PLAIN)}.", soft_wrap=True)
        if row["over"]:
            out.print(f"{row['point']} is over the budget: {row['over']}.", soft_wrap=True)
        if row["front"]:
            out.print(f"{row['point']}: {row['command']}", soft_wrap=True)
    out.print(f"Report: {request.out}/report.html")
