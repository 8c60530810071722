"""`deploy/`: everything that a program needs to answer with the integer file, beside it or with it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx
import torch

from fewbit.core.graph import Graph
from fewbit.core.inputs import arrays_of, example, image_among
from fewbit.data.prepare import around
from fewbit.deploy.program import program
from fewbit.deploy.python.pictures import MODES
from fewbit.files import write_atomic, write_json
from fewbit.folder import MODEL
from fewbit.task import task_of

Json = Any
FOLDER = "deploy"


@dataclass(frozen=True)
class About:
    """What the folder says of the run: the model's name, its target, recipe, bits and runtime, the names of the classes, and
    what the file takes (the entry `fewbit.preprocess`).
    """

    model: str
    target: str
    recipe: str
    bits: str
    runtime: str
    classes: Sequence[str]
    images: Mapping[str, Json]


def write(folder: Path, graph: Graph, about: About) -> Path:
    """Write the folder."""
    pieces, task = decoded(graph)
    outputs = list(graph.tail.gives) if graph.tail else [output.name for output in graph.outputs]
    task |= {"input": graph.input_name, "outputs": outputs, "batch": graph.in_a_file(1), "classes": list(about.classes) or None}
    pictures = ("prepare", *(["processed"] if about.images.get("processor") else []), "pictures")
    pieces = (*pictures, "session", *pieces, "program")
    task |= {"file": MODEL, "runtime": about.runtime, "pieces": list(pieces)}
    write_json(folder / "preprocess.json", dict(about.images))
    write_json(folder / "task.json", task)
    others = {one.name: one for one in graph.inputs if not one.is_image}
    if others:
        write_atomic(folder / "inputs.npz", lambda part: _save(part, _constants(graph)))
    name = re.sub(r"[^\w .:+-]", "_", about.model)
    images, examples = {"processor": "", **about.images}, _examples(graph, about.images)
    values = {"about": about, "name": name, "task": task, "images": images, "examples": examples}
    values |= {"others": list(others), "each": any(one.each for one in others.values()), "page": "example.html" in examples}
    values |= {"picture": picture_name(images["size"][0]), "modes": MODES}
    values |= {"around": [round(255 * value) for value in around(images)]}
    text = program(rendered("predict.txt", values), pieces)
    written = {"README.md": rendered("README.md", values), "predict.py": text}
    for file, content in {**written, **{file: rendered(file, values) for file in examples}}.items():
        write_atomic(folder / file, lambda part, content=content: part.write_text(content, encoding="utf-8"))  # type: ignore[misc]
    return folder


def decoded(graph: Graph) -> tuple[tuple[str, ...], dict[str, Json]]:
    """The pieces that make an answer of the outputs, and the numbers that they need, as the task says. Behind a tail the answer
    is the outputs.
    """
    task = task_of(graph)
    pieces, fields = (("numbers",), {}) if graph.tail else task.program()
    return pieces, {"task": task.spec, **fields}


def picture_name(channels: int) -> str:
    """A picture as examples call it, of a kind that a model of so many channels is given: with alpha for four, and an array for
    those that no picture has.
    """
    return "picture.jpg" if channels in (1, 3) else "picture.png" if channels in MODES else "picture.npy"


def _constants(graph: Graph) -> dict[str, np.ndarray[Any, Any]]:
    """What the inputs that are no image are given, in the types of the file."""
    images = torch.zeros(graph.in_a_file(1), *image_among(graph.inputs).shape)
    types = {port.name: onnx.helper.tensor_dtype_to_np_dtype(port.type) for port in graph.ports}
    arrays = zip(graph.inputs, arrays_of(graph.inputs, example(graph.inputs, images)), strict=True)
    return {one.name: x.astype(types.get(one.name, x.dtype)) for one, x in arrays if not one.is_image}


def _save(part: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _examples(graph: Graph, images: Mapping[str, Json]) -> tuple[str, ...]:
    """The examples in other languages: of files that take nothing but the image, as float32 or pixels; for browsers of images
    that a canvas makes as predict.py does, which are grey or of three colours, and of no image processor.
    """
    if len(graph.inputs) > 1 or images["dtype"] not in ("float32", "uint8"):
        return ()
    drawn = images["size"][0] in (1, 3) and not images.get("processor")
    return ("example.cpp", "example.mjs", "example.html") if drawn else ("example.cpp",)


def rendered(name: str, values: Mapping[str, Json]) -> str:
    """A template with these values; what is HTML is escaped."""
    loader = jinja2.PackageLoader("fewbit.deploy", "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=".html" in name,
    )  # fmt: skip
    environment.filters |= {"cpp": _cpp, "code": _code, "shell": shlex.quote, "literal": _literal}
    return environment.get_template(f"{name}.j2").render(values)


def _cpp(text: str) -> str:
    """A text as a literal of C++: what is not plain ASCII as octal bytes."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode()) + '"'


def _code(text: str) -> str:
    """A text of one line as code in Markdown, whatever it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def _literal(text: str) -> str:
    """A text as a literal of Python."""
    return json.dumps(text, ensure_ascii=False)
