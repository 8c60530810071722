"""`fewbit sweep`."""

from __future__ import annotations

from collections import Counter

from fewbit.cli.app import command
from fewbit.cli.options import options
from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, drawn, out
from fewbit.errors import FewbitFailed
from fewbit.request import SweepRequest


@command
@options(SweepRequest)
def sweep(request: SweepRequest) -> None:
    """Models x targets x recipes x bits of a TOML file, each quantized and verified, on one page; a killed sweep goes on."""
    from fewbit.report.words import measured, megabytes, percent, speed
    from fewbit.sweep import execute

    with drawn() as progress:
        rows = execute(request, progress)["rows"]
    table = Table("model", "target", "recipe", "bits", "end", "accuracy", "agreement", "codes wrong", "file", "than float")
    for row in rows:
        about = [str(row[key] or "") for key in ("model", "target", "recipe", "bits")]
        if "faster" not in row:
            table.add_row(*about, f"{row['end']}: {row['why']}")
            continue
        table.add_row(
            *about, row["end"], measured(row["quantized"], row["unit"]).translate(PLAIN),
            percent(row["agreement"]).translate(PLAIN), f"{row['codes_wrong']}", megabytes(row["bytes"]).translate(PLAIN),
            ", ".join(speed(ratio).translate(PLAIN) for ratio in row["faster"].values()),
        )  # fmt: skip
    out.print(table)
    out.print(f"Report: {request.out}/report.html")
    bad = Counter(row["end"] for row in rows if row["end"] not in ("right", "refused"))
    if bad:
        raise FewbitFailed(
            f"Of {len(rows)} rows {', '.join(f'{count} {end}' for end, count in bad.items())}; report.html says why."
        )
