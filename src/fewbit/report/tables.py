"""The tables behind the report that need neither torch nor a model: lists and numbers from what the stages returned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.errors import BadFile
from fewbit.folder import MODEL, NUMBERS, TWIN
from fewbit.onnx_file import bytes_of
from fewbit.report.answers import ELSEWHERE, MARGIN
from fewbit.report.words import plural
from fewbit.runtimes import RUNTIMES

if TYPE_CHECKING:
    from fewbit.core.checks import Checks, SelectionCheck
    from fewbit.core.graph import Graph
    from fewbit.core.plan import Plan

Rows = list[dict[str, Any]]
WEIGHED = {TWIN: "float model, ONNX", MODEL: "integer model, ONNX", NUMBERS: "plan, bit-packed"}


def histograms(sites: Rows, counts: Mapping[str, Mapping[str, object]], worst: int = 8) -> Rows:
    """The activation sites with the smallest signal to noise ratio, worst first; `counts` has edges and counts by site."""
    known = (row for row in sites if row["site"] in counts and row["sqnr_db"] is not None)
    selection = sorted(known, key=lambda row: row["sqnr_db"])[:worst]
    return [{**counts[r["site"]], **{k: r[k] for k in ("site", "range", "observed", "sqnr_db")}} for r in selection]


def checks(result: Checks) -> Rows:
    """Codes of the simulation against the runtime, per site, graph optimisations off and on; and codes in the file."""
    columns = ("site", "compared", "differing", "ties", "wrong", "max_difference")
    tables = (("off", result.off), ("on", result.on), ("in the file", result.weights))
    return [{"optimisations": name, **{c: getattr(check, c) for c in columns}} for name, table in tables for check in table]


def verify(result: Checks) -> dict[str, Any]:
    """The summary of `checks` for report.json; graph optimisations off and on are both counted.

    `problems` are the reasons, if any, why the run is not right: a line each, in the order in which they are best looked at.
    """
    table = result.off + result.on
    worst = max(table, key=lambda check: (check.wrong, check.max_difference, check.differing), default=None)
    return {
        "sites": len(result.off),
        "codes_compared": sum(check.compared for check in table),
        "codes_differing": sum(check.differing for check in table),
        "codes_wrong": sum(check.wrong for check in table),
        "max_difference": max((check.max_difference for check in table), default=0),
        "worst_site": worst.site if worst is not None and worst.differing else None,
        "stored_codes": sum(check.compared for check in result.weights),
        "outputs": len(result.outputs),
        "selections": sum(check.compared for table in result.selections for check in table),
        "near_ties": sum(check.near for table in result.selections for check in table),
        "tied_sites": [{name: getattr(check, name) for name in ("site", "ties", "compared")} for check in result.crowded],
        "gaps": _finite([asdict(gap) for gap in result.gaps]),
        "problems": problems(result),
    }


def outputs(result: Checks) -> Rows:
    """The outputs, a row each; what is not a number is its name, as JSON has none for it."""
    return _finite([{**asdict(check), "right": not check.wrong} for check in result.outputs])


def _finite(rows: Rows) -> Rows:
    """The rows with the name of each number that is none in its place."""
    return [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def problems(result: Checks, most: int = 5) -> list[str]:
    """What is wrong, if anything: in the files, at the first sites in the order of the graph, in the outputs."""
    lines = [f"{each.file}: {each.name} {each.what}" for each in result.file or ()]
    lines += [
        f"{check.site}: {check.wrong:,} of {check.compared:,} codes in the file are not the plan's"
        for check in result.weights
        if check.wrong
    ]
    places, chosen = ("as written", "as it ships"), result.selections
    for name, table, selections in zip(places, (result.off, result.on), chosen, strict=True):
        for check in (check for check in selections if check.wrong):
            what = _selects(check) if check.does == "selects" else _decides(check)
            lines.append(f"{check.node} {check.does} wrongly ({name}): {what}")
        wrong = [check for check in table if check.wrong]
        if wrong:
            total = sum(check.wrong for check in wrong)
            lines.append(
                f"{plural(total, 'code')} at {plural(len(wrong), 'site')} {'differs' if total == 1 else 'differ'} between "
                f"simulation and runtime ({name}), "
                f"first at {wrong[0].site}, off by up to {wrong[0].max_difference}"
            )
    for each in result.wrong_outputs:
        where = f"output {each.output} ({each.place})"
        lines.append(f"{where} {each.said}")
    return lines[:most] + [f"and {len(lines) - most} more"] * (len(lines) > most)


def _selects(check: SelectionCheck) -> str:
    rows = f"in {check.wrong:,} of {check.compared:,} rows"
    if check.difference == 0:
        return f"{rows} one place twice"
    if math.isinf(check.difference):
        return f"{rows} places that are none or have no score"
    return f"{rows} by up to {check.difference:.3g} from the best scores, where float32 rounding explains {check.limit:.2g}"


def _decides(check: SelectionCheck) -> str:
    numbers = f"{check.wrong:,} of {check.compared:,} numbers"
    if check.difference == 0:
        return f"{numbers}, which stand exactly on the threshold"
    if math.isinf(check.difference):
        return f"{numbers}, which are infinite or none, several steps off, or not as many as there should be"
    return f"{numbers}, up to {check.difference:.3g} from the threshold, where float32 rounding explains {check.limit:.2g}"


def size(graph: Graph, plan: Plan, files: Mapping[str, int]) -> dict[str, Any]:
    """Bytes on disk, and the mean width of the weights."""
    return {
        "float_bytes": files[TWIN],
        "onnx_bytes": files[MODEL],
        "packed_bytes": files[NUMBERS],
        "average_weight_bits": average_weight_bits(graph, plan),
    }


def average_weight_bits(graph: Graph, plan: Plan) -> float:
    """The mean width of the weights of all products; a weight that stayed float counts 32."""
    bits, total = 0.0, 0
    for site in graph.sites:
        if site.role == "weight":
            count = math.prod(site.shape)
            choice = plan.choices.get(site.name)
            bits += count * (choice.grid.mean_bits if choice else 32)
            total += count
    return bits / max(total, 1)


def files(folder: Path) -> Rows:
    """The bytes of each file of a run that a user would ship, and of the float model."""
    return [{"what": what, "bytes": bytes_of(folder / name)} for name, what in WEIGHED.items()]


def integer_share(graph: Graph, plan: Plan) -> float:
    """The share of multiply-accumulates whose op runs in integers; products of real numbers and codes do not, and ops that
    the runtime leaves in float (fallbacks of kind kernels).
    """
    integer_inputs = {op.name for op in graph.ops if "weight" not in op.operands or op.operands["input"] in plan.choices}
    planned = graph.share(sum(op.macs for op in graph.ops if op.name in plan.integer_ops and op.name in integer_inputs))
    return max(0.0, planned - sum(one.macs_share or 0.0 for one in plan.fallbacks if one.kind == "kernels"))


def fallbacks(plan: Plan) -> Rows:
    """What was requested and what the target got instead, a row each."""
    fields = ("site", "requested", "actual", "why", "macs_share", "kind")
    return [{field: getattr(fallback, field) for field in fields} for fallback in plan.fallbacks]


def latency(rows: Sequence[Any], runtime: str, plan: Plan) -> dict[str, Any]:
    """The first (smallest) batch in the target's own runtime (in each precision) for report.json; milliseconds of a call.
    Nothing where another runtime or processor than the target's computed.
    """
    first: dict[str, Any] = {}
    if any(fallback.kind in ELSEWHERE for fallback in plan.fallbacks):
        return first
    for row in (row for row in rows if row.runtime in (runtime, *RUNTIMES[runtime].variants)):
        fields = ("batch", "float_ms", "quantized_ms", "ratio")
        first.setdefault(row.runtime, {field: getattr(row, field) for field in fields})
    return first


def pays(rows: Sequence[Any], runtime: str, plan: Plan) -> dict[str, Any] | None:
    """The fastest way to run the file in the target's own runtime, beside the fastest way to run the float model there, of the
    smallest batch; None where nothing of the target's was measured.
    """
    if any(fallback.kind in ELSEWHERE for fallback in plan.fallbacks):
        return None
    own = [row for row in rows if row.runtime in (runtime, *RUNTIMES[runtime].variants)]
    own = [row for row in own if row.batch == own[0].batch]
    if not own:
        return None
    file = max(own, key=lambda row: row.over_best[1])
    best = next(row for row in own if row.runtime == file.best)
    low, ratio, high = file.over_best
    return {
        **{name: getattr(file, name) for name in ("runtime", "batch", "threads", "load")},
        "ms": file.quantized_ms,
        "spread": file.quantized_spread,
        "float_runtime": best.runtime,
        "float_ms": best.float_ms,
        "float_spread": best.float_spread,
        "rounds": file.runs,
        "ratio": ratio,
        "interval": [low, high],
        "pays": ratio >= MARGIN,
    }


def around(score: Mapping[str, Any]) -> list[float] | None:
    """The interval of an accuracy for a figure: with labels that of the difference, around the float model's accuracy."""
    interval = score["interval"]
    return interval if interval is None or score["quantized"] is None else [score["float"] + end for end in interval]


def headline(score: Mapping[str, Any]) -> tuple[str, float, str]:
    """The measure of an accuracy, its number for the integer model and its unit: with labels the task's, else the agreement,
    which is in percent.
    """
    if score["quantized"] is None:
        return score["agreement_measure"], score["agreement"], "%"
    return score["measure"], score["quantized"], score["unit"]


def runs(records: Mapping[str, tuple[Any, Any]]) -> Rows:
    """Bytes against accuracy of several runs, beside that of the float model; (report.json, run.json) by folder.

    Accuracy is agreement with the float model for all of them where one has no labels. Raises BadFile where a record lacks
    something, or where a run has another model than the first or was scored on other images.
    """
    rows: Rows = []
    hashes = None
    for folder, (report, record) in records.items():
        try:
            hashes = hashes or record["hashes"]
            for key, what in (("model", "has another model"), ("scored", "was scored on other images")):
                if record["hashes"][key] != hashes[key]:
                    raise BadFile(f"{folder} {what} than {next(iter(records))}; the runs of one figure share model and images.")
            bits, score, size = str(report["bits"]), report["accuracy"], report["size"]
            rows.append(
                {
                    "kind": f"{report['recipe']}, {'mixed precision' if bits.startswith('mixed') else 'one width'}",
                    "label": bits,
                    "bytes": size["onnx_bytes"],
                    "bits": size["average_weight_bits"],
                    "measure": score["measure"],
                    "unit": score["unit"],
                    "agreement_measure": score["agreement_measure"],
                    "accuracy": score["quantized"],
                    "interval": around(score),
                    "float": score["float"],
                    "agreement": score["agreement"],
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadFile(f"{folder}: report.json or run.json lacks {error}; write the run again with --force.") from error
    if any(row["accuracy"] is None for row in rows):
        for row in rows:  # the interval is that of the accuracy where there is one
            row["interval"] = row["interval"] if row["accuracy"] is None else None
            row |= {"measure": row["agreement_measure"], "accuracy": row["agreement"], "unit": "%", "float": None}
    return rows
