"""Oracle: the same bytes as without a limit; the kernel's count of what the process held."""

from __future__ import annotations

import io
import itertools
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit import quantize
from fewbit.choose import Recipe
from fewbit.core import limit
from fewbit.core.peak import peak
from fewbit.data.collection import Data, examples
from fewbit.data.images import Preprocess, open_images
from fewbit.data.synthesize.fdda import Fdda
from fewbit.errors import BadFile, BadModel, FewbitError, Stopped
from fewbit.lint.graph import _inferred
from fewbit.load import load_model
from fewbit.load.sizes import Sizes
from fewbit.onnx_reader.operators import OPERATORS
from fewbit.progress import Progress
from fewbit.recipes import RECIPES
from fewbit.runtimes import runtimes_for
from fewbit.stages.compare_onnx import as_it_runs
from fewbit.stages.limit import check_memory_limit
from fewbit.stages.settle import Walk
from fewbit.stages.sizes import holds_at_other_sizes
from onnx_reader.test_files import net as onnx_net
from onnx_reader.test_files import written

STATUS = Path("/proc/self/status")
BIG = """
import sys
import torch
from timm.models.vision_transformer import VisionTransformer
from fewbit import quantize

torch.manual_seed(0)
net = VisionTransformer(32, 8, num_classes=10, embed_dim=1024, depth=3, num_heads=16)
images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
quantize(net, images.numpy(), input_size=(3, 32, 32), out=sys.argv[1], memory=sys.argv[2], threads=1, quick=True)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_the_peak_of_a_process_is_not_that_of_whoever_started_it() -> None:
    child = "x = b'1' * 80_000_000; from fewbit.core.peak import peak; print(peak())"
    parent = f"import subprocess, sys; x = b'1' * 400_000_000; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    held = int(subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True).stdout)
    assert 80e6 < held < 200e6


def test_the_peak_is_found_where_the_system_does_not_say_vmhwm(monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", lambda *_: io.StringIO("VmRSS: 5 kB\n"))
        found = peak()
    assert found == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.01)


def test_a_limit_changes_no_byte_of_the_plan_and_of_the_files(conv_net, tmp_path, monkeypatch):
    monkeypatch.setattr(limit, "peak", lambda: 10**9)
    options = {"target": "ort-x86-vnni", "recipe": "fast", "input_size": (3, 8, 8), "quick": True, "threads": 1}
    for name, more in (("free", {}), ("held", {"memory": "4GB"})):
        quantize(conv_net.module, conv_net.images, out=tmp_path / name, **options, **more)
    for name in ("plan.safetensors", "model.onnx", "float.onnx", "stats.safetensors", "exported.pt2"):
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "held" / name).read_bytes(), name


def test_a_limit_that_is_passed_stops_the_run_and_more_of_it_goes_on(conv_net, tmp_path, monkeypatch):
    held = [1_000_000_000]
    monkeypatch.setattr(limit, "peak", lambda: held[0])
    options = {"target": "ort-x86-vnni", "input_size": (3, 8, 8), "quick": True, "threads": 1, "out": tmp_path / "run"}
    begun: list[str] = []
    check = limit.check

    def passed_in_choose(text, stage):
        begun.append(stage)
        held[0] = 2_340_000_000 if stage == "choose" else held[0]
        check(text, stage)

    monkeypatch.setattr("fewbit.run.check", passed_in_choose)
    with pytest.raises(
        Stopped, match=r"--memory 1\.5GB was passed: 2\.4GB were held up to the end of choose; type --memory 2\.4GB"
    ):
        quantize(conv_net.module, conv_net.images, memory="1.5GB", **options)
    assert begun[-1] == "choose"
    assert (tmp_path / "run.part" / "plan.json").exists()
    quantize(conv_net.module, conv_net.images, memory="2.4GB", **options)
    assert not (tmp_path / "run.part").exists()


def test_a_limit_that_cannot_be_enough_is_refused_with_one_that_is(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6000), torch.nn.ReLU(), torch.nn.Linear(6000, 10))
    images = torch.rand(8, 3, 8, 8)
    options = {"input_size": (3, 8, 8), "out": tmp_path / "run"}
    wanted = limit.LIBRARIES + 9 * 8 * 6000**2  # the matrices of the second layer's inputs
    with pytest.raises(
        FewbitError, match=rf"6,000 inputs to a layer at a time takes about {limit.shown(wanted)}; type --memory 3"
    ):
        quantize(net, images, recipe="fast", memory="3GB", **options)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.part").exists()


def test_a_layer_with_more_inputs_than_are_solved_at_once_counts_as_its_parts(capture_net):
    torch.manual_seed(0)
    net = capture_net(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7000), torch.nn.Linear(7000, 10)))
    wanted = limit.LIBRARIES + 9 * 8 * 2048**2
    with pytest.raises(FewbitError, match=rf"2,048 inputs to a layer at a time takes about {limit.shown(wanted)};"):
        check_memory_limit("1.2GB", SimpleNamespace(state_dict={}), net.graph, RECIPES["fast"])
    check_memory_limit(limit.shown(wanted), SimpleNamespace(state_dict={}), net.graph, RECIPES["fast"])


@dataclass(frozen=True)
class Own:
    """A pass of a user's own that holds a matrix, and one that needs images of the model."""

    inputs: int = 0
    pool: int = 8
    images: Fdda = Fdda()

    def __call__(self, plan, context):
        return plan

    def widest(self, graph):
        return self.inputs

    def check_model(self, teacher):
        raise BadModel(f"no images can be made of a model with {len(teacher.running)} batch norms; take --recipe fast.")


def test_a_pass_of_a_users_own_says_what_it_holds_and_from_which_models_it_makes_images(conv_net, tmp_path):
    wanted = limit.LIBRARIES + 9 * 8 * 20_000**2
    with pytest.raises(FewbitError, match=rf"20,000 inputs to a layer at a time takes about {re.escape(limit.shown(wanted))};"):
        check_memory_limit("4GB", SimpleNamespace(state_dict={}), conv_net.graph, Recipe("", (Own(20_000),)))
    check_memory_limit("4GB", SimpleNamespace(state_dict={}), conv_net.graph, Recipe("", (Own(100),)))
    with pytest.raises(BadModel, match="no images can be made of a model with 0 batch norms"):
        quantize(conv_net.module, conv_net.images, recipe=Recipe("", (Own(),)), input_size=(3, 16, 16), out=tmp_path / "run")


@pytest.mark.parametrize("text", ["4", "GB", "-4GB", "4TB", "1e9GB", "four GB"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(FewbitError, match="give a number of MB or GB: type --memory 4GB"):
        limit.parse(text)


def test_a_limit_below_the_libraries_is_refused_and_units_are_decimal():
    with pytest.raises(FewbitError, match=r"the libraries and a batch of images take 1\.1GB"):
        limit.parse("1000MB")
    assert limit.parse("1.5 gb") == limit.parse("1500MB") == 1_500_000_000


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="Linux alone counts so")
def test_a_model_of_150_megabytes_stays_below_its_limit(tmp_path):
    command = [sys.executable, "-c", BIG, str(tmp_path / "run"), "2.4GB"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8e9 < int(ended.stdout.split()[-1]) * 1024 < 2.4e9


def no_memory(*_: object, **__: object) -> Any:
    raise MemoryError("Unable to allocate 8 GiB")


def refused(*_: object, **__: object) -> Any:
    """As a runtime says it."""
    raise BadFile("onnxruntime cannot load a.onnx: bad allocation")


def at_call(number: int) -> Callable[..., Callable[..., Any]]:
    """What makes of a function one that has no memory at that call."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)
        return lambda *args, **options: no_memory() if next(calls) == number else function(*args, **options)

    return made


def tiny() -> torch.nn.Module:
    layers = torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(*layers).eval()


def loaded(_: Path) -> Any:
    return load_model(tiny(), overrides={"input_size": (3, 16, 24)}, sizes=Sizes.ANY)


def traced(folder: Path) -> None:
    torch.jit.trace(tiny(), torch.rand(1, 3, 16, 24)).save(folder / "net.pt")
    load_model(str(folder / "net.pt"), overrides={"input_size": (3, 16, 24)})


def read(folder: Path) -> None:
    path = written(onnx_net(), folder)
    as_it_runs(load_model(str(path)), path)


def read_otherwise(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATORS[""], "Relu", lambda node, x: torch.relu(x) + 1e-3 * x)
        read(folder)


def three_at_a_time(folder: Path) -> None:
    load_model(str(written(onnx_net(batch=3), folder)))


def a_loader(_: Path) -> None:
    open_images(Data([torch.rand(3, 8, 8)] * 4, transform=torch.neg), Preprocess((3, 8, 8)), skip_bad=True)


def a_file_of_a_walk(folder: Path) -> None:
    walk: Any = Walk.__new__(Walk)
    walk.rows, walk.limit, walk.progress, walk.folder = [{"changes": {}}], 1.0, Progress(), folder
    walk.request = walk.forget = lambda *_: None
    walk.tried("recipe best", {"recipe": "best"})


TRIALS: dict[str, tuple[str, Callable[..., Any], Callable[[Path], Any]]] = {
    "an export": ("fewbit.load.export._exported", at_call(1), loaded),
    "one image alone": ("fewbit.load.trials._copies", at_call(1), loaded),
    "the module at another size": ("fewbit.load.sizes.tensors_in", at_call(1), loaded),
    "the program at another size": ("fewbit.load.sizes.fed", at_call(1), loaded),
    "two images of TorchScript": ("fewbit.load.torchscript.tensors_in", at_call(3), traced),
    "the file at another size": (
        "fewbit.stages.sizes.save", at_call(1), lambda p: holds_at_other_sizes(loaded(p), {"opset": 20, "ir_version": 10})
    ),
    "an ONNX file as it runs": ("fewbit.stages.compare_onnx.OnnxRuntime", lambda _: refused, read),
    "the first node that differs": ("fewbit.stages.compare_onnx.read_onnx", at_call(1), read_otherwise),
    "another batch of an ONNX file": ("torch.matmul", at_call(2), three_at_a_time),
    "shapes of lint": ("onnx.shape_inference.infer_shapes", at_call(1), lambda _: _inferred(onnx_net(), fix=False)),
    "whether a runtime loads a file": (
        "fewbit.runtimes.open_session", lambda _: refused, lambda folder: runtimes_for(written(onnx_net(), folder))
    ),
    "the first item of a loader": ("fewbit.data.collection._all_of", at_call(1), lambda _: examples([torch.rand(3, 8, 8)])),
    "an image of a loader": ("fewbit.data.items.parts_of", at_call(1), a_loader),
    "a file of --max-drop": ("fewbit.stages.settle.Walk.measure", lambda _: refused, a_file_of_a_walk),
}  # fmt: skip


@pytest.mark.parametrize("tried", TRIALS)
def test_no_memory_in_a_trial_is_not_taken_for_its_answer(tried: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, failing, call = TRIALS[tried]
    place, _, name = target.rpartition(".")
    owner = resolve_name(place)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(Stopped, match="not enough memory"):
        call(tmp_path)
