"""The tables behind the report: plain lists and numbers from what the stages returned. No torch here, no drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fewbit.core.values import Checks, Choice, Graph, Plan
from fewbit.errors import BadFile
from fewbit.observe.outliers import LIMIT, Outliers

Rows = list[dict[str, Any]]
WEIGHED = {"float.onnx": "float model, ONNX", "model.onnx": "integer model, ONNX", "plan.safetensors": "plan, bit-packed"}


def sites(
    graph: Graph, plan: Plan, fidelity: Mapping[str, tuple[float, float]], seen: Mapping[str, tuple[float, float]]
) -> Rows:
    """One row per quantized site in graph order; `fidelity` is (dB, clipped share), `seen` the extremes, by site."""
    kinds = {op.name: op.kind for op in graph.ops}
    rows = []
    for site in graph.sites:
        choice = plan.choices.get(site.name)
        if choice is None or choice.role == "bias":
            continue
        scale, zero = choice.qparams.scale.flatten().tolist(), choice.qparams.zero.flatten().tolist()
        lows, highs = (end.expand(len(scale)).tolist() for end in choice.grid.ends())
        low = min((end - z) * s for end, s, z in zip(lows, scale, zero, strict=True))
        high = max((end - z) * s for end, s, z in zip(highs, scale, zero, strict=True))
        decibel, clipped = fidelity[site.name]
        rows.append(
            {
                "site": site.name,
                "role": site.role,
                "op": site.readers[0][0],
                "kind": kinds[site.readers[0][0]],
                "bits": choice.grid.mean_bits if choice.grid.widths else choice.grid.bits,
                "grid": str(choice.grid),
                "method": choice.method,
                "why": choice.why,
                "scale": scale[0] if len(scale) == 1 else {"min": min(scale), "max": max(scale)},
                "zero": zero[0] if len(set(zero)) == 1 else {"min": min(zero), "max": max(zero)},
                "kept": [low, high],
                "seen": list(seen[site.name]),
                "sqnr_db": decibel,
                "clipped_share": clipped,
            }
        )
    return rows


def outliers(graph: Graph, plan: Plan, found: Sequence[Outliers], seen: Mapping[str, Sequence[float]]) -> Rows:
    """What stands out in each activation of the user's model, with what was done about it; `seen` has the extremes of each site
    in the graph that the plan is for, which may be equalized.
    """
    moved: dict[str, float] = {}
    for row in cast(Any, plan.extra.get("equalize", ())):
        if row["moved"] and row["strength"]:
            moved[graph.op(row["op"]).operands.get("input", "")] = row["strength"]
    rows = []
    for one in found:
        after = max(map(abs, seen.get(one.site, (one.reach,))))
        done = _done(plan.choices.get(one.site), one, after, moved)
        rows.append({**one.to_json(), "any": one.any, "limit": LIMIT, "done": done})
    return rows


def _done(choice: Choice | None, found: Outliers, after: float, moved: Mapping[str, float]) -> str:
    if choice is None:
        return "stays float"
    if found.site in moved:
        return f"moved into the weights behind, strength {moved[found.site]:g}"
    if after < 0.9 * found.reach:
        return f"equalized: {found.reach:.3g} is {after:.3g}"
    if choice.grid.axis is not None:
        return "each channel has its own step"
    step, zero = float(choice.qparams.scale), float(choice.qparams.zero)
    kept = max((choice.grid.high - zero) * step, (zero - choice.grid.low) * step)
    return f"clipped at {kept:.3g} of {found.reach:.3g}" if kept < 0.98 * found.reach else "covered by the range"


def histograms(rows: Rows, drawn: Mapping[str, Mapping[str, object]], worst: int = 8) -> Rows:
    """The activation sites with the smallest signal to noise ratio, worst first; `drawn` has edges and counts by site."""
    chosen = sorted((row for row in rows if row["site"] in drawn), key=lambda row: row["sqnr_db"])[:worst]
    return [{**drawn[r["site"]], **{k: r[k] for k in ("site", "kept", "seen", "sqnr_db")}} for r in chosen]


def checks(found: Checks) -> Rows:
    """Codes of the simulation against the runtime, per site, graph optimisations off and on."""
    columns = ("site", "compared", "differing", "ties", "wrong", "max_difference")
    both = (("off", found.off), ("on", found.on))
    return [{"optimisations": name, **{c: getattr(check, c) for c in columns}} for name, table in both for check in table]


def verify(found: Checks) -> dict[str, Any]:
    """The summary of `checks` for report.json; graph optimisations off and on are both counted."""
    table = found.off + found.on
    worst = max(table, key=lambda check: (check.wrong, check.max_difference, check.differing), default=None)
    return {
        "sites": len(found.off),
        "codes_compared": sum(check.compared for check in table),
        "codes_differing": sum(check.differing for check in table),
        "codes_wrong": sum(check.wrong for check in table),
        "max_difference": max((check.max_difference for check in table), default=0),
        "worst_site": worst.site if worst is not None and worst.differing else None,
    }


def size(graph: Graph, plan: Plan, files: Mapping[str, int]) -> dict[str, Any]:
    """Bytes on disk, and the mean width of the weights."""
    return {
        "float_bytes": files["float.onnx"],
        "onnx_bytes": files["model.onnx"],
        "packed_bytes": files["plan.safetensors"],
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
    return [{"what": what, "bytes": (folder / name).stat().st_size} for name, what in WEIGHED.items()]


def integer_share(graph: Graph, plan: Plan) -> float:
    """The share of multiply-accumulates whose op runs in integers; products of real numbers and codes do not."""
    read = {op.name for op in graph.ops if "weight" not in op.operands or op.operands["input"] in plan.choices}
    return sum(op.macs for op in graph.ops if op.name in plan.integer_ops and op.name in read) / max(graph.macs, 1)


def fallbacks(plan: Plan) -> Rows:
    """What was asked for and not given."""
    fields = ("site", "requested", "actual", "why", "macs_share")
    return [{field: getattr(fallback, field) for field in fields} for fallback in plan.fallbacks]


def latency(rows: Sequence[Any]) -> dict[str, Any]:
    """The first (smallest) batch of each runtime for report.json; milliseconds of a call."""
    found: dict[str, Any] = {}
    for row in rows:
        fields = ("batch", "float_ms", "quantized_ms", "ratio")
        found.setdefault(row.runtime, {field: getattr(row, field) for field in fields})
    return found


def searched(plan: Plan) -> dict[str, Rows]:
    """What the searches of a plan left in it, a table each; empty where there was none."""
    return {
        "frontier": frontier(plan),
        "units": units(plan),
        "ranking": list(cast(Any, plan.extra.get("ranking", ()))),
        "joint": joint(plan),
        "norms": norms(plan),
        "equalized": list(cast(Any, plan.extra.get("equalize", ()))),
        "rebuilt": rebuilt(plan),
    }


def frontier(plan: Plan) -> Rows:
    """Bytes of the weights against the estimated loss: all that mixed precision weighed, one width, and what was taken."""
    found = cast(Any, plan.extra.get("mixed"))
    if not found:
        return []

    def row(kind: str, point: Mapping[str, Any], bits: float) -> dict[str, Any]:
        return {"kind": kind, "label": f"{bits:.3g} bits", "bytes": point["bytes"], "loss": point["loss"], "bits": bits}

    return [
        *(row("a width for each module", point, point["mean"]) for point in found["frontier"]),
        *(row("one width", point, point["bits"]) for point in found["uniform"]),
        *(row("this run", point, point["mean"]) for point in found["frontier"] if point["taken"]),
    ]


def units(plan: Plan) -> Rows:
    """The modules of mixed precision in graph order, with the loss at the width that each was given."""
    found = cast(Any, plan.extra.get("mixed"))
    return [{**unit, "loss": unit["losses"][str(unit["bits"])]} for unit in found["units"]] if found else []


def joint(plan: Plan) -> Rows:
    """The evaluations of a joint search in order: the loss of each (None where it was infinite) and the best so far."""
    found = cast(Any, plan.extra.get("joint"))
    if not found:
        return []
    said = {key: found[key] for key in ("images", "sites", "evaluations", "out_of_time", "seconds")}
    rows = [{"evaluation": i, "loss": loss, "best": best} for i, loss, best in found["curve"]]
    return [{**row, "what": found["loss"], **(said if i == 0 else {})} for i, row in enumerate(rows)]


def rebuilt(plan: Plan) -> Rows:
    """The units of a reconstruction in order: the error on held-out images before and after, steps, whether it was kept."""
    found = cast(Any, plan.extra.get("rebuilt"))
    said = {key: found[key] for key in ("seconds", "images", "held")} if found else {}
    return [{**row, **(said if i == 0 else {})} for i, row in enumerate(found["units"] if found else ())]


def norms(plan: Plan, points: int = 41) -> Rows:
    """The loss over p: what was measured, the parabola through it, and the p that the search started from."""
    found = cast(Any, plan.extra.get("joint"))
    if not found or not found["norms"]:
        return []
    measured, fit = found["norms"], found["parabola"]
    rows = [{"kind": "measured", **row} for row in measured]
    if fit is not None:
        low, high = measured[0]["p"], measured[-1]["p"]
        over = [low + (high - low) * i / (points - 1) for i in range(points)]
        rows += [{"kind": "parabola", "p": p, "loss": (fit["a"] * p + fit["b"]) * p + fit["c"], "r2": fit["r2"]} for p in over]
    return [*rows, {"kind": "start", "p": found["p"], "loss": found["start"], "what": found["loss"]}]


def runs(found: Mapping[str, tuple[Any, Any]]) -> Rows:
    """Bytes against accuracy of several runs, and the float model; `found` has report.json and run.json by folder.

    Accuracy is agreement with the float model for all of them where one has no labels. Raises BadFile where a record lacks
    something, or where a run has another model than the first or was scored on other images.
    """
    rows: Rows = []
    hashes, measure = None, "accuracy"
    for folder, (report, record) in found.items():
        try:
            hashes = hashes or record["hashes"]
            for key, what in (("model", "has another model"), ("scored", "was scored on other images")):
                if record["hashes"][key] != hashes[key]:
                    raise BadFile(f"{folder} {what} than {next(iter(found))}; the runs of one picture share model and images.")
            bits, score, size = str(report["bits"]), report["accuracy"], report["size"]
            labelled = score["quantized"] is not None
            measure = measure if labelled else "agreement"
            rows.append(
                {
                    "kind": f"{report['recipe']}, {'a width for each module' if bits.startswith('mixed') else 'one width'}",
                    "label": bits,
                    "bytes": size["onnx_bytes"],
                    "bits": size["average_weight_bits"],
                    "accuracy": score["quantized"],
                    "agreement": score["agreement"],
                    "interval": score["interval"],
                }
            )
            if len(rows) == 1:
                whole = {"kind": "float", "label": "float model", "bytes": size["float_bytes"], "bits": 32.0}
                whole |= {"accuracy": score["float"], "agreement": 100.0, "interval": None}
        except (KeyError, TypeError, AttributeError) as error:
            raise BadFile(f"{folder}: report.json or run.json lacks {error}; write the run again with --force.") from error
    for row in (rows := [*rows, whole]):
        agreement = row.pop("agreement")
        row["measure"] = measure
        if measure == "agreement":
            row["interval"] = row["interval"] if row["accuracy"] is None else None  # it is that of the accuracy
            row["accuracy"] = agreement
    return rows
