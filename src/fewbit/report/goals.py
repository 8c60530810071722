"""Whether a run has kept what was asked of its file: how much it may lose, and that it is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.errors import FewbitFailed
from fewbit.report.answers import unpaid

ROUNDING = 1e-9  # points; a drop is a difference of two percentages


def fail_on_drop(accuracy: Mapping[str, Any], allowed: float | None) -> None:
    """Raise FewbitFailed where the measure (without labels: agreement, from 100 %) drops by more (points of percent, or
    the measure's unit) than is allowed.
    """
    drop, measure, unit = drop_of(accuracy)
    points = "points" if unit == "%" else unit
    if allowed is not None and not drop <= allowed + ROUNDING:  # nor where it is not a number
        what, (least, most) = "agreement" if accuracy["quantized"] is None else "change", accuracy["interval"]
        digits = next((n for n in range(2, 9) if float(f"{drop:.{n}f}") > allowed), 9)  # that show what is too much
        fell = f"fell by {drop:.{digits}f} {points}".rstrip()
        fell = fell if drop == drop else "is not a number for the integer model or the float one"
        fell = f"{measure} {fell}; --max-drop allows {allowed:g}."
        raise FewbitFailed(" ".join((fell, f"The {what} is {least:.2f} to {most:.2f} (95 %).", accuracy["why"])).strip())


def fail_on_time(report: Mapping[str, Any], must_pay: bool) -> None:
    """Raise FewbitFailed where the file is not faster than the runtime's fastest float model, and must be."""
    if must_pay and not report["pays"]["pays"]:
        raise FewbitFailed(unpaid(report["pays"]).replace("\u00a0", " "))


def drop_of(accuracy: Mapping[str, Any]) -> tuple[float, str, str]:
    """By how much the measure dropped (without labels: agreement, from 100 %), its name and its unit; of percent in points."""
    if accuracy["quantized"] is not None:
        return accuracy["float"] - accuracy["quantized"], accuracy["measure"], accuracy["unit"]
    return 100 - accuracy["agreement"], accuracy["agreement_measure"], "%"
