"""report.json and tables.json -> report.html: one file, no network, the same bytes for the same two files.

The four answers come first, then what was refused, then pictures, then every site. Shares (`*_share`) are
0 to 1, accuracies and agreements are percent, `ratio` is float over integer time (2 is twice as fast). A table that is
missing or empty says so in one sentence; `units` and `runs` are there for mixed precision and on request only.

    python -m fewbit.report.page RUN        reads RUN/report.json and RUN/tables.json, writes RUN/report.html
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fewbit.errors import BadFile
from fewbit.report import figures

Json = Mapping[str, Any]
Rows = Sequence[Json]

FLOAT = "stays float"  # what was done about an outlier that no grid holds
WORST_SITES = 9  # histograms on the page
PLAIN = ("site", "role", "op", "kind", "bits", "grid", "method", "why", "scale", "zero", "kept", "seen")
UNIT = "\u00a0"  # a unit stays on the line of its number
ATTENTION_MAPS = 24  # pairs of maps on the page: each op and image brings one per head


# 1. Values as text ----------------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 4) -> str:
    """A float with significant digits, a pair or per-channel range joined, nothing as a dash."""
    if isinstance(value, Mapping):
        value = [value["min"], value["max"]]
    if isinstance(value, (list, tuple)):
        return " to ".join(number(v, digits) for v in value)
    if value is None or isinstance(value, str):
        return escape(value or "–")
    if not math.isfinite(value):
        return "∞" if value > 0 else "–∞" if value < 0 else "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}{UNIT}%"


def share(value: float | None) -> str:
    return percent(None if value is None else 100 * value)


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}{UNIT}MB"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# 2. Pieces of HTML ----------------------------------------------------------------------------------------------------


def paragraphs(*lines: str) -> str:
    return "".join(f"<p>{line}</p>" for line in lines if line)


def nothing(why: str) -> str:
    return f'<p class="nothing">{escape(why)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = (), box: str = "box") -> str:
    """Cells are HTML already; `numeric` are the columns that stand on the right."""
    right = set(numeric)
    mark = [' class="n"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{h}</th>" for m, h in zip(mark, head, strict=True))
    body = "".join("<tr>" + "".join(f"<td{m}>{c}</td>" for m, c in zip(mark, row, strict=True)) + "</tr>" for row in rows)
    return f'<div class="{box}" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: go.Figure, caption: str = "", *, level: int = 3) -> str:
    """A figure with its title as a heading that wraps, its JSON in the page and its caption below."""
    title, figure = figure.layout.title.text, go.Figure(figure)
    figure.layout.title = None
    figure.layout.margin.t -= figures.TITLE_ROOM
    data = figure.to_json(validate=False)  # plotly writes < as \u003c, so that no label can end the script
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><h{level}>{title}</h{level}><div class="plot" style="height:{figure.layout.height:.0f}px"></div>'
        f'<script type="application/json">{data}</script>{below}</figure>'
    )


def thumbnail(uri: Any) -> str:
    """An image that is inside the page; anything that would have to be loaded is left out."""
    return f'<img alt="" src="{escape(uri)}">' if isinstance(uri, str) and uri.startswith("data:image/") else ""


def card(question: str, big: str, *lines: str, word: str = "", mood: str = "") -> str:
    tag = f'<span class="word {mood}">{word}</span>' if word else ""
    return f'<article class="card"><h2>{question} {tag}</h2><p class="big">{big}</p>{paragraphs(*lines)}</article>'


# 3. The four answers --------------------------------------------------------------------------------------------------


def right(report: Json, tables: Json) -> str:
    verify, question = report.get("verify"), "Is it right?"
    if not verify:
        return card(question, "not verified", "No codes were compared with a runtime.", word="unknown", mood="unsure")
    differing, compared = verify["codes_differing"], verify["codes_compared"]
    checks, explained = tables.get("checks"), ""
    counted = sum(row["wrong"] for row in checks) if checks else None
    known = verify.get("codes_wrong", counted)
    wrong = differing if known is None else known
    if known is not None and differing:
        ties = "Every difference is a tie: off by one where the simulation stands on a rounding boundary."
        explained = f"{plural(wrong, 'code')} cannot be explained by rounding." if wrong else ties
    big = f"{differing:,} <small>of {compared:,} codes differ</small>"
    how = f"Simulation against runtime, the same codes going in, at {plural(verify['sites'], 'site')}."
    worst = f"Worst site: {escape(str(verify['worst_site']))}, off by at most {verify['max_difference']}."
    word, mood = ("no", "bad") if wrong else ("yes", "good")
    return card(question, big, how, worst if differing else "", explained, word=word, mood=mood)


def good(report: Json) -> str:
    accuracy, images, question = report.get("accuracy"), report.get("images") or {}, "Is it good?"
    exempt = "; ".join(map(escape, report.get("exemptions") or ())) or "nothing"
    if not accuracy:
        return card(question, "not evaluated", "No images were scored.", f"Exempt: {exempt}.")
    before, after = accuracy.get("float"), accuracy.get("quantized")
    labelled = before is not None and after is not None
    agreement = f"{percent(accuracy['agreement'])} agreement with the float model, cosine {accuracy['cosine']:.5f}."
    interval = " to ".join(map(percent, accuracy["interval"])) if accuracy.get("interval") else "not known"
    scored = f"{plural(images.get('scored', 0), 'image')} scored in {escape(str(accuracy['runtime']))}"
    if labelled:
        change = f"{after - before:+.2f}".replace("-", "−")
        big = f"{before:.2f} → {percent(after)} <small>accuracy</small>"
        lines = [f"{change} points; 95{UNIT}% interval {interval}.", agreement]
    else:
        big = f"{percent(accuracy['agreement'])} <small>agreement with the float model</small>"
        lines = [f"No labels, so no accuracy; 95{UNIT}% interval {interval}, cosine {accuracy['cosine']:.5f}."]
    calibrated = f"; {images['calibration']:,} for calibration" if "calibration" in images else ""
    warned = [f"<b>{escape(str(warning))}</b>" for warning in (report.get("calibration") or {}).get("warnings", ())]
    return card(question, big, *lines, f"{scored}{calibrated}.", f"Exempt: {exempt}.", *warned)


def small_and_fast(report: Json) -> str:
    sizes, timings, question = report.get("size"), report.get("latency") or {}, "Is it small and fast?"
    lines = []
    if sizes:
        big = f"{sizes['float_bytes'] / 1e6:.2f} → {megabytes(sizes['onnx_bytes'])}"
        big += f" <small>{sizes['float_bytes'] / sizes['onnx_bytes']:.2f}× smaller</small>"
        packed = f"weights packed {megabytes(sizes['packed_bytes'])}, " if sizes.get("packed_bytes") is not None else ""
        lines.append(f"ONNX files; {packed}{sizes['average_weight_bits']:.2f} bits a weight.")
    else:
        big = "not exported"
    for runtime, row in timings.items():
        lines.append(
            f"{escape(runtime)}: {row['float_ms']:.2f} → {row['quantized_ms']:.2f} ms, "
            f"{'<b>slower</b>, ' if row['quantized_ms'] > row['float_ms'] else ''}{row['ratio']:.2f}× as fast."
        )
    return card(question, big, *lines, "" if timings else "No latency was measured.")


def not_got(report: Json) -> str:
    refusals, integer = report.get("refusals") or (), report.get("integer_share")
    big = f"{len(refusals):,} <small>{'request' if len(refusals) == 1 else 'requests'} refused</small>"
    lines = [] if integer is None else [f"{share(integer)} of multiply-accumulates run in integers."]
    if refusals:
        most = max(collapsed(refusals), key=lambda group: len(group["sites"]))
        asked, given, why = (escape(str(most[key])) for key in ("asked", "given", "why"))
        lines.append(f"Most often {asked} became {given}, at {plural(len(most['sites']), 'site')}: {why}.")
    islands = {row["site"] for row in refusals if row["given"] == "float"}
    lines.append(f"{plural(len(islands), 'site')} stayed float." if islands else "No site was left float against a request.")
    return card("What did we not get?", big, *lines)


# 4. Refusals ----------------------------------------------------------------------------------------------------------


def collapsed(refusals: Rows) -> list[dict[str, Any]]:
    """One row per (asked, given, why): its sites and the sum of their shares, the largest share first."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in refusals:
        same = {key: row[key] for key in ("asked", "given", "why")}
        group = groups.setdefault(tuple(same.values()), {**same, "sites": [], "macs_share": 0.0})
        group["sites"].append(row["site"])
        group["macs_share"] += row.get("macs_share") or 0.0
    return sorted(groups.values(), key=lambda group: -group["macs_share"])


def refusals(report: Json) -> str:
    rows = report.get("refusals") or ()
    if not rows:
        return nothing("Nothing was refused: every site got what was asked for.")
    cells = []
    for group in collapsed(rows):
        sites, count = "<br>".join(map(escape, group["sites"])), len(group["sites"])
        if count > 1:
            sites = f"<details><summary>{count} sites</summary>{sites}</details>"
        cells.append([*(escape(str(group[k])) for k in ("asked", "given", "why")), sites, share(group["macs_share"])])
    return table(["asked", "given", "why", "where", "of the MACs"], cells, numeric=[4])


# 5. Pictures ----------------------------------------------------------------------------------------------------------


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


# 6. Everything else ---------------------------------------------------------------------------------------------------


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


def render(report: Json, tables: Json) -> str:
    """The whole page. What came from the user is escaped where it enters."""
    model, target, recipe, wanted = (escape(str(report.get(k, "?"))) for k in ("model", "target", "recipe", "bits"))
    caption = f"{model}, target {target}, recipe {recipe}, bits {wanted}."
    sections = {
        "refused": ("What was refused", refusals(report)),
        "pictures": ("Pictures", pictures(report, tables, caption)),
        "sites": ("Every site", site_table(tables.get("sites") or ())),
        "images": ("Some of the images", images(tables.get("images") or (), (tables.get("run") or {}).get("classes") or ())),
        "made": ("How this was made", made(report, tables.get("run") or {})),
    }
    cards = right(report, tables) + good(report) + small_and_fast(report) + not_got(report)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in sections.items())
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{inner}</section>' for name, (title, inner) in sections.items())
    here = files("fewbit.report")
    css, js = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{model} on {target}: fewbit</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head><body>'
        f'<header><p class="eyebrow">fewbit, post-training quantization</p><h1>{model}</h1><p class="lead">'
        f"Target <b>{target}</b>, recipe <b>{recipe}</b>, bits <b>{wanted}</b></p></header>"
        f'<main><div class="cards">{cards}</div><nav>{links}</nav>'
        f"<noscript>{nothing('The figures need JavaScript; their numbers are in tables.json.')}</noscript>{body}</main>"
        f"<script>{get_plotlyjs()}</script><script>{js}</script></body></html>\n"
    )


def write(path: Path, report: Json, tables: Json) -> None:
    """Write `path`, a pure function of the two."""
    path.write_text(render(report, tables), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m fewbit.report.page RUN", file=sys.stderr)
        return BadFile.exit_code
    run = Path(arguments[0])
    if not (run / "report.json").is_file():
        print(f"{run} has no report.json; make one with: fewbit quantize MODEL --images DIR --out {run}", file=sys.stderr)
        return BadFile.exit_code
    found = [run / name for name in ("report.json", "tables.json")]
    report, tables = (json.loads(p.read_text(encoding="utf-8")) if p.is_file() else {} for p in found)
    write(run / "report.html", report, tables)
    print(run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
