"""Commands on a finished run: evaluate, verify, bench, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.answers import fail_on_wrong
from fewbit.cli.app import command, command_without_torch
from fewbit.cli.options import options
from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, drawn, out
from fewbit.folder import MODEL, NUMBERS, REPORT, TWIN
from fewbit.request import BenchRequest, EvaluateRequest, VerifyRequest


@command
@options(EvaluateRequest)
def evaluate(request: EvaluateRequest) -> None:
    """Accuracy with labels, agreement with the float model without; float beside integer, in the runtime."""
    from fewbit.core.task import told
    from fewbit.report.words import ends_of, measured, percent
    from fewbit.run import Run
    from fewbit.workers import opened
    from fewbit.workers.machines import refuse_missing

    with drawn() as progress, opened(request.workers, request.ray, request.threads) as whoever:
        finished = Run.open(request.run, progress)
        given = finished.images(request.images, skip_bad=request.skip_bad, labels=request.labels, limit=request.limit)
        others = finished.unseen(given)
        others = finished.annotated(others, request.annotations)
        name = finished["runtime"] if request.runtime is None else request.runtime
        finished.do("twin", runtime=name)
        refuse_missing(whoever, [str(request.run), request.images])
        score = finished.do("evaluate", scored=others, runtime=name, threads=request.threads, workers=whoever)
    rating = score.rating
    table = Table("", "float", "quantized", "change", "agreement", "95 % interval", "images")
    top = ["-", "-", "-"]
    before, after = rating.float_score, rating.score
    if before is not None and after is not None:
        top = [*(measured(value, rating.unit).translate(PLAIN) for value in (before, after)), f"{after - before:+.2f}"]
    low, high = rating.interval
    interval = ends_of(rating.interval).translate(PLAIN) if after is None else f"{low:+.2f} to {high:+.2f}"
    table.add_row(name, *top, percent(rating.agreement).translate(PLAIN), interval, str(score.images))
    out.print(table)
    for row in (told(row) for row in rating.rows):
        numbers = ", ".join(
            f"{key} {measured(value, row['unit'])}" for key, value in row.items() if isinstance(value, (int, float))
        )
        better = "" if row["better"] == "more" else f" ({row['better']} is better)"
        out.print(f"{row['what']}{better}: {numbers}".translate(PLAIN), soft_wrap=True)
    for note in others.notes:
        out.print(f"Warning: {note}", style="yellow", soft_wrap=True)
    out.print(f"Agreement is {rating.agreement_measure}. {rating.why}".strip(), soft_wrap=True)


@command
@options(VerifyRequest)
def verify(request: VerifyRequest) -> None:
    """Integer codes of the simulation against those of the runtime, site by site."""
    from fewbit.files import read_json
    from fewbit.report import tables
    from fewbit.report.answers import apart, crowded, near_ties
    from fewbit.run import Run

    with drawn() as progress:
        checks = Run.open(request.run, progress).verify(request.images)
    table = Table("graph optimisations", "sites", "codes", "ties", "wrong", "worst site")
    parts = (("off", checks.off), ("on", checks.on), ("in the file", checks.weights))
    for name, part in ((name, part) for name, part in parts if part):
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
    for check in checks.outputs:
        largest = f"largest difference {check.difference:.3g} ({check.limit:.2g} explained by rounding)"
        usual = f"middle one {check.usual:.2g} ({check.usual_limit:.2g})"
        out.print(f"{check.output}, {check.place}: {largest}, {usual}, cosine {check.cosine:.6f}")
    found = tables.verify(checks)
    if said := near_ties(found):
        out.print(said, soft_wrap=True)
    if said := " ".join(filter(None, (crowded(found), apart(found)))):
        out.print(said.translate(PLAIN), style="yellow" if found["tied_sites"] else None, soft_wrap=True)
    fail_on_wrong(found, read_json(request.run / REPORT))


@command
@options(BenchRequest)
def bench(request: BenchRequest) -> None:
    """Latency, load time, memory and size: float beside integer."""
    from fewbit.onnx_file import bytes_of
    from fewbit.report.answers import ELSEWHERE, unpaid
    from fewbit.report.tables import pays
    from fewbit.report.words import megabytes, paired_speed
    from fewbit.run import Run

    with drawn() as progress:
        finished = Run.open(request.run, progress)
        rows, loading = finished.do(
            "bench", runtimes=request.runtime or None, batches=request.batch or (1, 8), threads=request.threads,
            seconds=request.seconds, repeats=3,
        )  # fmt: skip
    table = Table("runtime", "batch", "threads", "float ms", "integer ms", "integer is", "pairs")
    for row in rows:
        times = (
            _spread(row.float_ms, row.float_spread),
            _spread(row.quantized_ms, row.quantized_spread),
            paired_speed(row.float_ms, row.quantized_ms, row.ratio),
        )
        table.add_row(row.runtime, str(row.batch), str(row.threads), *(t.translate(PLAIN) for t in times), str(row.runs))
    out.print(table)
    for one in finished["plan"].fallbacks:
        if one.kind in ELSEWHERE:
            out.print(f"These are not times of {one.requested}: {one.why}.", style="yellow", soft_wrap=True)
    out.print(f"In brackets the middle half of the runs; the machine's load was {max(row.load for row in rows):.1f}.")
    paid = pays(rows, finished["runtime"], finished["plan"])
    if paid is not None and not paid["pays"]:
        out.print(unpaid(paid).translate(PLAIN), style="yellow", soft_wrap=True)
    table = Table("runtime", "load", "peak memory", "without a model", title="float -> integer")
    for load in loading:
        table.add_row(
            load.runtime,
            f"{load.float_seconds:.3f} -> {load.quantized_seconds:.3f} s",
            f"{load.float_bytes / 1e6:.0f} -> {load.quantized_bytes / 1e6:.0f} MB",
            f"{load.baseline_bytes / 1e6:.0f} MB",
        )
    out.print(table)
    sizes = {name: bytes_of(request.run / name) for name in (TWIN, MODEL, NUMBERS)}
    for name, size in sizes.items():
        out.print(f"{name}: {megabytes(size, list(sizes.values())).translate(PLAIN)}")


def _spread(middle: float, ends: tuple[float, float]) -> str:
    return f"{middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


@command_without_torch
def report(
    run: Path,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Another run of the model, to plot bytes against accuracy; may be repeated.")
    ] = None,
) -> None:
    """Draw report.html again from report.json and tables.json."""
    from fewbit.files import read_json
    from fewbit.report.draw import draw
    from fewbit.run import Run

    opened = {folder.resolve(): Run.open(folder) for folder in (run, *(beside or ()))}
    runs = opened if beside else {}
    others = {str(r.folder): (read_json(r.folder / REPORT), r.record) for r in runs.values()}
    out.print(f"Report: {draw(run, others)}")
