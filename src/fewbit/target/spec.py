"""The schema of a target file: every field with its type and limits. `load.py` reads one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fewbit.capture.kinds import KINDS
from fewbit.core.grid import Grid
from fewbit.runtimes import AS_WRITTEN, RUNNABLE, RUNTIMES
from fewbit.target.versions import IRS, OPSETS, usual_ir


def _whole(value: object) -> object:
    """Raise ValueError for true or 1.0, which pydantic takes for a literal 1."""
    if isinstance(value, bool | float):
        raise ValueError("it is a whole number")
    return value


Whole = BeforeValidator(_whole)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Type(Strict):
    """One integer type that an operand may have. `fixed_scale` pins the scale whatever the data are (softmax: 1/256 at 8 bits)
    and `fixed_zero` the zero point that goes with it; with fewer bits the range stays the same and the scale is larger.
    With `convention` the fixed scale is only the target's custom: the kernels take any.

    `container`: the bits that a code takes in the file and in memory, where that is more than the smallest that hold it; 4:
    the file's own type of 4 bits, where narrower codes are packed otherwise. `group_size`: a linear weight has a scale for
    each channel and group of so many inputs; where these do not divide the inputs, for each channel. `multiples`: the scale
    of a group is 1 to so many times one scale of the channel.
    `narrows_to`: where sums overflow the accumulator of an op, codes may have fewer bits, down to so many.
    """

    bits: int = Field(ge=1, le=32)
    signed: bool
    narrow: bool = False
    symmetric: bool = True
    granularity: Literal["tensor", "channel"] = "tensor"
    fixed_scale: float | None = Field(default=None, ge=1e-12, le=1e12)
    fixed_zero: int = 0
    convention: bool = False
    container: Annotated[Literal[0, 4, 8, 16, 32], Whole] = 0
    group_size: Annotated[Literal[0, 16, 32, 64, 128, 256], Whole] = 0
    multiples: Annotated[Literal[0, 4, 16], Whole] = 0
    narrows_to: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        grid = self.grid(None)
        if self.fixed_zero and self.fixed_scale is None:
            raise ValueError("fixed_zero belongs to a fixed_scale")
        if not min(grid.low, 0) <= self.fixed_zero <= grid.high:
            raise ValueError(f"fixed_zero is a code of the type, {grid.low} to {grid.high}, not {self.fixed_zero}")
        if self.group_size and not (self.granularity == "channel" and self.symmetric):
            raise ValueError('group_size belongs to a symmetric type with granularity = "channel"')
        if self.multiples and not self.group_size:
            raise ValueError("multiples belongs to a group_size: its steps are multiples of the channel's")
        if self.multiples and self.multiples * max(-grid.low, grid.high) > 2**7 - 1:
            raise ValueError(
                f"a code times multiple is a code of 8 bits; {self.multiples} times {max(-grid.low, grid.high)} is none"
            )
        if self.container == 4 and (self.bits > 4 or self.granularity == "tensor"):
            raise ValueError('a container of 4 bits holds codes of a weight with at most 4: granularity = "channel"')
        if self.narrows_to is not None and self.narrows_to > self.bits:
            raise ValueError(f"narrows_to is at most the type's {self.bits} bits, not {self.narrows_to}")
        return self

    def grid(self, axis: int | None, bits: int | None = None, inputs: int = 0) -> Grid:
        """The grid of this type with `bits` (at most its own: fewer bits live in the same container).

        `inputs` are the columns of the weight of a linear op; there are no groups where `group_size` does not divide them.
        """
        bits = self.bits if bits is None else min(bits, self.bits)
        axis = axis if self.granularity == "channel" else None
        grouped = bool(self.group_size and inputs and inputs % self.group_size == 0)
        group_size, multiples = (self.group_size, self.multiples) if grouped else (0, 0)
        return Grid(
            bits,
            self.signed,
            self.narrow,
            self.symmetric,
            axis,
            stored=self.container,
            group_size=group_size,
            multiples=multiples,
        )

    @property
    def least_opset(self) -> tuple[int, str]:
        """The oldest opset whose QuantizeLinear and DequantizeLinear have this type, and what older ones lack."""
        if self.container == 4:
            return 21, "int4 codes"
        if self.group_size and not self.multiples:
            return 21, "scales of blocks"
        if 8 < max(self.bits, self.container) <= 16:
            return 21, "16-bit codes"
        return OPSETS[0], ""

    def grids(self, axis: int | None, bits: int | None = None, inputs: int = 0) -> tuple[Grid, ...]:
        """The grid with `bits`, and those that it may be narrowed to."""
        first = self.grid(axis, bits, inputs)
        least = first.bits if self.narrows_to is None else min(self.narrows_to, first.bits)
        return tuple(self.grid(axis, b, inputs) for b in range(first.bits, least - 1, -1))

    def step(self, grid: Grid) -> float | None:
        """The fixed scale on a grid of this type; None without one."""
        return None if self.fixed_scale is None else self.fixed_scale * 2.0 ** (self.bits - grid.bits)

    def zero(self, grid: Grid) -> int:
        """The zero point that goes with the fixed scale."""
        return round(self.fixed_zero * 2.0 ** (grid.bits - self.bits))

    def has(self, grid: Grid) -> bool:
        """Whether a grid is one of this type, at its width or a smaller one."""
        alike = (grid.signed, grid.narrow, grid.symmetric, grid.stored) == (
            self.signed, self.narrow, self.symmetric, self.container,
        )  # fmt: skip
        alike = alike and (grid.group_size, grid.multiples) in ((self.group_size, self.multiples), (0, 0))
        return alike and grid.bits <= self.bits and (grid.axis is None) == (self.granularity == "tensor")


class Accumulator(Strict):
    """`bits` of the running sum and what it does when it leaves them. `pair_bits`: two neighbouring products are first added
    in so many bits, with saturation.

    `chain_bits`: `chain` products are first added in so many bits; operands whose products could leave them are not legal.
    Codes in containers wider than `operand_bits` are multiplied in float, after DequantizeLinear.
    """

    bits: int = Field(default=32, ge=2, le=64)
    overflow: Literal["wrap", "saturate"] = "wrap"
    pair_bits: int | None = Field(default=None, ge=2, le=64)
    chain_bits: int | None = Field(default=None, ge=2, le=64)
    chain: int | None = Field(default=None, ge=1, le=2**31)
    operand_bits: Annotated[Literal[8, 16, 32], Whole] = 8

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.chain is None) != (self.chain_bits is None):
            raise ValueError("chain and chain_bits belong together: so many products in so many bits")
        return self


class Limit(Strict):
    """What a size may be: at least, at most, and a multiple of what."""

    least: int = Field(default=1, ge=1, le=2**31)
    most: int | None = Field(default=None, ge=1, le=2**31)
    multiple: int = Field(default=1, ge=1, le=2**31)

    def why_not(self, size: int) -> str:
        """The limit that a size breaks; empty if it breaks none."""
        if size < self.least:
            return f"at least {self.least}"
        if self.most is not None and size > self.most:
            return f"at most {self.most}"
        return f"a multiple of {self.multiple}" if size % self.multiple else ""


class Shape(Strict):
    """Sizes for which a kernel exists. For a product of (rows, inputs) and (inputs, outputs): `inputs` are the input channels
    or the inner size of a product of two activations, `outputs` the output channels or its columns, `rows` the tokens or
    places of one image, `grouped` the input channels that one output channel of a grouped convolution reads. An op of another
    size stays float: nothing is padded.
    """

    inputs: Limit = Limit()
    outputs: Limit = Limit()
    rows: Limit = Limit()
    grouped: Limit = Limit()


class OpRule(Strict):
    """What one kind of op accepts. A kind may have several entries; of those that fit an op the first is taken.

    operands    operand name -> names of types, best first; an operand that is not listed stays float
    output      "float": the result is float; "integer": it must be quantized at once, and every reader reads the codes
    runs        "integer": always; "float": legal in integers but slower there (`why` says where it was measured);
                "follow": in integers where all of its operands have been quantized for others anyway
    readers     "integer": only integer ops read the codes of the input; "all": every reader does
    shared      operands that share one scale and zero point
    """

    kind: str
    operands: Mapping[str, tuple[str, ...]]
    output: Literal["float", "integer"] = "float"
    runs: Literal["integer", "float", "follow"] = "integer"
    readers: Literal["integer", "all"] = "integer"
    shared: tuple[str, ...] = ()
    shape: Shape = Shape()
    accumulator: Accumulator = Accumulator()
    why: str = ""

    @field_validator("kind")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in KINDS:
            raise ValueError(f"there is no such kind of op; there are {', '.join(KINDS)}")
        return name

    @property
    def weight_only(self) -> bool:
        """Whether the weight alone is codes and the activation stays float."""
        return "weight" in self.operands and "input" not in self.operands

    def types(self, operand: str) -> tuple[str, ...]:
        """The names of the types of an operand; the inputs of a concatenation are numbered in an op and alike here."""
        return self.operands.get(operand.rstrip("0123456789"), ())


class FileFormat(TypedDict):
    """How a target's files are written: see `Target`."""

    opset: int
    ir_version: int
    float_weights: bool
    fuse: tuple[str, ...]


class Target(Strict):
    """A runtime on a kind of processor. `requires`: alternatives of processor flags; the first line that fits is enough.

    `detected`: may be chosen automatically for a machine that it fits; otherwise only by name. `weights`: "float" keeps
    weights as float numbers with QuantizeLinear and DequantizeLinear behind them, "codes" as integers with the latter alone.
    `fuse`: fused operators that the runtime has kernels for and does not make by itself (realize/fuse/).
    """

    schema_version: Annotated[Literal[1], Whole] = Field(alias="schema")
    name: str = Field(min_length=1)
    about: str
    runtime: str
    machine: str = ".*"
    requires: tuple[tuple[str, ...], ...] = ((),)
    detected: bool = True
    opset: int = Field(default=20, ge=OPSETS[0], le=OPSETS[1])
    ir_version: int | None = Field(default=None, ge=IRS[0], le=IRS[1])
    weights: Literal["codes", "float"] = "codes"
    fuse: tuple[str, ...] = ()
    types: Mapping[str, Type] = Field(default_factory=dict)
    op: tuple[OpRule, ...] = ()

    @field_validator("machine")
    @classmethod
    def _is_expression(cls, text: str) -> str:
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f'it is a regular expression over the name of a processor, as in "x86_64|AMD64", and this is none: {error}'
            ) from error
        return text

    @field_validator("runtime")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in RUNTIMES:
            *names, last = (f"'{known}'" for known in RUNTIMES)
            raise ValueError(f"it is {', '.join(names)} or {last}")
        return name

    def rules(self, kind: str) -> tuple[OpRule, ...]:
        """The entries of a kind of op, best first."""
        return tuple(rule for rule in self.op if rule.kind == kind)

    def rule(self, kind: str) -> OpRule | None:
        """The first entry of a kind of op."""
        return next(iter(self.rules(kind)), None)

    @property
    def file_format(self) -> FileFormat:
        """How its files are written: the arguments of `realize`."""
        return {
            "opset": self.opset,
            "ir_version": self.ir_version or usual_ir(self.opset),
            "float_weights": self.weights == "float",
            "fuse": self.fuse,
        }

    @property
    def runs_in(self) -> str:
        """The runtime that its files are run in here: its own, or the one that stands in and computes them as written."""
        return self.runtime if self.runtime in RUNNABLE else AS_WRITTEN

    def written(self, opset: int | None, ir_version: int | None) -> Target:
        """The same target with files of another opset or IR version."""
        given = {name: value for name, value in (("opset", opset), ("ir_version", ir_version)) if value is not None}
        return self.model_copy(update=given) if given else self

    def fits(self, machine: str, flags: frozenset[str]) -> bool:
        """Whether a machine (`uname -m`) with these processor flags is one of the target's."""
        return bool(re.fullmatch(self.machine, machine)) and any(flags.issuperset(need) for need in self.requires)

    @property
    def processor(self) -> str:
        """The processor that it needs, in words."""
        sets = " or ".join(" and ".join(need) for need in self.requires if need)
        return f"{self.machine.split('|')[0]}{' with ' + sets if sets else ''}"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all fields of the target, independent of the file and of the order of types and kinds."""
        says = self.model_copy(update={"op": tuple(sorted(self.op, key=lambda rule: rule.kind))}).model_dump(mode="json")
        return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()

    def with_exact_sums(self) -> Target:
        """The same target with accumulators that never overflow, for comparison."""
        wide = {"bits": 64, "pair_bits": None, "chain_bits": None, "chain": None}
        exact = [rule.model_copy(update={"accumulator": rule.accumulator.model_copy(update=wide)}) for rule in self.op]
        return self.model_copy(update={"op": tuple(exact)})
