"""Every number that a user gives is of its type, finite and in its limits, or refused by the option's name.

Oracle: the limits, written out here once more; hypothesis draws the values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadImages, FewbitError
from fewbit.progress import Progress
from fewbit.request import Options, Request, SearchRequest
from fewbit.stages.bench import bench
from fewbit.stages.evaluate import evaluate
from fewbit.workers import LOCAL

NAN, INF = float("nan"), float("inf")
COUNT, FOREVER = (int, 1, 10**9), 86_400
LIMITS: dict[tuple[type[Options], str], tuple[type, float, float]] = {
    **{(kind, name): COUNT for kind in (Request, SearchRequest) for name in ("calibration", "scored")},
    **{(kind, "threads"): (int, 1, 1024) for kind in (Request, SearchRequest)},
    **{(kind, "seed"): (int, 0, 2**32 - 1) for kind in (Request, SearchRequest)},
    **{(kind, "crop_pct"): (float, 0.1, 10) for kind in (Request, SearchRequest)},
    **{(kind, "fill"): (float, 0, 255) for kind in (Request, SearchRequest)},
    **{(kind, "opset"): (int, 13, 23) for kind in (Request, SearchRequest)},
    **{(kind, "ir_version"): (int, 9, 13) for kind in (Request, SearchRequest)},  # of opset 20
    (Request, "seconds"): (float, 0.001, FOREVER),
    (Request, "max_drop"): (float, 0, 100),
    (SearchRequest, "evaluations"): COUNT,
    (SearchRequest, "points"): COUNT,
    (SearchRequest, "least"): (int, 2, 16),
}
ANYTHING = (
    st.integers()
    | st.integers(-5, 40)
    | st.floats()
    | st.floats(-2, 120)
    | st.booleans()
    | st.sampled_from([10**30, -(10**400), 1e309, 1e-400, "1", "nan", "", "x", [], {}, b"1", [1]])
)
TRIPLES = {"input_size": (1, 8192), "mean": (-10, 10), "std": (0.0001, 10)}


def is_allowed(value: Any, kind: type, low: float, high: float) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (kind is float and isinstance(value, float))) and low <= value <= high


def test_every_number_has_limits() -> None:
    """A field with a number in it is in the table above; steps and time belong to few recipes and are tested with those,
    workers need Ray (test_workers.py).
    """
    for kind in (Request, SearchRequest):
        numbers = {n for n, f in kind.model_fields.items() if any(t in str(f.annotation) for t in ("int", "float"))}
        assert numbers == {name for k, name in LIMITS if k is kind} | set(TRIPLES) | {"steps", "workers"}


@pytest.mark.parametrize(("kind", "name"), LIMITS)
@given(value=ANYTHING)
def test_a_number_is_in_its_limits_or_refused_by_name(kind: type[Options], name: str, value: Any) -> None:
    options: dict[str, Any] = {"model": "demo", "target": "ort-x86-vnni", name: value}
    if is_allowed(value, *LIMITS[kind, name]):
        assert getattr(kind(**options), name) == value
    else:
        with pytest.raises(FewbitError, match=f"--{name.replace('_', '-')} "):
            kind(**options)


@pytest.mark.parametrize("name", TRIPLES)
@given(data=st.data(), as_text=st.booleans())
def test_three_numbers_are_in_their_limits_or_refused_by_name(name: str, data: st.DataObject, as_text: bool) -> None:
    low, high = TRIPLES[name]
    number = st.integers(-2, 9000) if name == "input_size" else st.integers(-12, 12) | st.floats(-12, 12) | st.floats()
    rare = st.sampled_from([NAN, INF, -INF, 10**30, 1e30, 32.5, True, 0])
    values = data.draw(st.lists(number | number | rare, min_size=2, max_size=4) | st.tuples(st.just(3), number, number))
    kind = int if name == "input_size" else float
    plain = [int(v) if as_text and isinstance(v, bool) else v for v in values]
    in_limits = all(is_allowed(v, kind, low, high) for v in plain)  # of a mean or std as many as the model has channels
    allowed = in_limits and (kind is float or (len(values) == 3 and plain[0] <= 1024))
    given_as = ",".join(map(str, plain)) if as_text else values
    options: dict[str, Any] = {"model": "demo", "target": "ort-x86-vnni", name: given_as}
    if not allowed:
        with pytest.raises(BadImages, match=f"^--{name.replace('_', '-')} "):
            Request(**options)
        return
    found = getattr(Request(**options), name)
    assert found == tuple(plain)
    assert all(type(v) is kind for v in found)


@pytest.mark.parametrize("value", ["nan", "1e309", "-1", "3", "3,10**30,32", f"3,{10**30},32", "3,32.5,32", "3,0,32", "3,,32"])
def test_an_input_size_is_never_rounded_or_guessed(value: Any) -> None:
    with pytest.raises(BadImages, match=r"--input-size .* whole pixels, 1 to 8192, as in --input-size 3,224,224"):
        Request(model="demo", input_size=value)


@given(
    st.dictionaries(
        st.sampled_from(["input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode"]),
        st.none() | ANYTHING | st.lists(ANYTHING, max_size=4),
        min_size=1,
    )
)
@example({"input_size": 5})
@example({"mean": [0.5, 0.5, NAN]})
@example({"interpolation": ["bicubic"]})
@example({"crop_pct": 1e-300})
def test_a_record_of_a_file_is_a_preprocessing_in_limits_or_refused(record: dict[str, Any]) -> None:
    """Sidecars, constants of a Python file and configs come this way; None is the default."""
    try:
        preprocess = Preprocess.from_timm(record)
    except FewbitError:
        return
    assert preprocess.size[0] == 3
    assert all(type(side) is int and 1 <= side <= 8192 for side in preprocess.size)
    assert all(-10 <= mean <= 10 for mean in preprocess.mean)
    assert all(0.0001 <= std <= 10 for std in preprocess.std)
    assert 0.1 <= preprocess.crop_pct <= 10
    assert Preprocess.from_json(preprocess.to_json()) == preprocess


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *[("batches", [value], "--batch") for value in (0, -1, 4097, 10**30, True, 1.0, NAN, "1")],
        *[("seconds", value, "--seconds") for value in (NAN, INF, -1.0, 0.0, 1e30, True, "4")],
        *[("threads", value, "--threads") for value in (0, -1, 1025, 10**30, True, 2.0)],
    ],
)
def test_a_stage_refuses_a_number_before_it_opens_a_file(name: str, value: Any, says: str) -> None:
    """`Run.do` and the command line both come this way; neither file exists."""
    nowhere = Path("nowhere/model.onnx")
    options = {"threads": 1, "seconds": 1.0, "runtimes": ["onnxruntime"], name: value}
    with pytest.raises(FewbitError, match=f"^{says} "):
        bench(None, nowhere, nowhere, progress=Progress(), **options)
    if name == "threads":
        with pytest.raises(FewbitError, match=f"^{says} "):
            evaluate(None, nowhere, nowhere, None, (), "onnxruntime", value, Progress(), LOCAL, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "1.5", "-0.1"])
def test_the_share_that_lint_asks_for_is_one(value: str) -> None:
    done = CliRunner().invoke(app, ["lint", "nowhere.onnx", "--min-integer", value])
    assert done.exit_code == 2
    assert "--min-integer " in done.output
