"""Whether a run has kept what was asked of its file: how much it may lose, and that it is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.errors import FewbitFailed
from fewbit.report.answers import MARGIN
from fewbit.report.words import speed

ROUNDING = 1e-9  # points; a drop is a difference of two percentages


def missed(report: Mapping[str, Any], max_drop: float | None, must_pay: bool) -> list[str]:
    """A sentence for each goal that report.json does not show to be kept, with the figure that was judged and its limit."""
    found = (drop_missed(report["accuracy"], max_drop), time_missed(report["pays"], must_pay))
    return [sentence for sentence in found if sentence]


def fail_on_missed(report: Mapping[str, Any]) -> None:
    """Raise FewbitFailed where a run's report.json has goals that were missed."""
    if report["missed"]:
        raise FewbitFailed(" ".join(report["missed"]))


def drop_missed(accuracy: Mapping[str, Any], allowed: float | None) -> str:
    """What is said where the measure (without labels: agreement, from 100 %) drops by more (points of percent, or the measure's
    unit) than is allowed; "" where it does not.
    """
    drop, measure, unit = drop_of(accuracy)
    if allowed is None or drop <= allowed + ROUNDING:
        return ""
    points = "points" if unit == "%" else unit
    what, (least, most) = "agreement" if accuracy["quantized"] is None else "change", accuracy["interval"]
    digits = next((n for n in range(2, 9) if float(f"{drop:.{n}f}") > allowed), 9)  # that show what is too much
    fell = f"fell by {drop:.{digits}f} {points}".rstrip()
    fell = fell if drop == drop else "is not a number for the integer model or the float one"
    fell = f"{measure} {fell}; --max-drop allows {allowed:g}."
    return " ".join((fell, f"The {what} is {least:.2f} to {most:.2f} (95 %).", accuracy["why"])).strip()


def time_missed(paid: Mapping[str, Any] | None, must_pay: bool) -> str:
    """What is said where the file must be faster than the runtime's fastest float model, and is not; "" where it is."""
    if not must_pay or (paid is not None and paid["pays"]):
        return ""
    asked = f"--must-pay asks for {100 * (MARGIN - 1):.0f} % faster in paired rounds"
    if paid is None:
        return f"{asked}, and no time of the target was measured."
    (low, high), said = paid["interval"], speed(paid["ratio"]).replace("\u00a0", " ")
    return (
        f"{asked}, and the file is {said} (median ratio {paid['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}): "
        f"{paid['ms']:.2f} ms in {paid['runtime']}, the float model {paid['float_ms']:.2f} ms in {paid['float_runtime']}."
    )


def drop_of(accuracy: Mapping[str, Any]) -> tuple[float, str, str]:
    """By how much the measure dropped (without labels: agreement, from 100 %), its name and its unit; of percent in points."""
    if accuracy["quantized"] is not None:
        return accuracy["float"] - accuracy["quantized"], accuracy["measure"], accuracy["unit"]
    return 100 - accuracy["agreement"], accuracy["agreement_measure"], "%"
