"""Oracle: the processor's own numbers, bit for bit, on a device that only says it is another one (pretend.py); refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import pretend
from fewbit import quantize
from fewbit.choose import Bits, Context, choose, columns
from fewbit.choose.distill import Course, Distill, LearnedPlan
from fewbit.choose.sensitivity import Losses
from fewbit.cli import app
from fewbit.core import device as room
from fewbit.core.device import CPU, device_named, exact_products, on, wide
from fewbit.core.graph import Graph
from fewbit.core.grid import Grid, QParams, codes
from fewbit.core.plan import Plan
from fewbit.core.shelf import Shelf
from fewbit.data.preprocess import Preprocess
from fewbit.data.synthesize.fdda import Fdda, centres_of
from fewbit.data.synthesize.norms import NormInversion
from fewbit.data.synthesize.patches import PatchDiversity
from fewbit.data.synthesize.teacher import Teacher
from fewbit.errors import FewbitError
from fewbit.execute.simulate import simulate
from fewbit.observe import observe
from fewbit.recipes import RECIPES
from fewbit.request import Request, SearchRequest, SensitivityRequest
from fewbit.request.types import option
from fewbit.search.model import Loss, Model
from fewbit.search.search import search
from fewbit.target import load_target
from pretend import PRETEND, Pretended
from replay import plans
from replay.nets import CLASSES, SIZE, images, net

LONG = ("liu2021", "easyquant", "brecq", "adaround", "qdrop", "lapq", "fdda", "fast-rotated", "best", "best-rotated")
BITS = "4,first=8,last=8"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device has a name, and shapes are checked in other tests."""
    monkeypatch.setattr(room, "KINDS", (*room.KINDS, pretend.NAME))
    unchecked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", unchecked)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "NARROW", (pretend.NAME,))


# The test of the test: what no GPU does fails, everything else is what the processor computes.


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    x, g = torch.arange(3.0).to(PRETEND), torch.Generator()
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.zeros(1)]),
        lambda: torch.stack([x[0], torch.tensor(1.0)]),
        lambda: x.gather(0, torch.tensor([1])),
        lambda: torch.ones(3).copy_(x) + x,
        lambda: torch.rand(3, generator=g, device=PRETEND),
        lambda: torch.multinomial(x, 1, generator=g),
    ):
        with pytest.raises(RuntimeError, match="pretend"):
            wrong()
    with pytest.raises(TypeError):
        x.numpy()


def test_the_device_computes_what_the_processor_does() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)

    def gradients(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = F.conv2d(x, w, padding=1)[torch.tensor([1, 0])].flatten(1)
        y = (y + torch.tensor(1.0)).softmax(1)
        return torch.autograd.grad((y * y).sum(), [x, w])

    there = gradients(x.to(PRETEND), w.to(PRETEND))
    assert all(isinstance(one, Pretended) and one.device == PRETEND for one in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(gradients(x, w), there, strict=True))


def test_a_forgotten_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(h: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return h + torch.eye(h.shape[-1], dtype=h.dtype)

    monkeypatch.setattr(columns, "damped", forgetful)
    with pytest.raises(RuntimeError, match=r"pretend and one of shape \(27, 27\)"):
        plan_on(PRETEND, "conv", "fast")


# Moving.


def test_what_is_moved_comes_back_and_what_is_there_stays_itself(vit: Any) -> None:
    moved = on(vit.graph, PRETEND)
    tensors = [*moved.module.parameters(), *moved.module.buffers()]
    assert moved.device == PRETEND
    assert tensors
    assert all(t.device == PRETEND for t in tensors)
    assert not any(isinstance(t, Pretended) for t in vit.graph.module.state_dict().values())
    assert on(moved, PRETEND) is moved
    assert on(vit.graph, CPU) is vit.graph
    assert on({"a": (CPU,)}, CPU) == {"a": (CPU,)}
    back = on(moved, CPU)
    for name, value in vit.graph.module.state_dict().items():
        assert torch.equal(back.module.state_dict()[name], value)


def test_a_shelf_gives_back_on_the_device(tmp_path: Path) -> None:
    x = torch.randn(3, 4).t()
    shelf = Shelf.of([x.to(PRETEND), (x, 2)], tmp_path)
    assert shelf[0].device == PRETEND
    assert torch.equal(shelf[0].cpu(), x)
    assert shelf[0].stride() == x.stride()
    assert shelf[1][0].device == CPU
    assert torch.equal(shelf[1][0], x)


def test_without_float64_sums_are_float32_and_wide_codes_are_exact(narrow: None) -> None:
    x, qparams, grid = torch.tensor([0.7, 1.0, -1.0]), QParams(torch.tensor(2.0**-30), torch.tensor(0)), Grid(32)
    assert wide(x).dtype == torch.float64
    assert wide(x.to(PRETEND)).dtype == torch.float32
    there = codes(x.to(PRETEND), on(qparams, PRETEND), grid)
    assert there.device == PRETEND
    assert there.tolist() == codes(x, qparams, grid).tolist()
    assert on(x.double(), PRETEND).dtype == torch.float32


def test_convolutions_keep_their_digits_and_settings_come_back() -> None:
    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic

    before = settings()
    with exact_products(PRETEND):
        assert settings() == (before[0], False, True)
    assert settings() == before
    with exact_products(CPU):
        assert settings() == before


# Stages.


def plan_on(device: torch.device, net: str, recipe: str, bits: str = BITS) -> tuple[Graph, Plan]:
    """The plan that the stages make there."""
    method = plans.shortened(RECIPES[recipe])
    request = Request(model="demo", target="ort-x86-vnni", recipe=method, bits=bits, everything=True, device=str(device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "request_of", lambda *args, **options: request)
        plans.equalized.cache_clear()
        try:
            return plans.plan_of(net, "ort-x86-vnni", recipe, bits, everything=True)
        finally:
            plans.equalized.cache_clear()


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] if r in LONG else []) for r in RECIPES])
def test_every_recipe_makes_the_same_plan_there(recipe: str) -> None:
    there = plan_on(PRETEND, "conv", recipe)
    assert plans.decisions(*there) == plans.decisions(*plan_on(CPU, "conv", recipe))
    assert on(there[1], CPU) is there[1]


def test_learning_that_was_killed_goes_on_there(conv_net: Any, tmp_path: Path) -> None:
    context = Context(
        on(conv_net.graph, PRETEND), conv_net.stats, load_target("ort-x86-vnni"), images=[conv_net.images],
        aside=[conv_net.images[:4]], everything=True, folder=tmp_path,
    )  # fmt: skip
    plan, settings = on(choose(context, RECIPES["mse"]), PRETEND), Distill(steps=4, batch=4, checks=2, seconds=None)
    first = Course(LearnedPlan(plan, context), context, settings)
    first.advance()
    first.save(tmp_path / "state", 1.0, first.student.state())
    again = Course(LearnedPlan(plan, context), context, settings)
    again.resume(tmp_path / "state")
    for course in (first, again):
        course.advance()
    pairs = zip(first.student.parameters(), again.student.parameters(), strict=True)
    assert all(torch.equal(a, b) and b.device == PRETEND for a, b in pairs)
    states = [again.optimizer.state[p] for p in again.student.parameters()]
    assert {s["step"].device for s in states if s} == {CPU}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES][:5])
@pytest.mark.parametrize("bits", [BITS, "mixed:5:4,6"])
def test_attention_and_mixed_widths_too(recipe: str, bits: str) -> None:
    if bits != BITS and recipe != "mse":
        pytest.skip("mixed widths are the same for any recipe")
    assert plans.decisions(*plan_on(PRETEND, "mixed", recipe, bits)) == plans.decisions(*plan_on(CPU, "mixed", recipe, bits))


def test_statistics_and_simulation_are_the_processors(vit: Any) -> None:
    moved, batches = on(vit.graph, PRETEND), vit.images.split(4)
    there, here = observe(moved, batches).tensors(), observe(vit.graph, batches).tensors()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
    context = Context(moved, vit.stats, load_target("ort-x86-vnni"), images=list(batches), everything=True)
    plan = choose(context, RECIPES["mse"])
    with torch.no_grad():
        y = simulate(moved, plan)(vit.images)
        assert y.device == PRETEND
        assert torch.equal(y.cpu(), simulate(vit.graph, plan)(vit.images))
    losses = [Losses(graph, plan, batches)(plan.integer_ops, plan.integer_ops) for graph in (moved, vit.graph)]
    assert losses[0] == losses[1] > 0


def test_statistics_without_float64_are_within_float32_sums(vit: Any, narrow: None) -> None:
    """Counts and extremes are exact. A sum of n numbers in pairs is off by at most log2(n) 2**-24 of the sum of magnitudes."""
    there, here = (observe(graph, vit.images.split(4)).sites for graph in (on(vit.graph, PRETEND), vit.graph))
    for name, h in here.items():
        assert torch.equal(there[name].counts, h.counts)
        assert (there[name].low, there[name].high) == (h.low, h.high)
        largest = max(-h.low, h.high)
        assert abs(there[name].total - h.total) <= 32 * 2**-24 * largest * h.count
        assert there[name].squares == pytest.approx(h.squares, rel=64 * 2**-24)


def test_codes_without_float64_are_the_same_up_to_counted_ties(narrow: None) -> None:
    """A code that differs is a neighbour, and few do: float32 sums move a scale by parts in a million."""
    there, here = (plan_on(device, "conv", "fast")[1].choices for device in (PRETEND, CPU))
    pairs = [(there[name].codes, c.codes) for name, c in here.items() if c.codes is not None]
    apart = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in pairs])
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) <= len(apart) // 200


def teachers(net: str) -> list[Teacher]:
    loaded = plans.observed(net).inputs.loaded
    return [Teacher(loaded.program, loaded.inputs, device) for device in (CPU, PRETEND)]


@pytest.mark.parametrize(("net", "method"), [("conv", NormInversion(4)), ("vit", PatchDiversity(iterations=2, warm_up=1))])
def test_images_are_synthesized_there(net: str, method: Any) -> None:
    low, high = Preprocess(SIZE).ends()
    here, there = (method(teacher, SIZE, CLASSES, 4, low, high) for teacher in teachers(net))
    assert torch.equal(here[0], there[0])
    assert there[0].device == CPU


def test_a_generator_is_trained_there(tmp_path: Path) -> None:
    found = []
    for teacher in teachers("conv"):
        centres = centres_of(teacher, images(4, 1).split(1), torch.arange(4), CLASSES)
        method = Fdda(epochs=2, iterations=2, warm_up=0, batch=4, channels=8, latent=8)
        state = tmp_path / f"{teacher.device}.pt"
        found.append(method(teacher, SIZE, CLASSES, 6, centres, kept=state)[0])
        assert torch.equal(found[-1], method(teacher, SIZE, CLASSES, 6, centres, kept=state)[0])  # resumed at its end
    assert torch.equal(*found)
    assert found[1].device == CPU


def test_a_search_has_the_same_losses_there() -> None:
    ready, found = plans.observed("conv"), []
    for device in (CPU, PRETEND):
        context = Context(on(ready.graph, device), ready.stats, load_target("ort-x86-vnni"), name="mse")
        model = Model(context, plans.shortened(RECIPES["mse"]))
        loss = Loss(context.graph, ready.images.batches(8), None)
        found.append([loss(model.plan(Bits(b, b))) for b in (8, 5)])
    assert found[0] == found[1]


OPTIONS: dict[str, Any] = {"target": "ort-x86-vnni", "input_size": SIZE, "score": images(16, 1).numpy()}


@pytest.mark.slow
def test_a_run_writes_the_same_files_there(tmp_path: Path) -> None:
    digests = []
    for name in ("cpu", pretend.NAME):
        run = quantize(
            net("mixed"), images(32, 0).numpy(), recipe="fast", device=name, seconds=0.01, out=tmp_path / name, **OPTIONS
        )
        files = [path for path in run.folder.iterdir() if path.suffix in (".onnx", ".safetensors")]
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert {"model.onnx", "plan.safetensors", "stats.safetensors"} <= digests[0].keys()


@pytest.mark.slow
def test_a_search_is_made_there(tmp_path: Path) -> None:
    """Which losses it looks at follows from times as well, so they are not compared."""
    given = images(32, 0).numpy()
    found = search(net("conv"), given, points=1, evaluations=3, device=pretend.NAME, out=tmp_path / "search", **OPTIONS)
    assert found["evaluated"] == 3
    assert all(row["bytes"] > 0 for row in found["points"])


# The request.


def test_the_device_is_part_of_what_a_killed_run_is_recognised_by() -> None:
    one = Request(model="demo")
    assert one.key()["device"] == "cpu"
    assert one.place == CPU
    assert one.key() != Request(model="demo", device=pretend.NAME).key()


@pytest.mark.parametrize("kind", [Request, SearchRequest, SensitivityRequest])
@pytest.mark.parametrize(
    "name", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:999", "cuda 0", "cpu:1", "mps:7", "meta", "pretend:1"]
)
def test_a_device_that_is_none_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(FewbitError, match=rf"--device {name} is .*(allowed are cpu, cuda|finds cpu).*type --device pretend:0"):
        kind(model="demo", device=name)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_is_refused_with_what_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "KINDS", room.KINDS[:3])
    with pytest.raises(
        FewbitError, match=rf"--device {name} is not here, torch .* finds cpu: type --device cpu, or leave it out"
    ):
        device_named(name)
    assert device_named("cpu") == CPU
    assert option("device") == "--device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_the_command_says_so_at_once_with_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "KINDS", room.KINDS[:3])
    command = ["quantize", "nothing.onnx", "--images", ".", "--device", "cuda", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "--device cuda is not here" in done.output
    assert not [*tmp_path.iterdir()]
