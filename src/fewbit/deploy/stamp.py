"""How the integer file was made and what was measured of it: one entry of JSON in its metadata, `fewbit.made`.

It is written when the file has been verified and scored, so it names the file that was: `measured.sha256` is that of the file
without the entry, and `sha256` that of the entry without this. Nothing in front of the entry changes. Times are those of a
machine; they stand in report.json, where `times` finds them beside the file, and the same request gives the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from fewbit.core.record import MADE
from fewbit.errors import BadFile
from fewbit.files import sha256, text_digest, write_atomic
from fewbit.onnx_file import DATA, is_external, load_proto

if TYPE_CHECKING:
    import onnx

    from fewbit.core.plan import Plan

Json = Any
OWN = "sha256"  # in the entry, of what else is in it
DIGITS = 4  # of a measure; what is behind them depends on the order of float sums
RECORDED = ("task", "runtime", "seed", "hashes", "classes")  # of run.json
FOUND = ("right", "problems", "sites", "codes_compared", "codes_wrong")
SCORED = ("measure", "unit", "float", "quantized", "agreement_measure", "agreement", "interval", "runtime", "why")


@dataclass(frozen=True)
class Stamp:
    """What a file says of itself: `entries` by their names, JSON where it is some; `intact`: it is the file that was measured,
    None where it does not say which one that was; `as_made`: the entry says what fewbit wrote, None where there is none.
    """

    entries: Mapping[str, Json]
    intact: bool | None
    as_made: bool | None


def made(plan: Plan, record: Mapping[str, Json], report: Mapping[str, Json]) -> dict[str, Json]:
    """The entry, but for the hash: from the plan, run.json, and the parts `verify`, `accuracy` and `images` of report.json."""
    found = {**report["verify"], "right": not report["verify"]["problems"]}
    measured = {name: found[name] for name in FOUND} | {name: _short(report["accuracy"][name]) for name in SCORED}
    return {
        "fewbit": record["versions"]["fewbit"],
        "model": PurePath(plan.model).name,
        "target": plan.target,
        "recipe": plan.recipe,
        "bits": plan.bits,
        "left_alone": list(plan.exemptions),
        **{name: record[name] for name in RECORDED},
        "inputs": [_sizes(one, record["batch"]) for one in record["inputs"]],
        "measured": {**measured, "images": report["images"]["scored"]},
    }


def _sizes(one: Mapping[str, Json], batch: int | None) -> str:
    """An input of run.json with its shape; where images may have other sizes, that one which was measured."""
    others = one.get("others", ())
    free = [any(other[i] != n for other in others) for i, n in enumerate(one["shape"])]
    sizes = [f"any (here {n})" if is_free else str(n) for n, is_free in zip(one["shape"], free, strict=True)]
    rows = [str(batch or "batch")] if one["batch"] else []
    return f"{one['name']}: {' x '.join(rows + sizes) or 'a number'}"


def _short(value: Json) -> Json:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def times(report: Mapping[str, Json], record: Mapping[str, Json]) -> dict[str, Json]:
    """How fast the file was, with the machine that said so, from report.json and run.json; empty where nothing was timed."""
    paid, machine = report["pays"], record["machine"]
    if paid is None:
        return {}
    low, high = paid["interval"]
    return {
        "processor": machine["processor"],
        "threads": paid["threads"] or machine["threads"],
        "runtime": paid["runtime"],
        "batch": paid["batch"],
        "milliseconds": _timed(paid["ms"], paid["spread"]),
        "fastest float model": f"{_timed(paid['float_ms'], paid['float_spread'])} in {paid['float_runtime']}",
        "times as fast": f"{paid['ratio']:.3f} in paired rounds, 95 % interval {low:.3f} to {high:.3f}",
        "pays": paid["pays"],
    }


def _timed(median: float, spread: Sequence[float]) -> str:
    return f"{median:.3g} ms (middle half {spread[0]:.3g} to {spread[1]:.3g})"


def stamp(path: Path, entry: Mapping[str, Json]) -> None:
    """Write the entry into a file, in the place of one that it may have."""
    content = stamped(load_proto(path, data=False), entry, path).SerializeToString()
    write_atomic(path, lambda part: part.write_bytes(content))


def stamped(model: onnx.ModelProto, entry: Mapping[str, Json], path: Path | None = None) -> onnx.ModelProto:
    """The model with the entry behind all others; `path` is its file, whose large weights may stand beside it."""
    digest = _without(model, path)
    whole = {name: value for name, value in entry.items() if name != OWN}
    whole["measured"] = {**entry["measured"], "sha256": digest}
    own = {} if OWN in entry else {OWN: text_digest(whole)}
    model.metadata_props.add(key=MADE, value=_text({**whole, **own}))
    return model


def _text(entry: Mapping[str, Json]) -> str:
    return json.dumps(entry, allow_nan=False)


def as_stored(entry: Mapping[str, Json], model: onnx.ModelProto) -> dict[str, Json]:
    """The entry with the keys of the one in a file alone, in their order: an older fewbit may have known fewer, and those that
    it wrote are what can be compared. Keys that are the file's alone are left out, so that it differs.
    """
    stored = next((_parsed(one.value) for one in model.metadata_props if one.key == MADE), None)
    if not isinstance(stored, dict) or not isinstance(stored.get("measured"), dict):
        return dict(entry)
    known = {name: _keys_of(entry[name], value) for name, value in stored.items() if name in entry}
    return known if OWN in stored else {**known, OWN: None}  # without a digest of its own, then


def _keys_of(ours: Json, theirs: Json) -> Json:
    """A value, and of a dict what the other has."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ours
    return {name: _keys_of(ours[name], value) for name, value in theirs.items() if name in ours}


def read(path: Path) -> Stamp:
    """What a file says of itself. Raises BadFile for a broken one, for one in a runtime's own form, and where the entry is none
    of fewbit's.
    """
    _refuse_forms(path)
    model = load_proto(path, data=False)
    if not model.graph.output:
        raise BadFile(f"{path} holds no graph, so it is no ONNX file; give one, as in fewbit show run/model.onnx.")
    entries = {entry.key: _parsed(entry.value) for entry in model.metadata_props}
    if MADE not in entries:
        return Stamp(entries, None, None)
    try:
        said, text = entries[MADE]["measured"]["sha256"], next(e.value for e in model.metadata_props if e.key == MADE)
        rest = {name: value for name, value in entries[MADE].items() if name != OWN}
        own = _text({**rest, OWN: text_digest(rest)}) == text
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadFile(f"{path}: its metadata entry {MADE} is not as fewbit writes it; make the file again.") from error
    entries[MADE].pop(OWN, None)
    return Stamp(entries, said == _without(model, path), own)


def _refuse_forms(path: Path) -> None:
    """Raise BadFile for a file that `fewbit export` wrote in the form of a runtime, which holds nothing that can be shown."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:  # which is said when it is read
        return
    weights = path.suffix == ".bin" and path.with_suffix(".xml").is_file()
    form = "onnxruntime's own form" if head[4:8] == b"ORTM" else "openvino's IR" if head.startswith(b"<?xml") or weights else ""
    if form:
        raise BadFile(
            f"{path} is {form}, which cannot be shown. How it was made and what was measured stands in the run that it was "
            "exported from: fewbit show RUN, or fewbit show RUN/model.onnx."
        )


def target_of(path: Path) -> str:
    """The target that a file says it was made for; empty where it does not say. Raises BadFile for a broken one."""
    entry = next((_parsed(one.value) for one in load_proto(path, data=False).metadata_props if one.key == MADE), None)
    target = entry.get("target") if isinstance(entry, dict) else None
    return target if isinstance(target, str) else ""


def _without(model: onnx.ModelProto, path: Path | None) -> str:
    """Take the entry out of a model, and give the SHA-256 of what is left, with the file beside it."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != MADE]
    del model.metadata_props[:]
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)
    content = hashlib.sha256(model.SerializeToString(deterministic=True))
    if path is not None and is_external(path):
        content.update(sha256(path.with_name(path.name + DATA)).encode())
    return content.hexdigest()


def _parsed(text: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
