"""First and second moments of an op's inputs, in the float model and in the model quantized so far.

A layer is linear, so the error of its output, whatever its weights are, is a quadratic form in these; no row is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.device import wide, widest

ROWS = 512  # of one product
TINY = torch.finfo(torch.float32).tiny
SUMS = ("read", "exact", "gram", "cross", "residual", "residual_read")


@dataclass(frozen=True)
class Moments:
    """Sums over rows, in the widest floats of their device, each row times its weight (1 unless said), whose sum is `count`.
    A row has `groups` parts of m elements; each part is read by its own outputs.

    `read` (groups, m) and `exact` (groups, m) sum the rows of the quantized and of the float model, `gram` (groups, m, m) the
    products of read with read, `cross` of exact with read. `residual` (c_out,) sums the residual error, float minus quantized
    value of the branch that the output is added to, `residual_read` (c_out, m) its products with what is read; zeros without
    such a branch.
    """

    count: float
    read: Tensor
    exact: Tensor
    gram: Tensor
    cross: Tensor
    residual: Tensor
    residual_read: Tensor

    @staticmethod
    def of(
        rows: Iterable[tuple[Float[Tensor, "n c"], Float[Tensor, "n c"], Float[Tensor, "n o"] | None]],
        groups: int,
        outputs: int,
        weight: Float[Tensor, "n"] | None = None,
    ) -> Moments:
        """The moments of pieces (read, exact, residual); `weight` is of the rows of each piece."""
        total: Moments | None = None
        for read, exact, residual in rows:
            q, x = (v.unflatten(1, (groups, -1)).transpose(0, 1) for v in (read, exact))
            m = q.shape[2]
            d = residual if residual is not None else read.new_zeros(len(read), outputs)
            joint = residual is not None and groups == 1
            part = Moments(
                len(read) if weight is None else float(wide(weight).sum()),
                _sum(q, weight),
                _sum(x, weight),
                _products(q, q, weight),
                _products(x, q, weight),
                _sum(d, weight),
                _products(d[None], q, weight)[0] if joint else q.new_zeros(outputs, m, dtype=widest(q.device)),
            )
            total = part if total is None else total.add(part)
        if total is None:
            raise ValueError("no rows")
        return total

    def __add__(self, other: Moments) -> Moments:
        """The moments of both."""
        return Moments(self.count + other.count, *(getattr(self, n) + getattr(other, n) for n in SUMS))

    def add(self, other: Moments) -> Moments:
        """The same, in the place of these: of wide rows a matrix of products is hundreds of megabytes."""
        return Moments(self.count + other.count, *(getattr(self, n).add_(getattr(other, n)) for n in SUMS))

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of what is read, of the exact rows and of the residual error."""
        return self.read / self.count, self.exact / self.count, self.residual / self.count

    def centred(self) -> Moments:
        """Means in place of sums, and covariances in place of products: the error after the bias absorbs its mean."""
        return Moments(self.count, *(getattr(self, n).clone() for n in SUMS)).centre()

    def centre(self) -> Moments:
        """The same in the place of these, which are gone then."""
        n, (q, x, d) = self.count, self.means()
        behind = torch.zeros_like(self.residual_read) if len(q) > 1 else self.residual_read / n - d[:, None] * q[0]
        gram, cross = _less(self.gram.div_(n), q, q), _less(self.cross.div_(n), x, q)
        return Moments(1, q, x, gram, cross, d, behind)

    def target(self, w: Float[Tensor, "o m"]) -> Float[Tensor, "o m"]:
        """The products of the target output, W x + residual, with the input."""
        parts = wide(w).unflatten(0, (len(self.cross), -1)) @ self.cross
        return parts.flatten(0, 1) + self.residual_read

    def error(self, target: Float[Tensor, "o m"], w: Float[Tensor, "o m"]) -> Float[Tensor, "o"]:
        """The squared error of each output up to a constant that no weight changes; `target` is from the method `target`."""
        v = wide(w)
        return (self.through(v) * v).sum(1) - 2 * (target * v).sum(1)

    def through(self, w: Float[Tensor, "o m"]) -> Float[Tensor, "o m"]:
        """W H with each output's own Gram matrix."""
        return (w.unflatten(0, (len(self.gram), -1)) @ self.gram).flatten(0, 1)


def _sum(x: Float[Tensor, "*g n m"], weight: Float[Tensor, "n"] | None) -> Float[Tensor, "*g m"]:
    """The sum of rows in the widest floats, each times its weight."""
    return x.sum(-2, dtype=widest(x.device)) if weight is None else wide(weight) @ wide(x)


def _mean(x: Float[Tensor, "*g n m"], weight: Float[Tensor, "n"] | None) -> Float[Tensor, "*g 1 m"]:
    if weight is None:
        return x.mean(-2, keepdim=True)
    return (weight @ x / weight.sum().clamp_min(TINY)).unsqueeze(-2)


def _products(
    a: Float[Tensor, "groups n o"], b: Float[Tensor, "groups n m"], weight: Float[Tensor, "n"] | None
) -> Float[Tensor, "groups o m"]:
    """aᵀ b in float64, from products of float32 numbers around their means: covariances keep the digits of the rows.

    Each row counts by its weight. A few rows at a time, so that no product is split along the rows and the sums are the same
    with any number of threads.
    """
    a0, b0 = _mean(a, weight), _mean(b, weight)
    left, right = a - a0, b - b0
    sums = [_sum(v, weight).unsqueeze(1) for v in (left, right)]
    left = left if weight is None else left * weight[:, None]
    count = a.shape[1] if weight is None else float(wide(weight).sum())
    a0, b0 = wide(a0), wide(b0)
    inner = a0.new_zeros(len(a), a.shape[2], b.shape[2])
    for x, y in zip(left.split(ROWS, 1), right.split(ROWS, 1), strict=True):
        inner += x.mT @ y
    for term in (lambda: a0.mT @ sums[1], lambda: sums[0].mT @ b0, lambda: (a0.mT @ b0).mul_(count)):
        inner += term()
    return inner


def _less(sums: Float[Tensor, "groups n m"], a: Float[Tensor, "groups n"], b: Float[Tensor, "groups m"]) -> Tensor:
    """Products without those of means, in place, a few rows at a time."""
    for part, rows in zip(sums.split(ROWS, 1), a.split(ROWS, 1), strict=True):
        part -= rows[:, :, None] * b[:, None]
    return sums
