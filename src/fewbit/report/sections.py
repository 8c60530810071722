"""The sections below the answers, as data: each names its table in tables.json and how it is shown.

A section whose table is empty does not appear. What a pass of the recipe logged (name, settings, rows, summary) is a section
by itself; LOG_VIEWS adds figures to some. Shares (`*_share`) are 0 to 1, accuracies and agreements are percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.report.figures import SITES, Bars, Heatmap, Histogram, Points
from fewbit.report.scale import Axis
from fewbit.report.views import Block, Each, Facts, Gallery, Table, View
from fewbit.report.words import Json, Rows, number

MODULES, OPS = SITES.replace("site", "module"), "op (ticks: blocks)"
MB = "MB (10⁶ bytes)"


@dataclass(frozen=True)
class Section:
    """`key` names a table; of several, joined by `+`, the rows are shown together and `table` says whose a row is."""

    title: str
    key: str
    views: tuple[View, ...]
    note: str = ""

    def shown(self, tables: Json) -> Block | None:
        """The title, the note and all views; None where the table is empty."""
        keys = self.key.split("+")
        rows = [row if len(keys) == 1 else {"table": key, **row} for key in keys for row in tables.get(key) or ()]
        blocks = [block for view in self.views if (block := view(rows))] if rows else []
        return {"title": self.title, "notes": [self.note] if self.note else [], "blocks": blocks} if blocks else None


# fmt: off
FALLBACKS = (
    Section("What could not be had", "fallbacks", (
        Table(("requested", "instead:actual", "why", "where:site:sites", "share of the work:macs_share:share"),
              group=("requested", "actual", "why")),
    )),
    Section("What is in float on purpose", "chosen", (
        Table(("why", "where:site:sites", "share of the work:macs_share:share"), group=("why",)),
    ), "Because that is faster on this target, because it was asked for, or because --max-drop found that it loses too much."),
    Section("Behind the last layers", "behind", (
        Table(("function", "runs in:how", "nodes:nodes:#", "why")),
    ), "Functions that decode, select or enlarge the outputs of the last layers. They stay float where integers gain nothing."),
    Section("What integers cost behind the last layers", "behind_cost", (
        Facts(("integer ops:ops", "their share of multiply-accumulates:macs_share:share",
               "loss of the outputs as shipped:loss", "loss with these ops in float:without",
               "images of the simulation:images")),
    ), "The loss is the task's: 0 is the float model."),
)
ACCURACY = (
    Section("How --max-drop found this file", "goal", (
        Table(("file:index:#", "what was tried:what", "drop:drop:fall", "within", "taken", "ms:ms:#",
               "times as fast as float:faster:#", "in integers:share:share", "why", "seconds:seconds:#")),
    ), "In the order in which they were tried, each measured on images that are neither calibrated on nor scored: recipes, "
       "then twice as many modules each time until it suffices, then halfway between too few and enough."),
    Section("Calibration images", "calibration", (
        Facts((
            "source", "images", "difference between the ranges of two halves, median:range_change:share",
            "mean at batch norms, in standard deviations from training's (median):shift",
            "variance at batch norms, |log ratio| to training's (median):spread",
            "classes among the float model's answers (effective number):classes",
            "images that are one colour or a copy:duplicate_share:share", "warnings",
        )),
    ), "Whether there are enough of them, and whether they look like the images of training."),
    Section("Synthetic images", "synthetic", (Gallery(("{label}",)),),
            "Calibration images that were made from the model alone, each with its target class."),
    Section("Accuracy against the number of calibration images", "curve", (
        Points(Axis("score", "{title}"), Axis("images", "calibration images", log=True), lines=("",),
               hover="{said}", interval="interval", line="float"),
        Table(("images:images:#", "accuracy:quantized:measure", "agreement:agreement:%", "95 % interval:interval:ends",
               "difference between halves:range_change:share")),
    ), "Each set of images contains the one before it. Bars are 95 % intervals; the dotted line is the float model."),
    Section("Size and accuracy of the runs of this model", "runs", (
        Points(Axis("accuracy", "{title}"), Axis("bytes", f"ONNX file, {MB}", 1e-6), group="{kind}", label="{label}",
               hover="{label}, {weighs}, {bits:.2f} bits a weight, {said}", interval="interval", line="float"),
    ), "All runs were scored on the same images. Bars are 95 % intervals; the dotted line is the float model."),
    Section("Outputs: integer against float", "closeness", (
        Table(("output", "measure", "agreement:agreement:%", "95 % interval:interval:ends",
               "error relative to the spread:relative_error:share")),
    ), "Over all scored images, in the runtime. Correlation and error are means over channels."),
    Section("Other measures", "measures", (
        Table(("measure:what", "float:float:measure", "integer:quantized:measure", "agreement:agreement:measure",
               "error:error:measure", "is better:better")),
    ), "The last column says whether more or less is better."),
    Section("Scored images", "images", (
        Gallery(("{name}", "label {label}", "float {float}", "integer {quantized}", "error relative to the spread {error:.2g}"),
                differs=("float", "quantized")),
    ), "The worst images come first: those whose answer changed (red), or whose outputs are furthest from the float model's."),
    Section("Predictions: float on the left, integer on the right", "pictures", (
        Gallery(("{name}", "difference {error:.2g}"), wide=True),
    ), "The images that differ most come first."),
)
ERROR = (
    Section("Modules that lose most", "sensitivity", (
        Table(("module", "kind", "loss alone in integers:loss:#", "of all modules' losses:loss_share:share",
               "share of the work:macs_share:share", "images:images:#")),
    ), "The loss of the task (0 is the float model) where one module alone is in integers, in the simulation, on calibration "
       "images. fewbit sensitivity has every module, its milliseconds and the commands that leave it float."),
    Section("Error by site", "sites", (
        Bars(Axis("sqnr_db", "SQNR, dB", most=80.0), along="site", group="{role}",
             hover="{site}, {sqnr_db:.1f} dB, {grid}, {method}"),
    ), "Signal to quantization noise ratio (SQNR) of each quantized tensor. A low bar loses much; bars end at 80 dB."),
    Section("Bits and grids", "sites", (
        Bars(Axis("bits", "bits of a code"), along="site", group="{bits} bits", varies=True,
             hover="{site}, {bits} bits, {grid}"),
        Table(("role", "bits:bits:#", "grid", "where:site:sites"), group=("role", "bits", "grid")),
    )),
    Section("Ranges of the sites with the largest error", "histograms", (
        Each(Histogram("range"), "{site}: {sqnr_db:.1f} dB", most=9),
    ), "Grey: how often a value occurred in calibration. Blue: the range of the grid. Values outside of it are clipped."),
    Section("Outlier channels and tokens", "outliers", (
        Points(Axis({"channel_ratio": "largest channel", "token_ratio": "largest token"}, "ratio to the median", log=True,
                    most=1000.0), along="site", mark="over", line="limit",
               hover="{site}: channel {channel_ratio:.1f}, token {token_ratio:.1f} times the median; {done}"),
        Table(("site", "largest value:reach:#", "outlier channels:channel_count:#", "largest of them:channels",
               "largest without all of them:rest_of_channels:share", "outlier tokens:token_share:share",
               "at positions:position_count:#", "most frequent of them:positions", "largest without:rest_of_tokens:share",
               "what was done:done"), where="any"),
    ), "The largest channel and token, relative to the median one. Diamonds are over the limit; points end at 1,000. Of "
       "outlier channels and positions at most 8 are listed."),
    Section("The image that the attention maps look at", "attended", (Gallery(("{name}",)),)),
    Section("Attention maps", "attention", (
        Each(Heatmap(Axis("", ""), "x", "y", panels={"float": "float", "quantized": "quantized"}),
             "{op}, head {head}: {flipped} of key pairs change order"),
    ), "Float beside quantized, on one colour scale. Where the axes are patches, it is the attention of the class token."),
    Section("Order of attention scores by head", "flips", (
        Heatmap(Axis("flipped_share", "%", 100.0), "head", "op", "{op}, head {head}: {flipped} of key pairs"),
    ), "How many key pairs, in percent, are in another order than in the float model."),
)
RUNTIME = (
    Section("Codes: simulation against runtime", "checks", (
        Table(("graph optimisations:optimisations", "where:site:sites", "codes compared:compared:#", "differing:differing:#",
               "ties:ties:#", "wrong:wrong:#"), group=("optimisations",)),
        Each(Bars(Axis({"ties": "ties", "wrong": "wrong"}, "codes"), along="site", stacked=True, varies=True,
                  hover="{site}, {differing:,} of {compared:,} codes, off by at most {max_difference}"),
             "graph optimisations {optimisations}", key="optimisations", wide=True),
    ), "A tie is off by one where the simulation stands on a rounding boundary, or by as much as the error of a sigmoid and "
       "its like explains. Any other difference is wrong."),
    Section("Outputs: float file against the given model, runtime against simulation", "outputs", (
        Table(("where:place", "output", "largest difference:difference:#", "limit:limit:#", "right",
               "cosine:cosine:cosine", "same largest entry:agreement:%")),
    ), "The limit is four times what the outputs move when every op reads its inputs with the rounding errors of float32."),
    Section("Fused operators", "kernels", (
        Facts(("integer kernels in the runtime's optimised graph:found", "integer operators of the plan:expected",
               "all nodes of that graph:ops")),
    )),
    Section("Nodes in integers, by rules", "by_rules", (
        Facts(("nodes of the file that compute in integers:integer", "nodes of the file that compute:nodes",
               "integer operators of the plan:expected", "rules")),
    ), "The kernels of the target's own runtime were not counted: it was not here, or does not show them."),
)
COST = (
    Section("Latency", "latency", (
        Each(Bars(Axis({"float_ms": "float", "quantized_ms": "integer"}, "ms a batch"), number="{value:.2f} ms",
                  label="{runtime}, threads: {threads}",
                  hover="float {float_ms:.3f} ms, integer {quantized_ms:.3f} ms, {runs} runs"),
             "batch of {batch}", key="batch", wide=True),
        Table(("runtime", "batch:batch:#", "float:float_ms:ms", "middle half, ms:float_spread:range", "integer:quantized_ms:ms",
               "middle half, ms:quantized_spread:range", "float / integer, median of pairs:ratio:#", "pairs of runs:runs:#",
               "load:load:#")),
    ), "Medians on this machine, in every runtime that runs the file. Load: the processes that ran meanwhile, these included."),
    Section("Loading", "loads", (
        Table(("runtime", "load, float:float_seconds:s", "load, integer:quantized_seconds:s",
               "peak memory, float:float_bytes:MB", "peak memory, integer:quantized_bytes:MB",
               "without a model:baseline_bytes:MB")),
    ), "A fresh process loads each file and runs one image."),
    Section("Files", "size", (Bars(Axis("bytes", MB, 1e-6), label="{what}", number="{weighs}"),)),
    Section("Time of each stage", "seconds", (Bars(Axis("seconds", "s"), label="{stage}", number="{value:.1f} s"),)),
)
DETAILS = (
    Section("All sites", "sites", (
        Table(("site", "SQNR:sqnr_db:dB", "module", "loss of its module:module_share:share",
               "clipped:clipped_share:share", "bits:bits:#",
               "role", "kind", "grid", "method", "why", "scale:scale:#", "zero point:zero:#", "range of the grid:range:range",
               "observed:observed:range"),
              least="sqnr_db", search=True),
    ), "The sites with the least SQNR come first. The loss of a module is that of all its sites alone in integers, as a share "
       "of the losses of all modules."),
    Section("Nodes that stay as they are", "carried", (Table(("node", "operator", "opset:opset:#", "why")),),
            "They stand behind the quantized part, in float, as in the file that was given."),
    Section("Inputs", "inputs", (Table(("name:input", "shape", "type", "given")),), "In the order of the file."),
    Section("What the file takes", "input", (Facts(),), "The metadata of the ONNX file says the same."),
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
                 hover="{module}: {bits} bits, {weights} weights, loss by bits: {losses}"),
        )),
        Section("Size against estimated loss", "frontier+uniform", (
            Points(Axis("loss", "estimated loss (sum over modules)", log=True), Axis("bytes", f"weights, {MB}", 1e-6),
                   group="{table}", lines=("frontier",), label="{bits} bits", hover="{x:.3f} MB: {loss:.4g}", mark="taken"),
        ), "No choice lies below the frontier. The diamond is this run. Other points have one width for all modules."),
    ),
    "equalize": (
        Section("Error of each place", "rows", (
            Points(Axis({"before": "before", "after": "after"}, "error", log=True), along="op", x_title=OPS,
                   hover="{op} ({kind}): {before} before, {after} after"),
        ), "Ranges move from activations into weights; the float model computes the same as before."),
    ),
    "ranking": (
        Section("Order of attention scores with and without the ranking term", "rows", (
            Points(Axis("with", "key pairs that change order with it, %", 100.0),
                   Axis("without", "key pairs that change order without the ranking term, %", 100.0), group="{op}",
                   diagonal=True, hover="{op}, head {head}, {x:.2f} % without, {y:.2f} % with"),
        ), "A point below the diagonal is a head that the term helps."),
    ),
    "output search": (
        Section("Objective of each search", "rows", (
            Points(Axis({"before": "before", "after": "after"}, "objective"), along="input",
                   hover="{input}, {before:.4g} before, {after:.4g} after"),
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
                   hover="{block}, {before:.3g} before, {after:.3g} after"),
        ), "Squared error of the block's output over the variance of the float output, on images that are not trained on."),
    ),
}
# fmt: on
TITLES = {"gptq": "GPTQ"}  # names that are no words


def plain(values: Any) -> str:
    """The words and numbers of a mapping in one line; nested values are for tables."""
    if not isinstance(values, Mapping):
        return str(values or "")
    words = {key: value for key, value in values.items() if isinstance(value, (str, int, float)) and value != ""}
    return ", ".join(f"{str(key).replace('_', ' ')}: {number(value)}" for key, value in words.items())


def passes(log: Rows) -> list[Block | None]:
    """A section for each pass that logged something: what it is, summary, the figures declared for it, and its rows."""
    parts: list[Block | None] = []
    for entry in log:
        name, rows, summary = str(entry["name"]), entry.get("rows") or (), entry.get("summary") or {}
        inner = [section.shown({**summary, "rows": rows}) for section in LOG_VIEWS.get(name, ())]
        blocks = [{"kind": "section", **one} for one in inner if one] + [block for block in (Table()(rows),) if block]
        notes = [line for line in (plain(entry.get("about") or entry.get("settings")), plain(summary)) if line]
        if notes or blocks:
            parts.append({"title": TITLES.get(name) or name[:1].upper() + name[1:], "notes": notes, "blocks": blocks})
    return parts
