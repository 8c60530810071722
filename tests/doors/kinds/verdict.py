"""Every number of every file of a run, changed: the proof fails or the file is refused, also where its hash was made to fit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from doors.case import Case, caught
from doors.kinds.runs import COMMANDS

Change = Callable[[Path], object]


def signed(file: str, change: Change) -> Callable[[Path], None]:
    """Change a file, and make the hashes of the run fit."""

    def put(folder: Path) -> None:
        from fewbit.folder import seal

        change(folder / "run" / file)
        seal(folder / "run")

    return put


def cases() -> Iterator[Case]:
    for file, changes, command in (("model.onnx", _onnx(6), "verify"), ("float.onnx", _onnx(3), "evaluate"),
        ("plan.safetensors", _tensors(), "verify"),
                                   ("plan.json", _plan(), "verify"), ("exported.pt2", _program(), "verify")):  # fmt: skip
        for name, change in changes:
            plain = lambda folder, file=file, change=change: change(folder / "run" / file)  # noqa: E731
            yield Case(f"{file}: {name}", COMMANDS[command], caught(), before=plain, needs=("run",))
            if file != "float.onnx":
                yield Case(f"{file}: {name}, signed", COMMANDS["verify"], caught(), before=signed(file, change), needs=("run",))
    for field, value in (
        ("runtime", "openvino"),
        ("preprocess", None),
        ("classes", ["x"]),
        ("seed", 7),
        ("target", "nope"),
        ("runtime", "nope"),
        ("schema", 99),
    ):
        yield Case(
            f"run.json: {field} {value}",
            COMMANDS["evaluate"],
            caught(),
            before=_record(field, value),
            needs=("run",),
        )
    for command in ("verify", "evaluate", "report", "bench"):
        for file in (
            "model.onnx",
            "float.onnx",
            "plan.json",
            "plan.safetensors",
            "exported.pt2",
            "images.safetensors",
            "stats.safetensors",
            "report.json",
            "tables.json",
            "calibration.json",
        ):
            yield Case(
                f"{command}: a byte behind {file}",
                COMMANDS[command],
                caught(file),
                before=lambda folder, file=file: _longer(folder / "run" / file),
                needs=("run",),
            )
    yield Case("nothing is changed", COMMANDS["verify"], _yes(), needs=("run",))
    yield Case("nothing is changed, evaluated", COMMANDS["evaluate"], _yes(), needs=("run", "classes"))


def _yes() -> Any:
    from doors.case import done

    return done()


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _record(field: str, value: object) -> Change:
    def put(folder: Path) -> None:
        path = folder / "run" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return put


def _onnx(places: int) -> Iterator[tuple[str, Change]]:
    """Each initializer of the file in turn, by its place: what holds for weights holds for scales and zero points."""
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "negated": lambda a: -a if a.dtype.kind == "f" else (a.max() - a + a.min()).astype(a.dtype),
        "doubled": lambda a: (a * 2).astype(a.dtype),
        "one more in one place": lambda a: _bumped(a, 1),
        "one less in the last place": lambda a: _bumped(a[::-1], -1)[::-1] if a.ndim else _bumped(a, -1),
        "zero": np.zeros_like,
    }
    for place in range(places):
        for name, change in changes.items():

            def put(path: Path, place: int = place, change: Callable[[np.ndarray], np.ndarray] = change) -> None:
                import onnx
                from onnx import numpy_helper

                model = onnx.load(path)
                tensors = [
                    t for t in model.graph.initializer if numpy_helper.to_array(t).dtype.kind in "fiu" and "shape" not in t.name
                ]
                tensor = tensors[place % len(tensors)]
                old = numpy_helper.to_array(tensor)
                new = np.ascontiguousarray(change(old.copy()))
                if np.array_equal(old, new):  # doubled zeros
                    new = _bumped(old, 1)
                tensor.CopyFrom(numpy_helper.from_array(new.reshape(old.shape), tensor.name))
                onnx.save(model, path)

            yield (name if place == 0 else f"{name}, tensor {place}"), put


def _bumped(array: np.ndarray, step: int) -> np.ndarray:
    new = array.copy()
    flat = new.reshape(-1)
    low = new.dtype.kind != "f" and not np.iinfo(new.dtype).min < int(flat[0]) + step <= np.iinfo(new.dtype).max
    flat[0] = flat[0] + (-step if low else step if new.dtype.kind != "f" else step * (abs(flat[0]) + 1))
    return new


def _tensors() -> Iterator[tuple[str, Change]]:
    """A bit of each tensor of the plan."""
    for place in range(10):
        for bit in (0, 6):

            def put(path: Path, place: int = place, bit: int = bit) -> None:
                content = bytearray(path.read_bytes())
                head = int.from_bytes(content[:8], "little")
                spans = sorted(v["data_offsets"] for k, v in json.loads(content[8 : 8 + head]).items() if k != "__metadata__")
                spans = [span for span in spans if span[1] > span[0]]
                content[8 + head + spans[place % len(spans)][1] - 1] ^= 1 << bit
                path.write_bytes(content)

            yield f"bit {bit} of tensor {place}", put


def _plan() -> Iterator[tuple[str, Change]]:
    """Each number and word of the plan that decides anything."""

    def edited(change: Callable[[dict[str, Any]], object]) -> Change:
        def put(path: Path) -> None:
            plan = json.loads(path.read_text())
            change(plan)
            path.write_text(json.dumps(plan))

        return put

    for place in range(5):
        for name, change in {
            "a scale doubled": lambda c: _numbers(c, "scale", lambda v: v * 2),
            "a zero point one more": lambda c: _numbers(c, "zero", lambda v: v + 1),
            "a site renamed": lambda c: c.update(site=c["site"] + "x"),
            "other bits": lambda c: _numbers(c, "bits", lambda v: v - 1), "a choice without its site": lambda c: c.pop("site"),
        }.items():  # fmt: skip
            yield (
                f"{name}, choice {place}",
                edited(lambda p, place=place, change=change: change(p["choices"][place % len(p["choices"])])),
            )
    for name, whole in {
        "no choice": lambda p: p.update(choices=[]), "a choice left out": lambda p: p["choices"].pop(),
        "a choice twice": lambda p: p["choices"].append(p["choices"][0]),
        "another target": lambda p: p.update(target="tensorrt"),
        "a target that does not exist": lambda p: p.update(target="nope"), "schema 99": lambda p: p.update(schema=99),
        "other bits": lambda p: p.update(bits="w4a4"), "biases gone": lambda p: p.update(biases=[]),
    }.items():  # fmt: skip
        yield name, edited(whole)


def _numbers(value: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Change every number of a name, however deep."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == name and isinstance(one, int | float):
                value[key] = change(one)
            elif key == name and isinstance(one, dict):
                value[key] = {k: change(v) for k, v in one.items()}
            elif key == name and isinstance(one, list):
                value[key] = [change(v) if isinstance(v, int | float) else v for v in one]
            else:
                _numbers(one, name, change)
    elif isinstance(value, list):
        for one in value:
            _numbers(one, name, change)


def _program() -> Iterator[tuple[str, Change]]:
    """A weight of the exported program, with the checksum of the archive made to fit."""
    for place in range(4):

        def put(path: Path, place: int = place) -> None:
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            names = sorted(name for name in members if "/data/weights/weight_" in name)
            content = bytearray(members[names[place % len(names)]])
            content[3] ^= 0x80  # the sign of the first number
            members[names[place % len(names)]] = bytes(content)
            with zipfile.ZipFile(path, "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, member)

        yield f"weight {place} negated in one place", put
