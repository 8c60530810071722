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
    about = ("model", "target", "recipe", "bits")
    alike = {name: rows[0][name] for name in about if len(rows) > 1 and len({str(row[name]) for row in rows}) == 1}
    varied, sizes = [name for name in about if name not in alike], [row.get("bytes") for row in rows]
    scored, timed = any(row.get("quantized") is not None for row in rows), any(row.get("faster") for row in rows)
    figures = [*(["accuracy"] if scored else []), "agreement", "codes wrong", "file", *(["than float"] if timed else [])]
    table = Table(*varied, "end", *figures)
    for row in rows:
        names = [str(row[name] or "") for name in varied]
        if "faster" not in row:
            table.add_row(*names, f"{row['end']}: {row['why']}")
            continue
        cells = {
            "accuracy": measured(row["quantized"], row["unit"]),
            "agreement": percent(row["agreement"]),
            "codes wrong": f"{row['codes_wrong']}",
            "file": megabytes(row["bytes"], sizes),
            "than float": ", ".join(map(speed, row["faster"].values())),
        }
        table.add_row(*names, row["end"], *(cells[name].translate(PLAIN) for name in figures))
    if said := ", ".join(f"{name} {value}" for name, value in alike.items() if value):
        out.print(f"All rows: {said}.", soft_wrap=True)
    out.print(table)
    out.print(f"Report: {request.out}/report.html")
    bad = Counter(row["end"] for row in rows if row["end"] not in ("right", "refused"))
    if bad:
        raise FewbitFailed(
            f"Of {len(rows)} rows {', '.join(f'{count} {end}' for end, count in bad.items())}; report.html says why."
        )
