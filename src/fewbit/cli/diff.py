"""`fewbit diff`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.app import command
from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, out
from fewbit.errors import shortened
from fewbit.folder import PLAN, REPORT

Json = Mapping[str, Any]
ABSENT = "float"  # a site that only one of the two quantizes
NUMBERS = ("codes", "scale", "zero")  # of a site, in plan.safetensors
REAL, MANY = "float.", ""  # in front of the names of tensors that stay float; in the place of numbers that are too many


@command
def diff(
    a: Path,
    b: Path,
    everything: Annotated[bool, typer.Option("--all", help="Every place and field that differs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the differences to this file.")] = None,
) -> None:
    """What differs between two runs: what came out of them, then where their plans differ, up to every code."""
    from fewbit.files import read_json, write_json
    from fewbit.folder import checked
    from fewbit.report.words import FIELDS, number, places

    records = [checked(folder) for folder in (a, b)]
    reports = [read_json(folder / REPORT) for folder in (a, b)]
    outcomes = [outcome(report, [one["size"]["onnx_bytes"] for one in reports]) for report in reports]
    outcomes = [{**words, **facts} for words, facts in zip(outcomes, differing(records, reports), strict=True)]
    table = Table("", str(a), str(b))
    for name in dict.fromkeys([*outcomes[0], *outcomes[1]]):
        table.add_row(name, *(one.get(name, "-").translate(PLAIN) for one in outcomes))
    out.print(table)
    if said := not_comparable(records, reports):
        out.print(said, soft_wrap=True)
    rows = changes(a, b)
    more = "" if everything or not rows else " --all lists them."
    said = f"The plans differ at {places(list({row['site'] for row in rows}))}: {counted(rows)}.{more}"
    same = "The plans are the same. Every grid, scale, code, bias and fallback was compared."
    out.print(said if rows else same, soft_wrap=True)
    if everything and rows:
        table = Table("where", "field", "numbers that differ", str(a), str(b))
        for row in rows:
            values = (number(row[run]).translate(PLAIN) for run in ("differing", "a", "b"))
            table.add_row(row["site"], FIELDS.get(row["field"], row["field"]), *values)
        out.print(table)
    if json_file is not None:
        write_json(json_file, rows)


def counted(rows: Sequence[Json]) -> str:
    """At how many places each field differs, the most frequent first, and how many codes there."""
    from fewbit.report.words import FIELDS, plural

    parts = []
    for field, count in Counter(row["field"] for row in rows).most_common():
        total = sum(row["differing"] or 0 for row in rows if row["field"] == field)
        what = plural(total, "code") if field == "codes" else FIELDS.get(field, field)
        parts.append(f"{what} at {count}")
    return ", ".join(parts)


def outcome(report: Json, sizes: Sequence[int]) -> dict[str, str]:
    """What a run is and what came out of it, in words; `sizes` are those of the files that it stands beside, in bytes."""
    from fewbit.report.words import measured, megabytes, percent, share, signed, speed

    score, size = report["accuracy"], report["size"]
    words = {name: str(report[name]) for name in ("model", "target", "recipe", "bits")}
    if score["quantized"] is not None:
        low, high = map(signed, score["interval"])
        change = f"{signed(score['quantized'] - score['float'])} ({low} to {high})"
        words |= {str(score["measure"]): measured(score["quantized"], score["unit"]), "change from float": change}
    words[str(score["agreement_measure"])] = percent(score["agreement"])
    words |= {"file": megabytes(size["onnx_bytes"], sizes), "bits a weight": f"{size['average_weight_bits']:.2f}"}
    for runtime, row in report["latency"].items():
        words[f"{runtime}, batch {row['batch']}"] = f"{row['quantized_ms']:.2f} ms, {speed(row['ratio'])} than float"
    return {
        **words,
        "codes that are wrong": str(report["verify"]["codes_wrong"]),
        "work in integers": share(report["integer_share"]),
        "fallbacks": str(sum(row["kind"] != "chosen" for row in report["fallbacks"])),
    }


def differing(records: Sequence[Json], reports: Sequence[Json]) -> list[dict[str, str]]:
    """What of the images and the files is not the same in two runs, in words: how many images were scored, what the file takes
    and how that is made, opset and IR version.
    """
    from fewbit.report.words import number

    facts = []
    for record, report in zip(records, reports, strict=True):
        size, format_of, how = record["preprocess"]["size"], record["file_format"], dict(record["preprocess"])
        inside = how.pop("whole", False)
        dtype = next((one["type"] for one in record["inputs"] if one["kind"] == "image"), "float32")
        order = (*size[1:], size[0]) if inside else size
        sides = ", ".join(map(str, (record["batch"] or "batch", *order)))
        where, layout = ("inside the file", "NHWC") if inside else ("outside", "NCHW")
        mean, std = (", ".join(f"{value:g}" for value in how.pop(name)) for name in ("mean", "std"))
        del how["size"]
        facts.append({
            "images scored": f"{report['images']['scored']:,}",
            "input": f"{'uint8' if inside else dtype} {layout} ({sides})",
            "normalization": f"{where}: mean {mean}; std {std}",
            **{name.replace("_", " "): shortened(number(value), 100) for name, value in how.items()},
            "opset": str(format_of["opset"]), "IR version": str(format_of["ir_version"]),
        })  # fmt: skip
    names = [name for name in {**facts[0], **facts[1]} if facts[0].get(name) != facts[1].get(name)]
    return [{name: one[name] for name in names if name in one} for one in facts]


def not_comparable(records: Sequence[Json], reports: Sequence[Json]) -> str:
    """A sentence where two runs were scored on other images, or on another number of them; else nothing."""
    counts = [report["images"]["scored"] for report in reports]
    if counts[0] == counts[1] and records[0]["hashes"]["scored"] == records[1]["hashes"]["scored"]:
        return ""
    many = f"{counts[0]:,} each" if counts[0] == counts[1] else f"{counts[0]:,} and {counts[1]:,}"
    return f"They were scored on different images ({many}), so accuracy and agreement are not comparable with each other."


def changes(a: Path, b: Path) -> list[dict[str, Any]]:
    """A row for each field of a site, and for each op, that differs between the plans of two runs: what both have there and,
    where it is numbers, how many of them differ (`differing`). Codes are compared where both have the same grid.
    """
    from fewbit.files import read_json
    from fewbit.realize.packed import stored_numbers

    plans = [read_json(folder / PLAN) for folder in (a, b)]
    numbers = [stored_numbers(folder) for folder in (a, b)]
    first, second = ({choice["site"]: choice for choice in plan["choices"]} for plan in plans)
    rows: list[dict[str, Any]] = []
    for site in dict.fromkeys([*first, *second]):
        one, two = first.get(site, {}), second.get(site, {})
        alike = one.get("grid") == two.get("grid")
        counts = {name: _differing(f"{site}.{name}", *numbers) for name in NUMBERS if alike or name != "codes"}
        names = {name for name in {*one, *two} - {"site"} if one.get(name) != two.get(name)}
        names |= {name for name, count in counts.items() if count}
        absent = [MANY if choice else ABSENT for choice in (one, two)]
        values = {name: (one.get(name, absent[0]), two.get(name, absent[1])) for name in sorted(names)}
        rows += [_row(site, name, *both, counts.get(name) or None) for name, both in values.items()]
    biases = [{row["op"]: f"{row['grid']['bits']} bits" if row["grid"] else ABSENT for row in plan["biases"]} for plan in plans]
    for op in dict.fromkeys(itertools.chain(*biases)):
        of_both = [kinds.get(op, "the model's") for kinds in biases]
        count = _differing(f"{op}.bias", *numbers)
        if count or of_both[0] != of_both[1]:
            rows.append(_row(f"{op}:bias", "bias", of_both[0], of_both[1], count or None))
    for name in numbers[0]:
        if name.startswith(REAL) and (count := _differing(name, *numbers)):
            rows.append(_row(name.removeprefix(REAL), "real numbers", MANY, MANY, count))
    ops, missed = [set(plan["integer_ops"]) for plan in plans], [_missed(plan) for plan in plans]
    places = ("float", "integers")
    rows += [_row(op, "runs in", places[op in ops[0]], places[op in ops[1]]) for op in sorted(ops[0] ^ ops[1])]
    for place in dict.fromkeys(itertools.chain(*missed)):
        one_why, two_why = (each.get(place, "none") for each in missed)
        if one_why != two_why:
            rows.append(_row(place, "fallback", one_why, two_why))
    return rows


def _row(site: str, field: str, a: Any, b: Any, differing: int | None = None) -> dict[str, Any]:
    return {"site": site, "field": field, "a": a, "b": b, "differing": differing}


def _differing(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    """How many numbers of that name differ: all where one has more of them, none where one has none."""
    if name not in a or name not in b:
        return 0
    return int((a[name] != b[name]).sum()) if len(a[name]) == len(b[name]) else max(len(a[name]), len(b[name]))


def _missed(plan: Json) -> dict[str, str]:
    """What could not be had, or is in float on purpose, and why, by place."""
    found: dict[str, list[str]] = {}
    for row in plan["fallbacks"]:
        found.setdefault(row["site"], []).append(f"{row['actual']}, not {row['requested']}: {row['why']}")
    return {place: "; ".join(sorted(lines)) for place, lines in found.items()}
