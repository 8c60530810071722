"""The sections behind the answers: pictures, every site, images, how it was made. Rows go in, HTML comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from fewbit.report import figures
from fewbit.report.pieces import (
    UNIT,
    Json,
    Rows,
    megabytes,
    nothing,
    number,
    paragraphs,
    percent,
    plot,
    plural,
    share,
    table,
    thumbnail,
)

FLOAT = "stays float"  # what was done about an outlier that no grid holds
WORST_SITES = 9  # histograms on the page
PLAIN = ("site", "role", "op", "kind", "bits", "grid", "method", "why", "scale", "zero", "kept", "seen")
ATTENTION_MAPS = 24  # pairs of maps on the page: each op and image brings one per head


# Pictures --------------------------------------------------------------------------------------------------------------


def picture(rows: Any, draw: Callable[[Any], go.Figure], caption: str, why: str) -> str:
    """The figure, or its question with one sentence on why there is none."""
    figure = draw([] if rows is None else rows)
    return plot(figure, caption) if rows else f"<h3>{figure.layout.title.text}</h3>{nothing(why)}"


def bits(rows: Rows, caption: str) -> str:
    found = {row.get("bits") for row in rows}
    if len(found) == 1 and None not in found:
        said = paragraphs(f"All {plural(len(rows), 'site')} have {found.pop()} bits.")
        return f"<h3>{figures.bits_by_site([]).layout.title.text}</h3>{said}"
    return picture(rows, figures.bits_by_site, caption, "No sites were listed, so there are no bits to show.")


def units(rows: Rows, caption: str) -> str:
    """The widths of mixed precision; nothing where there was none."""
    if not rows:
        return ""
    total = sum(row["weights"] for row in rows)
    mean = sum(row["bits"] * row["weights"] for row in rows) / max(total, 1)
    said = f"{caption} {plural(len(rows), 'module')}, {total:,} weights, {mean:.2f} bits a weight on average."
    return plot(figures.bits_by_unit(rows), said)


def equalized(rows: Rows) -> str:
    """What was moved between tensors before the steps were chosen, each place with its strength."""
    if not rows:
        return ""
    what = {"norm": "layer norm", "value": "values", "key": "keys", "convolution": "convolutions", "rotation": "rotation"}
    head = ("before", "what", "strength", "shift", "error that is left")
    cells = []
    for row in rows:
        strength = "off" if not row["moved"] or row["strength"] is None else f"{row['strength']:g}"
        strength = "on" if row["moved"] and row["kind"] == "rotation" else strength
        left = percent(100 * row["after"] / row["before"]) if row["before"] else "–"
        cells.append(
            (escape(row["op"]), str(what.get(row["kind"], row["kind"])), strength, "yes" if row["shift"] else "no", left)
        )
    said = "Ranges moved out of activations into weights; the float function is the same."
    drawn = table(head, cells, numeric=(2, 4))
    return f"<h3>What was moved between tensors?</h3><figure>{drawn}<figcaption>{said}</figcaption></figure>"


def outliers(rows: Rows, caption: str) -> str:
    """Channels and tokens far larger than the others, and what was done about each; nothing where they were not looked for."""
    if not rows:
        return ""
    found = [row for row in rows if row["any"] and row["done"] != FLOAT]
    beside = [escape(row["site"]) for row in rows if row["any"] and row["done"] == FLOAT]
    limit = rows[0]["limit"]
    caption += f" Over the line ({number(limit)} times the median) a channel or a token stands out."
    drawn = plot(figures.outliers_by_site(rows, limit), caption)
    drawn += paragraphs(*([f"In float, so nothing was to be done: {', '.join(beside)}."] if beside else []))
    if not found:
        return drawn + paragraphs(f"No channel and no token stands out{' elsewhere' if beside else ''}.")
    cells = [
        [
            escape(row["site"]),
            number(row["reach"], 3),
            ", ".join(map(str, row["channels"])) or "–",
            share(row["rest_of_channels"]) if row["channels"] else "–",
            f"{share(row['token_share'])}, at {', '.join(map(str, row['positions']))}" if row["token_share"] else "–",
            share(row["rest_of_tokens"]) if row["token_share"] else "–",
            escape(row["done"]),
        ]
        for row in found
    ]
    head = ["site", "largest", "channels", "the others reach", "tokens", "the others reach", "what was done"]
    return drawn + table(head, cells, numeric=(1, 3, 5))


def rebuilt(rows: Rows, spent: float | None) -> str:
    """Each unit of a reconstruction with its error before and after; nothing where there was none."""
    if not rows:
        return ""
    head = "<tr><th>unit</th><th>error before</th><th>after</th><th>steps</th><th>kept</th></tr>"
    body = ""
    for row in rows:
        tried = row["after"] if row["kept"] else row.get("tried")
        after = "–" if tried is None else number(tried, 3)
        cells = (escape(row["unit"]), number(row["before"], 3), after, f"{row['steps']:,}", "yes" if row["kept"] else "no")
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    first, kept = rows[0], sum(bool(row["kept"]) for row in rows)
    said = f"Squared error of each unit's output over the variance of the float output, on {plural(first['held'], 'image')} of "
    said += f"{first['images']} that nothing was learnt on. {kept} of {plural(len(rows), 'unit')} kept what was learnt; "
    said += f"{number(spent, 3)}{UNIT}s in all, the choice before included"
    said += "." if first["seconds"] is None else f", of {number(first['seconds'], 3)}{UNIT}s (--time)."
    return f"<figure><table>{head}{body}</table><figcaption>{said}</figcaption></figure>"


def ranking(rows: Rows, caption: str) -> str:
    """Rank flips with and without the ranking term."""
    if rows:
        with_it, without = (100 * sum(row[key] for row in rows) / len(rows) for key in ("with", "without"))
        better, worse = (sum(sign * (row["without"] - row["with"]) > 0 for row in rows) for sign in (1, -1))
        caption += (
            f" A point below the diagonal is a head that the term helps: {better} of {len(rows)}; above it are {worse}."
            f" The mean over heads is {percent(with_it)} with it and {percent(without)} without."
        )
    return picture(rows, figures.ranking, caption, "The recipe has no ranking term, so no heads were compared.")


def frontier(rows: Rows, caption: str) -> str:
    if any(row["kind"] == "a width for each module" and row.get("loss") is not None for row in rows):
        caption += " Nothing lies below the line: no widths have a smaller estimated loss in as few bytes."
    return picture(rows, figures.frontier, caption, "No widths were searched, so there is no frontier.")


def joint(rows: Rows, norms: Rows, caption: str) -> str:
    """The losses of a joint search and of its start; nothing where there was none."""
    parts = []
    if norms:
        fit = next((f" The parabola's R² is {row['r2']:.3f}." for row in norms if row.get("r2") is not None), "")
        start = norms[-1]["p"]
        parts.append(plot(figures.norms(norms), f"{caption} The search starts at p = {number(start, 3)}.{fit}"))
    if rows:
        first, best = rows[0], rows[-1]["best"]
        said = f"{caption} {plural(first['evaluations'], 'evaluation')} on {plural(first['images'], 'image')}, "
        said += f"{plural(first['sites'], 'free step')}: the loss ({escape(str(first['what']))}) "
        said += f"goes from {number(first['best'])} to {number(best)}."
        if first.get("out_of_time"):
            said += f" The time was up after {number(first['seconds'])}{UNIT}s; more may bring more (--time)."
        parts.append(plot(figures.joint(rows), said))
    return "".join(parts)


def synthetic(rows: Rows, classes: Sequence[str]) -> str:
    """Images that were made from the model, in a row; nothing where there were none."""
    if not rows:
        return ""
    cells = []
    for row in rows:
        label = row.get("label")
        named = classes[label] if isinstance(label, int) and 0 <= label < len(classes) else label
        cells.append(f'<div class="image">{thumbnail(row.get("thumbnail"))}<div>{escape(str(named))}</div></div>')
    note = "Calibrated on images that were made from the model alone; the class is the one that the model was to see in each."
    return f'<h3>What did the model make up?</h3><div class="images">{"".join(cells)}</div><p class="note">{note}</p>'


def calibration(report: Json, caption: str) -> str:
    """What the statistics say of the calibration images; nothing where they were not looked at."""
    found = report.get("calibration")
    if not found:
        return ""
    change, shift, spread, classes = (found.get(key) for key in ("range_change", "shift", "spread", "classes"))
    rows = [
        ["images", escape(str(found.get("source", ""))), number(found.get("images"))],
        ["ranges of two halves", "differ by, median over sites", share(change)],
        ["what batch norms read, mean", "standard deviations from training's, median over layers", number(shift, 3)],
        ["the same, variance", "mean |log ratio| to training's, median over layers", number(spread, 3)],
        ["classes", "over which the float model spreads its answers", number(classes, 3)],
        ["one colour or a repetition", "share of the images", share(found.get("idle"))],
    ]
    head = "<h3>Are the calibration images enough?</h3>"
    warned = paragraphs(*([escape(str(w)) for w in found.get("warnings", ())] or ["Nothing speaks against them."]))
    return f'{head}{warned}{table(["what", "how", "found"], rows, numeric=[2])}<p class="note">{caption}</p>'


def curve(rows: Rows, caption: str) -> str:
    """Accuracy against calibration images, as a figure and a table; nothing where the run was not asked for it."""
    if not rows:
        return ""
    labelled = rows[0].get("quantized") is not None
    cells = [
        [
            f"{row['images']:,}",
            percent(row["quantized"] if labelled else row["agreement"]),
            " to ".join(map(percent, row["interval"])),
            percent(row["agreement"]),
            share(row.get("range_change")),
        ]
        for row in rows
    ]
    head = ["images", "top-1" if labelled else "agreement", "95 % interval", "agreement", "ranges of halves differ by"]
    said = f"{caption} Each set of images is inside of the next; scored in {escape(str(rows[0]['runtime']))}."
    return plot(figures.curve(rows), said) + table(head, cells, numeric=range(5))


def runs(rows: Rows) -> str:
    """Several runs in one picture; nothing where there is only this one."""
    if not rows:
        return ""
    intervals = f" Bars are 95{UNIT}% intervals." if any(row.get("interval") for row in rows) else ""
    return plot(figures.runs(rows), f"{plural(len(rows) - 1, 'run')} of the same model, scored on the same images.{intervals}")


def loads(rows: Rows) -> str:
    head = "<h3>What does loading take, float beside integer?</h3>"
    if not rows:
        return head + nothing("No load was measured.")
    cells = [
        [
            escape(str(row["runtime"])),
            f"{row['float_seconds']:.3f} → {row['quantized_seconds']:.3f}{UNIT}s",
            f"{row['float_bytes'] / 1e6:.0f} → {row['quantized_bytes'] / 1e6:.0f}{UNIT}MB",
            f"{row['baseline_bytes'] / 1e6:.0f}{UNIT}MB",
        ]
        for row in rows
    ]
    note = "A process of its own loads a file and runs one image; the last column is one that imports the runtime only."
    columns = ["runtime", "load", "peak memory", "peak without a model"]
    return f'{head}{table(columns, cells, numeric=[1, 2, 3])}<p class="note">{note}</p>'


def ranges(rows: Rows, caption: str) -> str:
    head = "<h3>What do the worst sites keep of their range?</h3>"
    if not rows:
        return head + nothing("No histograms were kept, so no range can be drawn against one.")
    plots = "".join(
        plot(figures.range_kept(row), f"{number(row.get('sqnr_db'), 3)} dB; seen {number(row['seen'], 3)}", level=4)
        for row in rows[:WORST_SITES]
    )
    note = "Grey: how often a value was seen in calibration. Blue: what the grid covers; outside it is clipped."
    note += f" {len(rows) - WORST_SITES} more are in tables.json." if len(rows) > WORST_SITES else ""
    return f'{head}<div class="many">{plots}</div><p class="note">{caption} {note}</p>'


def attention(rows: Rows, caption: str) -> str:
    head = "<h3>Does attention still look at the same places?</h3>"
    if not rows:
        return head + nothing("No attention maps were kept: the model has none, or none were asked for.")
    parts, drawn = [], 0
    for row in rows:
        heads = range(len(row["float"]))
        if drawn and drawn + len(heads) > ATTENTION_MAPS:
            break
        drawn += len(heads)
        name = f"{escape(str(row['op']))}, image {escape(str(row['image']))}"
        pairs = "".join(plot(figures.attention_pair(row, h), level=4) for h in heads)
        parts.append(f'<div class="group">{thumbnail(row.get("thumbnail"))}{name}</div><div class="many">{pairs}</div>')
    note = "One colour scale for each pair. A map over patches is what the class token looks at."
    note += f" {len(rows) - len(parts)} more are in tables.json." if len(parts) < len(rows) else ""
    return f'{head}{"".join(parts)}<p class="note">{caption} {note}</p>'


def differing(rows: Rows, caption: str) -> str:
    equal = ""
    for setting in dict.fromkeys(row["optimisations"] for row in rows):
        members = [row for row in rows if row["optimisations"] == setting]
        if not any(row["differing"] for row in members):
            compared, sites = sum(row["compared"] for row in members), plural(len(members), "site")
            equal += f" Graph optimisations {setting}: none of {compared:,} codes differs, at {sites}."
    if rows and not any(row["differing"] for row in rows):
        return f"<h3>{figures.codes_by_site([]).layout.title.text}</h3>{paragraphs(f'Nowhere.{equal}')}"
    return picture(rows, figures.codes_by_site, caption + equal, "No codes were compared with a runtime.")


def runtimes(tables: Json) -> str:
    """What comes out at the end, and what the runtime's own graph is made of."""
    outputs, kernels = tables.get("outputs"), tables.get("kernels")
    parts = ["<h3>Do the runtime's outputs equal the simulation's?</h3>"]
    if outputs:
        rows = [
            [
                escape(str(r["runtime"])),
                number(r["max_abs_difference"]),
                f"{r['cosine']:.7f}",
                percent(r["argmax_agreement"]),
            ]
            for r in outputs
        ]
        parts.append(table(["runtime", "largest difference", "cosine", "same top answer"], rows, numeric=[1, 2, 3]))
    else:
        parts.append(nothing("No outputs were compared with a runtime."))
    parts.append("<h3>Does the runtime really compute in integers?</h3>")
    if kernels:
        counts = sorted((kernels.get("ops") or {}).items(), key=lambda item: (-item[1], item[0]))
        ops = ", ".join(f"{escape(op)} {count:,}" for op, count in counts)
        found = f"{kernels['found']:,} of {kernels['expected']:,} integer kernels are in its optimised graph."
        parts.append(paragraphs(found, ops and f"All of its nodes: {ops}."))
    else:
        parts.append(nothing("The runtime's optimised graph was not looked at."))
    return "".join(parts)


# Everything else -------------------------------------------------------------------------------------------------------


def site_table(rows: Rows) -> str:
    if not rows:
        return nothing("No sites were listed.")
    head = [*PLAIN, "SQNR dB", "clipped"]
    cells = [[*(number(r.get(k)) for k in PLAIN), number(r.get("sqnr_db")), share(r.get("clipped_share"))] for r in rows]
    return (
        f"<details><summary>All {plural(len(rows), 'site')}</summary>"
        '<input type="search" id="search" placeholder="filter: fc2 weight" aria-label="filter the sites">'
        f"{table(head, cells, numeric=[4, 8, 9, 10, 11, 12, 13], box='box tall')}</details>"
    )


def images(rows: Rows, classes: Sequence[str]) -> str:
    """`classes` are the names of answers that are numbers, if the run knows them."""
    if not rows:
        return nothing("No scored images were kept.")
    cells = []
    for row in rows:
        found = [row.get(k) for k in ("label", "float", "quantized")]
        named = [classes[v] if isinstance(v, int) and 0 <= v < len(classes) else v for v in found]
        name, label, before, after = (escape(str(v)) for v in (row["name"], *named))
        known = "" if row.get("label") is None else f"label {label}<br>"
        answers = f"{name}<br>{known}float {before}<br><b>integer {after}</b>"
        mark = "" if found[1] == found[2] else " differs"
        cells.append(f'<div class="image{mark}">{thumbnail(row.get("thumbnail"))}<div>{answers}</div></div>')
    changed = sum(row["float"] != row["quantized"] for row in rows)
    said = paragraphs(f"{changed} of these {len(rows)} answers changed; the images were picked, so this is no rate.")
    return f'{said}<div class="images">{"".join(cells)}</div>'


def made(report: Json, run: Json) -> str:
    peak = report.get("peak_memory_bytes")
    if not run:
        return nothing("The command and versions were not recorded.")
    groups = {key: run.get(key) or {} for key in ("versions", "machine", "hashes")}
    pairs = [("seed", run.get("seed")), *(pair for group in groups.values() for pair in group.items())]
    if peak is not None:
        pairs.append(("peak memory", megabytes(peak)))
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs if v is not None)
    return f"<pre>{escape(str(run.get('command') or ''))}</pre><dl>{items}</dl>"


def pictures(report: Json, tables: Json, caption: str) -> str:
    sites, stages = tables.get("sites") or (), tables.get("seconds") or report.get("seconds") or {}
    flips_why = "No attention was compared, so no ranks were counted."
    faster = f"{caption} In brackets: how many times as fast the integer model is."
    return "".join(
        [
            picture(sites, figures.error_by_site, caption, "No sites were listed, so there is no error to show."),
            bits(sites, caption),
            units(tables.get("units") or (), caption),
            outliers(tables.get("outliers") or (), caption),
            equalized(tables.get("equalized") or ()),
            rebuilt(tables.get("rebuilt") or (), (report.get("seconds") or {}).get("reconstruct")),
            ranges(tables.get("histograms") or (), caption),
            attention(tables.get("attention") or (), caption),
            picture(tables.get("flips"), figures.flips_by_head, caption, flips_why),
            ranking(tables.get("ranking") or (), caption),
            picture(tables.get("latency"), figures.latency, faster, "No latency was measured."),
            loads(tables.get("loads") or ()),
            picture(tables.get("size"), figures.size, caption, "No file was weighed."),
            differing(tables.get("checks") or (), caption),
            runtimes(tables),
            frontier(tables.get("frontier") or (), caption),
            joint(tables.get("joint") or (), tables.get("norms") or (), caption),
            calibration(report, caption),
            curve(tables.get("curve") or (), caption),
            synthetic(tables.get("synthetic") or (), (tables.get("run") or {}).get("classes") or ()),
            runs(tables.get("runs") or ()),
            picture(stages, figures.seconds, caption, "No stage was timed."),
        ]
    )
