"""The command line. Exit codes: 0 done, 1 verification or an accuracy floor failed, 2 the request was wrong."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from fewbit import pipeline
from fewbit.capture.export import FORMS
from fewbit.errors import FewbitError, FewbitFailed, UnknownName
from fewbit.files import read_json, write_atomic, write_json
from fewbit.progress import Progress
from fewbit.recipes import DEFAULT, RECIPES
from fewbit.report import page, tables
from fewbit.run import THIS_MACHINE, Run
from fewbit.search import search as find
from fewbit.target import detect, load_target, target_names
from fewbit.target.spec import processor_flags
from fewbit.verify import bench as measure
from fewbit.verify import evaluate as score_run
from fewbit.verify import lint as linter
from fewbit.verify import loads, runtime_names, timed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training quantization of vision models.",
)
out, err = Console(), Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help=FORMS)]
TargetOption = Annotated[str | None, typer.Option(help="See `fewbit targets`; the default fits this machine.")]
ImagesOption = Annotated[str | None, typer.Option(help="Folder (class sub-folders or flat), parquet, .npy or .npz.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime.")]


class BarProgress(Progress):
    """A line per stage on standard error, with a bar where the number of steps is known."""

    def __init__(self) -> None:
        super().__init__()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, TextColumn("{task.fields[note]}"), console=err)
        self._task: Any = None

    def begin(self, name: str, total: int | None) -> None:
        self._finish()
        self._bars.start()
        self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, text: str = "") -> None:
        self._bars.update(self._task, advance=steps, note=text[-40:])

    def close(self) -> None:
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=total, completed=total, note="")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command of the app: errors that a user can mend are one message and an exit code, not a stack."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (FewbitError, FewbitFailed) as error:
            err.print(f"{type(error).__name__}: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None

    return run


def numbers(text: str | None, option: str, count: int) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5` as numbers. Raises FewbitError that says what is allowed."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count:
        raise FewbitError(
            f"{option} {text} is not understood; {count} numbers with commas are needed, as in {option} 3,224,224."
        )
    return found


@command
def quantize(
    model: ModelArgument,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder (class sub-folders or flat), parquet, .npy or .npz; synthetic (made from the model) or synthetic:DIR "
            "(made from the model and a few real ones)."
        ),
    ] = None,
    score: Annotated[str | None, typer.Option(help="Images to score on; without it a part of --images is held out.")] = None,
    target: TargetOption = None,
    recipe: Annotated[str, typer.Option(help="See `fewbit recipes`.")] = DEFAULT,
    bits: Annotated[
        str | None,
        typer.Option(
            help="8 (the default, or the most that the target has); w4a8; 4,first=8,last=8 (exceptions by op); mixed:6.0 (a "
            "width for each module)."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("run"),
    calibration: Annotated[int, typer.Option(min=1, help="Calibrate on so many images at most.")] = 128,
    scored: Annotated[int | None, typer.Option(min=1, help="Score on so many images at most.")] = None,
    seed: int = 0,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="Pattern of ops or sites that stay float; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Also what runs faster in float on the target.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out.")] = False,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Ignore labels.")] = False,
    time: Annotated[str | None, typer.Option(help="Of a search or reconstruction (lapq, best): 90s, 10min, 1h.")] = None,
    loss: Annotated[str | None, typer.Option(help="Of that search: kl (default) or labels, of the calibration images.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of what makes synthetic images and of recipes that train (fdda).")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Score 1, 2, 4, ... 256 calibration images as well.")] = False,
    classes: Annotated[Path | None, typer.Option(help="File with the model's class names in output order.")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a timm model.")] = None,
    input_size: Annotated[str | None, typer.Option(help="3,height,width")] = None,
    mean: Annotated[str | None, typer.Option(help="r,g,b in [0, 1]")] = None,
    std: Annotated[str | None, typer.Option(help="r,g,b in [0, 1]")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos")] = None,
    resize: Annotated[str | None, typer.Option(help="squash, center or border")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized image that the crop keeps.")] = None,
    threads: Threads = 2,
    max_drop: Annotated[
        float | None, typer.Option(help="Exit with 1 where more points are lost (without labels: agreement).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run.")] = False,
) -> None:
    """Quantize a model, verify it in the runtime and write a run folder with its report."""
    size = numbers(input_size, "--input-size", 3)
    overrides = {
        "input_size": tuple(int(v) for v in size) if size else None,
        "mean": numbers(mean, "--mean", 3),
        "std": numbers(std, "--std", 3),
        "interpolation": interpolation,
        "resize": resize,
        "crop_pct": crop_pct,
    }
    progress = BarProgress()
    try:
        result = pipeline.quantize(
            model,
            images,
            score=score,
            target=target,
            recipe=recipe,
            bits=bits,
            out=folder,
            calibration=calibration,
            scored=scored,
            seed=seed,
            keep_float=keep_float or (),
            everything=everything,
            skip_bad=skip_bad,
            labels=not no_labels,
            time=time,
            loss=loss,
            steps=steps,
            curve=curve,
            classes=classes,
            weights=weights,
            preprocess={k: v for k, v in overrides.items() if v is not None},
            threads=threads,
            force=force,
            command="fewbit " + shlex.join(sys.argv[1:]),
            progress=progress,
        )
    finally:
        progress.close()
    show(dict(result.report))
    out.print(f"Report: {folder / 'report.html'}")
    fail_on_wrong(result.report["verify"], result.report)
    fail_on_drop(result.report["accuracy"], max_drop)


@command
def evaluate(
    run: Path,
    images: Annotated[str, typer.Option(help="Images that were not used to calibrate.")],
    runtime: Annotated[str | None, typer.Option(help="onnxruntime or openvino")] = None,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad")] = False,
    no_labels: Annotated[bool, typer.Option("--no-labels")] = False,
    threads: Threads = 2,
) -> None:
    """Top-1 with labels, agreement and cosine without; float beside integer, in the runtime."""
    opened = Run.open(run)
    found = opened.images(images, skip_bad=skip_bad, labels=not no_labels, limit=limit)
    chosen = runtime or opened.record["runtime"]
    progress = BarProgress()
    try:
        with progress.stage("evaluate", len(found)):
            score = score_run(
                run / "float.onnx",
                run / "model.onnx",
                found,
                runtime=chosen,
                threads=threads,
                progress=progress.advance,
            )
    finally:
        progress.close()
    table = Table("", "float", "quantized", "drop", "agreement", "cosine", "95 % interval", "images")
    top = ["-", "-", "-"]
    if score.top1 is not None and score.float_top1 is not None:
        top = [f"{score.float_top1:.2f} %", f"{score.top1:.2f} %", f"{score.float_top1 - score.top1:+.2f}"]
    low, high = score.interval
    table.add_row(
        chosen, *top, f"{score.agreement:.2f} %", f"{score.cosine:.5f}", f"{low:.2f} to {high:.2f} %", str(score.images)
    )
    out.print(table)


@command
def verify(run: Path, images: Annotated[str | None, typer.Option(help="Other images than the run's own.")] = None) -> None:
    """Integer codes of the simulation against those of the runtime, site by site."""
    opened = Run.open(run)
    progress = BarProgress()
    try:
        checks = opened.verify(images, progress)
    finally:
        progress.close()
    table = Table("graph optimisations", "sites", "codes", "ties", "wrong", "worst site")
    for name, part in (("off", checks.off), ("on", checks.on)) if checks.on else (("off", checks.off),):
        worst = max(part, key=lambda c: (c.wrong, c.differing))
        table.add_row(
            name,
            str(len(part)),
            f"{sum(c.compared for c in part):,}",
            str(sum(c.ties for c in part)),
            str(sum(c.wrong for c in part)),
            worst.site if worst.differing else "-",
        )
    out.print(table)
    for runtime, row in checks.outputs.items():
        out.print(f"{runtime}: largest difference of an output {row['max_abs_difference']:.3g}, cosine {row['cosine']:.6f}")
    fail_on_wrong(tables.verify(checks), read_json(run / "report.json"))


@command
def bench(
    run: Path,
    batch: Annotated[list[int] | None, typer.Option(help="May be repeated; 1 and 8 by default.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(help="Measure each for so long.")] = 4.0,
) -> None:
    """Latency, what loading takes, and size, float beside integer."""
    opened = Run.open(run)
    progress = BarProgress()
    runtimes, batches = runtime or list(timed(opened.folder / "model.onnx")), batch or [1, 8]
    try:
        files = run / "float.onnx", run / "model.onnx", opened.preprocess.size
        with progress.stage("bench", len(runtimes) * (len(batches) + 1)):
            rows = measure(
                *files,
                runtimes=runtimes,
                batches=batches,
                threads=threads,
                seconds=seconds,
                progress=lambda text: progress.advance(1, text),
            )
            whole = [name for name in runtimes if name in runtime_names()]  # what loading takes does not hang on the precision
            loaded = loads(*files, runtimes=whole, threads=threads, runs=3, progress=lambda text: progress.advance(1, text))
    finally:
        progress.close()
    table = Table("runtime", "batch", "threads", "float ms", "integer ms", "faster", "pairs")
    for row in rows:
        times = f"{row.float_ms:.2f}", f"{row.quantized_ms:.2f}", f"{row.ratio:.2f} x"
        table.add_row(row.runtime, str(row.batch), str(row.threads), *times, str(row.runs))
    out.print(table)
    table = Table("runtime", "load", "peak memory", "without a model", title="float -> integer")
    for load in loaded:
        table.add_row(
            load.runtime,
            f"{load.float_seconds:.3f} -> {load.quantized_seconds:.3f} s",
            f"{load.float_bytes / 1e6:.0f} -> {load.quantized_bytes / 1e6:.0f} MB",
            f"{load.baseline_bytes / 1e6:.0f} MB",
        )
    out.print(table)
    for name in ("float.onnx", "model.onnx", "plan.safetensors"):
        out.print(f"{name}: {(run / name).stat().st_size / 1e6:.2f} MB")


@command
def lint(
    file: Path,
    target: TargetOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every node, not only the worst.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every node here as well.")] = None,
    min_integer: Annotated[float | None, typer.Option(help="Exit with 1 where a smaller share (0 to 1) is integer.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the file here too and show where the rules are wrong.")] = False,
) -> None:
    """Which nodes of a Q/DQ ONNX file run in integers on a target, by which rule, and what to change."""
    chosen = load_target(target or detect())
    found = linter.lint(file, chosen)
    rows = found.worst() if not everything else list(found.rows)
    table = Table("node", "op", "MACs", "integer", "rule", "change")
    for row in rows if everything else rows[:20]:
        share = f"{100 * row.share:.1f} %" if row.macs else "-"
        table.add_row(row.name, row.op, share, "yes" if row.integer else "no", row.rule, row.change)
    out.print(table)
    if len(rows) > 20 and not everything:
        out.print(f"... and {len(rows) - 20} more nodes; --all shows every one.")
    out.print(f"{found.file} on {found.target}: {found.summary()}", soft_wrap=True)
    if json_file is not None:
        write_json(json_file, found.to_json())
    wrong = linter.disagreements(file, found, chosen) if check else []
    for row, ran in wrong:
        out.print(f"Ran otherwise: {row.op} {row.name} as {ran.kernel}; the rule said: {row.rule}", soft_wrap=True)
    if check:
        out.print(f"{chosen.runtime} runs {len(rows) - len(wrong)} of {len(rows)} nodes as predicted.")
    if min_integer is not None and found.integer_share < min_integer:
        share = f"{found.integer_share:.3f} of the multiply-accumulates run in integers"
        raise FewbitFailed(f"{share}; --min-integer asks for {min_integer:g}.")


@command
def search(
    model: ModelArgument,
    images: ImagesOption = None,
    score: Annotated[str | None, typer.Option(help="Images to judge on; without it a part of --images is held out.")] = None,
    target: TargetOption = None,
    recipe: Annotated[str, typer.Option(help="Of ranges: minmax, percentile, mse or kl.")] = DEFAULT,
    budget: Annotated[list[str] | None, typer.Option(help="6bit, 3MB or 20ms; may be repeated, all are kept.")] = None,
    strategy: Annotated[str, typer.Option(help="greedy, random, annealing or tpe.")] = "greedy",
    time: Annotated[str | None, typer.Option(help="End the search then: 90s, 10min, 1h.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates to look at.")] = 300,
    edges: Annotated[str, typer.Option(help="What gets widths: weights (activations keep 8 bits) or all.")] = "weights",
    least: Annotated[int, typer.Option(min=2, help="The narrowest width.")] = 4,
    loss: Annotated[str, typer.Option(help="kl (to the float model) or labels, of the calibration images.")] = "kl",
    calibration: Annotated[int, typer.Option(min=1, help="Search on so many images at most.")] = 64,
    scored: Annotated[int | None, typer.Option(min=1, help="Judge on so many images at most.")] = None,
    points: Annotated[int, typer.Option(min=1, help="Realize so many points at most.")] = 8,
    seed: int = 0,
    keep_float: Annotated[list[str] | None, typer.Option(help="Pattern of ops that stay float; may be repeated.")] = None,
    threads: Threads = 2,
    folder: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("search"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier search.")] = False,
) -> None:
    """The Pareto front of accuracy, measured latency and size; Ctrl-C ends the search and keeps its best."""
    progress = BarProgress()
    try:
        found = find(
            model, images, score=score, target=target, recipe=recipe, budgets=budget or (), strategy=strategy, time=time,
            evaluations=evaluations, edges=edges, least=least, loss=loss, calibration=calibration, scored_images=scored,
            seed=seed, threads=threads, points=points, keep_float=keep_float or (), out=folder, force=force,
            command="fewbit " + shlex.join(sys.argv[1:]), progress=progress,
        )  # fmt: skip
    finally:
        progress.close()
    table = Table("point", "top-1", "agreement", "ms", "predicted", "faster", "MB", "bits", "front")
    for row in found["points"]:
        table.add_row(
            row["point"], "-" if row["quantized"] is None else f"{row['quantized']:.2f} %", f"{row['agreement']:.2f} %",
            f"{row['ms']:.3f}", f"{row['predicted_ms']:.3f}", f"{row['faster']:.2f} x", f"{row['bytes'] / 1e6:.3f}",
            f"{row['weight_bits']:.2f}", "yes" if row["front"] else "",
        )  # fmt: skip
    out.print(table)
    for row in found["points"]:
        if row["front"]:
            out.print(f"{row['point']}: {row['command']}", soft_wrap=True, highlight=False)
    out.print(f"Report: {folder / 'report.html'}")


@command
def targets() -> None:
    """The targets that come with fewbit."""
    flags, installed = processor_flags(), runtime_names()
    try:
        here = detect()
    except UnknownName:  # a machine that no target fits has no default
        here = ""
    table = Table("target", "runtime", "runs here", "ops in integers", "about")
    for name in target_names():
        found = load_target(name)
        marks = {"integer": "", "float": " (float is faster)", "follow": ""}
        kinds = ", ".join(dict.fromkeys(rule.kind + marks[rule.runs] for rule in found.op)) or "none"
        if found.runtime not in installed:
            runs = f"as written, in {found.runs_in}"
        else:
            runs = "yes" if found.fits(platform.machine(), flags) else f"needs {found.processor}"
        table.add_row(f"{name} (this machine)" if name == here else name, found.runtime, runs, kinds, found.about)
    out.print(table)


@command
def recipes() -> None:
    """The recipes that have a name."""
    table = Table("recipe", "about", "settings")
    for name, recipe in RECIPES.items():
        settings = f"activations {recipe.activations!r}, weights {recipe.weights!r}, rounding {recipe.rounding!r}"
        settings += f", search {recipe.search!r}" if recipe.search is not None else ""
        settings += f", module {recipe.module!r}" if recipe.module is not None else ""
        settings += f", correction {recipe.correction!r}" if recipe.correction is not None else ""
        settings += f", widths by {recipe.sensitivity!r}"
        table.add_row(f"{name} (default)" if name == DEFAULT else name, recipe.about, settings)
    out.print(table)


@command
def report(
    run: Path,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Another run of the model, for a picture of bytes against accuracy; repeat it.")
    ] = None,
) -> None:
    """Draw report.html again from report.json and tables.json."""
    summary, rows = read_json(run / "report.json"), read_json(run / "tables.json")
    if beside:
        folders = {folder.resolve(): Run.open(folder) for folder in (run, *beside)}
        found = {str(r.folder): (read_json(r.folder / "report.json"), r.record) for r in folders.values()}
        rows["runs"] = tables.runs(found)
    html = page.render(summary, rows)
    if beside:
        write_json(run / "tables.json", rows)
    write_atomic(run / "report.html", lambda part: part.write_text(html, encoding="utf-8"))
    out.print(f"Report: {run / 'report.html'}")


@command
def diff(
    a: Path,
    b: Path,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the differences here as well.")] = None,
) -> None:
    """What two runs decided differently, site by site, and what came of it."""
    plans = [read_json(folder / "plan.json") for folder in (a, b)]
    sites = [{choice["site"]: choice for choice in plan["choices"]} for plan in plans]
    rows = []
    for site in dict.fromkeys([*sites[0], *sites[1]]):
        one, two = sites[0].get(site), sites[1].get(site)
        fields = sorted({*(one or {}), *(two or {})} - {"site"})
        changed = [f for f in fields if (one or {}).get(f) != (two or {}).get(f)]
        rows += [
            {"site": site, "field": f, "a": (one or {}).get(f, "float"), "b": (two or {}).get(f, "float")} for f in changed
        ]
    table = Table("site", "field", str(a), str(b))
    for row in rows[:60]:
        table.add_row(row["site"], row["field"], str(row["a"]), str(row["b"]))
    out.print(table if rows else "The plans are the same.")
    if len(rows) > 60:
        out.print(f"... and {len(rows) - 60} more rows; --json FILE has all.")
    reports = [read_json(folder / "report.json") for folder in (a, b)]
    summary = Table("", str(a), str(b))
    for name, where in (
        ("quantized %", ("accuracy", "quantized")),
        ("agreement %", ("accuracy", "agreement")),
        ("bytes", ("size", "onnx_bytes")),
    ):
        summary.add_row(name, *(str(r[where[0]][where[1]]) for r in reports))
    out.print(summary)
    if json_file is not None:
        write_json(json_file, rows)


def show(report: dict[str, Any]) -> None:
    """The four answers on the terminal."""
    accuracy, size, check = report["accuracy"], report["size"], report["verify"]
    table = Table(show_header=False, title=f"{report['model']} on {report['target']}, {report['recipe']}, {report['bits']}")
    wrong = check["codes_wrong"]
    table.add_row(
        "Is it right?",
        f"{'yes' if not wrong else 'NO'}: {wrong} of {check['codes_compared']:,} codes wrong at {check['sites']} sites"
        f" ({check['codes_differing']} ties)" + (f", worst {check['worst_site']}" if wrong else ""),
    )
    low, high = accuracy["interval"]
    if accuracy["quantized"] is not None:
        good = f"{accuracy['float']:.2f} % -> {accuracy['quantized']:.2f} % top-1 ({low:.2f} to {high:.2f}), "
    else:
        good = ""
    good += f"agreement {accuracy['agreement']:.2f} %, cosine {accuracy['cosine']:.4f}"
    table.add_row("Is it good?", f"{good}, {report['images']['scored']} images in {accuracy['runtime']}")
    faster = ", ".join(f"{name} {row['ratio']:.2f} x faster" for name, row in report["latency"].items())
    times = size["float_bytes"] / size["onnx_bytes"]
    table.add_row("Is it small and fast?", f"{size['onnx_bytes'] / 1e6:.2f} MB, {times:.2f} x smaller; {faster}")
    share = 100 * report["integer_share"]
    table.add_row("What did we not get?", f"{len(report['refusals'])} refusals; {share:.1f} % of the work runs in integers")
    out.print(table)
    for warning in (report.get("calibration") or {}).get("warnings", ()):
        out.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def fail_on_drop(accuracy: dict[str, Any], allowed: float | None) -> None:
    """Exit code 1 where more points were lost than allowed; without labels, where agreement is further from 100 %."""
    labelled = accuracy["quantized"] is not None
    drop = accuracy["float"] - accuracy["quantized"] if labelled else 100 - accuracy["agreement"]
    if allowed is not None and drop > allowed:
        what = "accuracy fell by" if labelled else "answers differ for"
        raise FewbitFailed(f"{what} {drop:.2f} {'points' if labelled else '% of the images'}; --max-drop allows {allowed:g}.")


def fail_on_wrong(check: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Exit code 1 where codes differ that are no ties; `report` is the run's."""
    if check["codes_wrong"]:
        says = f"{check['codes_wrong']} codes differ between simulation and runtime, most at {check['worst_site']}."
        for refusal in report["refusals"]:
            if refusal["site"] == THIS_MACHINE:
                says += f" {report['target']} needs {refusal['asked']}; `fewbit targets` lists what fits this machine."
        raise FewbitFailed(says)


if __name__ == "__main__":
    app()
