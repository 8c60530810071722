"""The whole way: capture, observe, equalize, choose, realize, verify, report. Each stage can start from the files of the one
before, which lie in the run's folder (run.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from fewbit import nodata
from fewbit.capture import Loaded, capture, load_model
from fewbit.capture.export import DEMOS, fingerprint
from fewbit.capture.sites import tensor_of
from fewbit.choose import Bits, LabelledImages, Mixed, allocate, choose, finetune, lapq, parse_bits, reconstruct
from fewbit.choose.powell import parse_time
from fewbit.choose.ranges import Samples, fidelity
from fewbit.core.values import Checks, Fallback, Graph, Plan
from fewbit.data.images import Images, Preprocess, open_images, read_classes, refuse_same
from fewbit.data.synthesize.source import Synthesis, asked_for
from fewbit.data.synthesize.teacher import Teacher
from fewbit.demo import model as demo
from fewbit.equalize import Equalize, Equalized, replaced
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.samples import ROWS, OpSample, PairSample, channel_samples, op_samples
from fewbit.execute.simulate import simulate
from fewbit.files import Journal, read_json, write_atomic, write_json
from fewbit.observe import Stats, observe
from fewbit.observe.outliers import outliers
from fewbit.progress import Progress
from fewbit.realize import float_onnx, load_plan, realize, save_plan
from fewbit.recipes import DEFAULT, RECIPES, Recipe, recipe_named
from fewbit.report import page, tables
from fewbit.run import CHECKED, EQUALIZED, FILES, STANDS_IN, THIS_MACHINE, Request, check_codes, free_folder, resume, run_record
from fewbit.target import Target, detect, load_target, widest
from fewbit.target.allowed import allowed
from fewbit.target.spec import processor_flags
from fewbit.verify import Latency, Load, Score, bench, evaluate, loads, runtimes_for, timed
from fewbit.verify.attention import attention_tables

EQUALIZATION = "equalization.json"  # what was moved, while the run works
OUTLIER_IMAGES = 32  # calibration images in which channels and tokens are looked at
JOURNAL = "joint.jsonl"  # losses of a joint search or errors of a reconstruction, while it runs
UNITS = "units"  # what a reconstruction has found of each unit, while it runs


@dataclass(frozen=True)
class Result:
    """What quantize returns. `folder` holds every file; `module` is the simulation."""

    folder: Path
    graph: Graph
    plan: Plan
    checks: Checks
    score: Score
    latency: tuple[Latency, ...]
    report: Mapping[str, Any]
    _keep: object = None

    @property
    def module(self) -> nn.Module:
        """The simulation: (b, c, h, w) images to what the integer model answers."""
        return simulate(self.graph, self.plan)

    def export(self, folder: str | Path, *, force: bool = False) -> Path:
        """Copy the run's files to a folder that does not exist yet. Raises BadFile where it does."""
        target = Path(folder)
        free_folder(target, force=force)
        shutil.copytree(self.folder, target)
        return target


def quantize(
    model: str | nn.Module | ExportedProgram,
    images: Any = None,
    *,
    score: Any = None,
    target: str | None = None,
    recipe: str = DEFAULT,
    bits: str | int | None = None,
    out: str | Path | None = None,
    calibration: int = 128,
    scored: int | None = None,
    seed: int = 0,
    keep_float: Sequence[str] = (),
    everything: bool = False,
    skip_bad: bool = False,
    labels: bool = True,
    time: str | None = None,
    loss: str | None = None,
    steps: int | None = None,
    curve: bool = False,
    classes: str | Path | Sequence[str] | None = None,
    weights: Path | None = None,
    preprocess: Mapping[str, Any] | None = None,
    threads: int = 2,
    seconds: float = 4.0,
    force: bool = False,
    command: str = "fewbit.quantize(...)",
    progress: Progress | None = None,
) -> Result:
    """Quantize a model with a few images, realize it, and prove it in the runtime.

    `images` calibrate; `score` are other images to score on. Without `score` a quarter of the images (at most 1,000) is
    held out for it. `images` may be `synthetic` (made from the model) or `synthetic:DIR` (made beside a few real ones);
    `calibration` says how many and `steps` how long. `preprocess` overrides fields of the model's own record (input_size,
    mean, std, interpolation, resize, crop_pct). Without `bits` it is 8, or the most that the target has. `time` (`90s`,
    `10min`, `1h`) and `loss` (`kl` or `labels`) are for recipes with a joint search, the first for reconstruction too. `curve`
    scores 1, 2, 4, ... 256 of the calibration images as well. Raises FewbitError for whatever the caller can mend.
    """
    progress = progress or Progress()
    hardware = load_target(target or detect())
    bits = default_bits(hardware) if bits is None else bits
    synthetic, _ = asked_for(images)
    method = nodata.with_steps(recipe_named(recipe), recipe, steps, synthetic=synthetic)
    method, asked = with_joint(method, recipe, time, loss, synthetic=synthetic), parse_bits(bits)
    if curve:
        nodata.refuse_curve(method, recipe)
    check_bits(hardware, asked)
    ref = model if isinstance(model, str) else type(model).__name__
    request = Request(
        ref,
        hardware.name,
        recipe,
        str(bits),
        calibration,
        scored,
        seed,
        tuple(keep_float),
        everything,
        skip_bad,
        labels,
        time,
        loss,
        steps,
        curve,
    )
    images, score = given_images(ref, images, score)
    if synthetic and ref in DEMOS:
        score = score or demo.TEST
    keep: object = None
    if out is None:
        keep = tempfile.TemporaryDirectory(prefix="fewbit-")
        final = Path(keep.name) / "run"
    else:
        final = Path(out)
    free_folder(final, force=force, check_only=True)

    overrides = dict(preprocess or {})
    load_overrides = {k: v for k, v in overrides.items() if k == "input_size"}
    with progress.stage("load"):
        loaded = load_model(model, weights=weights, overrides=load_overrides)
        recorded = preprocess_of(loaded, overrides)
        names = read_classes(classes) if isinstance(classes, str | Path) else (classes or loaded.classes or None)
        outputs = class_count(loaded)
        known = names if names else outputs
        _check_class_names(names, outputs)
        making: Synthesis | None = None
        chosen: Images | None = None
        if synthetic:
            teacher = Teacher(loaded.program)
            making, held_out = nodata.synthesis(teacher, images, score, recorded, outputs, known, request)
        else:
            if method.tune is not None:
                nodata.refuse_training(loaded, outputs)
            chosen, held_out = open_both(images, score, recorded, known, request)
    part = final.with_name(final.name + ".part")
    identity = {
        "request": json.loads(json.dumps(request.__dict__)),
        "model": fingerprint(loaded.program),
        "calibration": nodata.identity_of(making, chosen, loaded),
        "scored": held_out.fingerprint(),
        "preprocess": recorded.to_json(),
        "target": hardware.fingerprint(),
    }
    if loss == "labels" and chosen is not None and chosen.labels is not None:
        identity["labels"] = hashlib.sha256(chosen.labels.numpy().tobytes()).hexdigest()
    resume(part, identity)

    if making is not None:
        chosen = nodata.made(making, teacher, part / nodata.MADE, progress)
    assert chosen is not None
    with progress.stage("capture"):
        graph = exact = capture(loaded)
        if not (part / "exported.pt2").exists():
            write_atomic(part / "exported.pt2", lambda file: torch.export.save(loaded.program, file))
    with progress.stage("observe", len(chosen)):
        stats, verdict = _observe(graph, loaded, chosen, part, progress)
        standing = outliers(exact, chosen.subset(range(min(OUTLIER_IMAGES, len(chosen)))).batches(8))
    if method.equalize is not None:
        graph, stats, found = _equalize(graph, hardware, method.equalize, asked, request, chosen, part, progress)
    plan = load_plan(graph, part) if (part / "plan.json").exists() else None
    if plan is None:
        lots = None
        if method.tune is not None:
            lots = nodata.lots(method, loaded, chosen, outputs, synthetic, request, part, progress)
        plan = _choose(graph, stats, hardware, method, asked, request, chosen, part, progress, lots)
        if method.equalize is not None:
            plan = replace(plan, extra={**plan.extra, "equalize": [dict(row) for row in found]})
        save_plan(graph, plan, part)
    (part / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(part / UNITS, ignore_errors=True)
    with progress.stage("realize", 2):
        for name, write in (
            ("model.onnx", lambda p: realize(graph, plan, p, **hardware.form)),
            ("float.onnx", lambda p: float_onnx(exact, p, opset=hardware.opset)),
        ):
            if not (part / name).exists():
                write(part / name)
            progress.advance()
    with progress.stage("verify", 3):
        sample = next(held_out.batches(CHECKED))
        write_atomic(part / "images.safetensors", lambda file: save_file({"images": sample.contiguous()}, file))
        checks = check_codes(graph, plan, part, sample, hardware.runtime == "onnxruntime", progress)
    with progress.stage("evaluate", len(held_out)):
        result = evaluate(
            part / "float.onnx", part / "model.onnx", held_out,
            runtime=hardware.runs_in, threads=threads, progress=progress.advance,
        )  # fmt: skip
    rows_by_count: list[dict[str, Any]] = []
    if curve:

        def scored_after(seen: Stats, some: Images, file: Path) -> dict[str, Any]:
            mine = exact
            with tempfile.TemporaryDirectory() as own:
                if method.equalize is not None:
                    mine, seen, _ = _equalize(mine, hardware, method.equalize, asked, request, some, Path(own), Progress())
                plan = _choose(mine, seen, hardware, method, asked, request, some, Path(own), Progress())
            realize(mine, plan, file, **hardware.form)
            return evaluate(part / "float.onnx", file, held_out, runtime=hardware.runs_in, threads=threads).to_json()

        rows_by_count = nodata.curve(chosen, part, seed, progress, exact, scored_after)
    here, ways = runtimes_for(part / "model.onnx"), timed(part / "model.onnx")
    with progress.stage("bench", 2 * len(ways) + len(here)):
        timings = bench(
            part / "float.onnx", part / "model.onnx", graph.input_shape,
            runtimes=ways, threads=threads, seconds=seconds, progress=lambda text: progress.advance(1, text),
        )  # fmt: skip
        weighed = loads(
            part / "float.onnx", part / "model.onnx", graph.input_shape,
            runtimes=here, threads=threads, runs=1, progress=lambda text: progress.advance(1, text),
        )  # fmt: skip
    if hardware.runtime == "onnxruntime":
        plan = _note_kernels(plan, checks)
    plan = _note_bf16(plan, hardware.runtime, timings)
    with progress.stage("report"):
        rows = _tables(graph, plan, stats, checks, timings, weighed, held_out, result, sample, part)
        record = run_record(command, request, identity, recorded, names, outputs, hardware.runs_in, threads)
        rows["run"] = record
        rows["curve"] = rows_by_count
        rows["outliers"] = tables.outliers(graph, plan, standing, {row["site"]: row["seen"] for row in rows["sites"]})
        rows["synthetic"] = nodata.thumbnails(chosen) if synthetic else []
        summary = summarize(graph, plan, checks, result, timings, len(chosen), part, progress.seconds)
        summary["calibration"] = {"source": chosen.source, **verdict}
        rows["seconds"] = summary["seconds"]
        write_json(part / "run.json", record)
        write_json(part / "report.json", summary)
        write_json(part / "tables.json", rows)
        page.write(part / "report.html", summary, rows)
    (part / "request.json").unlink()
    (part / EQUALIZATION).unlink(missing_ok=True)
    (part / "equalized-stats.safetensors").unlink(missing_ok=True)
    free_folder(final, force=force)
    os.replace(part, final)
    return Result(final, graph, plan, checks, result, tuple(timings), summary, keep)


def given_images(model: str, images: Any, score: Any) -> tuple[Any, Any]:
    """What calibrates and what scores; a demo has images of its own. Raises BadImages for another model without any."""
    if images is not None:
        return images, score
    if model not in DEMOS:
        raise BadImages("no images; a few dozen of the kind that the model will see are needed: --images DIR.")
    return demo.CALIBRATION, score or demo.TEST


def open_both(images: Any, score: Any, preprocess: Preprocess, classes: Any, request: Request) -> tuple[Images, Images]:
    """Calibration images and scored images, never the same: without `score` a part of the images is held out."""
    options: dict[str, Any] = {"classes": classes, "skip_bad": request.skip_bad, "seed": request.seed}
    if score is not None:
        known = request.loss == "labels" and request.labels
        given = {**options, "classes": classes if known else None}
        chosen = open_images(images, preprocess, limit=request.calibration, **given, labels=known)
        held_out = open_images(score, preprocess, limit=request.scored, labels=request.labels, **options)
        refuse_same(chosen, held_out)
        return chosen, held_out
    found = open_images(images, preprocess, labels=request.labels, **options)
    if len(found) < 2:
        raise BadImages(f"{found.source} holds {len(found)} image; at least 2 are needed, one to calibrate and one to score.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(request.seed)).tolist()
    held = min(max(len(found) // 4, 1), 1000, request.scored or len(found))
    return found.subset(sorted(order[held : held + request.calibration])), found.subset(sorted(order[:held]))


def with_joint(recipe: Recipe, name: str, time: str | None, loss: str | None, *, synthetic: bool = False) -> Recipe:
    """A recipe whose joint search has another budget or loss, or whose reconstruction another budget. Raises FewbitError where
    it has no such search.

    A recipe that trains has a loss as well; with `synthetic` images it says which classes the real ones beside them have.
    """
    if time is None and loss is None:
        return recipe
    if time is None and recipe.joint is None and loss in ("kl", "labels") and (recipe.tune is not None or synthetic):
        return recipe if recipe.tune is None else replace(recipe, tune=replace(recipe.tune, loss=loss))
    if recipe.rebuild is not None and time is not None and loss is None:
        return replace(recipe, rebuild=recipe.rebuild.in_seconds(parse_time(time)))
    if recipe.joint is None:
        found = ", ".join(n for n, r in RECIPES.items() if r.joint is not None)
        timed = ", ".join(n for n, r in RECIPES.items() if r.rebuild is not None)
        raise FewbitError(
            f"--time and --loss are for a search on the model's loss; recipe {name} has none, these have: {found}. "
            f"--time is for reconstruction too: {timed}."
        )
    search = recipe.joint if time is None else replace(recipe.joint, seconds=parse_time(time))
    if loss is not None and loss not in ("kl", "labels"):
        raise FewbitError(
            f"--loss {loss} is not understood; allowed are kl (against the float model's answers) and labels (cross-entropy)."
        )
    return replace(recipe, joint=search if loss is None else replace(search, loss=loss))  # type: ignore[arg-type]


def summarize(
    graph: Graph, plan: Plan, checks: Checks, score: Score, timings: Sequence[Latency], calibration: int, folder: Path,
    seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """report.json."""
    sizes = {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}
    return {
        "schema": 1,
        "model": str(plan.extra["model"]),
        "target": plan.target,
        "recipe": plan.recipe,
        "bits": plan.bits,
        "exemptions": list(plan.exemptions),
        "images": {"calibration": calibration, "scored": score.images},
        "accuracy": score.to_json(),
        "size": tables.size(graph, plan, sizes),
        "latency": tables.latency(timings),
        "verify": tables.verify(checks),
        "integer_share": tables.integer_share(graph, plan),
        "fallbacks": tables.fallbacks(plan),
        "seconds": dict(seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def preprocess_of(loaded: Loaded, overrides: Mapping[str, Any]) -> Preprocess:
    record = dict(loaded.record)
    base = Preprocess.from_timm(record)
    extra: dict[str, Any] = {k: record[k] for k in ("resize", "antialias") if k in record}
    given = {("size" if k == "input_size" else k): v for k, v in overrides.items()}
    fields: dict[str, Any] = {**extra, **given}
    return base.replace(**fields)


def class_count(loaded: Loaded) -> int | None:
    node = next(n for n in loaded.program.graph.nodes if n.op == "output")
    value = node.args[0][0].meta["val"]
    return int(value.shape[1]) if value.ndim == 2 else None


def _check_class_names(names: Sequence[str] | None, outputs: int | None) -> None:
    if names and outputs and len(names) != outputs:
        raise BadImages(
            f"{len(names)} class names for a model with {outputs} outputs; give one name per output: --classes FILE."
        )


def _counted(images: Images, progress: Progress, size: int = 8) -> Iterator[Tensor]:
    """The images in batches (size, c, h, w), each counted once it has been worked on."""
    for batch in images.batches(size):
        yield batch
        progress.advance(len(batch))


def _observe(graph: Graph, loaded: Loaded, images: Images, part: Path, progress: Progress) -> tuple[Stats, Mapping[str, Any]]:
    """What was seen, and whether the images are enough, judged by what two halves of them say."""
    path = part / "stats.safetensors"
    if path.exists():
        return Stats.from_tensors(load_file(path)), read_json(part / nodata.CALIBRATION)
    found = [observe(graph, _counted(half, progress)) for half in nodata.halves(images)]
    verdict = nodata.judged(loaded, images, found, part)
    stats = found[0] if len(found) == 1 else found[0].merge(found[1])
    write_atomic(path, lambda file: save_file(stats.tensors(), file))
    return stats, verdict


def _equalize(
    graph: Graph, target: Target, method: Equalize, bits: Bits | Mixed, request: Request, images: Images, part: Path,
    progress: Progress,
) -> tuple[Graph, Stats, Sequence[Mapping[str, Any]]]:  # fmt: skip
    """The equalized graph, its statistics, and what was done; all of it is in the run's folder, the record last."""
    done, seen = part / EQUALIZATION, part / "equalized-stats.safetensors"
    if done.exists():
        changed = replaced(graph, load_file(part / EQUALIZED))
        return changed, Stats.from_tensors(load_file(seen)), read_json(done)["places"]
    widths = bits.of(graph) if isinstance(bits, Bits) else Bits(round(bits.mean), round(bits.mean))
    with progress.stage("equalize", 2 * len(images)):
        found: Equalized = method(
            graph,
            _counted(images, progress),
            allowed(
                graph, target, weight_bits=widths.weights, activation_bits=widths.activations, widths=widths.ops,
                keep_float=request.keep_float, everything=request.everything,
            ).grids,
        )  # fmt: skip
        write_atomic(part / EQUALIZED, lambda file: save_file(dict(found.constants), file))
        stats = observe(found.graph, _counted(images, progress))
        write_atomic(seen, lambda file: save_file(stats.tensors(), file))
        write_json(done, {"places": [dict(row) for row in found.record]})
        return found.graph, stats, found.record


def default_bits(target: Target) -> int:
    """8, or the widest that the target has."""
    return min(8, _most(target))


def check_bits(target: Target, bits: Bits | Mixed) -> None:
    """Raise FewbitError where a uniform width is more than the target holds."""
    most = _most(target)
    if isinstance(bits, Bits) and bits.most > most:
        raise FewbitError(
            f"--bits {bits}: {target.name} has no integers wider than {most} bits; allowed are 2 to {most}, or a target that "
            "has wider ones: fewbit targets."
        )


def _most(target: Target) -> int:
    return max((widest(target, rule.kind) for rule in target.op), default=8)


def _choose(
    graph: Graph, stats: Stats, target: Target, recipe: Recipe, bits: Bits | Mixed, request: Request, images: Images,
    part: Path, progress: Progress, lots: tuple[LabelledImages | None, LabelledImages | None] | None = None,
) -> Plan:  # fmt: skip
    """The plan, with what its stages before choose have found: samples of what ops read, and the widths of mixed precision."""
    options: dict[str, Any] = {"keep_float": request.keep_float, "everything": request.everything}
    samples: Mapping[str, OpSample | PairSample] | None = None
    if recipe.needs_samples:  # what linear layers and convolutions read, a part of it, on all calibration images
        with progress.stage("replay", len(images)):
            names, rows = [op.name for op in graph.ops], max(1, ROWS // len(images))
            samples = op_samples(graph, _counted(images, progress), names, rows, request.seed)
    if axes := allowed(graph, target, **options).channel_axes:
        with progress.stage("channels", len(images)):
            options["channels"] = channel_samples(
                graph, _counted(images, progress), axes, max(1, ROWS // len(images)), request.seed
            )
    mixed: dict[str, Any] = {}
    refused: tuple[Fallback, ...] = ()
    if isinstance(bits, Mixed):
        with progress.stage("allocate"):
            batch = next(images.batches(recipe.sensitivity.images))
            found = allocate(
                graph, stats, target, recipe, bits, batch, progress=lambda unit: progress.advance(1, unit), **options
            )
        bits, refused, mixed["mixed"] = found.bits, found.fallbacks, found.record
    options |= {"name": request.recipe, "bits": bits, "samples": samples, "images": images.batches(8)}
    if recipe.joint is not None:
        with progress.stage("joint"):
            plan = lapq(
                graph, stats, target, recipe, labels=images.labels, journal=Journal(part / JOURNAL),
                progress=lambda text: progress.advance(1, text), **options,
            )  # fmt: skip
    elif recipe.rebuild is not None:
        with progress.stage("reconstruct"):
            plan = reconstruct(
                graph, stats, target, recipe, seed=request.seed, journal=Journal(part / JOURNAL), folder=part / UNITS,
                progress=lambda unit: progress.advance(1, unit), **options,
            )  # fmt: skip
    elif recipe.tune is not None:
        assert lots is not None
        with progress.stage("tune", -(-recipe.tune.steps // 10)):
            plan = finetune(
                graph, stats, target, recipe, *lots, seed=request.seed, progress=lambda text: progress.advance(1, text),
                **options,
            )  # fmt: skip
    else:
        with progress.stage("choose", len(graph.sites)):
            plan = choose(graph, stats, target, recipe, progress=lambda site: progress.advance(1, site), **options)
    if target.runtime != target.runs_in:
        why = f"{target.runtime} is not here: codes and accuracy are the file's as written, times are not the target's"
        refused = (*refused, Fallback(STANDS_IN, target.runtime, target.runs_in, why))
    elif not target.fits(platform.machine(), processor_flags()):
        why = "kernels of another processor compute here: sums of 8-bit products may saturate, times are not the target's"
        refused = (*refused, Fallback(THIS_MACHINE, target.processor, "another processor", why))
    notes = tuple(Fallback(note.split(":")[0], "integers", "float", note.split(": ")[1]) for note in graph.notes)
    extra = {"model": request.model, "recipe": repr(recipe), **plan.extra, **mixed}
    return replace(plan, fallbacks=(*refused, *plan.fallbacks, *notes), extra=extra)


def _note_kernels(plan: Plan, checks: Checks) -> Plan:
    """A fallback where onnxruntime fused fewer integer kernels than the plan has integer ops."""
    expected, found = int(checks.kernels["expected"]), int(checks.kernels["found"])
    if found >= expected:
        return plan
    lost = Fallback("the optimised graph", f"{expected} integer kernels", f"{found}", "onnxruntime did not fuse the others")
    return replace(plan, fallbacks=(*plan.fallbacks, lost))


def _note_bf16(plan: Plan, runtime: str, timings: Sequence[Latency]) -> Plan:
    """A fallback where the runtime's own bf16 float model is faster than the integer model, f32 and bf16 beside it."""
    found = plan.fallbacks
    for bf16 in (row for row in timings if row.runtime == f"{runtime}-bf16"):
        own = [row.quantized_ms for row in timings if row.runtime in (runtime, bf16.runtime) and row.batch == bf16.batch]
        if bf16.float_ms < min(own):
            asked, given = "faster than bf16", f"{min(own):.2f} ms, bf16 {bf16.float_ms:.2f} ms, batch {bf16.batch}"
            found = (*found, Fallback("the whole model", asked, given, f"{runtime} runs the float model in bf16 faster here"))
    return replace(plan, fallbacks=found)


def _tables(
    graph: Graph, plan: Plan, stats: Stats, checks: Checks, timings: Sequence[Latency], weighed: Sequence[Load],
    images: Images, score: Score, sample: Tensor, part: Path,
) -> dict[str, Any]:  # fmt: skip
    found, seen, drawn = {}, {}, {}
    axes = {c.site: c.grid.axis for c in plan.choices.values() if c.codes is None and c.grid.axis is not None}
    by_channel = channel_samples(graph, [sample], axes, ROWS // len(sample))
    for site in graph.sites:
        choice = plan.choices.get(site.name)
        if choice is None or choice.role == "bias":
            continue
        if choice.role == "weight":
            samples = Samples.of_weight(tensor_of(graph, site), choice.grid)
        else:
            samples = Samples.of_histogram(stats.sites[site.name])
            drawn[site.name] = stats.sites[site.name].to_json()
        if site.name in by_channel:
            there = by_channel[site.name]
            samples = Samples.of_channels(there.values, there.low, there.high)
        found[site.name] = fidelity(samples, choice.qparams, choice.grid)
        seen[site.name] = (samples.low.min().item(), samples.high.max().item())
    rows = tables.sites(graph, plan, found, seen)
    maps, flips = attention_tables(graph, plan, sample[:4])
    return {
        "sites": rows,
        "histograms": tables.histograms(rows, drawn),
        "attention": maps,
        "flips": flips,
        "latency": [row.to_json() for row in timings],
        "loads": [row.to_json() for row in weighed],
        "size": tables.files(part),
        "checks": tables.checks(checks),
        "outputs": [{"runtime": runtime, **row} for runtime, row in checks.outputs.items()],
        "kernels": checks.kernels,
        "images": _pictures(images, score),
        **tables.searched(plan),
    }


def _pictures(images: Images, score: Score, count: int = 12) -> list[dict[str, Any]]:
    """A few scored images, those with another answer than the float model's first."""
    changed = (score.float_answers != score.answers).nonzero().flatten().tolist()
    rest = (score.float_answers == score.answers).nonzero().flatten().tolist()
    rows = []
    for i in (changed[: count - 4] + rest)[:count]:
        rows.append(
            {
                "name": images.names[i],
                "thumbnail": images.data_uri(i, 96),
                "label": None if images.labels is None else int(images.labels[i]),
                "float": int(score.float_answers[i]),
                "quantized": int(score.answers[i]),
            }
        )
    return rows
