"""Selections among nearly equal scores, and thresholds. Oracles: files whose order is forced, files that select wrongly, brute
force.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from conftest import captured
from fewbit.capture.selections import COMPARISONS, SELECTORS
from fewbit.core.checks import Checks, SelectionCheck
from fewbit.core.fx import aten
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import simulate
from fewbit.realize import realize
from fewbit.recipes import recipe_named
from fewbit.report.answers import near_ties
from fewbit.report.tables import verify as summary
from fewbit.runtimes import AS_WRITTEN, open_session, runtime_names
from fewbit.target import load_target
from fewbit.verify import compare, deviations
from fewbit.verify.outputs import disturbances
from fewbit.verify.selections import Selected
from planning import plan_for

needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")
CHOSEN = 6


class Chosen(nn.Module):
    """The tokens with the best scores, on their way through a layer of their own (the queries of RT-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 4, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        places = self.score(x[:, :1]).amax(1).flatten(1).topk(CHOSEN, 1).indices
        return self.head(tokens.gather(1, places[..., None].expand(-1, -1, 8)))


class Run:
    """A net, its plan and its file, on images whose right half is almost as red as their left one: scores in pairs, almost
    equal, of tokens that are not.
    """

    def __init__(self, net: nn.Module, folder: Path, target: str = "ort-x86-vnni") -> None:
        torch.manual_seed(0)
        self.target, self.path = load_target(target), folder / "model.onnx"
        made = captured(net)
        self.graph, images = made.graph, made.images[:4].clone()
        images[:, 0, :, 4:] = images[:, 0, :, :4].flip(-1) * (1 + 1e-7)
        self.images = images
        self.plan = plan_for(made.graph, made.stats, self.target, recipe_named("minmax"), keep_float=("score",))
        realize(self.graph, self.plan, self.path, **self.target.file_format)

    def edited(self, edit: Callable[[onnx.GraphProto, onnx.NodeProto], None]) -> Path:
        """The file after `edit` of its graph at the node that selects."""
        model, path = onnx.load(self.path), self.path.with_name("edited.onnx")
        edit(model.graph, next(node for node in model.graph.node if any(name.endswith(".chosen") for name in node.output)))
        onnx.save(model, path)
        return path

    def checks(self, path: Path | None = None, runtime: str = AS_WRITTEN) -> Checks:
        return compare(self.graph, self.plan, path or self.path, [self.images], runtime=runtime)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    return Run(Chosen(), tmp_path_factory.mktemp("chosen"))


def scores_plus(numbers: np.ndarray[Any, Any]) -> Callable[[onnx.GraphProto, onnx.NodeProto], None]:
    """Something is added to the scores of each image's 64 tokens before the choice, and only there."""

    def edit(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        graph.initializer.append(numpy_helper.from_array(numbers.astype(np.float32), "more"))
        graph.node.insert(list(graph.node).index(node), helper.make_node("Add", [node.input[0], "more"], ["moved"]))
        node.input[0] = "moved"

    return edit


@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_of_nearly_equal_scores_is_the_runtimes_and_every_code_behind_is_compared(chosen, sign, monkeypatch):
    path = chosen.edited(scores_plus(sign * 3e-7 * np.linspace(-1, 1, 64)))
    checks = chosen.checks(path)
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    near = [row.near for table in checks.selections for row in table]
    assert len(near) == 2
    found = summary(checks)
    assert (found["near_ties"], found["selections"], found["problems"]) == (sum(near), 8, [])
    if sum(near) > 1:
        assert near_ties(found).startswith(f"{sum(near)} selections were near ties, of 8 (")
    monkeypatch.setattr("fewbit.verify.selections.selections", lambda graph: [])
    blind = chosen.checks(path)
    assert {check.site for check in blind.wrong} == ({"head:input"} if sum(near) else set())
    assert near_ties(summary(blind)) == ""
    assert sum(near) > 0 or sign == 1  # one of both orders is not the simulation's


def smallest(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    next(attribute for attribute in node.attribute if attribute.name == "largest").i = 0


def twice(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """The best place once more in place of the second best."""
    chosen, order = node.output[1], np.array([0, 0, *range(2, CHOSEN)])
    node.output[1] = "real"
    graph.initializer.append(numpy_helper.from_array(order, "order"))
    gather = helper.make_node("Gather", ["real", "order"], [chosen], axis=1)
    graph.node.insert(list(graph.node).index(node) + 1, gather)


def far(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Scores are larger than they should be, the further behind the more."""
    scores_plus(np.linspace(0, 2, 64))(graph, node)


@pytest.mark.parametrize("fault", [smallest, twice, far], ids=lambda fault: fault.__name__)
def test_a_file_that_selects_wrongly_is_found_and_the_node_is_named(chosen, fault):
    checks = chosen.checks(chosen.edited(fault))
    rows = [row for table in checks.selections for row in table]
    assert [row.node for row in rows] == ["topk", "topk"]
    assert all(row.wrong for row in rows)
    assert checks.wrong == ()  # a difference does not spread
    assert summary(checks)["problems"][0].startswith("topk selects wrongly (as written): in ")


def test_a_file_that_gathers_other_rows_than_it_selects_is_found_behind_them(chosen):
    def shifted(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(63), "last"))
        for reader in graph.node:
            reader.input[:] = ["other" if name == node.output[1] else name for name in reader.input]
        at = list(graph.node).index(node) + 1
        graph.node.insert(at, helper.make_node("Sub", ["last", node.output[1]], ["other"]))

    checks = chosen.checks(chosen.edited(shifted))
    assert not any(row.wrong for table in checks.selections for row in table)
    assert {check.site for check in checks.wrong} == {"head:input"}


class Every(nn.Module):
    """Each way to select, and rows that it gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        scores = self.score(tokens).mean(-1)
        values, order = scores.sort(1, descending=True)
        all_of = [
            scores.topk(3, 1, largest=False).indices,
            scores.argsort(1)[:, :2],
            order[:, 3:5],
            scores.max(1).indices[:, None],
        ]
        all_of += [scores.argmax(1, keepdim=True), scores.argmin(1)[:, None], scores.min(1, keepdim=True).indices]
        places = torch.cat(all_of, 1)
        return self.head(tokens.gather(1, places[..., None].expand(-1, -1, 8))) + values[:, :1, None]


@pytest.mark.parametrize("runtime", [AS_WRITTEN, pytest.param("openvino", marks=needs_openvino)])
def test_every_way_to_select_is_read_out_of_the_file(tmp_path, runtime, request):
    target = "ort-x86-vnni" if runtime == AS_WRITTEN else request.getfixturevalue("openvino_target")
    run = Run(Every(), tmp_path, target)
    checks = run.checks(runtime=runtime)
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    for table in checks.selections:
        assert len(table) == 7
        assert not any(row.wrong for row in table)


CALLS: dict[Any, tuple[Any, ...]] = {
    aten.topk.default: (3, 1), aten.sort.default: (1, True), aten.argsort.default: (1,), aten.argmax.default: (1,),
    aten.argmin.default: (1, True), aten.max.dim: (1,), aten.min.dim: (1, True),
}  # fmt: skip


def selected(target: Any, arguments: tuple[Any, ...], scores: Tensor, moved: Tensor, places: Tensor) -> tuple[Any, Any]:
    """What a node gives that selects `places`, and its check, where rounding moves scores to `moved`."""
    graph = torch.fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"), *arguments))
    node.name = "select"
    graph.output((node,))
    module = torch.fx.GraphModule(nn.Module(), graph)
    chosen = Selected(Executor(module), {"select": places})
    given = chosen.calls["select"](scores, *arguments)
    chosen.calls["select"](moved, *arguments)
    return given, chosen.checks()[0]


@pytest.mark.parametrize("target", CALLS, ids=lambda target: target.__name__)
def test_what_moved_scores_select_is_never_wrong_and_other_places_are(target):
    """Brute force: each possible choice of each row is allowed only where scores moved by so much could make it."""
    generator, arguments = torch.Generator().manual_seed(0), CALLS[target]
    places_of = lambda result: result if isinstance(result, Tensor) else result[1]  # noqa: E731
    near = 0
    for _ in range(40):
        scores = torch.randint(0, 3, (3, 4), generator=generator).float() + 1e-5 * torch.rand(3, 4, generator=generator)
        moved = scores + 2e-5 * (torch.randint(0, 2, scores.shape, generator=generator) * 2 - 1)
        theirs = places_of(target(scores + 2e-5 * (2 * torch.rand(scores.shape, generator=generator) - 1), *arguments))
        given, check = selected(target, arguments, scores, moved, theirs)
        assert check.wrong == 0
        near += check.near
        assert torch.equal(places_of(given), theirs)
        if not isinstance(given, Tensor):
            wide = theirs if theirs.ndim == 2 else theirs[:, None]
            assert torch.equal(given[0].reshape(wide.shape), scores.gather(1, wide))
    assert near > 0
    scores = torch.tensor([[0.0, 1.0, 2.0, 2.0 + 1e-5]])
    own = places_of(target(scores, *arguments))
    right = 0
    for choice in itertools.product(range(4), repeat=own.numel()):
        places = torch.tensor(choice).reshape(own.shape)
        _, check = selected(target, arguments, scores, scores + 1e-5, places)
        same = torch.equal(scores.round().gather(1, places.reshape(1, -1)), scores.round().gather(1, own.reshape(1, -1)))
        assert (check.wrong == 0) == (same and len(set(choice)) == len(choice))
        right += check.wrong == 0
    assert right == (1 if target in (aten.argmin.default, aten.min.dim) else 2)


def test_a_mask_among_scores_excuses_nothing_among_the_others():
    scores = torch.tensor([[1.0, 2.0, 3.0, -1e9, -1e9, torch.finfo(torch.float32).min, float("-inf")]])
    moved = scores * (1 + 2.0**-20)
    for places, wrong in (([2, 1], 0), ([1, 2], 1), ([2, 0], 1), ([3, 4], 1), ([2, 6], 1), ([2, 7], 1), ([2, -1], 1)):
        assert selected(aten.topk.default, (2, 1), scores, moved, torch.tensor([places]))[1].wrong == wrong
    assert selected(aten.topk.default, (5, 1), scores, moved, torch.tensor([[2, 1, 0, 4, 3]]))[1].near == 1
    assert selected(aten.topk.default, (5, 1), scores, moved, torch.tensor([[2, 1, 4, 3, 5]]))[1].wrong == 1


COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "less": lambda score, other: score < other,
    "greater": lambda score, other: score > other,
    "at most": lambda score, other: score <= other,
    "at least": lambda score, other: score >= other,
    "equal": lambda score, other: score == other,
    "unequal": lambda score, other: score != other,
    "below a number": lambda score, other: (score - other) < 0,
    "a number at most": lambda score, other: 1.0 + score - other >= 1.0,
    "below half": lambda score, other: (score - other).sigmoid() < 0.5,
    "not zero": lambda score, other: (score - other).bool(),
    "sign": lambda score, other: (score - other).sign(),
    "rounded down": lambda score, other: (score - other + 2).floor(),
    "rounded up": lambda score, other: (score - other + 2).ceil(),
    "rounded": lambda score, other: (score - other + 2.5).round(),
    "cut off": lambda score, other: (score - other - 2).trunc(),
    "an integer": lambda score, other: (score - other + 2).long(),
}
UNMOVED = ("eq", "ne", "to")  # where 0.01 more changes nothing of what does not stand on the threshold


class Masked(nn.Module):
    """Tokens times what is decided of their scores, on their way through a layer (masks of Mask2Former). A score is compared
    with that of the other half of the image, which is almost equal, in four of eight rows with 0.005 more or less.
    """

    def __init__(self, truth: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.score, self.head, self.truth = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 4, 1), nn.Linear(8, 4), truth
        self.register_buffer("step", 0.005 * torch.tensor([0.0, 0, 0, 0, 1, -1, 1, -1])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        tokens, score = self.stem(x).flatten(2).transpose(1, 2), self.score(x[:, :1]).amax(1)
        return self.head(tokens * self.truth(score, score.flip(-1) + self.step).flatten(1)[..., None])


def left_plus(number: float) -> Callable[[onnx.GraphProto, onnx.NodeProto], None]:
    """A number, down or up by turns, is added to what is judged, and only there: Not stands behind Equal, and what is cut off
    is rounded down without its sign.
    """
    numbers = number * (2 * (np.arange(64).reshape(8, 8) % 2) - 1)

    def edit(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        first, makers = node, {name: one for one in graph.node for name in one.output}
        while (before := makers.get(first.input[0])) is not None and before.op_type in ("Equal", "Floor", "Abs"):
            first = before
        whole = first.input[0]
        scores_plus(numbers)(graph, first)
        for reader in graph.node if first.op_type == "Abs" else ():
            if reader.op_type == "Sign" and reader.input[0] == whole:
                reader.input[0] = "moved"

    return edit


@pytest.fixture(scope="module", params=COMPARED)
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    return Run(Masked(COMPARED[request.param]), tmp_path_factory.mktemp("masked"))


def test_what_is_true_of_numbers_on_a_threshold_is_the_runtimes_and_every_code_behind_is_compared(masked, monkeypatch):
    path = masked.edited(left_plus(3e-7))
    checks = masked.checks(path)
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    (name,) = (name for node in onnx.load(path).graph.node for name in node.output if name.endswith(".chosen"))
    theirs = open_session(AS_WRITTEN, path, outputs=[name]).run(masked.images.numpy())[name]
    seen: list[Any] = []
    executor = simulate(masked.graph, masked.plan).executor
    executor(masked.images, {name.removesuffix(".chosen"): seen.append})
    turned = int((seen[0].numpy() != theirs).sum())
    assert turned > 8
    off, on = checks.selections
    assert [(row.compared, row.near, row.wrong) for row in off] == [(256, turned, 0)]
    found = summary(checks)
    assert (found["near_ties"], found["selections"], found["problems"]) == (turned + on[0].near, 512, [])
    monkeypatch.setattr("fewbit.verify.selections.thresholds", lambda graph: [])
    assert {check.site for check in masked.checks(path).wrong} == {"head:input"}


def otherwise(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """What is true is false, and a whole number is one more."""
    given, node.output[0] = node.output[0], "real"
    real = node.op_type in ("Floor", "Ceil", "Round", "Mul", "Sign")
    of_truth = not real and not (node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.INT64)
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32 if real else np.int64), "one"))
    late = helper.make_node("Not", ["real"], [given]) if of_truth else helper.make_node("Add", ["real", "one"], [given])
    graph.node.insert(list(graph.node).index(node) + 1, late)


def test_a_file_that_decides_wrongly_is_found_and_the_node_is_named(masked):
    for fault in (left_plus(0.01), otherwise):
        checks = masked.checks(masked.edited(fault))
        rows = [row for table in checks.selections for row in table]
        assert len(rows) == 2
        assert all(row.wrong >= 32 for row in rows) or (fault is not otherwise and rows[0].node in UNMOVED)
        assert checks.wrong == ()  # a difference does not spread
        if rows[0].wrong:
            start = f"{rows[0].node} {rows[0].does} wrongly (as written): {rows[0].wrong} of 256 numbers, "
            assert summary(checks)["problems"][0].startswith(start)


@needs_openvino
def test_openvino_shows_what_is_true(tmp_path, openvino_target):
    run = Run(Masked(COMPARED["less"]), tmp_path, openvino_target)
    checks = run.checks(run.edited(left_plus(3e-7)), runtime="openvino")
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    assert all(table[0].near > 8 and not table[0].wrong for table in checks.selections)
    checks = run.checks(run.edited(otherwise), runtime="openvino")
    assert all(table[0].wrong for table in checks.selections)


def test_zeros_behind_a_rectifier_are_on_no_side_of_a_threshold_by_rounding(tmp_path):
    run = Run(Masked(lambda score, other: (score - 0.2).relu() > 0), tmp_path)
    assert run.checks().selections[0][0].near == 0

    def at_least(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        node.op_type = "GreaterOrEqual"

    (row,) = run.checks(run.edited(at_least)).selections[0]
    assert row.wrong > 20
    assert row.difference == row.limit == 0


def truth(target: Any, left: Tensor, right: Any, moved: Tensor, theirs: Tensor) -> tuple[Tensor, SelectionCheck]:
    """What a node gives where a runtime finds `theirs` true, and its check, where rounding moves the left side to `moved`."""
    graph = torch.fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"), right))
    node.name = "compare"
    graph.output((node,))
    chosen = Selected(Executor(torch.fx.GraphModule(nn.Module(), graph)), {"compare": theirs})
    given = chosen.calls["compare"](left, right)
    chosen.calls["compare"](moved, right)
    return given, chosen.checks()[0]


@pytest.mark.parametrize("target", [target for target in COMPARISONS if "Scalar" in str(target)], ids=str)
def test_what_is_true_of_moved_numbers_is_never_wrong_and_of_others_it_is(target):
    numbers = torch.tensor([0.3, 0.3 + 1e-5, 0.3 - 1e-5, 0.31, 0.29, float("inf"), float("-inf"), float("nan"), -1e9])
    moved = numbers + torch.tensor([1e-5, -1e-5, *[1e-5] * 7])
    near = torch.tensor([True] * 3 + [False] * 6)
    own = target(numbers, 0.3)
    for i in range(len(numbers)):
        theirs = own.clone()
        theirs[i] = ~theirs[i]
        given, check = truth(target, numbers, 0.3, moved, theirs)
        assert torch.equal(given, theirs)
        assert (check.near, check.wrong) == ((1, 0) if near[i] else (0, 1))
    assert truth(target, numbers, 0.3, moved, own)[1].near == 0
    given, check = truth(target, numbers, 0.3, moved, own[1:])
    assert (check.wrong, torch.equal(given, own)) == (9, True)


STEPPED = {
    aten.floor.default: 1.0,
    aten.ceil.default: 1.0,
    aten.round.default: 0.5,
    aten.trunc.default: 1.0,
    aten.sign.default: 0.0,
}


@pytest.mark.parametrize("target", STEPPED, ids=str)
def test_a_whole_number_may_be_another_only_where_a_moved_number_gives_it(target):
    numbers = STEPPED[target] + torch.tensor([1e-6, -1e-6, 0.2, -0.2, 0.7])
    moved = numbers + torch.tensor([1e-5, -1e-5, 1e-5, 1e-5, 1e-5])
    graph = torch.fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"),))
    node.name = "step"
    graph.output((node,))
    own, low, high = target(numbers), target(numbers - 1e-5), target(numbers + 1e-5)
    for i in range(len(numbers)):
        for other in range(-2, 4):
            theirs = own.clone()
            theirs[i] = other
            chosen = Selected(Executor(torch.fx.GraphModule(nn.Module(), graph)), {"step": theirs})
            assert torch.equal(chosen.calls["step"](numbers), theirs)
            chosen.calls["step"](moved)
            assert chosen.checks()[0].wrong == (not low[i] <= other <= high[i])


class Known(nn.Module):
    """Comparisons of sizes, places and constants beside those of numbers, which are written with the same operators; and two
    nodes of which torch.onnx makes one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2) + self.score(x).flatten(2)
        best = torch.cat([y.argmax(2), y.max(2).indices, y.topk(2, 2).indices[..., 0]], 1)
        valid = (torch.arange(x.shape[0]) >= 0)[:, None, None] & (torch.arange(64) * 0.5 >= 0.2) & (torch.zeros_like(y) >= 0)
        masks = [torch.heaviside(y, y), y.isclose(y.flip(2)), y > y.mean(2, keepdim=True), y.gt(0.1), y >= 0.2, valid]
        masks += [(best >= 3).sum(1)[:, None, None] > 2, y.sign() >= y]
        return self.head((y * sum(mask.float() for mask in masks)).transpose(1, 2))


@pytest.mark.parametrize("traced", [False, True])
def test_operators_are_named_by_the_nodes_that_they_are_of(tmp_path, monkeypatch, traced):
    if traced:
        monkeypatch.setattr("fewbit.realize.torch_onnx.program_of", lambda *args: None)
    run = Run(Known(), tmp_path)
    named = {name: node for node in onnx.load(run.path).graph.node for name in node.output if name.endswith(".chosen")}
    kinds = sorted(node.op_type for node in named.values())
    assert kinds == ["ArgMax", "Greater", "Greater", "GreaterOrEqual", "GreaterOrEqual", "Sign", "TopK"]
    checks = run.checks()
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    assert {f"{row.node}.chosen" for row in checks.selections[0]} == set(named)
    assert not any(row.wrong for table in checks.selections for row in table)


def test_a_file_without_the_names_is_the_plans_and_nothing_is_read_out_of_it(masked):
    expected, older = onnx.load(masked.path), onnx.load(masked.path)
    for node in older.graph.node:
        node.input[:], node.output[:] = ([v.removesuffix(".chosen") for v in values] for values in (node.input, node.output))
    for value in older.graph.value_info:
        value.name = value.name.removesuffix(".chosen")
    assert older != expected
    assert deviations("model.onnx", older, expected) == ()
    older.graph.node[-1].name = "another"
    assert deviations("model.onnx", older, onnx.load(masked.path)) != ()
    path = masked.path.with_name("older.onnx")
    onnx.save(older, path)
    assert masked.checks(path).selections == ((), ())


def test_a_disturbance_moves_scores_but_not_what_the_runtime_selected(chosen):
    executor = Executor(chosen.graph)
    places = torch.arange(CHOSEN).expand(4, -1)
    chosen_calls = Selected(executor, {"topk": places})
    seen: list[Any] = []
    for noise in ({}, disturbances(executor)):
        executor(chosen.images, {"topk": seen.append}, calls={**noise, **chosen_calls.calls})
    assert all(torch.equal(one[1], places) for one in seen)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert set(SELECTORS) >= set(CALLS)
