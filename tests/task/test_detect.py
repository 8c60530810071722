"""Oracles: pycocotools' own summary, torchvision's own post-processing, and boxes that were written down by hand."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pkgutil
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.ops import box_area, box_iou

from fewbit.core.task import Output, Placement, Signature
from fewbit.errors import BadImages, BadModel, UnknownName
from fewbit.stages.task import digest
from fewbit.task import check_name, task_named
from fewbit.task.decode import DECODERS, Queries, Selected, Ssd, Yolo, Yolox
from fewbit.task.detect import Boxes, Detect, apart, same_classes
from fewbit.task.objects import Objects, read
from fewbit.task.precision import matched
from fewbit.task.selection import Found, select
from fewbit.tasks import BOXES, TASKS

STILL = Placement((1.0, 1.0), (0.0, 0.0), (64, 64))


def scene(seed: int, count: int = 25, classes: int = 3) -> tuple[list[Found], list[Objects]]:
    """Objects, some of them crowds or small, and boxes around most of them with errors and too many besides."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(count):
        n = int(rng.integers(0, 6))
        start, side = rng.uniform(0, 200, (n, 2)), rng.uniform(5, 150, (n, 2))
        boxes, labels = np.concatenate([start, start + side], 1), rng.integers(0, classes, n)
        crowd = (rng.random(n) < 0.1).astype(np.int64)
        areas = torch.from_numpy(side.prod(1))
        truth.append(Objects(torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(crowd), areas, STILL))
        more = np.concatenate([boxes + rng.normal(0, 6, boxes.shape), rng.uniform(0, 90, (3, 4)) + np.array([0, 0, 100, 100])])
        kinds = np.concatenate([labels, rng.integers(0, classes, 3)])
        found.append(Found(torch.from_numpy(more), torch.from_numpy(rng.random(n + 3)), torch.from_numpy(kinds)))
    return found, truth


def cocos(found: list[Found], truth: list[Objects]) -> list[float]:
    """pycocotools' twelve numbers, its own way from dictionaries."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = [
        {"id": i * 100 + k + 1, "image_id": i, "category_id": int(one.labels[k]), "iscrowd": int(one.crowd[k]),
         "bbox": [*one.boxes[k, :2].tolist(), *(one.boxes[k, 2:] - one.boxes[k, :2]).tolist()], "area": float(one.areas[k])}
        for i, one in enumerate(truth) for k in range(len(one.labels))
    ]  # fmt: skip
    results = [
        {"image_id": i, "category_id": int(one.labels[k]), "score": float(one.scores[k]),
         "bbox": [*one.boxes[k, :2].tolist(), *(one.boxes[k, 2:] - one.boxes[k, :2]).tolist()]}
        for i, one in enumerate(found) for k in range(len(one.labels))
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        labels = sorted({row["category_id"] for row in rows})
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))], "categories": [{"id": c} for c in labels], "annotations": rows,
            "info": {},
        }  # fmt: skip
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(v) for v in evaluation.stats]


@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_is_pycocotools_own(seed):
    found, truth = scene(seed)
    result, expected = matched(found, truth), cocos(found, truth)
    ours = [
        result.ap(), result.ap(thresholds=slice(1)), result.ap(thresholds=slice(5, 6)),
        *(result.ap(size=size) for size in ("small", "medium", "large")),
    ]  # fmt: skip
    assert ours == pytest.approx([100 * v for v in expected[:6]], abs=1e-9)
    assert 5 < ours[0] < 95


def test_an_image_that_is_drawn_twice_counts_as_two():
    found, truth = scene(2)
    often = np.random.default_rng(0).integers(0, 3, len(found))
    twice = [(f, t) for f, t, n in zip(found, truth, often, strict=True) for _ in range(n)]
    expected = cocos([f for f, _ in twice], [t for _, t in twice])
    assert matched(found, truth).ap(often.astype(float)) == pytest.approx(100 * expected[0], abs=1e-9)


def test_where_nothing_is_found_the_precision_is_0():
    found, truth = scene(3)
    empty = [Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)) for _ in found]
    assert matched(empty, truth).ap() == 0


SELECTED = {
    "yolov10": Selected.v10(Signature([Output("y", (4, 6))], (64, 64))),
    "torchvision": Selected.named(
        Signature([Output("labels", (4,), False), Output("boxes", (4, 4)), Output("scores", (4,))], (64, 64))
    ),
}


def test_yolox_is_decoded_as_its_authors_do():
    model = Signature([Output("output", (84, 8))], (64, 64))
    decoder = Yolox.of(model)
    y = torch.randn(2, 84, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    boxes, scores = decoder.candidates([y])
    for k, (stride, column, row) in {0: (8, 0, 0), 10: (8, 2, 1), 64: (16, 0, 0), 69: (16, 1, 1), 83: (32, 1, 1)}.items():
        x, yy, w, h = y[1, k, :4].double().tolist()  # demo_postprocess of YOLOX: (xy + grid) * stride, exp(wh) * stride
        center, side = ((x + column) * stride, (yy + row) * stride), (np.exp(w) * stride, np.exp(h) * stride)
        expected = [center[0] - side[0] / 2, center[1] - side[1] / 2, center[0] + side[0] / 2, center[1] + side[1] / 2]
        assert boxes[1, k].tolist() == pytest.approx(expected)
        assert scores[1, k].tolist() == pytest.approx((y[1, k, 4] * y[1, k, 5:]).tolist())


@pytest.mark.parametrize("form", ["v5", "v8"])
def test_yolos_heads_differ_in_order_and_objectness(form):
    boxes, scores = torch.tensor([[30.0, 20, 10, 4], [5, 5, 2, 2]]), torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    if form == "v5":
        y = torch.cat([boxes, torch.tensor([[0.5], [1.0]]), scores], 1)[None].repeat(1, 6, 1)
        decoder, expected = Yolo.v5(Signature([Output("y", (12, 8))], (64, 64))), scores * torch.tensor([[0.5], [1.0]])
    else:
        y = torch.cat([boxes, scores], 1).T[None].repeat(1, 1, 6)
        decoder, expected = Yolo.v8(Signature([Output("y", (7, 12))], (64, 64))), scores
    corners, found = decoder.candidates([y])
    assert corners[0, :2].tolist() == [[25.0, 18, 35, 22], [4, 4, 6, 6]]
    torch.testing.assert_close(found[0, :2].float(), expected)


def test_a_weaker_box_of_the_same_class_on_the_same_place_is_dropped():
    rows = torch.tensor([[30.0, 30, 20, 20, 1, 0.9, 0.0], [31, 30, 20, 20, 1, 0.8, 0.0], [30, 30, 20, 20, 1, 0.0, 0.7]])
    decoder = Yolo.v5(Signature([Output("y", (30, 7))], (64, 64)))
    (found,) = select(decoder, [torch.cat([rows, torch.zeros(27, 7)])[None]])
    assert [(round(s, 2), c) for s, c in zip(found.scores.tolist(), found.labels.tolist(), strict=True)] == [(0.9, 0), (0.7, 1)]


@dataclass(frozen=True)
class Plain:
    """A decoder whose outputs are candidates as they are."""

    overlaps: bool
    classes: int = 3
    alone: bool = False
    piece: str = ""

    def candidates(self, outputs):
        return outputs


def one_by_one(boxes, scores, overlaps):
    """(score, box, class) of an image by a loop: all that count, best first, without weaker ones on the same place."""
    there = [(s, tuple(box), c) for box, row in zip(boxes.tolist(), scores.tolist(), strict=True) for c, s in enumerate(row)
             if s >= 0.01 and np.isfinite(box).all()]  # fmt: skip
    kept = []
    for s, box, c in sorted(there, reverse=True)[: 1000 if overlaps else 100]:
        rivals = torch.tensor([other for _, other, of in kept if of == c], dtype=torch.float64).view(-1, 4)
        if not overlaps or not bool((box_iou(torch.tensor([box], dtype=torch.float64), rivals) > 0.65).any()):
            kept.append((s, box, c))
    return kept[:100]


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_is_selected_is_what_brute_force_finds_and_nothing_that_is_no_number(overlaps):
    generator = torch.Generator().manual_seed(0)
    corner = 200 * torch.rand(2, 420, 2, generator=generator, dtype=torch.float64)
    corner[1, :400] = torch.rand(400, 2, generator=generator)  # 1,200 candidates on one place, before others
    boxes = torch.cat([corner, corner + 20 + 5 * torch.rand(2, 420, 2, generator=generator, dtype=torch.float64)], 2)
    scores = 0.5 * torch.rand(2, 420, 3, generator=generator, dtype=torch.float64)
    scores[1, :400] += 0.5
    scores[0, 3:] *= torch.rand(417, 1, generator=generator) < 0.02  # on the first image few count
    boxes[0, 0, 1], boxes[0, 1, 2], scores[0, 2, 1] = torch.nan, torch.inf, torch.nan
    scores[0, 5:7], scores[0, 5, 0], scores[0, 6, 0] = 0.0, 0.01, float(np.nextafter(0.01, 0))
    found = select(Plain(overlaps), [boxes, scores])
    for one, *given in zip(found, boxes, scores, strict=True):
        ours = list(zip(one.scores.tolist(), map(tuple, one.boxes.tolist()), one.labels.tolist(), strict=True))
        assert ours == one_by_one(*given, overlaps)
    assert found[0].scores.min() == 0.01
    assert len(found[1].scores) == (3 if overlaps else 100)


def test_rows_of_yolov10_that_hold_nothing_are_none():
    """Exports fill up with rows of no class, -1."""
    rows = torch.tensor([[10.0, 12, 30, 40, 0.9, 2], [0, 0, 0, 0, 0, -1], [1, 1, 8, 9, 0.4, 0], [0, 0, 0, 0, 0, -1]])
    (found,) = select(Selected.v10(Signature([Output("y", (4, 6))], (64, 64))), [rows[None]])
    assert found.boxes.tolist() == [[10, 12, 30, 40], [1, 1, 8, 9]]
    assert found.labels.tolist() == [2, 0]


def test_a_row_of_yolov10_may_have_any_number_as_its_class():
    """A matrix with a column for each class up to the highest would not fit into any memory."""
    rows = torch.tensor([[10.0, 12, 30, 40, 0.9, 2**40], [0, 0, 9, 9, 0.5, torch.nan], [1, 1, 8, 9, 0.4, 3]])
    (found,) = select(SELECTED["yolov10"], [rows[None]])
    assert found.labels.tolist() == [2**40, 0, 3]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.4])


def test_the_queries_of_detr_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    logits, boxes = torch.randn(2, 6, 5) * 2, torch.rand(2, 6, 4) * 0.5 + 0.1
    processor = transformers.DetrImageProcessor()
    expected = processor.post_process_object_detection(
        DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes), threshold=0.4, target_sizes=[(48, 64)] * 2
    )
    outputs = [Output("logits", (6, 5)), Output("pred_boxes", (6, 4))]
    found, scores = Queries.detr(Signature(outputs, (48, 64))).candidates([logits, boxes])
    for i, one in enumerate(expected):
        best, labels = scores[i].max(1)
        kept = best > 0.4
        torch.testing.assert_close(found[i][kept].float(), one["boxes"])
        torch.testing.assert_close(best[kept].float(), one["scores"])
        assert labels[kept].tolist() == one["labels"].tolist()
    (first, _) = select(Queries.detr(Signature(outputs, (48, 64))), [logits, boxes])
    assert len(first.scores) == 6  # a query has one class


@pytest.mark.slow
def test_ssd_is_decoded_as_torchvision_does():
    from torchvision.models.detection import ssd300_vgg16

    net = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4).eval()
    generator = torch.Generator().manual_seed(0)
    offsets, logits = torch.randn(1, 8732, 4, generator=generator), 4 * torch.randn(1, 8732, 4, generator=generator)
    maps = [torch.zeros(1, 1, n, n) for n in (38, 19, 10, 5, 3, 1)]
    from torchvision.models.detection.image_list import ImageList

    anchors = net.anchor_generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)
    (boxes,) = (net.box_coder.decode_single(one, anchor) for one, anchor in zip(offsets, anchors, strict=True))
    model = Signature([Output("boxes", (8732, 4)), Output("classes", (8732, 4))], (300, 300))
    with pytest.raises(BadModel, match="one output"):  # four classes with the background look like boxes
        Ssd.of(model)
    found, scores = Ssd(0, 1, 3, (300, 300), 8732).candidates([offsets, logits])
    torch.testing.assert_close(found[0].float(), boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores[0].float(), logits[0].softmax(1)[:, 1:])


def test_a_form_has_to_be_named_and_to_fit():
    outputs = [Output("output", (84, 8))]
    with pytest.raises(
        BadModel, match=r"detect: .* has to be named, as in detect:yolox; these outputs could be yolox or yolov5"
    ):
        task_named("detect", Signature(outputs, (64, 64)))
    with pytest.raises(BadModel, match=r"--task detect:detr: logits .* are needed; the model gives output \(batch, 84, 8\)"):
        task_named("detect:detr", Signature(outputs, (64, 64)))
    lonely = [Output("logits", (8, 1)), Output("pred_boxes", (8, 4))]
    with pytest.raises(
        BadModel, match=r'detect:detr: logits of two or more columns .* "no object".* take --task detect:rtdetr'
    ):
        task_named("detect:detr", Signature(lonely, (64, 64)))
    assert task_named("detect:rtdetr", Signature(lonely, (64, 64))).decoder.classes == 1
    with pytest.raises(BadModel, match=r"these outputs could be rtdetr\b"):
        task_named("detect", Signature(lonely, (64, 64)))
    for form, outputs in (
        ("detr", [Output("logits", (8,)), Output("pred_boxes", (8, 4))]),
        ("rtdetr", [Output("logits", (8, 3)), Output("pred_boxes", (9, 4))]),
        ("rtdetr", [Output("logits", (8, 3)), Output("pred_boxes", (8, 5))]),
        ("torchvision", [Output("boxes", (8, 5)), Output("scores", (8,)), Output("labels", (8,), False)]),
        ("torchvision", [Output("boxes", (8, 4)), Output("scores", (8, 2)), Output("labels", (8,), False)]),
        ("ssd", [Output("boxes", (3234, 4)), Output("classes", (3234, 1))]),
    ):
        with pytest.raises(BadModel, match=f"detect:{form}: .* (are|is) needed"):
            task_named(f"detect:{form}", Signature(outputs, (64, 64)))
    with pytest.raises(UnknownName, match="Did you mean yolox"):
        check_name("detect:yolx")
    with pytest.raises(UnknownName, match=r"unknown task 'detekt'\. Did you mean detect"):
        check_name("detekt")


@pytest.mark.parametrize(
    ("form", "shapes", "size", "names", "classes"),
    [
        ("yolov8", [(84, 8400)], 640, 0, 80),
        ("yolov8", [(84, 64)], 64, 80, 80),
        ("yolov8", [(1207, 525)], 160, 0, 1203),  # as many boxes as the grids have cells: 400 + 100 + 25
        ("yolov8", [(84, 84)], 64, 80, 80),
        ("yolov8", [(84, 90), (7, 90)], 64, 3, 3),  # the names say which
        ("yolov8", [(84, 90), (7, 90)], 64, 0, "one output"),
        ("yolov8", [(84, 90)], 64, 3, 80),
        ("yolov8", [(84, 84)], 64, 0, r"more boxes than 4 \+ classes, or the 84 of grids .* give the names .*--classes FILE"),
        ("yolov8", [(84, 64)], 64, 0, "with fewer boxes it is the number of classes that says which axis is which"),
        ("yolov8", [(84, 64)], 64, 20, r"which axis is which: 4 \+ the 20 named ones is 24"),
        ("yolov8", [(8400, 84)], 640, 80, "one output"),
        ("yolov8", [(4, 90)], 64, 0, "one output"),
        ("yolov5", [(25200, 85)], 640, 0, 80),
        ("yolov5", [(64, 85)], 64, 80, 80),
        ("yolov7", [(252, 1208)], 64, 0, 1203),
        ("yolov5", [(64, 85)], 64, 0, "with fewer boxes"),
    ],
)  # fmt: skip
def test_which_axis_of_a_yolo_counts_boxes_is_taken_from_what_is_certain(form, shapes, size, names, classes):
    outputs = [Output(f"y{i}", shape) for i, shape in enumerate(shapes)]
    model = Signature(outputs, (size, size), tuple(f"n{i}" for i in range(names)))
    if isinstance(classes, int):
        assert task_named(f"detect:{form}", model).decoder.classes == classes
    else:
        with pytest.raises(BadModel, match=classes):
            task_named(f"detect:{form}", model)


def detr_outputs(n: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [4 * torch.randn(n, 8, 4, generator=generator), torch.rand(n, 8, 4, generator=generator) * 0.4 + 0.3]


def detr_task() -> Detect:
    model = Signature([Output("logits", (8, 4)), Output("pred_boxes", (8, 4))], (64, 64), ("cat", "dog", "owl"))
    return task_named("detect:detr", model)


def test_the_same_boxes_are_nothing_apart_and_agree():
    task, outputs = detr_task(), detr_outputs()
    meter = task.meter(None)
    assert meter.add(outputs, outputs).tolist() == [0] * 5
    rating = meter.rating(())
    assert (rating.agreement, rating.score) == (100, None)
    assert task.divergence(outputs, outputs) == pytest.approx(0, abs=1e-12)


def test_the_same_boxes_on_every_image_are_not_called_right():
    task, outputs = detr_task(), [one[:1].expand(5, -1, -1) for one in detr_outputs()]
    meter = task.meter(None)
    meter.add(outputs, outputs)
    with pytest.raises(BadImages, match="the same boxes for every scored image"):
        meter.rating(())


@pytest.mark.parametrize("crowd", [0, 1])
def test_a_precision_of_0_or_of_nothing_is_replaced_by_agreement(crowd):
    task, outputs = detr_task(), detr_outputs()
    box, label = torch.tensor([[0.0, 0, 1, 1]], dtype=torch.float64), torch.tensor([0])
    truth = [Objects(box, label, torch.tensor([crowd]), torch.ones(1, dtype=torch.float64), STILL)] * 5
    meter = task.meter(truth)
    meter.add(outputs, [outputs[0], outputs[1].flip(0)])
    rating, alone = meter.rating(()), task.meter(None)
    alone.add(outputs, [outputs[0], outputs[1].flip(0)])
    assert (rating.measure, rating.score, rating.agreement) == ("", None, alone.rating(()).agreement)
    assert rating.interval == alone.rating(()).interval
    assert ("nothing of which AP could be taken" if crowd else "AP of the float model is 0.00") in rating.why


def objects_of(task, outputs, seed=0):
    """What the model is sure of as the truth, slightly moved, and a model that finds it."""
    found = select(task.decoder, outputs)
    move = torch.Generator().manual_seed(seed)
    truth = []
    for one in found:
        sure = one.scores >= 0.5
        boxes = one.boxes[sure] + torch.rand(int(sure.sum()), 4, generator=move)
        truth.append(Objects(boxes, one.labels[sure], torch.zeros(len(boxes), dtype=torch.long), box_area(boxes), STILL))
    return truth


@pytest.mark.parametrize("wrong", ["classes", "images"])
def test_a_precision_by_chance_is_replaced_by_agreement(wrong):
    task, outputs = detr_task(), detr_outputs(12)
    truth = objects_of(task, outputs)

    def rated(truth):
        meter = task.meter(truth)
        meter.add(outputs, [outputs[0], outputs[1] + 0.01])
        return meter.rating(())

    right = rated(truth)
    assert (right.measure, right.why) == ("AP", "")
    if wrong == "classes":
        rating = rated([replace(one, labels=(one.labels + 1) % 3) for one in truth])
        assert " have their class, and " in rating.why
    else:
        rating = rated([*truth[5:], *truth[:5]])
    assert "not clearly better than a guess" in rating.why
    assert (rating.measure, rating.score, rating.agreement) == ("", None, right.agreement)


def test_boxes_of_one_class_on_the_objects_of_other_images_are_by_chance():
    box, label = torch.tensor([[0.0, 0, 40, 40]]), torch.zeros(1, dtype=torch.long)
    shift = torch.arange(6.0)[:, None, None] * 4
    crowd, area = label, torch.tensor([1600.0])
    truth = [Objects(box + s, label, crowd, area, STILL) for s in shift]
    found = [Found(box + s + 1, torch.tensor([0.9]), label) for s in shift]
    boxes = Boxes(detr_task(), truth)
    assert boxes._guessed(found, truth, matched(found, truth).ap()) == ""
    turned = [*truth[-1:], *truth[:-1]]
    ap = matched(found, turned).ap()
    assert ap > 1
    why = boxes._guessed(found, turned, ap)
    assert "the same boxes on the annotations of other images has" in why


@pytest.mark.parametrize("seed", [0, 1])
def test_classes_by_chance_are_those_of_cohens_kappa(seed):
    from torchmetrics.functional.classification import multiclass_cohen_kappa

    true, given = (torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(seed + s)) for s in (0, 9))
    given[:20] = true[:20]
    boxes = torch.arange(40.0)[:, None] * 50 + torch.tensor([0.0, 0, 40, 40])
    found = [Found(boxes, torch.ones(40), given)]
    same, count, chance = same_classes(found, [Objects(boxes, true, 0 * true, torch.ones(40), STILL)])
    expected = float(multiclass_cohen_kappa(given, true, 3))
    assert (same / count - chance) / (1 - chance) == pytest.approx(expected)


def test_the_loss_grows_with_moved_boxes_and_with_changed_scores():
    task, (logits, boxes) = detr_task(), detr_outputs()
    moved = [task.divergence([logits, boxes], [logits, boxes + d]) for d in (0.01, 0.03, 0.1)]
    changed = [task.divergence([logits, boxes], [logits * s, boxes]) for s in (0.95, 0.8, 0.4)]
    for losses in (moved, changed):
        assert 0 < losses[0] < losses[1] < losses[2]


def written(form, boxes, scores, labels):
    """Rows (b, n, ...) as a model that selects by itself writes them."""
    if form == "torchvision":
        return [labels, boxes, scores]
    return [torch.cat([boxes, scores[..., None], labels[..., None].to(boxes)], 2)]


def selection(seed, classes, count=4):
    """Two images with rows on four places, in any order."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.tensor([[4.0, 4], [30, 6], [8, 34], [36, 36]])[torch.randperm(4, generator=generator)[:count]]
    boxes = torch.cat([corner, corner + 16], 1) + 3 * torch.randn(2, count, 4, generator=generator)
    labels = torch.randint(0, classes, (2, count), generator=generator)
    return boxes.double(), torch.rand(2, count, generator=generator).double(), labels


def nearest(exact, others):
    """The least over all orders of the rows of what two lists of candidates, a column for each class, are apart, in numpy."""
    (a, s, c), (b, t, d) = ([one.numpy() for one in rows] for rows in (exact, others))
    side = np.tile((a[..., 2:] - a[..., :2]).clip(1), 2)

    def apart(i, order):
        p, q = (np.clip(np.eye(9)[x] * y[:, None], 1e-6, 1 - 1e-6) for x, y in ((c[i], s[i]), (d[i][order], t[i][order])))
        scores = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
        error = np.abs(a[i] - b[i][order]) / side[i]
        places = (np.where(error < 1, error**2 / 2, error - 0.5).mean(1) * s[i]).sum()
        return (scores + places) / max(s[i].sum(), 1)

    return sum(min(apart(i, list(order)) for order in itertools.permutations(range(4))) for i in range(2))


@pytest.mark.parametrize("form", SELECTED)
def test_rows_of_a_selection_are_paired_so_that_they_are_nearest(form):
    task = Detect(form, SELECTED[form])
    for seed in range(6):
        exact, others = selection(seed, 3), selection(seed + 90, 9)  # of other classes, the highest among them
        given = [written(form, *one) for one in (exact, others)]
        assert float(task.divergence(*given)) == pytest.approx(nearest(exact, others), rel=1e-5)
        turned = [one[:, [2, 0, 3, 1]] for one in given[1]]
        assert float(task.divergence(given[0], turned)) == pytest.approx(float(task.divergence(*given)))
        assert float(task.divergence(turned, given[1])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("fewer", [0, 1])
def test_a_row_that_is_missing_is_one_without_a_score(fewer):
    task, whole = Detect("torchvision", SELECTED["torchvision"]), selection(0, 3)
    short = [one[:, :3] for one in whole]
    boxes, scores, labels = (one.clone() for one in whole)
    scores[:, 3], boxes[:, 3], labels[:, 3] = 0, 0, 0
    pairs = [written("torchvision", *one) for one in (whole, short)], [written("torchvision", *whole), [labels, boxes, scores]]
    found, expected = (task.divergence(*(reversed(pair) if fewer else pair)) for pair in pairs)
    assert float(found) == pytest.approx(float(expected))
    assert found > 0


FORMS = {
    "yolox": [("y", (84, 8))], "yolov5": [("y", (90, 8))], "yolov8": [("y", (7, 90))], "yolov10": [("y", (30, 6))],
    "detr": [("logits", (20, 4)), ("pred_boxes", (20, 4))], "rtdetr": [("logits", (20, 3)), ("pred_boxes", (20, 4))],
    "torchvision": [("boxes", (30, 4)), ("labels", (30,)), ("scores", (30,))],
    "ssd": [("boxes", (3234, 4)), ("classes", (3234, 3))],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_any_two_outputs_is_a_number_with_a_gradient(form):
    size = (320, 320) if form == "ssd" else (64, 64)
    task = task_named(f"detect:{form}", Signature([Output(*one, one[0] != "labels") for one in FORMS[form]], size))
    generator = torch.Generator().manual_seed(0)

    def drawn(scale, broken=()):
        found = []
        for name, shape in FORMS[form]:
            y = scale * torch.rand(2, *shape, generator=generator)
            for i, value in enumerate(broken):
                y.view(-1)[i * 7 :: 37] = value
            found.append(y.nan_to_num(0, 0, 0).long() if name == "labels" else y)
        return found

    huge = torch.finfo(torch.float32).max
    for exact in (drawn(1), drawn(60), drawn(9, (torch.inf, huge))):
        for other in (drawn(1), drawn(60), drawn(2000), drawn(1, (torch.nan, torch.inf, -torch.inf, huge, -huge))):
            real = [y.requires_grad_() for y in other if y.is_floating_point()]
            loss = task.divergence(exact, other)
            assert 0 < loss.item() < float("inf")
            for gradient in torch.autograd.grad(loss, real, allow_unused=True):
                assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("form", ["yolov10", "torchvision"])
def test_the_loss_of_a_selection_falls_along_its_gradient(form):
    task, (boxes, scores, labels) = Detect(form, SELECTED[form]), selection(0, 3)
    exact = written(form, boxes, scores, labels)
    moved, other = (boxes + 2).requires_grad_(), (scores * 0.7).requires_grad_()
    loss = task.divergence(exact, written(form, moved, other, labels))
    along = torch.autograd.grad(loss, [moved, other])
    less = task.divergence(exact, written(form, moved - along[0], other - 1e-3 * along[1], labels))
    assert 0 < less.item() < loss.item()


def test_boxes_elsewhere_or_of_another_class_are_apart():
    box, sure = torch.tensor([[10.0, 10, 30, 30], [40, 40, 60, 60]]), torch.tensor([0.9, 0.8])
    one = Found(box, sure, torch.tensor([0, 1]))
    assert apart(one, Found(box + 2, sure, torch.tensor([0, 1]))) == 0
    assert apart(one, Found(box, sure, torch.tensor([0, 2]))) == 0.5
    assert apart(one, Found(box + 30, sure * 0.1, torch.tensor([0, 1]))) == 1


def test_annotations_in_the_pixels_of_a_larger_picture_are_met_by_boxes_of_the_input():
    task, (logits, boxes) = detr_task(), detr_outputs(1)
    (found,) = select(task.decoder, [logits, boxes])
    place = Placement((0.5, 0.25), (4.0, 8.0), (64, 64))
    scale, shift = torch.tensor([*place.scale] * 2), torch.tensor([*place.shift] * 2)
    best = found.scores >= 0.5
    count = int(best.sum())
    crowd, areas = torch.zeros(count, dtype=torch.long), torch.full((count,), 2e4)
    truth = Objects((found.boxes[best] - shift) / scale, found.labels[best], crowd, areas, place)
    meter = task.meter([truth])
    meter.add([logits, boxes], [logits, (boxes + 0.2).clamp(0, 1)])
    rating = meter.rating(())
    assert rating.float_score == pytest.approx(100)
    assert rating.score < 50
    assert {"AP50", "AP of large objects"} <= {row["what"] for row in rating.rows}
    assert all("class" not in row["what"] for row in rating.rows)  # but cat, dog or owl


@dataclass
class Pictures:
    """Three pictures of 100 x 80 pixels."""

    names: tuple[str, ...] = ("a.jpg", "sub/b.jpg", "c.jpg")
    wide: tuple[tuple[int, int], ...] = field(default=((80, 100),) * 3)

    where: tuple[str, ...] = ()

    @property
    def paths(self):
        return self.where or self.names

    def sizes(self):
        return list(self.wide)

    def placed(self, size):
        return STILL


NAMES = ("a.jpg", "b.jpg", "c.jpg")


def one(category: int, *box: float) -> dict:
    """The only annotation of a file, on the first image."""
    return {"annotations": [{"id": 9, "image_id": 0, "category_id": category, "bbox": box}]}


def with_field(**fields) -> dict:
    """A right annotation but for these fields."""
    return {"annotations": [{**one(7, 5, 0, 3, 10)["annotations"][0], **fields}]}


def listed(**fields) -> dict:
    """The images of a file, the first with other fields."""
    images = [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in enumerate(NAMES)]
    return {"images": [{**images[0], **fields}, *images[1:]]}


def coco(path, **changes):
    file = {
        **listed(),
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [10, 20, 30, 40], "area": 900.0, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 100, 80]},
        ],
    }  # fmt: skip
    path.write_text(json.dumps({**file, **changes}))
    return path


def yolo(folder):
    for name, text in (("a", "0 0.25 0.5 0.3 0.5"), ("b", "1 0.5 0.5 1 1"), ("c", "")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def voc(folder):
    boxes = {"a": [("cat", 11, 21, 40, 60)], "b": [("dog", 1, 1, 100, 80)], "c": []}
    for name, some in boxes.items():
        inner = "".join(
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
            f"<ymax>{y1}</ymax></bndbox></object>" for label, x0, y0, x1, y1 in some
        )  # fmt: skip
        (folder / f"{name}.xml").write_text(f"<annotation>{inner}</annotation>")
    return folder


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((100, 80), None),
        ((0, 0), None),
        ((200, 160), "200 x 160"),
        ((80, 100), "80 x 100"),
        ((100, 81), "100 x 81"),
        ((0, 81), "100 x 81"),
        (("nan", 80), "nan x 80"),
    ],
)
def test_boxes_of_a_picture_of_another_size_are_refused(tmp_path, size, says):
    for file in voc(tmp_path).glob("*.xml"):
        text = file.read_text()
        kept = "<size><width>{}</width><height>{}</height><depth>3</depth></size>".format(*size)
        file.write_text(text.replace("<annotation>", f"<annotation>{kept}") if file.stem == "b" else text)
    if says is None:
        assert [len(one.labels) for one in read(tmp_path, Pictures(), ("cat", "dog"), 2)] == [1, 1, 0]
        return
    message = rf"b\.xml says that sub/b\.jpg is {says} pixels, and it is 100 x 80; give the annotations of these very pictures"
    with pytest.raises(BadImages, match=message):
        read(tmp_path, Pictures(), ("cat", "dog"), 2)


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_three_ways_to_write_the_same_objects(tmp_path, kind):
    path = {"coco": lambda: coco(tmp_path / "x.json"), "yolo": lambda: yolo(tmp_path), "voc": lambda: voc(tmp_path)}[kind]()
    a, b, c = read(path, Pictures(), ("cat", "dog"), 2)
    assert a.boxes.tolist() == [pytest.approx([10, 20, 40, 60])]
    assert (a.labels.tolist(), b.labels.tolist(), len(c.labels)) == ([0], [1], 0)
    assert b.boxes.tolist() == [pytest.approx([0, 0, 100, 80])]
    assert a.areas.tolist() == [pytest.approx(900 if kind == "coco" else 1200)]


@pytest.mark.parametrize(
    "size", [{"width": "100", "height": "80"}, {"width": None, "height": None}, {"width": 0, "height": ""}]
)
def test_a_size_may_be_text_or_not_known(tmp_path, size):
    a, *_ = read(coco(tmp_path / "x.json", **listed(**size)), Pictures(), ("cat", "dog"), 2)
    assert a.boxes.tolist() == [[10, 20, 40, 60]]


def test_an_image_that_is_listed_twice_has_the_annotations_of_both_ids(tmp_path):
    plain = coco(tmp_path / "x.json")
    file = json.loads(plain.read_text())
    first = file["annotations"][0]
    file["images"].append({**file["images"][0], "id": 90, "file_name": "./a.jpg"})
    file["annotations"] += [{**first, "image_id": 90}, {**first, "image_id": 90, "bbox": [1, 2, 3, 4]}]
    a, b, c = read(coco(tmp_path / "y.json", **file), Pictures(), ("cat", "dog"), 2)
    assert a.boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6]]  # the box of both ids once
    assert (len(b.labels), len(c.labels)) == (1, 0)


SIDES = ((80, 100),) * 2


@pytest.mark.parametrize(
    ("written", "images", "places"),
    [
        (("a/0.jpg", "b/0.jpg"), ("a/0.jpg", "b/0.jpg"), (0, 1)),
        (("b/0.jpg", "a/0.jpg"), ("x/a/0.jpg", "x/b/0.jpg"), (1, 0)),
        ((r"C:\val\1.jpg", r"C:\val\0.jpg"), ("0.jpg", "1.jpg"), (1, 0)),
        ((r"val\a\0.jpg", r"val\b\0.jpg"), ("b/0.jpg", "a/0.jpg"), (1, 0)),
        (("val/0.jpg", "val/1.jpg"), ("cat/1.jpg", "dog/0.jpg"), (1, 0)),
        (("a/0.jpg",), ("a/0.jpg", "b/0.jpg"), r"a/0\.jpg could belong to a/0\.jpg and to b/0\.jpg; each image needs its own"),
        (("a/0.jpg", "a/1.jpg"), ("a/0.jpg", "b/1.jpg"), r"a/1\.jpg, of another folder, is all that there is for b/1\.jpg"),
        (("val/0.jpg", "train/0.jpg"), ("0.jpg", "1.jpg"), r"lists val/0\.jpg and train/0\.jpg, and 0\.jpg could be either"),
    ],
)  # fmt: skip
def test_an_image_gets_the_boxes_of_its_own_path_alone(tmp_path, written, images, places):
    boxes = [[i, i, 9, 9] for i in range(len(written))]
    file = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(written)],
        "annotations": [{"id": i, "image_id": i, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)],
    }
    path = coco(tmp_path / "x.json", **file)
    if isinstance(places, str):
        with pytest.raises(BadImages, match=places):
            read(path, Pictures(images, SIDES), ("cat", "dog"), 2)
        return
    found = read(path, Pictures(images, SIDES), ("cat", "dog"), 2)
    assert [int(one.boxes[0, 0]) for one in found] == list(places)


@pytest.mark.parametrize("kind", ["yolo", "voc", "parquet"])
def test_files_in_folders_that_are_links_are_found_as_images_are(tmp_path, kind):
    real, given = tmp_path / "real", tmp_path / "given"
    real.mkdir(), given.mkdir()
    {"yolo": yolo, "voc": voc, "parquet": shards}[kind](real)
    (given / "cat").symlink_to(real, target_is_directory=True)
    (real / "again").symlink_to(real, target_is_directory=True)  # a folder in itself is entered once
    names = [f"val-{k}.parquet:{row}" for k in range(2) for row in range(2)] if kind == "parquet" else NAMES
    there, here = (Pictures(tuple(f"{at}{name}" for name in names), SIDES[:1] * len(names)) for at in ("", "cat/"))
    direct, linked = (read(folder, images, ("cat", "dog"), 2) for folder, images in ((real, there), (given, here)))
    assert [one.boxes.tolist() for one in linked] == [one.boxes.tolist() for one in direct]
    before = digest(given)
    next(real.glob("*.*")).write_bytes(b"another")
    assert digest(given) != before


@pytest.mark.parametrize("suffix", [".txt", ".xml"])
@pytest.mark.parametrize("images", [("a/0.jpg", "b/0.jpg"), ("a/0.jpg", "a/0.png")])
def test_two_images_do_not_share_a_file(tmp_path, suffix, images):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"0{suffix}").write_text("0 0.5 0.5 1 1" if suffix == ".txt" else "<annotation></annotation>")
    with pytest.raises(BadImages, match=rf"a/0\{suffix} could belong to {images[0]} and to {images[1]}"):
        read(tmp_path, Pictures(images, SIDES), ("cat", "dog"), 2)


def shards(folder, **columns):
    """Two files of two rows; the only box of each row begins at 10 for the second file, plus its row."""
    for k in range(2):
        objects = [{"bbox": [[10.0 * k + row, 0.0, 5.0, 5.0]], "category": [0]} for row in range(2)]
        pq.write_table(pa.table({"objects": objects, **columns}), folder / f"val-{k}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["yolo", "voc", "json"])
def test_a_row_of_parquet_has_the_objects_of_its_own_path(tmp_path, kind):
    """Oracle: those of the same pictures under their names."""
    made = {"yolo": yolo, "voc": voc, "json": lambda folder: coco(folder / "x.json")}[kind](tmp_path)
    path = made if kind == "json" else tmp_path
    there = Pictures() if kind == "json" else Pictures(NAMES)
    expected = read(path, there, ("cat", "dog"), 2)
    images = Pictures(tuple(f"val-0.parquet:{row}" for row in range(3)), where=tuple(f"/data/{name}" for name in there.names))
    assert any(len(one.boxes) for one in expected)
    assert [one.boxes.tolist() for one in read(path, images, ("cat", "dog"), 2)] == [one.boxes.tolist() for one in expected]


def test_rows_of_parquet_have_the_objects_of_their_own_file(tmp_path):
    images = Pictures(("val-0.parquet:1", "val-1.parquet:0", "val-1.parquet:1"))
    found = read(shards(tmp_path), images, (), 2)
    assert [float(one.boxes[0, 0]) for one in found] == [1, 10, 11]
    one = read(tmp_path / "val-1.parquet", Pictures(("val-1.parquet:1",), SIDES[:1]), (), 2)
    assert one[0].boxes[0, 0] == 11


def test_a_folder_of_text_files_may_hold_parquet_too(tmp_path):
    a, *_ = read(shards(yolo(tmp_path)), Pictures(), (), 2)
    assert a.boxes.tolist() == [pytest.approx([10, 20, 40, 60])]


@pytest.mark.parametrize(
    ("file", "images", "message"),
    [
        ("val-0.parquet", ("val-0.parquet:0", "val-1.parquet:0"), r"has no file val-1\.parquet, whose rows are scored"),
        ("val-0.parquet", ("val-1.parquet:0", "val-1.parquet:1"), "has no file val-1"),
        ("", ("val-0.parquet:0", "val-2.parquet:0"), "has no file val-2"),
        ("", ("val-0.parquet:0", "val-1.parquet:2"), r"val-1\.parquet, row 2: has no objects"),
        ("val-0.parquet", ("000000001532.jpg", "b.jpg"), r"is parquet, .* and 000000001532\.jpg is not one of them\. Give"),
    ],
)  # fmt: skip
def test_objects_of_other_rows_of_parquet_are_refused(tmp_path, file, images, message):
    with pytest.raises(BadImages, match=message):
        read(shards(tmp_path) / file, Pictures(images, SIDES), (), 2)


def test_a_row_of_parquet_that_says_another_size_is_refused(tmp_path):
    images = Pictures(("val-0.parquet:0", "val-0.parquet:1"), SIDES)
    read(shards(tmp_path, width=[100, 100], height=[80, None]), images, (), 2)
    with pytest.raises(BadImages, match=r"row 1: says that val-0\.parquet:1 is 100 x 81 pixels"):
        read(shards(tmp_path, width=[100, 100], height=[80, 81]), images, (), 2)


@pytest.mark.parametrize("line", ["1.0 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.2 0.2 0.93", "1 0.5 0.5 0.2 0.2 1"])
def test_a_line_may_have_its_class_as_a_real_number_and_a_confidence(tmp_path, line):
    (yolo(tmp_path) / "a.txt").write_text(line)
    a, *_ = read(tmp_path, Pictures(), (), 2)
    assert (a.labels.tolist(), a.boxes.tolist()) == ([1], [pytest.approx([40, 32, 60, 48])])


def test_categories_without_names_of_classes_are_those_in_order(tmp_path):
    a, b, _ = read(coco(tmp_path / "x.json"), Pictures(), (), 2)
    assert (a.labels.tolist(), b.labels.tolist()) == ([1], [0])
    with pytest.raises(BadImages, match="has 2 categories and the model 5 classes without names"):
        read(tmp_path / "x.json", Pictures(), (), 5)


def test_of_a_selection_without_names_nobody_knows_how_many_classes_there_are(tmp_path):
    classes = SELECTED["yolov10"].classes
    with pytest.raises(BadImages, match=r"has 2 categories \(ids 3 to 7\), and nobody knows how many .* --classes FILE"):
        read(coco(tmp_path / "x.json"), Pictures(), (), classes)
    listed = {"categories": [{"id": 0, "name": "cat"}, {"id": 70000, "name": "dog"}]}
    a, *_ = read(coco(tmp_path / "x.json", **listed, **one(70000, 5, 0, 3, 10)), Pictures(), (), classes)
    assert a.labels.tolist() == [70000]  # numbers from 0 are the model's
    (yolo(tmp_path) / "a.txt").write_text("-1 0.5 0.5 0.2 0.2")
    with pytest.raises(BadImages, match=r"line 1, has class -1; classes are counted from 0\. Fix it"):
        read(tmp_path, Pictures(), (), classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "has no object on any of the 3 scored images"),
        (one(7, 90, 0, 30, 10), r"annotation 9 is a box from \(90, 0, 120"),
        (one(7, 5, 0, -3, 10), r"annotation 9 has bbox \[5, 0, -3, 10\], a box of negative width; width and height"),
        (one(7, 5, 0, -3, -10), "a box of negative width and height;"),
        (one(4, 5, 0, 3, 10), "has category_id 4"),
        ({"images": [{"id": 0, "file_name": "a.jpg"}]}, "lists no image sub/b.jpg"),
        (listed(width=50, height=40), "says that a.jpg is 50 x 40 pixels, and it is 100 x 80"),
        (listed(width="50", height="80"), "says that a.jpg is 50 x 80 pixels, and it is 100 x 80"),
        (listed(width="wide"), r"width of a\.jpg is 'wide'; a number of pixels is needed"),
        (listed(height=[80]), r"height of a\.jpg is \[80\]; a number of pixels is needed"),
        ({"categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "caat"}]}, "unknown category 'caat'. Did you mean cat"),
        ({"annotations": 7}, "is not in COCO's format"),
        ({"annotations": [None]}, "is not in COCO's format"),
        (one(7, 5, 0, 3), r"annotation 9 has bbox \[5, 0, 3\]; four numbers are needed: x, y, width, height in pixels"),
        (one(7, 5, 0, 3, 10, 10), "four numbers"),
        (one(7, 5, 0, "3", 10), r"bbox \[5, 0, '3', 10\]"),
        (one(7, 5, 0, None, 10), "four numbers"),
        (one(7, [5], 0, 3, 10), "four numbers"),
        (one(7, 5, 0, True, 10), "four numbers"),
        (one(7, 5, 0, 10**400, 10), "four numbers"),
        (one(7, 5, 0, float("nan"), 10), r"annotation 9 has bbox \[5, 0, nan, 10\]; only finite numbers are places"),
        (one(7, 5, 0, float("inf"), 10), r"bbox \[5, 0, inf, 10\]; only finite numbers"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": None}]}, r"annotations\[0\] has bbox None"),
        ({"annotations": [{"image_id": 0, "category_id": 7}]}, r"annotations\[0\] has no bbox: x, y, width, height in pixels"),
        (one(True, 5, 0, 3, 10), "has category_id True"),
        (one("7", 5, 0, 3, 10), "has category_id '7', and the file's categories are 3 to 7"),
        (one([7], 5, 0, 3, 10), r"has category_id \[7\]"),
        ({"categories": []}, "has category_id 7, and the file's categories are none"),
        ({"categories": [{"id": "x", "name": "dog"}]}, "has category 'x'; a whole number is needed"),
        ({"categories": [{"id": float("inf"), "name": "dog"}]}, "has category inf; a whole number is needed"),
        ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, r"annotations\[0\] has no image_id\. Write it"),
        ({"annotations": [{"image_id": 0, "bbox": [1, 2, 3, 4], "id": 9}]}, "annotation 9 has no category_id"),
        (with_field(image_id=[5]), r"annotation 9 has image_id \[5\]; a number or a text is needed"),
        ({"images": [{"id": 4}]}, "image 4 has no file_name"),
        ({"images": [{"id": 4, "file_name": "a.jpg"}, {"file_name": "b.jpg"}]}, r"images\[1\] has no id"),
        ({"categories": [{"id": 3, "name": "dog"}, {"id": 7}]}, "category 7 has no name"),
        ({"categories": {"3": "dog"}}, "categories is {'3': 'dog'}, and a list is needed"),
        (
            {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]},
            "has the category 'cat' under two ids, (7 and 3|3 and 7), and annotations of both",
        ),
        (with_field(image_id=5), r"annotation 9 has image_id 5, which is the id of no image of the file\. Fix it"),
        (with_field(image_id="0"), r"annotation 9 has image_id '0', .* file \(0 is one, which is another type\)"),
        (listed(id=1), r"lists a\.jpg and b\.jpg under the one id 1, so nobody can say whose"),
        (
            {"categories": [{"id": 3, "name": "dog"}, {"id": 3, "name": "cat"}]},
            "has the categories 'dog' and 'cat' under the one id 3",
        ),
        *((with_field(area=v), "has area .*; a number of square pixels") for v in ("9", -1, float("inf"), [9], 10**400)),
        *((with_field(iscrowd=v), "has iscrowd .*; 0 and 1 are allowed") for v in ("0", 2, [1], float("nan"))),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_annotation_is_named(tmp_path, changes, message):
    with pytest.raises(BadImages, match=message):
        read(coco(tmp_path / "x.json", **changes), Pictures(), ("cat", "dog"), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2", "a.txt, line 1, is '0 0.5 0.5 0.2'; a class and four numbers"),
        ("2 0.5 0.5 0.2 0.2", "has class 2; the model has classes 0 to 1"),
        ("0 0.9 0.5 0.5 0.2", "boxes have to lie inside"),
        ("0 nan 0.5 0.5 0.2", "line 1, has '0 nan 0.5 0.5 0.2'; only finite numbers"),
        ("0 0.5 0.5 -0.2 0.2", "line 1, has '0 0.5 0.5 -0.2 0.2', a box of negative width;"),
        (
            "0 50 50 20 20",
            r"line 1, has '0 50 50 20 20'; YOLO's numbers are shares of the picture, from 0 to 1\. Divide x and width by .*"
            r"\(100\), y and height by its height \(80\)",
        ),
        ("1.5 0.5 0.5 0.2 0.2", "line 1, is '1.5 0.5 0.5 0.2 0.2'; a class and four numbers"),
        ("inf 0.5 0.5 0.2 0.2", "a class and four numbers"),
        ("0 0.5 0.5 0.2 0.2 7", "and perhaps a confidence"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "a class and four numbers"),
    ],
)
def test_a_wrong_line_of_a_text_file_is_named(tmp_path, text, message):
    (yolo(tmp_path) / "a.txt").write_text(text)
    with pytest.raises(BadImages, match=message):
        read(tmp_path, Pictures(), (), 2)


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        (["1", "2", "3", "4"], 0, r"row 0: has bbox \['1'"),
        ([1.0, 2.0, 3.0], 0, "four numbers"),
        (None, 0, "has bbox None"),
        ([1.0, 2.0, 3.0, 4.0], float("inf"), "has category inf; a whole number"),
        ([1.0, 2.0, 3.0, 4.0], 0.5, "has category 0.5; a whole number"),
    ],
)
def test_a_wrong_row_of_parquet_is_named(tmp_path, box, label, message):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"objects": [{"bbox": [box], "category": [label]}]}), path)
    with pytest.raises(BadImages, match=message):
        read(path, Pictures(("x.parquet:0",), ((80, 100),)), (), 2)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark in front"])
def test_text_files_are_read_with_and_without_a_mark_in_front(tmp_path, mark):
    file = yolo(tmp_path) / "a.txt"
    plain = read(tmp_path, Pictures(), (), 2)
    file.write_bytes(mark + file.read_bytes())
    for found, want in zip(read(tmp_path, Pictures(), (), 2), plain, strict=True):
        assert found.boxes.tolist() == want.boxes.tolist()
        assert found.labels.tolist() == want.labels.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps([{"image_id": 0}]).encode(),
            "holds a list, as predictions in COCO's format are; ",
        ),
        ('{"images": []}'.encode("utf-16"), "is UTF-16 and no text in UTF-8; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", r"x\.json is packed by gzip; unpack it"),
        (b"PK\x03\x04", r"x\.json is packed by zip; unpack it"),
        (b"7", r"it has no images\. It needs images, annotations and categories, and is 7"),
        (b'{"images": [], "annotations": []}', r"it has no categories\. It needs .*, and has images, annotations"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(BadImages, match=message):
        read(path, Pictures(), (), 2)


@pytest.mark.parametrize("name", ["x.json.gz", "x.zip"])
def test_a_packed_file_is_to_be_unpacked(tmp_path, name):
    with pytest.raises(BadImages, match=r"It is packed \(\..*\): unpack it\. Give COCO"):
        read(tmp_path / name, Pictures(), (), 2)


def test_ids_of_one_name_are_one_class_where_one_of_them_has_no_annotation(tmp_path):
    categories = {"categories": [{"id": 0, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]}
    a, b, _ = read(coco(tmp_path / "x.json", **categories), Pictures(), ("cat", "dog"), 2)
    assert (a.labels.tolist(), b.labels.tolist()) == ([0], [1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>11</xmin>", "<xmin>61</xmin>", "object 1 .cat., has xmin, .* of 61, 21, 40, 60, a box of negative width"),
        ("<xmin>11</xmin>", "<xmin>x</xmin>", "object 1 .cat., has xmin, .* of x, 21, 40, 60; numbers are needed"),
        ("<xmin>11</xmin>", "", r"a\.xml, object 1 \(cat\), has no bndbox/xmin; each object needs name and bndbox"),
        ("bndbox>", "box>", r"a\.xml, object 1 \(cat\), has no bndbox/xmin"),
        ("<name>cat</name>", "", r"a\.xml, object 1, has no name"),
        ("<annotation>", '<?xml version="1.0" encoding="klingon"?><annotation>', "in Pascal VOC's format: unknown encoding"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_object_of_voc_is_named(tmp_path, old, new, message):
    file = voc(tmp_path) / "a.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(BadImages, match=message):
        read(tmp_path, Pictures(), ("cat", "dog"), 2)


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16", "windows-1252", "utf-8-sig"])
def test_xml_is_read_in_the_encoding_that_it_says(tmp_path, encoding):
    file = voc(tmp_path) / "a.xml"
    said = "" if encoding == "utf-8-sig" else f'<?xml version="1.0" encoding="{encoding}"?>'
    file.write_bytes((said + file.read_text().replace("cat", "Käfer")).encode(encoding))
    a, *_ = read(tmp_path, Pictures(), ("Käfer", "dog"), 2)
    assert (a.labels.tolist(), a.boxes.tolist()) == ([0], [[10, 20, 40, 60]])


def test_an_image_without_annotation_is_named(tmp_path):
    (yolo(tmp_path) / "b.txt").unlink()
    with pytest.raises(BadImages, match=r"sub/b\.jpg has no file in"):
        read(tmp_path, Pictures(), (), 2)


def test_boxes_are_drawn_with_the_names_of_classes():
    task, outputs = detr_task(), detr_outputs(1)
    blank = Image.new("RGB", (64, 64), "white")
    drawn = task.drawn(blank.copy(), outputs)
    (found,) = select(task.decoder, outputs)
    x0, y0, _, y1 = found.boxes[0].round().long().tolist()
    assert np.asarray(drawn)[(y0 + y1) // 2, x0].tolist() != [255, 255, 255]  # the left edge of the best box
    assert blank.tobytes() != drawn.tobytes()


def test_what_task_takes_is_what_there_is() -> None:
    assert tuple(DECODERS) == BOXES
    for name, task in TASKS.items():
        assert pkgutil.resolve_name(task.where).name == name
        assert all(option in task.help for option in task.variants)
