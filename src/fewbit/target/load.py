"""Reads a target file and the one that it extends, and detects this machine's target. Every error names file and line."""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from fewbit.errors import BadFile, UnknownName
from fewbit.runtimes import AS_WRITTEN, RUNNABLE, runtime_names
from fewbit.target.contradictions import contradictions
from fewbit.target.lines import Location, line_of, syntax_error
from fewbit.target.spec import Target

HERE = Path(__file__).parent
LARGEST, DEEPEST, LONGEST = 200_000, 8, 8  # bytes of a file, levels of lists and tables, files that extend one another
OWN = ("name", "about")  # fields that are not inherited from the file that it extends


@dataclass(frozen=True)
class _File:
    path: Path
    text: str

    def error(self, location: Location, message: str) -> BadFile:
        line = line_of(self.text, location)
        return BadFile(f"target file {self.path}, line {line}: {message}. docs/targets.md describes every field.")


@dataclass(frozen=True)
class _Entry:
    """A value of a target and where it is written."""

    value: Any
    file: _File
    at: Location


@dataclass(frozen=True)
class _Document:
    """The merged contents of a file and the files that it extends."""

    file: _File
    fields: dict[str, _Entry]
    types: dict[str, _Entry]
    ops: list[_Entry]

    @property
    def whole(self) -> dict[str, Any]:
        fields = {name: entry.value for name, entry in self.fields.items()}
        types = {name: entry.value for name, entry in self.types.items()}
        return {**fields, "types": types, "op": [entry.value for entry in self.ops]}

    def _entry(self, location: Location) -> tuple[_Entry | None, Location]:
        """What a location is in, and the rest of its path there."""
        if len(location) > 1 and location[0] in ("op", "types"):
            return self.ops[int(location[1])] if location[0] == "op" else self.types[str(location[1])], location[2:]
        return self.fields.get(str(location[0])), location[1:]

    def says(self, location: Location) -> bool:
        """Whether a field is written in the file itself, not in one that it extends."""
        entry, _ = self._entry(location)
        return entry is not None and entry.file is self.file

    def error(self, location: Location, message: str) -> BadFile:
        """An error about a field of the merged document, with the file and line where that is written."""
        entry, rest = self._entry(location)
        return self.file.error(location, message) if entry is None else entry.file.error((*entry.at, *rest), message)


def target_names() -> list[str]:
    """The targets that come with fewbit."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_target(name: str) -> Target:
    """A target of ours by name, or a user's file by its path. Raises UnknownName, or BadFile with the line at fault."""
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not os.path.isfile(path):
        if name.endswith(".toml"):
            raise BadFile(f"target file {name} does not exist. `fewbit targets` lists those that come with fewbit.")
        raise UnknownName("target", name, target_names(), "A file of your own is named by its path: --target my.toml.")
    document = _read(path, ())
    try:
        target = Target.model_validate_json(json.dumps(document.whole, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        got = "" if first["type"] == "missing" else f" (found {first['input']!r:.80})"
        raise document.error(
            first["loc"], f"{where}: {first['msg'].removeprefix('Value error, ')}{got}{_near_fields(first)}"
        ) from error
    found = list(contradictions(target))
    for _, message in found[:1]:
        places = [location for location, same in found if same == message]
        raise document.error(next(filter(document.says, places), places[0]), message)
    return target


def _text(path: Path) -> _File:
    """A target file as it is written. Raises BadFile where it cannot be read, is not text, or far too large."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFile(
            f"target file {path} cannot be read: {error.strerror}. Give one that can, or a name of `fewbit targets`."
        ) from error
    if len(content) > LARGEST:
        raise BadFile(f"target file {path} has {len(content):,} bytes; a target has a few thousand. Is it another file?")
    try:
        return _File(path, content.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadFile(
            f"target file {path}, line {line}: byte {content[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _read(path: Path, readers: tuple[Path, ...]) -> _Document:
    """The contents of a file merged over those of the file that it extends; `readers` are the files that extend this one."""
    file = _text(path)
    try:
        fields = tomllib.loads(file.text)
    except RecursionError:
        raise BadFile(
            f"target file {path} is nested too deeply; lists and tables of a target go {DEEPEST} deep at most."
        ) from None
    except ValueError as error:
        line, fault = syntax_error(file.text, error)
        raise BadFile(f"target file {path}, line {line}: {fault}. docs/targets.md describes every field.") from error
    for name, value in fields.items():
        if _deeper(value, DEEPEST):
            raise file.error((name,), f"{name} is nested too deeply; lists and tables of a target go {DEEPEST} deep at most")
    extends, remove = fields.pop("extends", None), fields.pop("remove", [])
    own = _document(file, fields)
    if not isinstance(remove, list) or (remove and extends is None):
        raise file.error(("remove",), 'remove lists kinds of op of the target that this file extends: remove = ["matmul"]')
    if extends is None:
        return own
    base = path.parent / str(extends) if str(extends).endswith(".toml") else HERE / f"{extends}.toml"
    if not os.path.isfile(base):
        near = difflib.get_close_matches(str(extends), target_names(), n=1)
        there = f"did you mean {near[0]}?" if near else f"there are {', '.join(target_names())}, and paths from this file"
        raise file.error(("extends",), f"extends: no target '{extends}'; {there}")
    if len(readers) == LONGEST:
        raise file.error(("extends",), f"extends: '{extends}' is the {LONGEST + 1}th file in a row; {LONGEST} are allowed")
    if base.resolve() in [reader.resolve() for reader in (path, *readers)]:
        raise file.error(("extends",), f"extends: '{extends}' extends this file, so neither is the first")
    return _over(_read(base, (path, *readers)), own, remove)


def _document(file: _File, fields: dict[str, Any]) -> _Document:
    """The contents of one file alone; an op with a list of kinds becomes one entry for each."""
    types, entries = fields.pop("types", {}), fields.pop("op", [])
    if not isinstance(types, dict):
        raise file.error(("types",), "types: each has a table of its own, [types.NAME]")
    if not isinstance(entries, list) or not all(isinstance(op, dict) for op in entries):
        raise file.error(("op",), "op: each has a table of its own, [[op]]")
    ops = []
    for i, op in enumerate(entries):
        kinds = op["kind"] if isinstance(op.get("kind"), list) else [op.get("kind")]
        if not kinds or not all(isinstance(kind, str) for kind in kinds):
            raise file.error(("op", i, "kind"), f"op.{i}: kind is a name, or a list of names whose entries are alike")
        ops += [_Entry({**op, "kind": kind}, file, ("op", i)) for kind in kinds]
    return _Document(
        file,
        {name: _Entry(value, file, (name,)) for name, value in fields.items()},
        {name: _Entry(value, file, ("types", name)) for name, value in types.items()},
        ops,
    )


def _over(base: _Document, own: _Document, remove: Sequence[str]) -> _Document:
    """A file merged over its base: fields and types are replaced by name, ops by kind, in the order of the base.

    Types of the base that no op reads any more are left out.
    """
    kinds = list(dict.fromkeys(op.value.get("kind") for op in base.ops))
    for kind in remove:
        if kind not in kinds:
            message = f"remove: {base.file.path.stem} has no op '{kind}'; it has {', '.join(map(str, kinds))}"
            raise own.file.error(("remove",), message)

    def of(kind: str, document: _Document) -> list[_Entry]:
        return [op for op in document.ops if op.value.get("kind") == kind]

    ops = [op for kind in kinds if kind not in remove for op in of(kind, own) or of(kind, base)]
    ops += [op for op in own.ops if op.value.get("kind") not in kinds or op.value.get("kind") in remove]
    operands = [op.value["operands"] for op in ops if isinstance(op.value.get("operands"), dict)]
    used = {name for names in operands for listed in names.values() if isinstance(listed, list) for name in listed}
    types = {name: entry for name, entry in base.types.items() if name in used} | own.types
    fields = {name: entry for name, entry in base.fields.items() if name not in OWN} | own.fields
    return _Document(own.file, fields, types, ops)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and tables are nested deeper than so many levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_deeper(part, levels - 1) for part in inner))


def _near_fields(error: Any) -> str:
    """The valid fields, for an error about an unknown one."""
    if error["type"] != "extra_forbidden":
        return ""
    model: Any = Target
    for part in error["loc"][:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is not None:
            inner = [a for a in (field.annotation, *get_args(field.annotation)) if hasattr(a, "model_fields")]
            model = inner[0] if inner else model
    names = [field.alias or name for name, field in model.model_fields.items()]
    names += ["extends", "remove"] if model is Target else []
    near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; allowed are {', '.join(names)}"


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(listed.group(1).split()) if listed else frozenset()


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def absent(target: Target) -> str:
    """What of a target this machine does not have, in words; nothing where its milliseconds can be measured here."""
    if target.runtime not in runtime_names():
        return f"{target.runtime} is not installed" if target.runtime in RUNNABLE else f"{target.runtime} does not run here"
    if not target.fits(platform.machine(), processor_flags()):
        return f"{target.name} needs {target.processor}, and this is {processor()}"
    return ""


def detect(runtime: str = AS_WRITTEN, machine: str | None = None, flags: frozenset[str] | None = None) -> str:
    """The name of the first target (best first) for this machine and runtime. Raises UnknownName where none fits."""
    machine = platform.machine() if machine is None else machine
    flags = processor_flags() if flags is None else flags
    targets = [load_target(name) for name in target_names()]
    fits = [
        (max(len(need) for need in target.requires if flags.issuperset(need)), target.name)
        for target in targets
        if target.detected and target.runtime == runtime and target.fits(machine, flags)
    ]
    if not fits:
        raise UnknownName("target for this machine", f"{runtime}, {machine}", target_names(), "Give one with --target.")
    return max(fits)[1]
