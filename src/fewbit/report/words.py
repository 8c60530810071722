"""Values as text. Nothing here is markup: the templates escape what they show."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

Json = Mapping[str, Any]
Rows = Sequence[Json]

UNIT = "\u00a0"  # a unit stays on the line of its number
EXACT = 1e-9  # percent from 0 or 100, up to which it is float rounding
NEAR = 0.05  # of a ratio, within which two ways to count it say the same
FILE = re.compile(r"\.(onnx|pt2|ep|py|pt|pth|safetensors)(:\w+)?$")
FIELDS = {  # of a site's choice in plan.json, where the page has another word for it
    "zero": "zero point",
    "all_readers": "every reader takes its codes",
    "source": "where the scale comes from",
}
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any, digits: int = 4) -> str:
    """Any value of a table: floats with significant digits, {min, max} as a range, None as a dash."""
    if isinstance(value, Mapping):
        if value.keys() == {"min", "max"}:
            return f"{number(value['min'], digits)} to {number(value['max'], digits)}"
        return ", ".join(f"{key}: {number(part, digits)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(number(part, digits) for part in value) or "–"
    if value is None or isinstance(value, (str, bool)):
        return ("yes" if value else "no") if isinstance(value, bool) else value or "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "–∞" if value < 0 else "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}".replace("-", "−")


def measured(value: float | None, unit: str = "%") -> str:
    """A measure with its unit (%, dB; "" for none); a percentage is 0 or 100 only where it is."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{bare(value, unit)}{UNIT}{unit}" if unit else bare(value, unit)


def bare(value: float, unit: str = "%") -> str:
    """A measure without its unit, where that stands elsewhere."""
    if not unit or not math.isfinite(value):
        return number(value)
    text = f"{value:.2f}".replace("-", "−")
    if unit != "%" or min(abs(value), abs(value - 100)) < EXACT:
        return text.replace("−0.00", "0.00")
    near = {"0.00": "< 0.01", "−0.00": "> −0.01", "100.00": "> 99.99" if value < 100 else "> 100.00"}
    return near.get(text, text)


def ends_of(ends: Sequence[float] | None, unit: str = "%") -> str:
    """An interval of a measure."""
    return " to ".join(measured(end, unit) for end in ends) if ends else "–"


def fall(value: float | None, unit: str = "%") -> str:
    """By how much a measure fell or rose: a difference of percentages is one of points."""
    digits = "–" if value is None else signed(value).removeprefix("+") if math.isfinite(value) else number(value)
    return digits if value is None or not unit else f"{digits}{UNIT}{'points' if unit == '%' else unit}"


def titled(measure: str, unit: str = "%") -> str:
    """The title of an axis or a column of a measure, with its unit if it has one."""
    return f"{measure}, {unit}" if unit else measure


def percent(value: float | None) -> str:
    return measured(value)


def share(value: float | None) -> str:
    return percent(None if value is None else 100 * value)


def megabytes(value: float | None, beside: Sequence[float | None] = ()) -> str:
    """Bytes in MB, below 1 MB in kB (powers of ten), below 1 kB one by one: three digits or more. What stands `beside` others
    is in the unit of the smallest of them that is not 0.
    """
    if value is None:
        return number(value)
    smallest = min((abs(one) for one in (value, *beside) if one), default=0)
    power, unit = next(((power, unit) for power, unit in ((1e6, "MB"), (1e3, "kB")) if smallest >= power), (1, "B"))
    return f"{value / power:,.{0 if unit == 'B' else 2}f}{UNIT}{unit}"


def interval(value: Sequence[Any] | None) -> str:
    return " to ".join(map(number, value)) if value else "–"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def places(names: Sequence[Any]) -> str:
    """How many ops or sites there are: a site is called <op>:<operand>."""
    of_sites = {":" in str(name) for name in names}
    return plural(len(names), "place" if len(of_sites) > 1 else "op" if of_sites == {False} else "site")


def speed(ratio: float) -> str:
    """How much faster or slower something is than what took `ratio` times as long: never "0.92 times faster"."""
    if as_shown(ratio) == 1:
        return "as fast"
    return f"{ratio:.2f}{UNIT}× faster" if ratio > 1 else f"{1 / ratio:.2f}{UNIT}× slower"


def as_shown(ratio: float) -> float:
    """The ratio that `speed` shows, with no more digits than there."""
    if abs(ratio - 1) < 0.005:
        return 1.0
    return round(ratio, 2) if ratio > 1 else 1 / round(1 / ratio, 2)


def paired_speed(before: float, after: float, ratio: float) -> str:
    """How much faster a file is, beside its time and the float model's: `ratio` is the median of paired rounds, which is not
    the ratio of the two medians, and the words say so where one sees it.
    """
    alone = before / after
    said, other = speed(ratio), speed(alone)
    if said == other:
        return said
    paired = f"{said} in paired rounds"
    return f"{paired}, and {other} by these two medians: noise" if is_noise(before, after, ratio) else paired


def is_noise(before: float, after: float, ratio: float) -> bool:
    """Whether two times and the median of their paired rounds say something else."""
    return speed(ratio) != speed(before / after) and abs(before / after / ratio - 1) >= NEAR


def size(before: float, after: float) -> str:
    """How much smaller or larger a file is than one before."""
    ratio = before / after
    if abs(ratio - 1) < 0.005:
        return "as large"
    return f"{ratio:.2f}× smaller" if ratio > 1 else f"{1 / ratio:.2f}× larger"


def tick(value: float) -> str:
    """A number beside an axis, short."""
    size = abs(value)
    for step, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= step:
            return f"{value / step:g}{suffix}".replace("-", "−")
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        ten = f"10{str(int(power)).translate(SUPERSCRIPT)}"
        return ten if digits == "1.0" else f"{float(digits):g}·{ten}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def title_of(model: str) -> str:
    """The name of a model: of a path the file's, without its folders."""
    path, found = PurePath(model), FILE.search(model)
    return path.name.removesuffix(".onnx").removesuffix(".pt2") if found or path.is_absolute() else model


class _Words(string.Formatter):
    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return kwargs.get(key)

    def format_field(self, value: Any, spec: str) -> str:
        return format(value, spec) if spec and value is not None else number(value)


def fill(template: str, row: Json) -> str:
    """A format string with the values of a row."""
    return _Words().vformat(template, (), row)


def _sum(values: Sequence[Any]) -> Any:
    if not all(isinstance(value, (int, float, type(None))) for value in values):
        return values
    return None if None in values else sum(values)


def grouped(rows: Rows, keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all rows with equal `keys`, in order of appearance: numbers are added (None where one of
    them is not known), other values listed.
    """
    groups: dict[str, list[Json]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(key) for key in keys]), []).append(row)
    sums = []
    for members in groups.values():
        lists = {key: [row[key] for row in members if key in row] for row in members for key in row}
        sums.append({**{k: _sum(v) for k, v in lists.items()}, **{key: members[0].get(key) for key in keys}})
    return sums
