"""Oracle: `map` of Python; what each option says that cannot be; errors before and after they were pickled."""

from __future__ import annotations

import importlib.util
import pickle

import pytest

from fewbit.errors import BadFile, BadValues, FewbitError, Stopped, UnknownName
from fewbit.request import Request, SearchRequest, SensitivityRequest, SweepRequest
from fewbit.workers import Local, check_workers, opened


def square(x: int) -> int:
    return x * x


def test_without_options_the_work_is_done_here_one_item_after_the_other() -> None:
    with opened(None, None) as workers:
        assert workers == Local()
        assert list(workers.map(square, [3, 1, 2])) == [(0, 9), (1, 1), (2, 4)]
        assert list(workers.everywhere(square, 3).values()) == [9]
        seen = []
        first = next(workers.map(lambda x: seen.append(x) or x, [1, 2]))
        assert (first, seen) == ((0, 1), [1])  # a result comes before the next item is begun


@pytest.mark.parametrize(
    ("workers", "address", "says"),
    [
        (2, "auto", "--workers starts workers here and --ray joins others; leave --workers 2 or --ray out"),
        (None, "10.0.0.1", "--ray 10.0.0.1 is no address; give HOST:PORT"),
        (None, "10.0.0.1:99999", "--ray 10.0.0.1:99999 is no address"),
        (None, "ray://10.0.0.1:10001", "--ray ray://10.0.0.1:10001 is no address"),
        (2, None, r'--workers 2 needs Ray, which is not installed: pip install "fewbit\[scale\]"'),
        (None, "auto", r'--ray auto needs Ray, which is not installed: pip install "fewbit\[scale\]"'),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(monkeypatch, tmp_path, workers, address, says) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FewbitError, match=says):
        check_workers(workers, address)
    file = tmp_path / "a.toml"
    file.touch()
    with pytest.raises(FewbitError, match=says):
        SweepRequest(file=file, workers=workers, ray=address)


def test_other_commands_refuse_them_too_and_a_device_beside_them(monkeypatch) -> None:
    monkeypatch.setattr("fewbit.core.device.found", lambda: iter(["cpu", "cuda:0"]))
    for kind in (Request, SensitivityRequest, SearchRequest):
        with pytest.raises(FewbitError, match="--ray nowhere is no address"):
            kind(model="demo", target="ort-x86-vnni", ray="nowhere")
        for count in (0, -1, 10**30, True, 2.0, "2"):
            with pytest.raises(FewbitError, match=rf"--workers {count!r} is not allowed"):
                kind(model="demo", target="ort-x86-vnni", workers=count)
        with pytest.raises(FewbitError, match="--workers 2 gives tasks processors and no GPU; leave it or --device cuda out"):
            kind(model="demo", target="ort-x86-vnni", workers=2, device="cuda")


def test_an_error_is_the_same_after_it_was_sent_by_another_process() -> None:
    errors = UnknownName("recipe", "fats", ["fast"], "Hint."), BadValues("a:weight holds NaN"), Stopped("full")
    for error in (*errors, BadFile("a" * 300)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.exit_code) == (type(error), str(error), 2)
