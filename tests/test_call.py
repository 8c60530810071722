"""A call in any state of the caller's torch, and beside another one. Oracle: the files of a call in a fresh state."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import FewbitError, Run, quantize
from fewbit.core import call
from fewbit.load.contexts import quiet
from fewbit.request import SensitivityRequest, SweepRequest
from fewbit.run import sensitivity
from fewbit.search.search import search
from fewbit.sweep import execute as sweep
from test_run import Told

SIZE = (3, 8, 8)
SAME = ("model.onnx", "float.onnx", "plan.json", "plan.safetensors")
IMAGES = torch.rand(20, *SIZE, generator=torch.Generator().manual_seed(1)).numpy()


class Net(nn.Module):
    """A convolution with batch norm, and a linear head; a scale as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.scale = torch.full((8, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((F.relu(self.norm(self.conv(x))) * self.scale).mean((2, 3)))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


@contextmanager
def changed(setter: Callable[[Any], object], value: Any, usual: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": lambda: changed(torch.set_grad_enabled, False, True),
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: changed(torch.set_default_dtype, torch.float16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: changed(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
}


def state() -> dict[str, Any]:
    """What a process has of each once, or a thread."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "threads": torch.get_num_threads(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "random": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters),
        "logging": logging.root.manager.disable,
        "stderr": sys.stderr,
    }


def made(out: Path, images: Any = IMAGES, model: nn.Module | None = None, **options: Any) -> list[bytes]:
    """The files of a run of a net, and of its simulation what it gives for the images."""
    options = {"input_size": SIZE, "quick": True, "threads": 1, "scored": 4, "recipe": "mse", **options}
    result = quantize(model or net(), images, out=out, **options)
    return [(result.folder / name).read_bytes() for name in SAME]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return made(tmp_path_factory.mktemp("usual") / "run")


@pytest.mark.parametrize("name", STATES)
def test_a_call_in_any_state_of_torch_gives_the_same_files_and_leaves_the_state(
    name: str, usual: list[bytes], tmp_path: Path
) -> None:
    model = net()
    with STATES[name]():
        before = state()
        found = made(tmp_path / "run", model=model)
        with pytest.raises(FewbitError):
            quantize(model, IMAGES, input_size=(3, 2, 2), out=tmp_path / "failed", quick=True)
        assert state() == before
    assert found == usual


@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
@pytest.mark.parametrize(
    ("images", "options"),
    [(IMAGES, {"recipe": "best", "steps": 2}), ("synthetic", {"steps": 2, "score": IMAGES[:4], "calibration": 4})],
)
def test_what_learns_has_gradients_where_the_caller_has_none(
    images: Any, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    expected = made(tmp_path / "usual", images, **options)
    with STATES[name]():
        assert made(tmp_path / "run", images, **options) == expected


def test_two_threads_give_the_files_of_one_and_the_second_says_that_it_waits(usual: list[bytes], tmp_path: Path) -> None:
    """Without a turn an export fails in the other's, and the file has a batch of one written in it."""
    models = net(), net()  # drawn here: torch has one random state
    before, told, begin = state(), [Told(), Told()], threading.Barrier(2)
    found: dict[int, Any] = {}

    def one(k: int) -> None:
        begin.wait()
        try:
            found[k] = made(tmp_path / f"{k}", model=models[k], progress=told[k])
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=one, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: usual, 1: usual}
    assert sorted(one.lines for one in told) == [[], [call.WAITS]]
    assert state() == before


class Inside(BaseException):
    """A call has its turn."""


@contextmanager
def inside() -> Iterator[None]:
    raise Inside
    yield


def test_every_door_takes_its_turn_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "run")
    finished, result = Run.open(tmp_path / "run"), quantize(net(), IMAGES, input_size=SIZE, quick=True, threads=1, recipe="mse")
    (tmp_path / "rows.toml").write_text("models = ['demo']")
    options: dict[str, Any] = {"input_size": SIZE, "out": tmp_path / "other"}
    doors: dict[str, Callable[[], object]] = {
        "quantize": lambda: quantize(net(), IMAGES, **options),
        "search": lambda: search(net(), IMAGES, **options),
        "sensitivity": lambda: sensitivity(SensitivityRequest(model=net(), images=IMAGES, **options)),
        "sweep": lambda: sweep(SweepRequest(file=tmp_path / "rows.toml", out=tmp_path / "other")),
        "verify": finished.verify,
        "images": lambda: finished.images(IMAGES),
        "do": lambda: finished.do("twin"),
        "value": lambda: finished["exact"],
        "module": lambda: result.module,
    }
    monkeypatch.setattr(call, "usual_torch", inside)
    for name, door in doors.items():
        try:
            door()
        except Inside:
            assert not (tmp_path / "other.part").exists(), name
        else:
            raise AssertionError(f"{name} takes no turn")


@contextmanager
def another_call() -> Iterator[None]:
    """A thread is in a call until the block ends."""
    first, over = threading.Event(), threading.Event()

    def hold() -> None:
        with call.one_call():
            first.set()
            over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    first.wait(10)
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_wait_is_said_once_and_is_no_time_of_the_work_and_calls_inside_of_a_call_do_not_wait() -> None:
    told, spent = Told(), list[float]()

    def wait() -> None:
        with call.one_call(told), call.one_call(told):
            spent.append(told.spent)

    thread = threading.Thread(target=wait)
    with another_call():
        thread.start()
        thread.join(0.3)
        assert told.lines == [call.WAITS]
        assert not spent
    thread.join()
    assert spent[0] < 0.2
    assert told.lines == [call.WAITS]


def test_a_forked_process_waits_for_no_thread_that_it_does_not_have() -> None:
    with another_call():
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(10)  # ends a process that waits
                with call.one_call():
                    os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_other_threads_say_during_an_export_is_said() -> None:
    heard = io.StringIO()
    with redirect_stderr(heard), quiet():
        print("of torch", file=sys.stderr)
        other = threading.Thread(target=lambda: print("of another", file=sys.stderr, flush=True))
        other.start()
        other.join()
    assert heard.getvalue() == "of another\n"


def test_a_model_and_images_made_in_inference_mode_give_the_same_files_and_are_left_alone(
    usual: list[bytes], tmp_path: Path
) -> None:
    with torch.inference_mode():
        model, images = net(), torch.from_numpy(IMAGES).clone()
    tensors = [*model.parameters(), *model.buffers(), model.scale]
    before = [value.clone() for value in tensors]
    assert made(tmp_path / "run", images, model) == usual
    after = [*model.parameters(), *model.buffers(), model.scale]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(tensors, after, before, strict=True))
    learns = {"recipe": "adaround", "time": "1s"}
    made(tmp_path / "learned", images, model, **learns)
