"""Oracles: scipy's interval, and both models run on the images one by one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fewbit.choose.loss import ModelLoss
from fewbit.core.task import Output
from fewbit.data.images import Preprocess, open_images
from fewbit.errors import BadFile, BadModel, UnknownName
from fewbit.task import Task, recognise
from fewbit.task.interval import newcombe, wilson
from fewbit.task.own import watched
from fewbit.verify import evaluate, open_session
from fewbit.verify.evaluate import _Rows
from fewbit.workers import Local


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys_interval(case, confidence):
    hits, count = case
    expected = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    assert wilson(hits, count, confidence) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


@pytest.mark.parametrize("hits", [0, 7])
def test_an_interval_stays_between_0_and_100_percent(hits):
    low, high = wilson(hits, 7)
    assert 0 <= low < high <= 100


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((37, 3, 8, 8)).astype(np.float32)


def answers(path, pictures) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": picture[None]})[0] for picture in pictures])


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_percentages_are_those_of_the_answers_image_by_image(realized_vit, pictures, batch):
    before, after = (answers(path, pictures) for path in (realized_vit.float_path, realized_vit.path))
    labels = before.argmax(1)
    labels[::3] = 0  # so that the float model is not always right
    images = open_images((pictures, labels), Preprocess(size=(3, 8, 8)), classes=4)
    net = realized_vit.net.graph
    score = evaluate(
        realized_vit.float_path, realized_vit.path, images, net.outputs, recognise(net.outputs), batch=batch, threads=1
    )
    rating = score.rating
    hits = int((after.argmax(1) == labels).sum())
    assert (score.images, score.runtime) == (37, "onnxruntime")
    assert rating.float_score == pytest.approx(100 * (before.argmax(1) == labels).mean())
    assert rating.score == pytest.approx(100 * hits / 37)
    assert rating.agreement == pytest.approx(100 * (before.argmax(1) == after.argmax(1)).mean())
    right = [torch.from_numpy(y.argmax(1) == labels) for y in (before, after)]
    assert rating.interval == newcombe(*right)
    np.testing.assert_array_equal(rating.float_answers.numpy(), before.argmax(1))
    np.testing.assert_array_equal(rating.answers.numpy(), after.argmax(1))
    assert 0 < rating.float_score < 100
    each = [np.corrcoef(before[:, k], after[:, k])[0, 1] for k in range(before.shape[1])]
    assert score.outputs[0].agreement == pytest.approx(100 * np.mean(each), abs=1e-6)
    error = np.sqrt(((before - after) ** 2).mean(0)) / before.std(0)
    assert score.outputs[0].relative_error == pytest.approx(error.mean(), abs=1e-6)


class Painted(Task):
    """Draws its outputs as what is known of the picture; the errors of images are those that are given."""

    name = "painted"

    def __init__(self, errors):
        self.errors = list(errors)

    def meter(self, truth):
        return self

    def add(self, exact, outputs):
        found, self.errors = self.errors[: len(exact[0])], self.errors[len(exact[0]) :]
        return torch.tensor(found)

    def rating(self, outputs):
        return outputs

    def divergence(self, exact, outputs):
        return 0.0

    def drawn(self, picture, outputs):
        picture.info["logits"] = outputs[0].numpy()
        return picture


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_worst_images_are_drawn_each_with_what_both_models_give_for_it(realized_vit, pictures, batch):
    """Oracle: both models run on the images one by one."""
    both = [answers(path, pictures) for path in (realized_vit.float_path, realized_vit.path)]
    errors, images = np.random.default_rng(4).permutation(37) / 37, open_images(pictures, Preprocess(size=(3, 8, 8)))
    score = evaluate(
        realized_vit.float_path,
        realized_vit.path,
        images,
        realized_vit.net.graph.outputs,
        Painted(errors),
        batch=batch,
        threads=1,
    )
    assert score.errors.tolist() == errors.tolist()
    assert list(score.pictures) == np.argsort(-errors)[:12].tolist()
    for i, two in score.pictures.items():
        seen = pictures[i].transpose(1, 2, 0) * images.preprocess.std + images.preprocess.mean
        for one, logits in zip(two, both, strict=True):
            np.testing.assert_allclose(one.info["logits"], logits[i : i + 1], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(one), np.rint(255 * seen.clip(0, 1)))


class Given(Local):
    """What both models give for all images is known."""

    def __init__(self, *both):
        object.__setattr__(self, "both", both)

    def each(self, function, count, size):
        yield count, self.both


class Silent(Painted):
    """Says nothing of an image and draws nothing."""

    drawn = Task.drawn

    def add(self, exact, outputs):
        return None


def test_the_error_of_an_image_is_that_of_the_output_that_is_furthest_off(pictures):
    exact = torch.tensor([[1.0, 0.0], [-1.0, 4.0], [1.0, 0.0], [-1.0, 4.0]]), torch.zeros(4, 5, dtype=torch.long)
    found = [one.clone() for one in exact]
    found[0][1] += torch.tensor([0.5, 1.0])  # half of the spread of both channels, which are 1 and 2
    found[0][2] += torch.tensor([0.1, 0.2])
    found[1][2, :3] = 1
    found[1][3, 0] = 1
    outputs, images = (
        (Output("logits", (2,)), Output("places", (5,), is_real=False)),
        open_images(pictures[:4], Preprocess((3, 8, 8))),
    )
    score = evaluate(Path("a"), Path("b"), images, outputs, Silent(()), workers=Given(exact, tuple(found)))
    assert score.errors.tolist() == pytest.approx([0, 0.5, 0.6, 0.2])
    assert score.pictures == {}


def test_without_labels_there_is_agreement_and_no_accuracy(realized_conv_net, pictures):
    run = realized_conv_net
    images = open_images(pictures, Preprocess(size=(3, 8, 8)))
    outputs = run.net.graph.outputs
    score = evaluate(run.float_path, run.path, images, outputs, recognise(outputs), threads=1)
    assert (score.rating.float_score, score.rating.score) == (None, None)
    agree = round(score.rating.agreement * 37 / 100)
    assert score.rating.interval == wilson(agree, 37)
    assert score.to_json()["interval"] == list(wilson(agree, 37))


class Failing(Task):
    """A user's task that fails at one place."""

    name = "failing"

    def meter(self, truth):
        return self

    def add(self, exact, outputs):
        raise ValueError("no angle")

    def divergence(self, exact, outputs):
        return "far"


def test_a_users_task_that_fails_is_named(realized_conv_net, pictures):
    run = realized_conv_net
    images, outputs = open_images(pictures, Preprocess(size=(3, 8, 8))), run.net.graph.outputs
    with pytest.raises(
        BadModel, match=r"test_evaluate\.py:Failing: Failing\.meter gave .*; an object with the methods add and rating"
    ):
        evaluate(run.float_path, run.path, images, outputs, watched(Failing()), threads=1)
    Failing.rating = lambda self, outputs: None
    with pytest.raises(BadModel, match=r"Failing\.add raised ValueError: no angle"):
        evaluate(run.float_path, run.path, images, outputs, watched(Failing()), threads=1)
    with pytest.raises(BadModel, match=r"Failing\.divergence gave 'far'"):
        ModelLoss(watched(Failing()), [[torch.zeros(2, 3)]]).total([[torch.zeros(2, 3)]])


def test_progress_counts_every_image_once(realized_conv_net, pictures):
    run, seen = realized_conv_net, []
    images = open_images(pictures, Preprocess(size=(3, 8, 8)))
    outputs = run.net.graph.outputs
    evaluate(run.float_path, run.path, images, outputs, recognise(outputs), batch=16, threads=1, progress=seen.append)
    assert seen == [16, 16, 5]


class Parts(Local):
    """Parts of the images, each by what was sent to another process."""

    def each(self, function, count, size):
        for start in range(0, count, size):
            yield from list(pickle.loads(pickle.dumps(function))(range(start, min(start + size, count))))


def test_a_score_is_the_same_whoever_runs_the_models(realized_vit, pictures):
    images, seen = open_images(pictures, Preprocess(size=(3, 8, 8))), []
    outputs, paths = realized_vit.net.graph.outputs, (realized_vit.float_path, realized_vit.path)
    options = {"batch": 1, "threads": 1, "progress": seen.append}
    scores = [evaluate(*paths, images, outputs, recognise(outputs), workers=w, **options) for w in (Local(), Parts())]
    one, two = (pickle.dumps((score.to_json(), score.errors.tolist())) for score in scores)
    assert one == two
    assert seen == [1] * 37 * 2


def test_rows_that_are_the_same_for_every_image_say_nothing():
    boxes = torch.arange(12.0).view(3, 4)
    for shown, agreement in (([boxes, boxes], None), ([boxes[:0], boxes[:0]], None), ([boxes[:0]], None), ([boxes], 100)):
        rows = _Rows("boxes")
        for one in shown:
            rows.add(one, one)
        assert rows.score().agreement == agreement
    rows = _Rows("boxes")
    rows.add(boxes, boxes)
    rows.add(boxes[:1], boxes[2:])
    assert rows.score().agreement == 50


def test_an_unknown_runtime_offers_those_that_there_are(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown runtime 'onnxruntim'\. Did you mean onnxruntime"):
        open_session("onnxruntim", tmp_path / "model.onnx")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_that_is_no_model_is_a_bad_file(tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BadFile, match=rf"{runtime} cannot load .*model\.onnx"):
        open_session(runtime, tmp_path / "model.onnx")


def test_float_and_quantized_models_are_different_files_with_the_same_names(realized_conv_net):
    run = realized_conv_net
    x = run.net.images.numpy()
    outputs = [open_session("onnxruntime", path).run(x) for path in (run.float_path, run.path)]
    assert [list(out) for out in outputs] == [["logits"], ["logits"]]
    with torch.no_grad():
        np.testing.assert_allclose(outputs[0]["logits"], run.net.module(run.net.images).numpy(), atol=3e-6)
    assert np.abs(outputs[0]["logits"] - outputs[1]["logits"]).max() > 1e-4
