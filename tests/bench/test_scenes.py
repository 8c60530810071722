"""Scenes and the training of the demo's DETR.

Oracles: colours of what was pasted, Pillow's bounding boxes, run lengths unrolled, the loss of transformers, every assignment
tried, and the forward pass of the class that is shipped.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from bench.scenes import OBJECTS, SIDE, Scenes, coco, numbered, runs
from PIL import Image
from torchvision.ops import box_convert, generalized_box_iou

from bench import train_detr

PLAIN = Scenes(np.repeat(np.arange(5, 255, 25, dtype=np.uint8), 32 * 32 * 3).reshape(10, 32, 32, 3), np.arange(10))


def test_what_is_seen_of_an_object_is_its_mask_and_box():
    found = numbered(PLAIN, 0, 40)
    for scene in found:
        assert 1 <= len(scene.labels) <= OBJECTS
        assert scene.masks.sum(0).max() == 1
        for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
            assert (scene.image[mask] == 5 + 25 * label).all()
            assert Image.fromarray(mask).getbbox() == tuple(box)
    assert len({len(scene.labels) for scene in found}) >= 4


def test_a_scene_depends_on_seed_and_number_alone():
    few, many, other = numbered(PLAIN, 3, 2), numbered(PLAIN, 3, 5), numbered(PLAIN, 4, 2)
    assert all((a.image == b.image).all() for a, b in zip(few, many, strict=False))
    assert not any((a.image == b.image).all() for a, b in zip(few, other, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_run_lengths_unroll_to_the_mask(share):
    mask = np.random.default_rng(0).random((7, 5)) < share
    counts = runs(mask)
    assert (mask == np.repeat(np.arange(len(counts)) % 2, counts).reshape(5, 7).T).all()


def test_objects_are_written_as_coco_has_them():
    (scene,) = numbered(PLAIN, 1, 1)
    written = coco([scene])
    for one, label, box, mask in zip(written["annotations"], scene.labels, scene.boxes, scene.masks, strict=True):
        left, top, width, height = one["bbox"]
        assert (left, top, left + width, top + height) == tuple(box)
        assert written["categories"][one["category_id"]]["id"] == label
        assert one["area"] == mask.sum() == sum(one["segmentation"]["counts"][1::2])


def predictions(count, queries=4, layers=1):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, count, queries, 11, generator=generator)
    boxes = torch.rand(layers, count, queries, 4, generator=generator) * 0.4 + 0.1
    rows = [train_detr.truth_of(scene) for scene in numbered(PLAIN, 0, count)]
    return logits, boxes, train_detr.Truth(*(torch.stack(row) for row in zip(*rows, strict=True)))


def test_the_loss_is_that_of_transformers(monkeypatch):
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    monkeypatch.setattr(train_detr, "GROUPS", 1)
    logits, boxes, truth = predictions(6, queries=8)
    ours = train_detr.set_loss(logits[0], boxes[0], truth, train_detr.matched(logits, boxes, truth)[0], train_detr.NO_OBJECT)
    labels = [
        {"class_labels": row[row < train_detr.NOTHING], "boxes": given[row < train_detr.NOTHING]}
        for row, given in zip(truth.labels, truth.boxes, strict=True)
    ]
    theirs = ForObjectDetectionLoss(logits[0], labels, "cpu", boxes[0], train_detr.architecture().config)[0]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_each_group_is_matched_for_itself_at_the_least_cost():
    logits, boxes, truth = predictions(3, queries=4 * OBJECTS)
    found = train_detr.matched(logits, boxes, truth)
    for image, rows in enumerate(found[0].unflatten(-1, (train_detr.GROUPS, -1))):
        count = int((truth.labels[image] < train_detr.NOTHING).sum())
        given, labels = truth.boxes[image, :count], truth.labels[image, :count]
        for group, row in enumerate(rows):
            place = slice(OBJECTS * group, OBJECTS * (group + 1))
            probabilities, own = logits[0, image, place].softmax(-1), boxes[0, image, place]
            overlap = generalized_box_iou(box_convert(own, "cxcywh", "xyxy"), box_convert(given, "cxcywh", "xyxy"))
            cost = 5 * (own[:, None] - given).abs().sum(-1) - probabilities[:, labels] - 2 * overlap
            least = min(
                sum(cost[q, o] for o, q in enumerate(queries)) for queries in itertools.permutations(range(OBJECTS), count)
            )
            assert sorted(row[row >= 0].tolist()) == list(range(count))
            assert cost[row >= 0, row[row >= 0]].sum() == pytest.approx(float(least), abs=1e-4)


def test_a_batch_mirrored_or_not_agrees_with_its_pixels():
    pool = train_detr.Pool(PLAIN, np.random.default_rng(0), size=2)
    place = (torch.arange(6) + 0.5) / 6
    for _ in range(6):
        images, truth = pool.batch(2)
        for image, boxes, owner in zip(images[:, 0, 8::16, 8::16], truth.boxes, truth.owner, strict=True):
            for number in owner[owner >= 0].unique():
                levels, (y, x) = image[owner == number], (owner == number).nonzero().T
                assert levels.max() - levels.min() < 1e-4
                centers = torch.stack([place[x], place[y]], 1)
                assert ((centers - boxes[number, :2]).abs() <= boxes[number, 2:] / 2).all()


def test_the_weights_of_the_training_are_those_of_the_unchanged_class():
    torch.manual_seed(0)
    net, x = train_detr.Trained(), torch.randn(2, 3, SIDE, SIDE)
    for _ in range(2):
        net(x)  # the batch norms learn
    net.eval()
    plain = train_detr.architecture().eval()
    plain.load_state_dict({name: w.float() for name, w in net.shipped().items()})
    net.load_state_dict({k: w.half().float() if w.is_floating_point() else w for k, w in net.state_dict().items()})
    with torch.no_grad():
        (logits, boxes, *_), given = net(x), plain(x)
    assert torch.allclose(logits[-1, :, : net.queries], given.logits, atol=1e-4)
    assert torch.allclose(boxes[-1, :, : net.queries], given.pred_boxes, atol=1e-4)
