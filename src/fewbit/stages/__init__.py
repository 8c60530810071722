"""The stages of a run, in order: the inputs of each (its parameters), its results, and its files in the run's folder.

`Run` (fewbit/run.py) is the loop: it computes a value on first access, resumes from the files of a killed run, and
times each stage. A finished run is read by REOPENED, in which verify, evaluate, bench and report are the same functions.

Each stage has the file of its name, but report, which is report/draw.py and needs no torch; float is in twin.py, and files,
which makes sure of what verify relies on, in verify.py. The other files:

stage          what a stage is
sources        where the images of a request come from
preprocessing  of a model: what is said of it, and what is assumed
task           what the model's outputs mean
compare_onnx   an ONNX file as onnxruntime runs it, beside what was read in it
sizes          whether float.onnx is the model at other sizes of images
tail           what stays as it is behind the layers of an ONNX file
limit          whether --memory is likely to be enough
times          what a plan takes on this machine
kernels        what the runtime leaves in float of what the plan has in integers, and what is said of its kernels
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fewbit import folder
from fewbit.report.draw import draw
from fewbit.stages import (
    bench,
    capture,
    choose,
    curve,
    deploy,
    equalize,
    evaluate,
    images,
    load,
    observe,
    realize,
    seen,
    sensitivity,
    settle,
    summarize,
    twin,
    verify,
)  # fmt: skip
from fewbit.stages.stage import Stage
from fewbit.stages.tail import TAIL

CHOOSE = Stage(
    "choose", choose.choose, ("plan",), (folder.PLAN, folder.NUMBERS), choose.chosen,
    scratch=(choose.JOURNAL, choose.UNITS),
)  # fmt: skip
FLOAT = Stage("float", twin.float_model, ("twin", "sample"), (folder.TWIN, folder.SAMPLE), twin.reopened)
TWIN = Stage("twin", twin.trusted, ("trusted",))
REALIZE = Stage("realize", realize.realize, ("model",), (folder.MODEL,), realize.realized)
VERIFY = Stage("verify", verify.verify, ("checks",))
EVALUATE = Stage("evaluate", evaluate.evaluate, ("score",))
BENCH = Stage("bench", bench.bench, ("timings", "loads"))
REPORT = Stage("report", draw, ("page",), (folder.PAGE,))


def thorough(values: Mapping[str, Any]) -> bool:
    """Whether more is asked for than the files, their proof and their score."""
    return not values["asked"].quick


STAGES = (
    Stage("load", load.load, ("inputs",)),
    Stage(
        "capture", capture.capture, ("inputs", "exact", "given", "quantized"), (folder.EXPORTED, capture.OTHERS, TAIL),
        reuses=True,
    ),
    Stage("images", images.images, ("calibration", "judged", "scored"), (images.MADE,), reuses=True),  # of synthetic images
    FLOAT,
    TWIN,
    Stage("observe", observe.observe, ("observed", "verdict"), (observe.CALIBRATION, observe.STATS), observe.observed),
    Stage("settle", settle.settle, ("request", "attempts"), scratch=(settle.FILE,), when=lambda values: values["asked"].drops),
    Stage(
        "equalize", equalize.equalize, ("graph", "stats", "equalized"),
        (equalize.EQUALIZED, equalize.EQUALIZED_STATS, equalize.EQUALIZATION), equalize.equalized,
        scratch=(equalize.EQUALIZED_STATS, equalize.EQUALIZATION), when=lambda values: values["request"].method.equalize,
    ),
    CHOOSE,
    REALIZE,
    VERIFY,
    EVALUATE,
    Stage("seen", seen.seen, ("known",), when=thorough, instead=(None,)),
    Stage("curve", curve.curve, ("curve",), (curve.FILE,), when=lambda values: values["request"].curve),
    replace(BENCH, when=thorough, instead=((), ())),
    Stage("sensitivity", sensitivity.short, ("sensitive",), when=thorough, instead=((),)),
    Stage(  # which stamps the model
        "summarize", summarize.summarize, ("summary", "noted"), (folder.RECORD, folder.REPORT, folder.TABLES, folder.MODEL)
    ),
    Stage("deploy", deploy.deploy, ("shipped",), ("deploy/",)),
    REPORT,
)  # fmt: skip
PREPARE = tuple(stage for stage in STAGES[:8] if stage not in (FLOAT, TWIN))  # the first stages of a search
SENSITIVITY = (
    *PREPARE, CHOOSE, Stage("sensitivity", sensitivity.measured, ("summary",), (sensitivity.FILE, sensitivity.PAGE)),
)  # fmt: skip

REOPENED = (
    Stage("capture", capture.reopened, ("exact", "given")),
    Stage("equalize", equalize.reopened, ("graph",)),
    CHOOSE,
    REALIZE,
    FLOAT,
    replace(TWIN, run=twin.twin_of),
    Stage("files", verify.files, ("deviations",)),
    VERIFY,
    EVALUATE,
    BENCH,
    REPORT,
)

__all__ = ["PREPARE", "REOPENED", "SENSITIVITY", "STAGES", "Stage"]
