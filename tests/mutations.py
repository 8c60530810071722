"""Each kind of number in each file of a finished run, changed by hand."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

Change = Callable[[Path], None]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Mutation:
    """A change of one file. `named` is what a message calls it where every hash fits again; "" where no proof can see it."""

    file: str
    what: str
    change: Change
    named: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def mutations(folder: Path) -> list[Mutation]:
    """All of them, for one run."""
    return [*_model(folder), *_twin(), *_plan(folder), *_tensors(folder), *_program(folder), *_inputs(), *_records()]


def flips(folder: Path, count: int, files: tuple[str, ...] = ()) -> Iterator[Mutation]:
    """So many bits of each file, anywhere in it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        draw, name = random.Random(path.name), path.relative_to(folder).as_posix()
        for _ in range(count if not files or name in files else 0):
            place = draw.randrange(8 * path.stat().st_size)
            yield Mutation(name, f"bit {place}", _bit(place))


def _bit(place: int) -> Change:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)

    return change


def next_number(array: Array) -> Array:
    """With its last value changed by the smallest step."""
    flat = array.reshape(-1)
    flat[-1] = np.nextafter(flat[-1], np.inf, dtype=flat.dtype) if flat.dtype.kind == "f" else flat[-1] ^ 1
    return array


def _initializer(name: str, number: Callable[[Array], Array]) -> Change:
    def change(path: Path) -> None:
        model = onnx.load(path)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(number(numpy_helper.to_array(tensor).copy()), name))
        onnx.save(model, path)

    return change


def _model(folder: Path) -> Iterator[Mutation]:
    graph = onnx.load(folder / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    weight = next(name for name, value in tensors.items() if name.endswith("weight") and value.dtype == np.int8)
    bias = next(name for name, value in tensors.items() if value.dtype == np.int32 and value.ndim == 1)
    _, scale, zero = quantizers[0].input
    for name, what in ((weight, "a weight's code"), (bias, "a bias"), (scale, "a scale"), (zero, "a zero point")):
        yield Mutation("model.onnx", what, _initializer(name, next_number), name)
    for name, what in ((weight, "a weight negated"), (bias, "a bias negated")):
        yield Mutation("model.onnx", what, _initializer(name, np.negative), name)

    def attribute(path: Path) -> None:
        model = onnx.load(path)
        node = next(node for node in model.graph.node if node.op_type == "Conv")
        next(a for a in node.attribute if a.name == "strides").ints[:] = [3, 3]
        onnx.save(model, path)

    yield Mutation("model.onnx", "the stride of a convolution", attribute, "Conv")


def _twin() -> Iterator[Mutation]:
    def every(path: Path) -> None:
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
        onnx.save(model, path)

    yield Mutation("float.onnx", "a weight", _initializer("head.weight", next_number), "head.weight")
    yield Mutation("float.onnx", "a bias negated", _initializer("head.bias", np.negative), "float.onnx")
    yield Mutation("float.onnx", "every weight zero", every, "float.onnx")


def edited(edit: Callable[[Any], object]) -> Change:
    """A change of a JSON file's value."""

    def change(path: Path) -> None:
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value, indent=1) + "\n")

    return change


def _plan(folder: Path) -> Iterator[Mutation]:
    choices = json.loads((folder / "plan.json").read_text())["choices"]
    read = next(i for i, choice in enumerate(choices) if choice["role"] == "input")
    weight = next(i for i, choice in enumerate(choices) if choice["role"] == "weight")

    def of(place: int, key: str, value: Any) -> Callable[[Any], object]:
        return lambda plan: plan["choices"][place].update({key: value(plan["choices"][place][key])})

    edits: tuple[tuple[str, Callable[[Any], object], str], ...] = (
        ("a scale doubled", of(read, "scale", lambda scale: 2 * scale), "scale"),
        ("a zero point", of(read, "zero", lambda zero: zero + 1), "zero"),
        ("the largest scale of a weight", of(weight, "scale", lambda s: {**s, "max": 2 * s["max"]}), "scale"),
        ("a weight's zero point", of(weight, "zero", lambda zero: zero + 1), "weight"),
        ("the bits of a choice", of(read, "bits", lambda bits: bits - 1), "bits"),
        ("the bits of a grid", of(read, "grid", lambda grid: {**grid, "bits": 4}), "bits"),
        ("the sign of a grid", of(read, "grid", lambda grid: {**grid, "signed": not grid["signed"]}), "model.onnx"),
        ("a choice left out", lambda plan: plan["choices"].pop(weight), "plan"),
        ("a bias left out", lambda plan: plan["biases"].pop(), "plan"),
        ("an integer op left out", lambda plan: plan["integer_ops"].pop(), "plan"),
        ("an integer op renamed", lambda plan: plan["integer_ops"].append("other"), "plan"),
        ("the bits", lambda plan: plan.update(bits="w4a4"), "bits"),
        ("the target", lambda plan: plan.update(target="arm-int7"), "target"),
        ("the recipe", lambda plan: plan.update(recipe="minmax"), "recipe"),
        ("the model's name", lambda plan: plan.update(model="another"), "model"),
        ("the schema", lambda plan: plan.update(schema=99), "schema"),
        ("a key more", lambda plan: plan.update(extra=None), "extra"),
        ("the words of a method", of(read, "method", lambda method: method + "?"), ""),
    )
    for what, edit, named in edits:
        yield Mutation("plan.json", what, edited(edit), named)


def _tensor(name: str) -> Change:
    def change(path: Path) -> None:
        tensors = load_file(path)
        save_file({**tensors, name: next_number(tensors[name].copy())}, path)

    return change


def _tensors(folder: Path) -> Iterator[Mutation]:
    names = sorted(load_file(folder / "plan.safetensors"))
    for kind in (":weight.codes", ":weight.scale", ":input.scale", ":input.zero", ".bias", "float."):
        name = next(name for name in names if name.startswith(kind) or name.endswith(kind))
        yield Mutation("plan.safetensors", name, _tensor(name), name.removeprefix("float.").rsplit(".", 1)[0].split(":")[0])


def _program(folder: Path) -> Iterator[Mutation]:
    with zipfile.ZipFile(folder / "exported.pt2") as archive:
        name = next(name for name in archive.namelist() if "/data/weights/weight_" in name)

    def change(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members[name] = members[name][:3] + bytes([members[name][3] ^ 0x80]) + members[name][4:]  # the sign of a number
        with zipfile.ZipFile(path, "w") as archive:  # with the checksum of what is written
            for member, content in members.items():
                archive.writestr(member, content)

    yield Mutation("exported.pt2", "a weight", change, "exported.pt2")


def _inputs() -> Iterator[Mutation]:
    def change(path: Path) -> None:
        save_file({name: next_number(value.copy()) for name, value in load_file(path).items()}, path)

    yield Mutation("images.safetensors", "a pixel of each image", change)
    yield Mutation("stats.safetensors", "a number of each site", change)
    yield Mutation("calibration.json", "the number of images", edited(lambda found: found.update(images=1)))


def _records() -> Iterator[Mutation]:
    for name, named in (("model", "model"), ("target", "target"), ("recipe", "recipe"), ("bits", "bits"), ("accuracy", "")):
        yield Mutation("report.json", name, edited(lambda report, name=name: report.update({name: "x"})), named)
    yield Mutation("tables.json", "a check", edited(lambda tables: tables["checks"][0].update(wrong=7)))
    yield Mutation("report.html", "a letter", lambda path: path.write_text(path.read_text().replace("fewbit", "fewbyt", 1)))
    edits: dict[str, Callable[[Any], object]] = {
        "the hash of the model": lambda record: record["hashes"].update(model="0" * 64),
        "the file's opset": lambda record: record["file_format"].update(opset=record["file_format"]["opset"] - 1),
        "the mean of the images": lambda record: record["preprocess"].update(mean=[0.0, 0.0, 0.0]),
        "the names of the classes": lambda record: record.update(classes=["a"]),
        "the seed": lambda record: record.update(seed=7),
        "the runtime": lambda record: record.update(runtime="openvino"),
        "a key less": lambda record: record.pop("file_format"),
    }
    yield Mutation("run.json", "a key more", edited(lambda record: record.update(extra=1)))
    for what, edit in edits.items():
        yield Mutation("run.json", what, edited(edit), "run.json")
