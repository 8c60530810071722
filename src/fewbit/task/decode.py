"""From the outputs of a detector to boxes: one decoder for each way in which detectors write them.

Candidates are all boxes that a model gives, with a score for each class; what is found are those that remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import box_convert

from fewbit.core.task import Outputs, Signature
from fewbit.errors import BadModel

STRIDES = (8, 16, 32)  # of a YOLO's three grids
QUERIES = "logits (batch, n, classes) and pred_boxes (batch, n, 4) are needed"


@dataclass(frozen=True)
class Rows:
    """What a model selected on each image: corners (b, n, 4) in pixels of its input, scores (b, n), classes (b, n) from 0."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Decoder(Protocol):
    """How outputs become candidates; `classes` is how many there are, `overlaps` whether the model leaves several boxes of one
    object, so that all but the best are dropped, `alone` whether a box has its likeliest class only, and no second guess,
    `piece` the piece of `predict.py` (deploy/python/) that does the same, empty where there is none.

    Candidate k of an image is the same place of the model's whatever the image; of models that select by themselves, which
    write boxes in any order, see `Selected`.
    """

    @property
    def classes(self) -> int: ...

    @property
    def overlaps(self) -> bool: ...

    @property
    def alone(self) -> bool: ...

    @property
    def piece(self) -> str: ...

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes (b, n, 4), corners in pixels of the model's input, and the score of each class (b, n, classes), 0 to 1."""


@dataclass(frozen=True)
class Yolox:
    """YOLOX (Ge et al. 2021): (b, n, 5 + classes) on grids of 8, 16 and 32 pixels; offsets and log sizes in cells, then scores
    that have been through a sigmoid.
    """

    index: int
    classes: int
    size: tuple[int, int]
    overlaps = True
    piece = "detect_yolox"
    alone = False

    @staticmethod
    def of(model: Signature) -> Yolox:
        cells = _cells(model)
        index, shape = _one(model, lambda s: len(s) == 2 and s[0] == cells and s[1] > 5, f"({cells}, 5 + classes)")
        return Yolox(index, shape[1] - 5, model.size)

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        y = outputs[self.index].double()
        corners, strides = _grid(self.size)
        centers, sides = (y[..., :2] + corners) * strides, y[..., 2:4].exp() * strides
        return box_convert(torch.cat([centers, sides], -1), "cxcywh", "xyxy"), y[..., 4:5] * y[..., 5:]


@cache
def _grid(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The corner of each cell (n, 2), x and y in cells, and the side of a cell in pixels (n, 1)."""
    corners, strides = [], []
    for stride in STRIDES:
        rows, columns = (torch.arange(n // stride, dtype=torch.float64) for n in size)
        yy, xx = torch.meshgrid(rows, columns, indexing="ij")
        corners.append(torch.stack([xx, yy], -1).view(-1, 2))
        strides.append(torch.full((len(corners[-1]), 1), float(stride), dtype=torch.float64))
    return torch.cat(corners), torch.cat(strides)


@dataclass(frozen=True)
class Yolo:
    """YOLOv5 and v7, (b, n, 5 + classes), YOLOv8, v9 and 11, (b, 4 + classes, n): centers, sides in pixels, then scores."""

    index: int
    classes: int
    objectness: bool
    overlaps = True
    piece = "detect_yolo"
    alone = False

    @staticmethod
    def v5(model: Signature) -> Yolo:
        index, shape = _rows(model, axis=0, fixed=5, cells=3 * _cells(model), needed="(boxes, 5 + classes)")
        return Yolo(index, shape[1] - 5, objectness=True)

    @staticmethod
    def v8(model: Signature) -> Yolo:
        index, shape = _rows(model, axis=1, fixed=4, cells=_cells(model), needed="(4 + classes, boxes)")
        return Yolo(index, shape[0] - 4, objectness=False)

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        y = outputs[self.index].double()
        y = y if self.objectness else y.transpose(1, 2)
        boxes = box_convert(y[..., :4], "cxcywh", "xyxy")
        return boxes, y[..., 4:5] * y[..., 5:] if self.objectness else y[..., 4:]


@dataclass(frozen=True)
class Selected:
    """YOLOv10 and what ends in a selection: (b, n, 6), corners in pixels, score, class; or these as outputs of their own named
    boxes, scores and labels, as torchvision has them. `classes` is None where the model's have no names: their shapes do not
    say how many there are.
    """

    places: tuple[int, ...]
    classes: int | None
    overlaps = False
    piece = "detect_selected"
    alone = False

    @staticmethod
    def v10(model: Signature) -> Selected:
        index, _ = _one(model, lambda s: len(s) == 2 and s[1] == 6, "(boxes, 6)")
        return Selected((index,), len(model.names) or None)

    @staticmethod
    def named(model: Signature) -> Selected:
        at = {output.name: i for i, output in enumerate(model.outputs)}
        shapes = [model.outputs[at[name]].shape if name in at else () for name in ("boxes", "scores", "labels")]
        count = shapes[0][:1]
        if shapes != [(*count, 4), count, count] or not count:
            raise BadModel("outputs named boxes (batch, n, 4), scores (batch, n) and labels (batch, n) are needed")
        return Selected((at["boxes"], at["scores"], at["labels"]), len(model.names) or None)

    def rows(self, outputs: Outputs) -> Rows:
        """What was selected; rows of no class (-1) are of class 0, with the score that they have."""
        if len(self.places) == 1:
            y = outputs[self.places[0]].double()
            return Rows(y[..., :4], y[..., 4], y[..., 5].round().long().clamp_min(0))
        boxes, scores, labels = (outputs[i] for i in self.places)
        return Rows(boxes.double(), scores.double(), labels.long().clamp_min(0))


@dataclass(frozen=True)
class Queries:
    """DETR (Carion et al. 2020): logits (b, n, classes + 1), the last of them "no object", and boxes (b, n, 4), centers and
    sides as shares of the input; with `independent` classes (Deformable DETR, RT-DETR and their kin) a sigmoid of each.
    """

    logits: int
    boxes: int
    classes: int
    size: tuple[int, int]
    independent: bool = False
    overlaps = False
    piece = "detect_queries"

    @property
    def alone(self) -> bool:
        return not self.independent

    @staticmethod
    def detr(model: Signature) -> Queries:
        return Queries._of(model, independent=False)

    @staticmethod
    def rtdetr(model: Signature) -> Queries:
        return Queries._of(model, independent=True)

    @staticmethod
    def _of(model: Signature, independent: bool) -> Queries:
        at = {output.name: i for i, output in enumerate(model.outputs)}
        if not {"logits", "pred_boxes"} <= set(at):
            lists = [i for i, output in enumerate(model.outputs) if len(output.shape) == 2]
            boxes = [i for i in lists if model.outputs[i].shape[1] == 4]
            if len(lists) != 2 or len(boxes) != 1:
                raise BadModel(QUERIES)
            at = {"pred_boxes": boxes[0], "logits": next(i for i in lists if i != boxes[0])}
        logits, corners = (model.outputs[at[name]].shape for name in ("logits", "pred_boxes"))
        if len(logits) != 2 or corners != (logits[0], 4):
            raise BadModel(QUERIES)
        if logits[1] < 2 and not independent:
            raise BadModel(
                'logits of two or more columns are needed, the classes and behind them "no object"; where one column is the '
                "only class and goes through a sigmoid, take --task detect:rtdetr"
            )
        classes = logits[1] - (not independent)
        return Queries(at["logits"], at["pred_boxes"], classes, model.size, independent)

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        logits, boxes = outputs[self.logits].double(), outputs[self.boxes].double()
        scores = logits.sigmoid() if self.independent else logits.softmax(-1)[..., :-1]
        h, w = self.size
        return box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([w, h, w, h]), scores


@dataclass(frozen=True)
class Ssd:
    """SSD (Liu et al. 2016) as torchvision trains it: offsets (b, n, 4) from default boxes and logits (b, n, 1 + classes), the
    first of them background; for its two nets, of 8,732 boxes (300 px) and of 3,234 (320 px).
    """

    offsets: int
    logits: int
    classes: int
    size: tuple[int, int]
    count: int
    overlaps = True
    piece = ""  # its answer takes more than a few lines
    alone = False

    @staticmethod
    def of(model: Signature) -> Ssd:
        offsets, shape = _one(model, lambda s: len(s) == 2 and s[0] in (8732, 3234) and s[1] == 4, "(8732 or 3234, 4)")
        logits, other = _one(
            model, lambda s: len(s) == 2 and s[0] == shape[0] and s[1] > 1 and s[1] != 4, f"({shape[0]}, 1 + classes)"
        )
        return Ssd(offsets, logits, other[1] - 1, model.size, shape[0])

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        from torchvision.models.detection._utils import BoxCoder

        offsets, logits = outputs[self.offsets].double(), outputs[self.logits].double()
        coder, defaults = BoxCoder((10.0, 10.0, 5.0, 5.0)), _defaults(self.count, self.size)
        boxes = torch.stack([coder.decode_single(one, defaults) for one in offsets])
        return boxes, logits.softmax(-1)[..., 1:]


@cache
def _defaults(count: int, size: tuple[int, int]) -> Tensor:
    """The default boxes of torchvision's ssd300_vgg16 or ssdlite320_mobilenet_v3_large, corners in pixels (n, 4)."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    if count == 8732:
        scales, steps = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05], [8, 16, 32, 64, 100, 300]
        made = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales, steps=steps)
        sides = [38, 19, 10, 5, 3, 1]
    else:
        made = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
        sides = [math.ceil(320 / step) for step in (16, 32, 64, 107, 160, 320)]
    image = torch.zeros(1, 3, *size)
    return made(ImageList(image, [size]), [torch.zeros(1, 1, n, n) for n in sides])[0].double()


DECODERS: Mapping[str, Callable[[Signature], Decoder | Selected]] = {
    "yolox": Yolox.of,
    "yolov5": Yolo.v5,
    "yolov7": Yolo.v5,
    "yolov8": Yolo.v8,
    "yolo11": Yolo.v8,
    "yolov10": Selected.v10,
    "detr": Queries.detr,
    "rtdetr": Queries.rtdetr,
    "torchvision": Selected.named,
    "ssd": Ssd.of,
}


def _one(
    model: Signature, fits: Callable[[tuple[int, ...]], bool], needed: str, clear: str = ""
) -> tuple[int, tuple[int, ...]]:
    """The number and the shape of the one output that fits; `clear` says what else makes one fit. Raises BadModel."""
    found = [(i, output.shape) for i, output in enumerate(model.outputs) if output.is_real and fits(output.shape)]
    if len(found) != 1:
        raise BadModel(f"one output (batch, {needed[1:]} is needed for images of {model.size[0]} x {model.size[1]}{clear}")
    return found[0]


def _cells(model: Signature) -> int:
    """How many cells the three grids of a YOLO have."""
    h, w = model.size
    return sum((h // s) * (w // s) for s in STRIDES)


def _rows(model: Signature, axis: int, fixed: int, cells: int, needed: str) -> tuple[int, tuple[int, ...]]:
    """The one output of two axes of which `axis` counts boxes and the other has `fixed` + classes columns: known by the names
    of the classes, else where there are more boxes than columns, or as many as `cells`. Raises BadModel.
    """
    names = len(model.names)

    def fits(shape: tuple[int, ...], by_names: bool) -> bool:
        if len(shape) != 2:
            return False
        boxes, columns = shape[axis], shape[1 - axis]
        if by_names:
            return columns == fixed + names
        return columns > fixed and (boxes > columns or boxes == cells != columns)

    by_names = names > 0 and sum(output.is_real and fits(output.shape, True) for output in model.outputs) == 1
    told = f"{fixed} + the {names} named ones is {fixed + names}" if names else "give the names of the classes (--classes FILE)"
    clear = (
        f", with more boxes than {fixed} + classes, or the {cells} of grids of 8, 16 and 32 pixels; with fewer boxes it is the "
        f"number of classes that says which axis is which: {told}"
    )
    return _one(model, lambda shape: fits(shape, by_names), needed, clear)
