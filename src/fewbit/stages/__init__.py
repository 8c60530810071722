"""The stages of a run, in order: the inputs of each (its parameters), its results, and its files in the run's folder.

`Run` (fewbit/run.py) is the loop: it computes a value on first access, resumes from the files of a killed run, and
times each stage. A finished run is read by REOPENED, in which verify, evaluate, bench and report are the same functions.
"""

from collections.abc import Mapping
from typing import Any

from fewbit.report.draw import draw
from fewbit.stages import choose, curve, deploy, goal, load, observe, prove, report, sensitivity
from fewbit.stages.stage import Stage
from fewbit.stages.tail import TAIL

CHOOSE = Stage(
    "choose", choose.choose, ("plan",), ("plan.json", "plan.safetensors"), choose.chosen,
    scratch=(choose.JOURNAL, choose.UNITS),
)  # fmt: skip
REALIZE = Stage("realize", prove.realize, ("model", "twin", "sample"), (prove.MODEL, prove.TWIN, prove.SAMPLE), prove.realized)
TWIN = Stage("twin", prove.twin_of, ("trusted",))
VERIFY = Stage("verify", prove.verify, ("checks",))
EVALUATE = Stage("evaluate", prove.evaluate, ("score",))
BENCH = Stage("bench", prove.bench, ("timings", "loads"))
REPORT = Stage("report", draw, ("page",), ("report.html",))


def thorough(values: Mapping[str, Any]) -> bool:
    """Whether more is asked for than the files, their proof and their score."""
    return not values["asked"].quick


STAGES = (
    Stage("load", load.load, ("inputs",)),
    Stage("capture", load.capture, ("inputs", "exact", "given", "quantized"), (load.EXPORTED, load.OTHERS, TAIL)),
    Stage("images", load.images, ("calibration", "judged", "scored"), (load.MADE,)),  # written only for synthetic images
    Stage("observe", observe.observe, ("observed", "verdict"), (observe.CALIBRATION, observe.STATS), observe.observed),
    Stage("settle", goal.settle, ("request", "attempts"), scratch=(goal.FILE,), when=lambda values: values["asked"].drops),
    Stage(
        "equalize", observe.equalize, ("graph", "stats", "equalized"),
        (observe.EQUALIZED, observe.EQUALIZED_STATS, observe.EQUALIZATION), observe.equalized,
        scratch=(observe.EQUALIZED_STATS, observe.EQUALIZATION), when=lambda values: values["request"].method.equalize,
    ),
    CHOOSE,
    REALIZE,
    TWIN,
    VERIFY,
    EVALUATE,
    Stage("curve", curve.curve, ("curve",), (curve.FILE,), when=lambda values: values["request"].curve),
    Stage("bench", prove.bench, ("timings", "loads"), when=thorough, instead=((), ())),
    Stage("sensitivity", sensitivity.short, ("sensitive",), when=thorough, instead=((),)),
    Stage("summarize", report.summarize, ("summary", "noted"), ("run.json", "report.json", "tables.json")),
    Stage("deploy", deploy.deploy, ("shipped",), ("deploy/",)),
    REPORT,
)  # fmt: skip
PREPARE = STAGES[:6]  # the first stages of a search
SENSITIVITY = (
    *PREPARE, CHOOSE, Stage("sensitivity", sensitivity.measured, ("summary",), (sensitivity.FILE, sensitivity.PAGE)),
)  # fmt: skip

REOPENED = (
    Stage("capture", load.reopened, ("exact", "given")),
    Stage("equalize", observe.reopened, ("graph",)),
    CHOOSE,
    REALIZE,
    TWIN,
    Stage("files", prove.files, ("deviations",)),
    VERIFY,
    EVALUATE,
    BENCH,
    REPORT,
)

__all__ = ["PREPARE", "REOPENED", "SENSITIVITY", "STAGES", "Stage"]
