"""Notes that the pipeline adds to a plan when everything has been measured."""

from __future__ import annotations

import pytest

from fewbit.core.values import Fallback, Plan
from fewbit.report.tables import latency
from fewbit.stages.report import note_bf16
from fewbit.verify import Latency


def timing(runtime: str, batch: int, float_ms: float, quantized_ms: float) -> Latency:
    return Latency(runtime, batch, 2, float_ms, quantized_ms, float_ms / quantized_ms, 9, (1.0, 2.0), (1.0, 2.0), 0.5)


@pytest.mark.parametrize(
    ("runtime", "with_bf16", "said"),
    [
        ("openvino", 2.5, []),  # the integer model is faster once the rest is bf16 as well
        ("openvino", 3.5, ["3.50 ms, bf16 3.00 ms, batch 1"]),
        ("openvino", 9.0, ["4.00 ms, bf16 3.00 ms, batch 1"]),  # bf16 beside integers may be the slower way
        ("onnxruntime", 9.0, []),  # another runtime's bf16 is no answer here
    ],
)
def test_an_integer_model_slower_than_bf16_is_said_to_be(runtime: str, with_bf16: float, said: list[str]) -> None:
    rows = [timing("openvino", 1, 8.0, 4.0), timing("openvino", 8, 8.0, 1.0)]
    rows += [timing("openvino-bf16", 1, 3.0, with_bf16), timing("openvino-bf16", 8, 3.0, 9.0)]
    noted = note_bf16(Plan("t", "r", "8", {}, ()), runtime, rows)
    assert [fallback.actual for fallback in noted.fallbacks] == said


def test_only_times_of_the_targets_own_runtime_and_processor_are_in_the_verdict() -> None:
    rows = [timing(name, batch, 8.0, 4.0) for name in ("onnxruntime", "openvino", "openvino-bf16") for batch in (1, 8)]
    plan = Plan("t", "r", "8", {}, ())
    assert {name: row["batch"] for name, row in latency(rows, "openvino", plan).items()} == {"openvino": 1, "openvino-bf16": 1}
    assert list(latency(rows, "onnxruntime", plan)) == ["onnxruntime"]
    for kind in ("runtime", "machine"):
        away = Plan("t", "r", "8", {}, (), fallbacks=(Fallback("it", "a", "b", "c", kind=kind),))  # type: ignore[arg-type]
        assert latency(rows, "onnxruntime", away) == {}
