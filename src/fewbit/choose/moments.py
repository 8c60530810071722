"""First and second moments of an op's inputs, in the float model and in the model quantized so far.

A layer is linear, so the error of its output, whatever its weights are, is a quadratic form in these; no row is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    such a branch. Products with what is not read are there where the layer's `target` is asked for: else `cross` has no group.
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
        total: Moments | None = None,
        *,
        target: bool = True,
    ) -> Moments:
        """The moments of pieces (read, exact, residual), in the place of those of `total`, which they are added to; `weight` is
        of the rows of each piece. Without `target` there are no products with what is not read.
        """
        for read, exact, residual in rows:
            q, x = (v.unflatten(1, (groups, -1)).transpose(0, 1) for v in (read, exact))
            if total is None:
                total = Moments._none(q, outputs, target)
            count = len(read) if weight is None else float(wide(weight).sum())
            q, x = _Centred.of(q, weight, count), _Centred.of(x, weight, count)
            _add_products(total.gram, q, q, weight)
            if target:
                _add_products(total.cross, x, q, weight)
            total.read.add_(q.sums), total.exact.add_(x.sums)
            if residual is not None:
                d = _Centred.of(residual[None], weight, count)
                total.residual.add_(d.sums[0])
                if groups == 1 and target:
                    _add_products(total.residual_read[None], d, q, weight)
            total = replace(total, count=total.count + count)
        if total is None:
            raise ValueError("no rows")
        return total

    @staticmethod
    def _none(rows: Float[Tensor, "groups n m"], outputs: int, target: bool) -> Moments:
        """Those of no rows, to which rows like these are to be added."""
        groups, _, m = rows.shape

        def zeros(*shape: int) -> Tensor:
            return rows.new_zeros(shape, dtype=widest(rows.device))

        cross = zeros(groups if target else 0, m, m)
        return Moments(0, zeros(groups, m), zeros(groups, m), zeros(groups, m, m), cross, zeros(outputs), zeros(outputs, m))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both."""
        return Moments(self.count + other.count, *(getattr(self, n) + getattr(other, n) for n in SUMS))

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of what is read, of the exact rows and of the residual error."""
        return self.read / self.count, self.exact / self.count, self.residual / self.count

    def copied(self) -> Moments:
        """The same numbers in memory of their own."""
        return Moments(self.count, *(getattr(self, n).clone() for n in SUMS))

    def of_outputs(self, outputs: int) -> Moments:
        """The same numbers in memory of their own, for a layer of so many outputs, without a residual error."""
        zeros = self.residual.new_zeros(outputs), self.residual.new_zeros(outputs, self.residual_read.shape[1])
        return replace(self.copied(), residual=zeros[0], residual_read=zeros[1])

    def centred(self) -> Moments:
        """Means in place of sums, and covariances in place of products: the error after the bias absorbs its mean."""
        return self.copied().centre()

    def centre(self) -> Moments:
        """The same in the place of these, which are gone then."""
        n, (q, x, d) = self.count, self.means()
        alone = len(q) > 1 or not len(self.cross)
        behind = torch.zeros_like(self.residual_read) if alone else self.residual_read / n - d[:, None] * q[0]
        gram = _less(self.gram.div_(n), q, q)
        cross = _less(self.cross.div_(n), x, q) if len(self.cross) else self.cross
        return Moments(1, q, x, gram, cross, d, behind)

    def to_read(self) -> Moments:
        """Those of what is read, which is all that the error of weights needs beside its target."""
        return replace(self, cross=self.cross[:0], residual_read=self.residual_read[:0])

    def target(self, w: Float[Tensor, "o m"]) -> Float[Tensor, "o m"]:
        """The products of the target output, W x + residual, with the input."""
        parts = wide(w).unflatten(0, (len(self.cross), -1)) @ self.cross
        return parts.flatten(0, 1) + self.residual_read

    def lacking(self, w: Float[Tensor, "o m"]) -> Float[Tensor, "o m"]:
        """The products of the error that weights leave with the input: the target of what is to be added to them."""
        return self.target(w) - self.through(wide(w))

    def error(self, target: Float[Tensor, "o m"], w: Float[Tensor, "o m"]) -> Float[Tensor, "o"]:
        """The squared error of each output up to a constant that no weight changes; `target` is from the method `target`."""
        v = wide(w)
        return (self.through(v) * v).sum(1) - 2 * (target * v).sum(1)

    def through(self, w: Float[Tensor, "o m"]) -> Float[Tensor, "o m"]:
        """W H with each output's own Gram matrix."""
        return (w.unflatten(0, (len(self.gram), -1)) @ self.gram).flatten(0, 1)


@dataclass(frozen=True)
class _Centred:
    """Rows (groups, n, m) around their mean (groups, m), and the sums of those and of the rows, each row times its weight."""

    rows: Tensor
    mean: Tensor
    left: Tensor  # by rounding the mean
    sums: Tensor

    @staticmethod
    def of(x: Float[Tensor, "groups n m"], weight: Float[Tensor, "n"] | None, count: float) -> _Centred:
        mean = x.mean(-2) if weight is None else weight @ x / weight.sum().clamp_min(TINY)
        rows = x - mean.unsqueeze(-2)
        left = rows.sum(-2, dtype=widest(x.device)) if weight is None else wide(weight) @ wide(rows)
        return _Centred(rows, wide(mean), left, left + count * wide(mean))


def _add_products(total: Float[Tensor, "groups o m"], a: _Centred, b: _Centred, weight: Float[Tensor, "n"] | None) -> None:
    """Add aᵀ b, in float64, from products of float32 numbers around their means: covariances keep the digits of the rows.

    Each row counts by its weight. About `ROWS` rows at a time, so that no product is split along the rows and the sums are the
    same with any number of threads.
    """
    left = a.rows if weight is None else a.rows * weight[:, None]
    pieces = max(1, round(left.shape[1] / ROWS))
    for x, y in zip(left.chunk(pieces, 1), b.rows.chunk(pieces, 1), strict=True):
        total += x.mT @ y
    total.baddbmm_(torch.stack([a.mean, a.left], 2), torch.stack([b.sums, b.mean], 1))


def _less(sums: Float[Tensor, "groups n m"], a: Float[Tensor, "groups n"], b: Float[Tensor, "groups m"]) -> Tensor:
    """Products without those of means, in place, a few rows at a time."""
    for part, rows in zip(sums.split(ROWS, 1), a.split(ROWS, 1), strict=True):
        part -= rows[:, :, None] * b[:, None]
    return sums
