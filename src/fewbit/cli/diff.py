"""`fewbit diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fewbit.cli.app import command
from fewbit.cli.terminal import PLAIN, out
from fewbit.folder import PLAN, REPORT

Json = Mapping[str, Any]
ABSENT = "float"  # a site that only one of the two quantizes


@command
def diff(
    a: Path,
    b: Path,
    everything: Annotated[bool, typer.Option("--all", help="Every site and field that differs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the differences to this file.")] = None,
) -> None:
    """What differs between two runs: what came out of them, then in how many sites their plans differ."""
    from fewbit.files import read_json, write_json
    from fewbit.folder import checked
    from fewbit.report.words import FIELDS, number

    for folder in (a, b):
        checked(folder)
    outcomes = [outcome(read_json(folder / REPORT)) for folder in (a, b)]
    table = Table("", str(a), str(b))
    for name in dict.fromkeys([*outcomes[0], *outcomes[1]]):
        table.add_row(name, *(one.get(name, "-").translate(PLAIN) for one in outcomes))
    out.print(table)
    rows = changes(*(read_json(folder / PLAN) for folder in (a, b)))
    sites = len({row["site"] for row in rows})
    fields = ", ".join(
        f"{FIELDS.get(field, field)} at {count}" for field, count in Counter(row["field"] for row in rows).most_common()
    )
    more = "" if everything or not rows else " --all lists them."
    out.print(f"The plans differ at {sites} sites: {fields}.{more}" if rows else "The plans are the same.", soft_wrap=True)
    if everything and rows:
        table = Table("site", "field", str(a), str(b))
        for row in rows:
            values = (number(row[run]).translate(PLAIN) for run in ("a", "b"))
            table.add_row(row["site"], FIELDS.get(row["field"], row["field"]), *values)
        out.print(table)
    if json_file is not None:
        write_json(json_file, rows)


def outcome(report: Json) -> dict[str, str]:
    """What a run is and what came out of it, in words."""
    from fewbit.report.words import megabytes, percent, share, signed, speed

    score, size = report["accuracy"], report["size"]
    words = {name: str(report[name]) for name in ("model", "target", "recipe", "bits")}
    if score["quantized"] is not None:
        low, high = map(signed, score["interval"])
        change = f"{signed(score['quantized'] - score['float'])} ({low} to {high})"
        words |= {str(score["measure"]): f"{score['quantized']:.2f} {score['unit']}", "change from float": change}
    words[str(score["agreement_measure"])] = percent(score["agreement"])
    words |= {"file": megabytes(size["onnx_bytes"]), "bits a weight": f"{size['average_weight_bits']:.2f}"}
    for runtime, row in report["latency"].items():
        words[f"{runtime}, batch {row['batch']}"] = f"{row['quantized_ms']:.2f} ms, {speed(row['ratio'])} than float"
    return {
        **words,
        "codes that are wrong": str(report["verify"]["codes_wrong"]),
        "work in integers": share(report["integer_share"]),
        "fallbacks": str(sum(row["kind"] != "chosen" for row in report["fallbacks"])),
    }


def changes(a: Json, b: Json) -> list[dict[str, Any]]:
    """A row for each field of a site that differs between two plans."""
    first, second = ({choice["site"]: choice for choice in plan["choices"]} for plan in (a, b))
    rows = []
    for site in dict.fromkeys([*first, *second]):
        one, two = first.get(site, {}), second.get(site, {})
        names = sorted(name for name in {*one, *two} - {"site"} if one.get(name) != two.get(name))
        rows += [{"site": site, "field": name, "a": one.get(name, ABSENT), "b": two.get(name, ABSENT)} for name in names]
    return rows
