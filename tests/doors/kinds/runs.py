"""Files of a finished run that lack, are broken, or hold something else; for each command that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from doors.case import Case, caught, quantize, refused, write

CONTENTS: dict[str, bytes] = {
    "empty": b"", "{}": b"{}", "[]": b"[]", "null": b"null", "a number": b"3", "text": b'"x"',
    "half of an object": b'{"schema": 1, "mod', "not UTF-8": b"\xff\xfe{}", "NaN": b"NaN",
    "a deep nest": b"[" * 100_000, "a deep nest of objects": b'{"a":' * 50_000, "a list of nulls": b"[null, null]",
    "huge numbers": b'{"schema": ' + b"9" * 5000 + b"}", "zeros": bytes(500),
}  # fmt: skip
READ: dict[str, tuple[str, ...]] = {  # file -> the commands that read it
    "run.json": ("verify", "evaluate", "report", "bench"),
    "plan.json": ("verify", "diff"),
    "report.json": ("report", "diff", "beside"),
    "tables.json": ("report",),
    "plan.safetensors": ("verify",),
    "images.safetensors": ("verify",),
    "exported.pt2": ("verify",),
    "model.onnx": ("verify", "evaluate", "bench", "lint"),
    "float.onnx": ("evaluate", "bench"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "run"), "evaluate": ("evaluate", "run", "--images", "classes", "--no-labels"),
    "report": ("report", "run"), "bench": ("bench", "run", "--seconds", "0.01", "--batch", "1"),
    "diff": ("diff", "run", "run"), "beside": ("report", "run", "--beside", "run"), "lint": ("lint", "run/model.onnx"),
}  # fmt: skip
INSTEAD: tuple[Any, ...] = (None, [], {}, "x", -1, True, 1e308)  # what a field may hold instead


def cases() -> Iterator[Case]:
    for file, commands in READ.items():
        for command in commands:
            contents = CONTENTS if file.endswith(".json") else {k: CONTENTS[k] for k in ("empty", "{}", "zeros", "not UTF-8")}
            for name, content in contents.items():
                yield Case(
                    f"{command}: {file} is {name}",
                    COMMANDS[command],
                    refused(file),
                    before=write(f"run/{file}", content),
                    needs=("run",),
                )
            yield Case(
                f"{command}: no {file}",
                COMMANDS[command],
                refused(file),
                before=lambda folder, file=file: (folder / "run" / file).unlink(),
                needs=("run",),
            )
            yield Case(f"{command}: {file} is a folder", COMMANDS[command], refused(file), before=_folder(file), needs=("run",))
            yield Case(f"{command}: {file} is cut", COMMANDS[command], refused(file), before=_cut(file), needs=("run",))
    for file, fields in FIELDS.items():
        for field in fields:
            for i, value in enumerate(("lacks", *INSTEAD)):
                command = COMMANDS["report" if file in ("report.json", "tables.json") else "verify"]
                change = _edit(
                    file,
                    field,
                    value if i else ...,
                )
                yield Case(
                    f"{file}: {field} {value!r}" if i else f"{file}: {field} lacks",
                    command,
                    caught(),
                    before=change,
                    needs=("run",),
                )
    yield from _parts()


FIELDS: dict[str, tuple[str, ...]] = {
    "run.json": ("preprocess", "classes", "runtime", "outputs"),
    "plan.json": ("choices", "schema", "target", "biases", "fallbacks"),
    "report.json": ("accuracy", "verify", "size", "images"),
}


def _edit(file: str, field: str, value: Any) -> Callable[[Path], None]:
    """Another value of a field, or none; `...` takes it out."""

    def put(folder: Path) -> None:
        path = folder / "run" / file
        content = json.loads(path.read_text())
        content.pop(field, None)
        path.write_text(json.dumps(content if value is ... else {**content, field: value}))

    return put


def _folder(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / "run" / name).unlink()
        (folder / "run" / name).mkdir()

    return put


def _cut(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        content = (folder / "run" / name).read_bytes()
        (folder / "run" / name).write_bytes(content[: len(content) // 2])

    return put


def _parts() -> Iterator[Case]:
    """Files of a run that was killed, which the same request would go on from."""
    for name in ("{}", "[]", "null", "half of an object", "a deep nest", "not UTF-8", "zeros"):
        yield Case(
            f"request.json of a .part is {name}",
            quantize(),
            refused("out.part"),
            before=write("out.part/request.json", CONTENTS[name]),
        )
