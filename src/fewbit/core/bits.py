"""What `--bits` means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewbit.core.graph import Graph
from fewbit.errors import BadFile, FewbitError, UnknownName
from fewbit.files import read_json
from fewbit.folder import check_beside

WIDTHS = range(2, 17)  # that a grid may have; a target may allow fewer
SPREAD = 2  # candidates below and above the mean width: {4..8} for 6, {6..10} for 8 (Liu et al. 2021, section 4.1)


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; `ops` has ops with another width of both, or one of each, and sites with their own, by
    name. `asked` is the request as text, `floats` are ops that stay float.

    `exceptions` are patterns of op names with a width of both or one of each (weights, activations), the last that fits counts;
    `first` and `last` are the first and the last op with a weight.
    """

    weights: int = 8
    activations: int = 8
    ops: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    asked: str = ""
    exceptions: tuple[tuple[str, int | tuple[int, int]], ...] = ()
    floats: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = (f"{p}={b}" if isinstance(b, int) else f"{p}=w{b[0]}a{b[1]}" for p, b in self.exceptions)
        return self.asked or ",".join([f"w{self.weights}a{self.activations}", *others])

    @property
    def most(self) -> int:
        """The largest width of all."""
        widths = (*self.ops.values(), *(b for _, b in self.exceptions))
        return max(self.weights, self.activations, *(b if isinstance(b, int) else max(b) for b in widths))

    def to_json(self) -> dict[str, Any]:
        """What `read_bits` reads back from a file."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "widths": dict(self.ops),
            "float": list(self.floats),
        }

    def of(self, graph: Graph) -> Bits:
        """The same with the exceptions resolved to ops of a graph. Raises UnknownName for one that fits nothing."""
        known = {op.name for op in graph.ops} | {site.name for site in graph.sites}
        for name in (*self.ops, *self.floats):
            if name not in known:
                raise UnknownName(f"op or site in --bits {self.asked}", name, known, "Is it a file of another model?")
        weighted = [op.name for op in graph.ops if "weight" in op.operands]
        ends = {"first": weighted[:1], "last": weighted[-1:]}
        ops = dict(self.ops)
        for pattern, bits in self.exceptions:
            names = [op.name for op in graph.ops if fnmatch.fnmatchcase(op.name, pattern)] or ends.get(pattern, [])
            if not names:
                raise UnknownName("op in --bits", pattern, [*ends, *(op.name for op in graph.ops)])
            ops |= dict.fromkeys(names, bits)
        return replace(self, ops=ops)


@dataclass(frozen=True)
class Mixed:
    """One width for each attention module and each MLP, so that a weight has `mean` bits on average at most."""

    mean: float
    candidates: tuple[int, ...]

    def __str__(self) -> str:
        return f"mixed:{self.mean:g}:{','.join(map(str, self.candidates))}"


def _width(text: str) -> int | tuple[int, int] | None:
    """`8` or `w4a8` of an exception; None for anything else."""
    match = re.fullmatch(r"(?:w(\d{1,2})a(\d{1,2})|(\d{1,2}))", text.lower())
    if match is None or any(int(n) not in WIDTHS for n in match.groups() if n):
        return None
    return int(match[3]) if match[3] else (int(match[1]), int(match[2]))


def read_bits(path: Path) -> Bits:
    """The widths in a JSON file: `{"weights": 8, "activations": 8, "widths": {op or site: bits}, "float": [op]}`; other
    keys are for people. Raises BadFile where it holds anything else.
    """
    check_beside(path)
    data = read_json(path)
    try:
        widths_of, floats = dict(data["widths"].items()), tuple(data["float"])
        bits = Bits(int(data["weights"]), int(data["activations"]), widths_of, f"{path}", (), floats)
        widths = [bits.weights, bits.activations, *bits.ops.values()]
        allowed = all(isinstance(b, int) and b in WIDTHS for b in widths) and all(isinstance(f, str) for f in bits.floats)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        allowed = False
    if not allowed:
        raise BadFile(
            f'{path} has no widths; needed are {{"weights": 8, "activations": 8, "widths": {{"NAME": 4}}, "float": ["NAME"]}} '
            "with 2 to 16 bits, as `fewbit search` writes them to points/."
        )
    return bits


def parse_bits(text: str | int) -> Bits | Mixed:
    """`8`, `6`, `w4a8`, `4,first=8,head=8`, `4,*.fc2=w4a8`, `mixed:6.0`, `mixed:6.0:4,6,8`, or a file, `points/07.json`.

    Raises FewbitError that says what is allowed.
    """
    if str(text).endswith(".json"):
        return read_bits(Path(text))  # type: ignore[arg-type]
    parts = str(text).strip().split(",")
    base, overrides = (",".join(p for p in parts if "=" not in p).lower(), [p.rpartition("=") for p in parts if "=" in p])
    exceptions = tuple((pattern, b) for pattern, _, bits in overrides if pattern and (b := _width(bits)) is not None)
    match = re.fullmatch(r"(?:w(\d{1,2})a(\d{1,2})|(\d{1,2}))", base)
    if match and len(exceptions) == len(overrides):
        weights, activations, both = match.groups()
        bits = Bits(int(weights or both), int(activations or both), exceptions=exceptions)
        if bits.weights in WIDTHS and bits.activations in WIDTHS:
            return bits
    match = re.fullmatch(r"mixed:(\d{1,2}(?:\.\d{1,9})?)(?::(\d{1,2}(?:,\d{1,2})*))?", base)
    if match and not overrides:
        mean = float(match[1])
        middle = round(mean)
        options = map(int, match[2].split(",")) if match[2] else range(middle - SPREAD, middle + SPREAD + 1)
        candidates = tuple(sorted({b for b in options if match[2] or b in WIDTHS}))
        if candidates and all(b in WIDTHS for b in candidates) and mean >= candidates[0]:
            return Mixed(mean, candidates)
    if re.fullmatch(r"\d{1,2}\.\d{1,9}", base) and not overrides:
        uniform = f"write {float(base):g} for that width everywhere, or " if float(base).is_integer() else ""
        raise FewbitError(
            f"--bits {text} is no width, which is a whole number; {uniform}write mixed:{base} for a width of each module, "
            f"{base} bits a weight on average."
        )
    raise FewbitError(
        f"--bits {text} is not understood; allowed are 2 to 16 (weights and activations), w4a8 (each its own), "
        "4,first=8,*.fc2=w4a8 (ops with another width, by name or pattern, first or last), mixed:6.0 (a width for each module, "
        "6.0 bits a weight on average), mixed:6.0:4,6,8 (from these widths, the mean not below them) and "
        "search/points/07.json (a file of fewbit search)."
    )
