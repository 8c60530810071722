"""The schema of a target file, and reading one. Every field of a TOML file is checked; a message names its line."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewbit.errors import BadFile, UnknownName
from fewbit.grid import Grid

HERE = Path(__file__).parent
Kind = Literal["linear", "conv", "depthwise", "matmul", "add", "avgpool"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Type(Strict):
    """One integer type that an operand may have. `fixed_scale` pins the step whatever the data say (softmax: 1/256 at 8 bits);
    fewer bits than the type's have the same range in larger steps. A `loose` one is custom, not need: the kernels take any.

    `container`: the bits that a code takes in the file and in memory, where that is more than the smallest that hold it.
    """

    bits: int = Field(ge=1, le=32)
    signed: bool
    narrow: bool = False
    symmetric: bool = True
    granularity: Literal["tensor", "channel"] = "tensor"
    fixed_scale: float | None = Field(default=None, gt=0)
    loose: bool = False
    container: Literal[0, 8, 16, 32] = 0

    def grid(self, axis: int | None, bits: int | None = None) -> Grid:
        """The grid of this type with `bits` (at most its own: fewer bits live in the same container)."""
        bits = self.bits if bits is None else min(bits, self.bits)
        axis = axis if self.granularity == "channel" else None
        return Grid(bits, self.signed, self.narrow, self.symmetric, axis, stored=self.container)

    def step(self, grid: Grid) -> float | None:
        """The pinned step on a grid of this type, None where there is none."""
        return None if self.fixed_scale is None else self.fixed_scale * 2.0 ** (self.bits - grid.bits)


class Accumulator(Strict):
    """`bits` of the running sum. `pair_bits`: two neighbouring products are first added in so many bits, with saturation.

    `chain_bits`: `chain` products are first added in so many bits; operands whose products could leave them are not legal.
    """

    bits: int = 32
    overflow: Literal["wrap", "saturate"] = "wrap"
    pair_bits: int | None = None
    chain_bits: int | None = Field(default=None, ge=2)
    chain: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.chain is None) != (self.chain_bits is None):
            raise ValueError("chain and chain_bits belong together: so many products in so many bits")
        return self


class OpRule(Strict):
    """What one kind of op accepts.

    operands    operand name -> names of types, best first; an operand that is not listed stays float
    output      "float": the result is float; "integer": it must be quantized at once, and every reader reads the codes
    runs        "integer": always; "float": legal in integers but slower there (`why` says where it was measured);
                "follow": in integers where all of its operands have been quantized for others anyway
    readers     "integer": only integer ops read the codes of the input; "all": every reader does
    """

    kind: Kind
    operands: Mapping[str, tuple[str, ...]]
    output: Literal["float", "integer"] = "float"
    runs: Literal["integer", "float", "follow"] = "integer"
    readers: Literal["integer", "all"] = "integer"
    accumulator: Accumulator = Accumulator()
    why: str = ""


class Target(Strict):
    """A runtime on a kind of processor. `requires`: alternatives of processor flags; the first line that fits is enough.

    `detected`: may be picked for a machine that it fits; otherwise it is there for who asks for it.
    """

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    about: str
    runtime: Literal["onnxruntime", "openvino"]
    machine: str = ".*"
    requires: tuple[tuple[str, ...], ...] = ((),)
    detected: bool = True
    opset: int = Field(default=20, ge=13)
    types: Mapping[str, Type]
    op: tuple[OpRule, ...]

    def rule(self, kind: str) -> OpRule | None:
        return next((rule for rule in self.op if rule.kind == kind), None)


def target_names() -> list[str]:
    """The targets that come with fewbit."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_target(name: str) -> Target:
    """A target of ours by name, or a user's file by its path. Raises UnknownName, or BadFile with the line at fault."""
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise BadFile(f"target file {name} does not exist. `fewbit targets` lists those that come with fewbit.")
        raise UnknownName("target", name, target_names(), "A file of your own is named by its path: --target my.toml.")
    text = path.read_text(encoding="utf-8")
    try:
        target = Target.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise BadFile(f"target file {path.name} is not TOML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        line = line_of(text, first["loc"])
        raise BadFile(
            f"target file {path.name}, line {line}: {where}: {first['msg']} (found {first['input']!r:.80}). "
            "docs/targets.md describes every field."
        ) from error
    for i, rule in enumerate(target.op):
        for operand, names in rule.operands.items():
            if missing := [name for name in names if name not in target.types]:
                line = line_of(text, ("op", i, "operands", operand))
                raise BadFile(
                    f"target file {path.name}, line {line}: op {rule.kind}: operand {operand} names type '{missing[0]}'; "
                    f"there are {', '.join(sorted(target.types))}."
                )
    return target


def line_of(text: str, location: tuple[int | str, ...]) -> int:
    """The line (from 1) of a field in a TOML text, by following tables, array entries and keys; the nearest that exists."""
    lines = text.splitlines()
    best, start = 1, 0
    for depth, part in enumerate(location):
        if isinstance(part, int):
            headers = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{location[depth - 1]}\s*\]\]", line)]
            if part < len(headers):
                best, start = headers[part] + 1, headers[part]
            continue
        if depth and re.match(rf".*[{{,]\s*{re.escape(part)}\s*=", lines[start]):
            continue  # a key of the table that stands in one line
        dotted = re.escape(".".join(str(p) for p in location[: depth + 1]))
        pattern = re.compile(rf"\s*(\[{dotted}\]|[\w\"'.]*\b{re.escape(part)}\b[\"']?\s*=)")
        for i in range(start, len(lines)):
            if i > start and start and re.match(r"\s*\[\[", lines[i]):
                break
            if pattern.match(lines[i]):
                best, start = i + 1, i
                break
    return best


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def detect(runtime: str = "onnxruntime", machine: str | None = None, flags: frozenset[str] | None = None) -> str:
    """The name of the first target (best first) for this machine and runtime. Raises UnknownName where none fits."""
    machine = platform.machine() if machine is None else machine
    flags = processor_flags() if flags is None else flags
    targets = [load_target(name) for name in target_names()]
    fits = [
        (max(len(need) for need in target.requires if flags.issuperset(need)), target.name)
        for target in targets
        if target.detected
        and target.runtime == runtime
        and re.fullmatch(target.machine, machine)
        and any(flags.issuperset(need) for need in target.requires)
    ]
    if not fits:
        raise UnknownName("target for this machine", f"{runtime}, {machine}", target_names(), "Give one with --target.")
    return max(fits)[1]
