"""The example of docs/tasks.md, run as it stands there, and what is refused. Oracle: the angles by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fewbit.choose.loss import ModelLoss
from fewbit.core.task import Output
from fewbit.deploy.folder import decoded
from fewbit.errors import BadImages, BadModel, FewbitError
from fewbit.request import Request
from fewbit.stages.task import meant, reopened
from fewbit.task import Classify, Rating, Segment, Task, Tensors, own

PAGE = Path(__file__).parent.parent.parent / "docs" / "tasks.md"


def model(*outputs: Output, **record: str) -> SimpleNamespace:
    """What is looked at of a model that was loaded."""
    return SimpleNamespace(ref="net", outputs=outputs, input_shape=(3, 8, 8), record=record)


@pytest.fixture
def mine(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "mine.py"
    path.write_text(code + "\n\ndef broken():\n    raise ValueError('no weights')\n\n\nnothing = 3\n")
    return path


def test_the_example_measures_angles(mine):
    task, notes = meant(f"{mine}:Angle", model(Output("y", (1,))), ())
    assert (task.spec, task.classes, notes) == ("angle", None, ())
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    y = x + torch.deg2rad(torch.tensor([[0.5], [-0.5], [20.0], [359.5]]))
    meter = task.meter(None)
    assert meter.add([x], [y]).tolist() == pytest.approx([0.5, 0.5, 20, 0.5], abs=0.05)
    assert meter.rating(()).agreement == 75
    assert task.divergence([x], [y]) == pytest.approx(1 - 0.9397 + 3 * 3.8e-5, rel=1e-2)
    with pytest.raises(BadImages, match=r"--annotations boxes\.json: task angle has none"):
        task.read(Path("boxes.json"), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"broken\(\) of .*mine.py failed: .*no weights"),
        ("nothing", "failed"),
        ("Degrees", "is a .*; a fewbit.Task is needed"),
    ],
)
def test_what_is_no_task_is_refused_by_name(mine, name, message):
    with pytest.raises(BadModel, match=message):
        meant(f"{mine}:{name}", model(Output("y", (1,))), ())
    with pytest.raises(FewbitError, match="Did you mean Angle"):
        meant(f"{mine}:Angel", model(Output("y", (1,))), ())


class Bad(Task):
    """A task that gives what it is told to, or raises it."""

    name = "bad"

    def __init__(self, **gives):
        self.gives = gives

    def given(self, method, otherwise=None):
        if isinstance(what := self.gives.get(method, otherwise), BaseException):
            raise what
        return what

    def meter(self, truth):
        rating = Rating("", "near", None, None, 90.0, (80.0, 95.0))
        meter = SimpleNamespace(add=lambda a, b: self.given("add"), rating=lambda outputs: self.given("rating", rating))
        return self.given("meter", meter)

    def divergence(self, exact, outputs):
        return self.given("divergence", 0.5)

    def read(self, path, images):
        return self.given("read")

    def softened(self, outputs, temperature):
        return self.given("softened", outputs)

    def drawn(self, picture, outputs):
        return self.given("drawn")


RATING = Rating("", "near", None, None, 90.0, (80.0, 95.0))
CALLS = {
    "meter": lambda task: own.watched(task).meter(None),
    "add": lambda task: own.watched(task).meter(None).add([torch.zeros(4, 2)], [torch.zeros(4, 2)]),
    "rating": lambda task: own.watched(task).meter(None).rating(()),
    "divergence": lambda task: own.watched(task).divergence([torch.zeros(4, 2)], [torch.zeros(4, 2)]),
    "softened": lambda task: own.watched(task).softened([torch.zeros(4, 2)], 2.0),
    "read": lambda task: own.watched(task).read(Path("x"), SimpleNamespace(names=("a", "b"))),
    "drawn": lambda task: own.watched(task).drawn(Image.new("RGB", (4, 4)), [torch.zeros(1, 2)]),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), KeyError("k")])
def test_what_a_users_method_raises_is_said_with_file_and_method(method, error):
    said = rf"--task .*test_own\.py:Bad: \w+\.{method} raised {type(error).__name__}: .+, at line \d+\. Fix it\."
    with pytest.raises(BadModel, match=said):
        CALLS[method](Bad(**{method: error}))
    refused = BadImages("own words")
    with pytest.raises(BadImages, match=r"^own words$"):
        CALLS[method](Bad(**{method: refused}))


@pytest.mark.parametrize(
    ("method", "gives", "message"),
    [
        ("meter", 3, "gave 3; an object with the methods add and rating is needed"),
        ("add", torch.zeros(3, 5), r"gave a tensor of shape \(3, 5\); None, or a tensor of shape \(4,\)"),
        ("add", 2.0, "gave 2.0; None, or a tensor"),
        ("rating", 3, "gave 3; a fewbit.Rating is needed"),
        ("rating", replace(RATING, agreement=math.nan), "gave nan as agreement; a number of percent, 0 to 100"),
        ("rating", replace(RATING, agreement=400.0), "gave 400.0 as agreement"),
        ("rating", replace(RATING, agreement="90"), "gave '90' as agreement"),
        ("rating", replace(RATING, interval=(1.0, math.inf)), "as interval; two finite numbers"),
        ("rating", replace(RATING, interval=None), "gave None as interval"),
        ("rating", replace(RATING, float_score=3.0), r"gave \(3.0, None\) as float_score and score"),
        ("rating", replace(RATING, agreement_measure=None), "gave None as agreement_measure; a text"),
        ("rating", replace(RATING, rows=({"float": 3},)), "as rows"),
        ("rating", replace(RATING, rows=({"what": "a", "unit": 3},)), "as rows"),
        ("rating", replace(RATING, rows=({"what": "a", "better": "down"},)), "as rows"),
        ("divergence", "x", "gave 'x'; a number, or a tensor of shape"),
        ("divergence", torch.zeros(4), r"gave a tensor of shape \(4,\)"),
        ("divergence", None, "gave None"),
        ("divergence", math.nan, "gave nan; a finite number of 0 or more is needed"),
        ("divergence", torch.tensor(math.inf), "gave inf; a finite number of 0 or more"),
        ("divergence", torch.tensor([-1.0], requires_grad=True), r"gave -1\.0; a finite number of 0 or more"),
        ("add", torch.tensor([0, math.nan, 1, 2]), "gave nan for an image; None, or a finite number of 0 or more"),
        ("add", torch.tensor([0, 3, -1, 2]), "gave -1 for an image; None, or a finite number of 0 or more"),
        ("rating", replace(RATING, rows=({"what": "x", "float": math.nan},)), "as rows; .* finite numbers is needed"),
        ("softened", [], r"gave \[\]; a list of 1 tensors, one for each output, is needed"),
        ("softened", torch.zeros(4, 2), r"gave a tensor of shape \(4, 2\); a list of 1 tensors"),
        ("read", [1], r"gave \[1\]; a list of what is known of each of the 2 images"),
        ("drawn", 7, "gave 7; a picture of PIL"),
    ],
)
def test_what_a_users_method_gives_and_may_not_is_said(method, gives, message):
    with pytest.raises(BadModel, match=rf"--task .*test_own\.py:Bad: \w+\.{method} .*{message}"):
        CALLS[method](Bad(**{method: gives}))
    right = Bad(read=["a", "b"])
    assert CALLS["rating"](right) == RATING
    assert (CALLS["add"](right), CALLS["divergence"](right), CALLS["drawn"](right)) == (None, 0.5, None)


def test_a_loss_of_outputs_that_are_not_finite_is_no_fault_of_the_task():
    task, broken = own.watched(Bad(divergence=math.nan)), [torch.tensor([1, math.inf])]
    assert math.isnan(task.divergence([torch.ones(2)], broken))
    assert ModelLoss(task, [[torch.ones(2)]]).total([broken]) == math.inf
    assert own.watched(Bad(divergence=-1e-7)).divergence([torch.ones(2)], [torch.ones(2)]) == -1e-7  # rounding


class Upside(Classify):
    """A user's own classifier, with a divergence that fails."""

    def divergence(self, exact, outputs):
        return super().divergence(exact, outputs) + outputs[3].sum()


def test_a_task_is_looked_at_from_where_it_is_named_on():
    given = Upside(0, 5)
    task, _ = meant(given, model(Output("y", (5,))), ())
    assert isinstance(task, Upside)  # and so a classifier, whose classes are those of the images
    assert (task.index, task.classes, type(task).drawn is Task.drawn, type(given)) == (0, 5, True, Upside)
    with pytest.raises(BadModel, match=r"test_own\.py:Upside: Upside\.divergence raised IndexError: .*, at line \d+\. Fix it"):
        task.divergence([torch.zeros(4, 5)], [torch.zeros(4, 5)])
    ours = Classify(0, 5)
    assert own.watched(ours) is ours


class Pair(Bad):
    """A user's own classifier that is none of fewbit's: what it gives is what it is told."""

    def program(self):
        return self.given("program", (("classify",), {"index": 1}))

    @property
    def logits(self):
        return self.given("logits", 1)


def test_a_users_task_has_logits_and_a_program() -> None:
    outputs = (Output("hidden", (7, 8)), Output("y", (5,)))
    task, _ = meant(Pair(), model(*outputs), ())
    assert (task.logits, task.program()) == (1, (("classify",), {"index": 1}))
    logits, labels = [torch.randn(4, 7, 8), torch.randn(4, 5)], torch.tensor([0, 4, 2, 2])
    loss = ModelLoss(task, (), labels).total([logits])
    assert loss == pytest.approx(F.cross_entropy(logits[1].double(), labels).item())
    pieces, fields = decoded(SimpleNamespace(task=task, tail=None))  # type: ignore[arg-type]
    assert (pieces, fields) == (("classify",), {"task": "bad", "index": 1})


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ({"logits": "1"}, r"Pair\.logits gave '1'; None, or the number of an output, from 0 is needed"),
        ({"logits": -1}, r"Pair\.logits gave -1; None, or the number"),
        ({"logits": 2}, r"Pair\.logits gave 2; the number of an output \(batch, classes\) is needed"),
        ({"logits": 0}, r"Pair\.logits gave 0; the number of an output \(batch, classes\) is needed"),
        ({"logits": KeyError("k")}, r"Pair\.logits raised KeyError: 'k', at line"),
        ({"classes": 4}, r"Pair\.logits gave 1; the number of an output \(batch, 4 classes\) is needed"),
        ({"program": None}, r"Pair\.program gave None; a tuple of the names of pieces"),
        ({"program": (("classify",), {1: 2})}, r"Pair\.program gave .*; a tuple of the names of pieces"),
        ({"program": (("classify",), {"index": torch.ones(2)})}, r"Pair\.program gave .*; what JSON can hold"),
        ({"program": (("clasify",), {})}, r"Pair\.program gave \('clasify',\); pieces of predict.py that make an answer"),
        ({"program": (("detect",), {})}, r"Pair\.program gave \('detect',\); pieces of predict.py that make an answer"),
        ({"program": ((), {})}, r"Pair\.program gave \(\); pieces of predict.py"),
    ],
)
def test_logits_and_a_program_that_cannot_be_are_refused_when_the_task_is_named(gives, message):
    task = Pair(**gives)
    task.classes = gives.get("classes")
    with pytest.raises(BadModel, match=message):
        meant(task, model(Output("hidden", (7, 8)), Output("y", (5,))), ())


def test_a_users_task_without_a_name_is_refused():
    for gives, message in (({"name": None}, "Bad.name gave None; a text"), ({"classes": "3"}, "Bad.classes gave '3'")):
        task = Bad()
        vars(task).update(gives)
        with pytest.raises(BadModel, match=message):
            meant(task, model(Output("y", (1,))), ())


def test_what_a_model_says_counts_and_what_the_user_says_counts_more():
    logits = Output("logits", (5, 8, 8))
    assert meant(None, model(logits, task="segment"), ("a", "b"))[0] == Segment(0, 5, names=("a", "b"))
    assert meant("tensors", model(logits, task="segment"), ())[0] == Tensors((True,))
    assert meant(None, model(Output("y", (5,))), ()) == (Classify(0, 5), ())


def test_where_nobody_says_it_outputs_are_numbers_and_a_note_asks():
    task, notes = meant(None, model(Output("y", (5, 8, 8))), ())
    assert task == Tensors((True,))
    assert (
        "Nothing says what the outputs of net are, so they are compared as numbers; say what they mean with --task" in notes[0]
    )
    task, notes = meant(None, model(Output("y", (5,)), Output("z", (5, 7)), task="detect:detr"), ())
    assert task == Tensors((True, True))
    assert "net is for detect:detr, but --task detect:detr: logits" in notes[0]


def test_a_finished_run_does_not_run_a_users_file_again(mine):
    record = {"task": f"{mine}:Angle", "classes": None, "preprocess": {"size": [3, 8, 8]}}
    mine.write_text("raise SystemExit('run')")
    assert reopened(record, [Output("y", (1,))]) == Tensors((True,))
    assert reopened({**record, "task": "segment", "classes": ["a"]}, [Output("y", (5, 8, 8))]) == Segment(0, 5, names=("a",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detect:yolo3"}, "unknown kind of task detect 'yolo3'"),
        ({"task": 3}, "--task 3 is neither a name nor a fewbit.Task"),
        ({"annotations": "nowhere.json"}, "--annotations nowhere.json does not exist"),
        ({"annotations": PAGE, "labels": False}, "tasks.md says what is known of the images, and"),
        ({"fill": 114.0, "resize": "squash"}, "fill 114 is for the borders of --resize letterbox or corner"),
        ({"channel_order": "bgr", "input_size": (4, 8, 8)}, "channel_order bgr needs 3 channels, and the input has 4"),
        ({"channel_order": "grb"}, "unknown channel_order 'grb'. Did you mean rgb"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(FewbitError, match=re.escape(message)):
        Request(model="demo", target="ort-x86-vnni", **options)
