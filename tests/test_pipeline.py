"""What is said of times when everything has been measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fewbit.core.plan import Fallback, Plan
from fewbit.errors import FewbitFailed
from fewbit.progress import Progress
from fewbit.report.answers import small_and_fast
from fewbit.report.goals import fail_on_missed, time_missed
from fewbit.report.tables import latency, pays
from fewbit.request import Request
from fewbit.stages import choose
from fewbit.verify import Latency
from fewbit.workers import LOCAL


def timing(runtime: str, batch: int, float_ms: float, quantized_ms: float, best: str = "", best_ms: float = 0.0) -> Latency:
    over = (best_ms or float_ms) / quantized_ms
    spreads = (float_ms - 1, float_ms + 1), (quantized_ms - 1, quantized_ms + 1)
    shared = best or runtime, (over - 0.01, over, over + 0.01)
    return Latency(runtime, batch, 2, float_ms, quantized_ms, float_ms / quantized_ms, 9, *spreads, 0.5, *shared)


@pytest.mark.parametrize(
    ("runtime", "with_bf16", "expected"),
    [
        ("openvino", 2.5, ("openvino-bf16", 2.5, 1.2, True)),  # the integer model is faster once the rest is bf16 as well
        ("openvino", 2.95, ("openvino-bf16", 2.95, 3 / 2.95, False)),  # by less than 2 %
        ("openvino", 9.0, ("openvino", 4.0, 0.75, False)),  # bf16 beside integers may be the slower way
        ("onnxruntime", 9.0, ("onnxruntime", 5.0, 1.8, True)),  # another runtime's bf16 is no answer here
    ],
)
def test_a_file_pays_that_is_faster_than_the_fastest_float_model_of_its_runtime(
    runtime: str, with_bf16: float, expected: tuple[str, float, float, bool]
) -> None:
    bf16 = "openvino-bf16", 3.0
    rows = [timing("openvino", 1, 8.0, 4.0, *bf16), timing("openvino", 8, 8.0, 1.0, *bf16), timing("onnxruntime", 1, 9.0, 5.0)]
    rows += [timing("openvino-bf16", 1, 3.0, with_bf16, *bf16), timing("openvino-bf16", 8, 3.0, 9.0, *bf16)]
    paid = pays(rows, runtime, Plan("t", "r", "8", {}, ()))
    assert paid is not None
    assert (paid["runtime"], paid["ms"], pytest.approx(paid["ratio"]), paid["pays"]) == expected
    assert paid["float_ms"] == (3.0 if runtime == "openvino" else 9.0)


def test_a_file_that_does_not_pay_is_said_on_the_first_page_and_fails_where_it_must() -> None:
    rows = [timing("openvino", 1, 8.0, 4.0, "openvino-bf16", 3.0), timing("openvino-bf16", 1, 3.0, 9.0, "openvino-bf16", 3.0)]
    report = {"pays": pays(rows, "openvino", Plan("t", "r", "8", {}, ())), "latency": {}}
    card = small_and_fast(report)
    said = (
        "Keep your float model: it takes 3.00 ms (2.00 to 4.00) in openvino-bf16, the file 4.00 ms (3.00 to 5.00) in openvino "
        "(batch 1, threads: 2, 9 rounds). In paired rounds the file is 1.33 × slower (median ratio 0.750, 95 % interval 0.740 "
        "to 0.760); a file pays from 2 % faster in paired rounds."
    )
    assert (card.word, card.mood) == ("keep your float model", "bad")
    assert [line.replace("\u00a0", " ") for line in card.loud] == [said]
    said = (
        "--must-pay asks for 2 % faster in paired rounds, and the file is 1.33 × slower (median ratio 0.750, 95 % interval "
        "0.740 to 0.760): 4.00 ms in openvino, the float model 3.00 ms in openvino-bf16."
    )
    assert time_missed(report["pays"], True) == said
    with pytest.raises(FewbitFailed, match="--must-pay asks for 2 % faster"):
        fail_on_missed({**report, "missed": [said]})
    assert time_missed(report["pays"], False) == ""
    assert time_missed(None, True).endswith("no time of the target was measured.")
    near = {**report, "pays": {**report["pays"], "ratio": 1.015, "interval": [1.0, 1.03]}}
    assert small_and_fast(near).loud[0].endswith("measure again with fewbit bench when little else runs.")
    paying = {**report, "pays": {**report["pays"], "pays": True}}
    assert time_missed(paying["pays"], True) == ""
    assert (small_and_fast(paying).word, small_and_fast(paying).loud) == ("", [])


def test_only_times_of_the_targets_own_runtime_and_processor_are_in_the_verdict() -> None:
    rows = [timing(name, batch, 8.0, 4.0) for name in ("onnxruntime", "openvino", "openvino-bf16") for batch in (1, 8)]
    plan = Plan("t", "r", "8", {}, ())
    assert {name: row["batch"] for name, row in latency(rows, "openvino", plan).items()} == {"openvino": 1, "openvino-bf16": 1}
    assert list(latency(rows, "onnxruntime", plan)) == ["onnxruntime"]
    for kind in ("runtime", "machine"):
        away = Plan("t", "r", "8", {}, (), fallbacks=(Fallback("it", "a", "b", "c", kind=kind),))  # type: ignore[arg-type]
        assert latency(rows, "onnxruntime", away) == {}
        assert pays(rows, "onnxruntime", away) is None


@pytest.mark.parametrize(("time", "spent"), [("60s", 12.5), (None, 0.0)], ids=["a limit of the user", "none"])
def test_a_limit_of_time_counts_what_was_before_the_plan(
    time: str | None, spent: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "spent", 12.5)
    journals = []
    monkeypatch.setattr(choose, "Journal", lambda path, spent: journals.append(spent))
    monkeypatch.setattr(choose, "context_of", lambda *_, **options: 1 / 0)
    images = SimpleNamespace(batches=lambda size: (), labels=None)
    with pytest.raises(ZeroDivisionError):
        choose.choose(
            SimpleNamespace(at_a_time=lambda n: n), None, (), images, None,  # type: ignore[arg-type]
            Request(model="demo", recipe="qdrop", time=time), tmp_path, Progress(), LOCAL,
        )  # fmt: skip
    assert journals == [spent]
