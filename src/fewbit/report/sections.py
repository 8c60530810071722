"""The sections below the answers, as data: each names its table in tables.json and how it is shown.

A section whose table is empty does not appear. What a pass of the recipe logged (name, settings, rows, summary) is a section
by itself; LOG_VIEWS adds figures to some. Shares (`*_share`) are 0 to 1, accuracies and agreements are percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from fewbit.report.figures import SITES, Axis, Bars, Heatmap, Histogram, Points
from fewbit.report.pieces import Json, Rows, number, plot, text
from fewbit.report.views import Each, Facts, Gallery, Table

View = Callable[[Rows], go.Figure | str | None]
MODULES, OPS = SITES.replace("site", "module"), "op (ticks: blocks)"
MB = "MB (10⁶ bytes)"


@dataclass(frozen=True)
class Section:
    """`key` names a table; of several, joined by `+`, the rows are shown together and `table` says whose a row is."""

    title: str
    key: str
    views: tuple[View, ...]
    note: str = ""

    def html(self, tables: Json, level: int = 3) -> str:
        """The heading, the note and all views; nothing where the table is empty."""
        keys = self.key.split("+")
        rows = [row if len(keys) == 1 else {"table": key, **row} for key in keys for row in tables.get(key) or ()]
        views = [view(rows) for view in self.views] if rows else []
        body = "".join(plot(view) if isinstance(view, go.Figure) else view or "" for view in views)
        note = f'<p class="note">{self.note}</p>' if self.note else ""
        return f"<h{level}>{text(self.title)}</h{level}>{note}{body}" if body else ""


# fmt: off
FALLBACKS = (
    Section("What was requested, and what the target got instead", "fallbacks", (
        Table(("requested", "actual", "why", "where:site:sites", "share of MACs:macs_share:share"),
              group=("requested", "actual", "why")),
    )),
    Section("Behind the last layers", "behind", (
        Table(("function", "runs in:how", "nodes:nodes:#", "why")),
    ), "What decodes, selects and enlarges what the layers give. It stays float where nothing is gained by integers."),
    Section("What integers cost there", "behind_cost", (
        Facts(("integer ops there:ops", "their share of multiply-accumulates:macs_share:share",
               "loss of the outputs as shipped:loss", "loss with these ops in float:without",
               "images of the simulation:images")),
    ), "The loss is the task's: 0 is the float model."),
)
ACCURACY = (
    Section("How the file was found", "goal", (
        Table(("file:index:#", "what was tried:what", "drop, points:drop:#", "within", "taken", "ms:ms:#",
               "times as fast as float:faster:#", "in integers:share:share", "why", "seconds:seconds:#")),
    ), "From the cheapest to the dearest, each measured on images that neither calibrated nor were scored."),
    Section("Calibration images", "calibration", (
        Facts((
            "source", "images", "ranges of two halves differ by (median over sites):range_change:share",
            "mean at batch norms, in standard deviations from training's (median):shift",
            "variance at batch norms, |log ratio| to training's (median):spread",
            "classes over which the float model's answers spread:classes",
            "images of one colour or a repetition:duplicate_share:share", "warnings",
        )),
    ), "What their statistics say about whether they are enough."),
    Section("Synthetic images", "synthetic", (Gallery(("{label}",)),),
            "Calibration images that were made from the model alone; below each is its target class."),
    Section("Accuracy against the number of calibration images", "curve", (
        Points(Axis("score", "{measure}, %"), Axis("images", "calibration images", log=True), lines=("",),
               hover="{images} images: {score:.2f} %", interval="interval", line="float"),
        Table(("images:images:#", "accuracy:quantized:%", "agreement:agreement:%", "95 % interval, %:interval:range",
               "ranges of halves differ by:range_change:share")),
    ), "Each set of images contains the one before it. Bars are 95 % intervals; the dotted line is the float model."),
    Section("Size against accuracy: runs of this model", "runs", (
        Points(Axis("accuracy", "{measure}, %"), Axis("bytes", f"ONNX file, {MB}", 1e-6), group="{kind}", label="{label}",
               hover="<b>{label}</b><br>{x:.3f} MB, {bits:.2f} bits a weight<br>{y:.2f} %", interval="interval", line="float"),
    ), "All runs were scored on the same images. Bars are 95 % intervals; the dotted line is the float model."),
    Section("Outputs: integer against float", "closeness", (
        Table(("output", "measure", "agreement:agreement:%", "95 % interval, %:interval:range",
               "error by spread:relative_error:share")),
    ), "Over all scored images, in the runtime. Correlation and error of real numbers are means over channels."),
    Section("Other measures", "measures", (
        Table(("measure:what", "float:float:#", "integer:quantized:#", "agreement:agreement:#", "error:error:#")),
    ), "By class and by size where there are annotations; in percent unless said. More is better unless said."),
    Section("Scored images", "images", (
        Gallery(("{name}", "label {label}", "float {float}", "<b>integer {quantized}</b>", "error by spread {error:.2g}"),
                differs=("float", "quantized")),
    ), "Images whose answer changed (in red), or whose outputs are furthest off, come first: their share is not that of all."),
    Section("Predictions: float on the left, integer on the right", "pictures", (
        Gallery(("{name}", "apart by {error:.2g}"), wide=True),
    ), "Those that differ most come first."),
)
ERROR = (
    Section("Error by site", "sites", (
        Bars(Axis("sqnr_db", "SQNR, dB"), along="site", group="{role}",
             hover="<b>{site}</b><br>{sqnr_db:.1f} dB<br>{grid}<br>{method}"),
    ), "Signal to quantization noise ratio (SQNR) of each quantized tensor in dB. A low bar is a site that loses much."),
    Section("Bits and grids", "sites", (
        Bars(Axis("bits", "bits of a code"), along="site", group="{bits} bits", varies=True,
             hover="<b>{site}</b><br>{bits} bits<br>{grid}"),
        Table(("role", "bits:bits:#", "grid", "where:site:sites"), group=("role", "bits", "grid")),
    )),
    Section("Ranges of the sites with the largest error", "histograms", (
        Each(Histogram("range"), "{site}: {sqnr_db:.1f} dB", most=9),
    ), "Grey: how often a value occurred in calibration (log scale). Blue: the range of the grid; values outside are clipped."),
    Section("Outlier channels and tokens", "outliers", (
        Points(Axis({"channel_ratio": "largest channel", "token_ratio": "largest token"}, "ratio to the median", log=True),
               along="site", mark="any", line="limit", hover="<b>{site}</b><br>{y:.1f} times the median<br>{done}"),
        Table(("site", "largest:reach:#", "channels", "largest without:rest_of_channels:share", "tokens:token_share:share",
               "positions", "largest without:rest_of_tokens:share", "what was done:done"), where="any"),
    ), "Largest magnitude of a channel and of a token over the median one. A diamond is a site where one is over the limit."),
    Section("The image that the attention maps look at", "attended", (Gallery(("{name}",)),)),
    Section("Attention maps", "attention", (
        Each(Heatmap(Axis("", ""), "x", "y", panels={"float": "float", "quantized": "quantized"}),
             "{op}, head {head}: {flipped_share:.2%} of key pairs change order"),
    ), "Float beside quantized on one colour scale. A map over patches is the attention of the class token."),
    Section("Order of attention scores by head", "flips", (
        Heatmap(Axis("flipped_share", "%", 100.0), "head", "op", "{op}, head {head}:<br>{flipped_share:.2%} of key pairs"),
    ), "Share of key pairs whose order is not that of the float model, in percent."),
)
RUNTIME = (
    Section("Codes: simulation against runtime", "checks", (
        Table(("graph optimisations:optimisations", "where:site:sites", "codes compared:compared:#", "differing:differing:#",
               "ties:ties:#", "wrong:wrong:#"), group=("optimisations",)),
        Each(Bars(Axis({"ties": "ties", "wrong": "wrong"}, "codes"), along="site", stacked=True, varies=True,
                  hover="<b>{site}</b><br>{differing:,} of {compared:,} codes<br>off by at most {max_difference}"),
             "graph optimisations {optimisations}", key="optimisations", wide=True),
    ), "A tie is a code that is off by one where the simulation stands on a rounding boundary; other differences are wrong."),
    Section("Outputs: float model against the one that was given, simulation against runtime", "outputs", (
        Table(("where:place", "output", "largest difference:difference:#", "explained by rounding:limit:#", "right",
               "cosine:cosine:cosine", "same largest entry:agreement:%")),
    ), "Rounding: four times what the outputs move when every op reads its inputs with the rounding errors of float32."),
    Section("Fused operators", "kernels", (
        Facts(("integer kernels in the runtime's optimised graph:found", "integer operators of the plan:expected",
               "all nodes of that graph:ops")),
    )),
)
COST = (
    Section("Latency", "latency", (
        Each(Bars(Axis({"float_ms": "float", "quantized_ms": "integer"}, "ms a batch"), number="{value:.2f} ms",
                  label="{runtime}, threads: {threads}<br>{ratio:.2f} times as fast",
                  hover="float {float_ms:.3f} ms, integer {quantized_ms:.3f} ms, {ratio:.2f} times as fast, {runs} runs"),
             "batch of {batch}", key="batch", wide=True),
    ), "Median time of a batch on this machine, float beside integer."),
    Section("Loading", "loads", (
        Table(("runtime", "load, float:float_seconds:s", "load, integer:quantized_seconds:s",
               "peak memory, float:float_bytes:MB", "peak memory, integer:quantized_bytes:MB",
               "without a model:baseline_bytes:MB")),
    ), "A process of its own loads a file and runs one image."),
    Section("Files", "size", (Bars(Axis("bytes", MB, 1e-6), label="{what}", number="{value:.2f} MB"),)),
    Section("Time of each stage", "seconds", (Bars(Axis("seconds", "s"), label="{stage}", number="{value:.1f} s"),)),
)
DETAILS = (
    Section("All sites", "sites", (
        Table(("site", "role", "op", "kind", "bits:bits:#", "grid", "method", "why", "scale:scale:#", "zero point:zero:#",
               "range of the grid:range:range", "observed:observed:range", "SQNR:sqnr_db:dB", "clipped:clipped_share:share"),
              search=True),
    )),
    Section("Nodes that stay as they are", "carried", (Table(("node", "operator", "opset:opset:#", "why")),),
            "Behind what is quantized, in float, as in the file that went in."),
    Section("Inputs", "inputs", (Table(("name:input", "shape", "type", "given")),), "In the order of the file."),
    Section("What the file takes", "input", (Facts(),), "It stands in the metadata of the ONNX file, too."),
    Section("How to run this again", "run", (Facts(),)),
)
PASSES = "Passes"  # the part of the log, which LOG_VIEWS describes
SECTIONS: Mapping[str, tuple[Section, ...]] = {
    "Fallbacks": FALLBACKS, "Error": ERROR, PASSES: (), "Accuracy": ACCURACY, "Runtime": RUNTIME, "Cost": COST,
    "Details": DETAILS,
}
LOG_VIEWS: Mapping[str, tuple[Section, ...]] = {
    "mixed precision": (
        Section("Bits of each module", "rows", (
            Bars(Axis("bits", "bits of a weight"), along="module", x_title=MODULES, group="{kind}",
                 hover="<b>{module}</b>: {bits} bits<br>{weights} weights<br>loss by bits:<br>{losses}"),
        )),
        Section("Size against estimated loss", "frontier+uniform", (
            Points(Axis("loss", "estimated loss (sum over modules)", log=True), Axis("bytes", f"weights, {MB}", 1e-6),
                   group="{table}", lines=("frontier",), label="{bits} bits", hover="{x:.3f} MB: {loss:.4g}", mark="taken"),
        ), "No allocation lies below the frontier. The diamond is this run; the other points have one width for all modules."),
    ),
    "equalize": (
        Section("Error of each place", "rows", (
            Points(Axis({"before": "before", "after": "after"}, "error", log=True), along="op", x_title=OPS,
                   hover="<b>{op}</b> ({kind}): {before} before, {after} after"),
        ), "Ranges move out of activations into weights; the float function stays the same."),
    ),
    "ranking": (
        Section("Order of attention scores with and without the ranking term", "rows", (
            Points(Axis("with", "key pairs that change order with it, %", 100.0),
                   Axis("without", "key pairs that change order without the ranking term, %", 100.0), group="{op}",
                   diagonal=True, hover="<b>{op}</b>, head {head}<br>{x:.2f} % without, {y:.2f} % with"),
        ), "A point below the diagonal is a head that the term helps."),
    ),
    "output search": (
        Section("Objective of each search", "rows", (
            Points(Axis({"before": "before", "after": "after"}, "objective"), along="input",
                   hover="<b>{input}</b><br>{before:.4g} before, {after:.4g} after"),
        )),
    ),
    "joint search": (
        Section("Loss of each evaluation", "rows", (
            Points(Axis({"loss": "each evaluation", "best": "best so far"}, "loss", log=True), Axis("evaluation", "evaluation"),
                   lines=("best so far",), hover="evaluation {evaluation}: {y:.5g}"),
        )),
        Section("Start of the search", "norms", (
            Points(Axis("loss", "loss"), Axis("p", "p of mean |x − fake(x)|ᵖ"), lines=("",), hover="p = {p:.3g}: {loss:.5g}"),
        ), "Ranges minimise a norm of the error; the search starts from the p with the smallest loss."),
    ),
    "reconstruct": (
        Section("Error of each block", "rows", (
            Points(Axis({"before": "before", "after": "after"}, "relative error", log=True), along="block", x_title=MODULES,
                   hover="<b>{block}</b><br>{before:.3g} before, {after:.3g} after"),
        ), "Squared error of the block's output over the variance of the float output, on images that are not trained on."),
    ),
}
# fmt: on
TITLES = {"gptq": "GPTQ"}  # names that are no words


def plain(values: Any) -> str:
    """The words and numbers of a mapping in one line of HTML; nested values are for tables."""
    if not isinstance(values, Mapping):
        return text(values or "")
    words = {key: value for key, value in values.items() if isinstance(value, (str, int, float)) and value != ""}
    return ", ".join(f"{text(str(key).replace('_', ' '))}: {number(value)}" for key, value in words.items())


def passes(log: Rows) -> str:
    """A section for each pass that logged something: settings, summary, the figures declared for it, and its rows."""
    parts = []
    for entry in log:
        name, rows, summary = str(entry["name"]), entry.get("rows") or (), entry.get("summary") or {}
        views = [section.html({**summary, "rows": rows}, level=4) for section in LOG_VIEWS.get(name, ())]
        notes = "".join(f'<p class="note">{line}</p>' for line in (plain(entry.get("settings")), plain(summary)) if line)
        parts.append(
            "".join([f"<h3>{text(TITLES.get(name) or name[:1].upper() + name[1:])}</h3>", notes, *views, Table()(rows)])
        )
    return "".join(parts)
