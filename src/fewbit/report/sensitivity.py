"""sensitivity.json -> one HTML page: every module, in the order in which to leave them float, with its command."""

from __future__ import annotations

from fewbit.report.figures import Bars
from fewbit.report.page import templates
from fewbit.report.scale import Axis
from fewbit.report.sections import MODULES
from fewbit.report.views import Facts, Table
from fewbit.report.words import Json, number, plural, title_of

TABLE = Table((
    "order:place:#", "module", "kind", "loss alone:loss:#", "regained without it:regained:#", "gained, ms:ms:#",
    "gained alone, ms:ms_alone:#", "share of the work:macs_share:share",
), search=True)  # fmt: skip
FIGURES = (
    Bars(Axis("loss", "loss with this module alone in integers"), along="module", x_title=MODULES, group="{kind}",
         hover="{module}: {loss:.3g}"),
    Bars(Axis("ms", "milliseconds that it gains in integers"), along="module", x_title=MODULES, group="{kind}",
         hover="{module}: {ms:.3f} ms"),
)  # fmt: skip
LONG = 30  # more rows have a box to scroll in
NOTHING = "Nothing would be left in integers."  # where all modules are float, and there is no command
MEASURED = ("runtime", "version", "processor", "threads", "date")


def draw(summary: Json) -> str:
    """The page."""
    rows, timed = summary["rows"], summary["milliseconds"]
    images, where = summary["images"], summary["latency_table"] or {}
    data = [{"command": row["command"], "instead": NOTHING, "said": said(row), "first": k == 0} for k, row in enumerate(rows)]
    along = sorted(rows, key=lambda row: row["position"])
    facts = {
        **{key: summary[key] for key in ("target", "recipe", "bits")},
        "images": f"{images['calibration']} to calibrate, {images['measured']} others to measure losses on",
        "loss of the whole plan": number(summary["loss"]),
        "milliseconds of one image": timed
        and f"{timed['float']:.3f} in float, {timed['integers']:.3f} in integers (predicted)",
        "times of single ops": ", ".join(f"{key} {where[key]}" for key in MEASURED if key in where),
        "command": summary["command"],
    }
    return templates().get_template("sensitivity.html.j2").render(
        title=title_of(summary["model"]), lead=lead(summary), by=summary["by"], note=note(summary), data=data,
        table={**(TABLE(rows) or {}), "folded": False}, long=len(rows) > LONG,
        figures=[figure(along) for figure in FIGURES[: 1 if timed is None else 2]], facts=Facts()([facts]),
    )  # fmt: skip


def lead(summary: Json) -> str:
    """The page in one sentence: how few modules have most of the loss."""
    losses = sorted((row["loss"] for row in summary["rows"]), reverse=True)
    total, few = sum(losses), 0
    while few < len(losses) and sum(losses[:few]) < 0.5 * total:
        few += 1
    if not total:
        return f"No module of {len(losses)} loses anything that these images show."
    return f"Half of what single modules lose is lost by {few} of {plural(len(losses), 'module')}."


def note(summary: Json) -> str:
    """What is to be known of the losses and the milliseconds."""
    distance = summary.get("distance") or "the task's"
    losses = (
        f"Loss: {distance}, an image, from the float model. Alone: with this module alone in integers. Regained: how much "
        "of the whole plan's loss goes where all but it are. "
    )
    return losses + _of_times(summary)


def _of_times(summary: Json) -> str:
    if summary["milliseconds"] is None:
        return (
            f"No milliseconds: {summary['why'] or 'nothing was timed'}. Times of another runtime or processor would not hold."
        )
    return (
        "Milliseconds are sums over ops that were measured one by one, float beside integer, with the quantizers around them "
        "(medians of paired rounds). A gain below 0.2 % of the model is 0. A file is measured whole by fewbit quantize."
    )


def said(row: Json) -> str:
    """A module in words."""
    words = f"{row['place']}. {row['module']}: loss {number(row['loss'], 3)}"
    if row["ms"] is None:
        return words
    return f"{words}, {'loses' if row['ms'] < 0 else 'gains'} {number(abs(row['ms']), 3)} ms in integers"
