"""How far the boxes of one model are from those of another, as a loss: finite, and with a gradient of scores and corners.

Candidates of one place are compared with each other. A model that selects by itself writes its boxes in any order, so there
boxes are paired first, so that the sum over all pairs is the least (an assignment problem, Kuhn 1955).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.core.task import Outputs
from fewbit.task.decode import Rows
from fewbit.task.selection import counted

FAR = 1e6  # pixels; a corner beyond counts as there
PAIRED = 300  # rows of an image, as many as YOLOv10 gives; the time of pairing grows with their cube
SURE_OF = 1e-6  # a score is at least so far from 0 and from 1


def passing(outputs: Outputs) -> Outputs:
    """Real outputs in double precision, whose gradient is 0 where it is not a number: what a NaN or an overflow has touched."""
    found = [y.double().view_as(y) if y.is_floating_point() else y for y in outputs]
    for one in found:
        if one.requires_grad:
            one.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
    return found


def of_candidates(exact: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> Tensor:
    """The distance of candidates, boxes (b, n, 4) and scores (b, n, classes), from exact ones: of each image the sum over
    candidates by that of their exact scores, at least 1, summed over images.
    """
    (boxes, p), (other, q) = ((_finite(boxes), counted(boxes, scores)) for boxes, scores in (exact, others))
    sure = p.amax(2).clamp(0, 1)
    each = _divergence(p, q).sum(2) + _places(boxes, other) * sure
    return (each.sum(1) / sure.sum(1).clamp_min(1)).sum()


def of_rows(exact: Rows, others: Rows) -> Tensor:
    """The distance of rows from exact ones, paired so that it is the least; two of different classes are as far as one that is
    missing and one too many. The best `PAIRED` of each image are looked at.
    """
    return torch.stack([_of_image(*pair) for pair in zip(_images(exact), _images(others), strict=True)]).sum()


def _images(rows: Rows) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each image the boxes (n, 4), scores (n,) and classes (n,) of its best rows."""
    scores = counted(rows.boxes, rows.scores[..., None])[..., 0]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :PAIRED]
    return [(_finite(b[i]), s[i], c[i]) for b, s, c, i in zip(rows.boxes, scores, rows.labels, best, strict=True)]


def _of_image(exact: tuple[Tensor, Tensor, Tensor], others: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    count = max(len(exact[1]), len(others[1]))
    exact, others = (_filled(one, count) for one in (exact, others))
    with torch.no_grad():
        costs = _apart(*(one[:, None] for one in exact), *(one[None] for one in others))
    _, columns = linear_sum_assignment(costs.numpy())
    boxes, scores, labels = (one[torch.from_numpy(columns)] for one in others)
    return _apart(*exact, boxes, scores, labels).sum() / exact[1].clamp(0, 1).sum().clamp_min(1)


def _filled(rows: tuple[Tensor, Tensor, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with so many of score 0 behind them that there are `count`."""
    boxes, scores, labels = rows
    missing = count - len(scores)
    return F.pad(boxes, (0, 0, 0, missing)), F.pad(scores, (0, missing)), F.pad(labels, (0, missing))


def _apart(boxes: Tensor, p: Tensor, labels: Tensor, other: Tensor, q: Tensor, others: Tensor) -> Tensor:
    """The distance of each pair of rows (...)."""
    none = torch.zeros((), dtype=p.dtype)
    scores = torch.where(labels == others, _divergence(p, q), _divergence(p, none) + _divergence(none, q))
    return scores + _places(boxes, other) * p.clamp(0, 1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """The KL divergence of scores, each of a class that is there or not."""
    p, q = (t.clamp(SURE_OF, 1 - SURE_OF) for t in (p, q))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _places(boxes: Tensor, other: Tensor) -> Tensor:
    """The distance of corners (..., 4) by the side of a box, at least 1 pixel: (...,)."""
    side = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1).repeat(*[1] * (boxes.ndim - 1), 2)
    boxes, other = torch.broadcast_tensors(boxes / side, other / side)
    return F.smooth_l1_loss(other, boxes, reduction="none").mean(-1)


def _finite(boxes: Tensor) -> Tensor:
    """Corners as numbers that a sum can hold: 0 where there is none."""
    return torch.where(boxes.isfinite(), boxes, 0.0).clamp(-FAR, FAR)
