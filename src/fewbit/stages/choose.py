"""Choose: the plan of a recipe, after the widths of mixed precision and the images to train on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.choose import LabelledImages, allocate
from fewbit.choose import choose as plan_of
from fewbit.choose.context import set_aside
from fewbit.choose.recipe import Synthesizes
from fewbit.core.bits import Mixed
from fewbit.core.device import on
from fewbit.core.graph import Graph
from fewbit.core.plan import Fallback, PassLog, Plan
from fewbit.core.shelf import Shelf
from fewbit.data.images import Images
from fewbit.data.synthesize.source import Synthesis
from fewbit.data.synthesize.teacher import Teacher
from fewbit.files import Journal
from fewbit.observe import Stats
from fewbit.progress import Progress
from fewbit.realize import load_plan, save_plan
from fewbit.request import Planned
from fewbit.stages.load import Inputs
from fewbit.stages.observe import Rows
from fewbit.stages.times import context_of, elsewhere, without_slower
from fewbit.workers import Workers

JOURNAL = "joint.jsonl"  # losses of a joint search or errors of a reconstruction, to resume it
UNITS = "units"  # results of a reconstruction by block, to resume it
POOL = "pool.safetensors"
ASIDE = 32  # of them at a time


def choose(
    graph: Graph, stats: Stats, equalized: Rows, calibration: Images, inputs: Inputs, request: Planned, folder: Path,
    progress: Progress, workers: Workers,
) -> Plan:  # fmt: skip
    """The plan of a recipe on a target, with all fallbacks; also saved in the run's folder."""
    recipe, bits = request.method, request.widths
    learned_on, judged_by = parted(calibration) if recipe.judged else (calibration, None)
    spent = progress.spent if request.time else 0.0  # a limit of a recipe's own is that of its pass
    context = context_of(
        graph, stats, request,
        images=learned_on.batches(graph.at_a_time(8)), labels=learned_on.labels, real_images=not request.synthetic[0],
        aside=() if judged_by is None else judged_by.batches(graph.at_a_time(ASIDE)),
        synthetic=_pool(inputs, calibration, request, folder, progress),
        journal=Journal(folder / JOURNAL, spent=spent), folder=folder / UNITS,
        progress=lambda text: progress.advance(1, text), workers=workers,
    )  # fmt: skip
    log: list[PassLog] = []
    if request.only_what_pays:
        context, slower = without_slower(context, request.threads, folder, progress)
        log.append(slower)
    if recipe.equalize is not None and equalized:
        log.append(PassLog.of("equalize", recipe.equalize, tuple(dict(row) for row in equalized)))
    fallbacks: tuple[Fallback, ...] = ()
    context = replace(context, graph=on(graph, request.place))
    if isinstance(bits, Mixed):
        progress.begin("allocate", None)
        widths = allocate(context, bits, recipe)
        context, fallbacks = replace(context, bits=widths.bits), widths.fallbacks
        log.append(widths.log)
    progress.expect(len(graph.sites) * len(recipe.passes))
    plan = plan_of(context, recipe)
    fallbacks = (*fallbacks, *elsewhere(graph, plan, request.hardware), *plan.fallbacks)
    plan = replace(plan, fallbacks=fallbacks, log=(*log, *plan.log), model=request.ref, settings=repr(recipe))
    save_plan(graph, plan, folder)
    return plan


def parted(images: Images) -> tuple[Images, Images | None]:
    """The images to learn from, and the last eighth, which judges; None where there are too few."""
    most = len(images) - set_aside(len(images))
    return images.subset(range(most)), images.subset(range(most, len(images))) if most < len(images) else None


def chosen(graph: Graph, folder: Path) -> Plan:
    """The same, loaded from the files."""
    return load_plan(graph, folder)


def _pool(inputs: Inputs, images: Images, request: Planned, folder: Path, progress: Progress) -> LabelledImages | None:
    """Synthetic images beside the real ones, for a pass that trains on both."""
    training = next((one for one in request.method.passes if isinstance(one, Synthesizes)), None)
    if training is None or request.synthetic[0]:
        return None
    assert inputs.task.classes is not None
    pool = Synthesis(training.images, training.pool, inputs.task.classes, images.preprocess, request.seed, images)
    progress.begin("synthesize", pool.total)
    teacher = Teacher(inputs.loaded.program, inputs.loaded.inputs, request.place)
    synthetic = pool(teacher, folder / POOL, lambda text: progress.advance(1, text))
    return LabelledImages(Shelf.of(synthetic.batches(64), folder), synthetic.labels)
