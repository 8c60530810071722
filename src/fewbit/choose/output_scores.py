"""Scores of candidate scales: single ops computed with many of them at once, and compared on the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fewbit.choose.objectives import RankingLoss, Similarity
from fewbit.core.grid import Grid, QParams, fake, qparams_from_range
from fewbit.execute.samples import Attention, PairSample

CHUNK = 1 << 20  # elements of candidate outputs that are held at a time: 4 MB, which stay in a processor's cache
MANY = 1 << 15  # elements of an output from which on candidates are looked at on a part of it first


@dataclass(frozen=True)
class Range:
    """The range of a tensor: low and high of shape () or (channels,), and its grid."""

    low: Tensor
    high: Tensor
    grid: Grid

    @staticmethod
    def of(qparams: QParams, grid: Grid) -> Range:
        """The range that the codes of a grid cover with a scale and zero point."""
        high = (grid.high - qparams.zero) * qparams.scale
        return Range(-high if grid.symmetric else (grid.low - qparams.zero) * qparams.scale, high, grid)

    def qparams(self, factor: Tensor) -> QParams:
        """The scale and zero point where the range is multiplied by a factor of shape () or (channels,)."""
        return qparams_from_range(self.low * factor, self.high * factor, self.grid)


@dataclass(frozen=True)
class Product:
    """One op that reads the searched input: float rows (images, tokens, c_in), weight (c_out, c_in / groups) and its range.

    `attention` and `bias` are there for a projection whose ranking counts; `read` are the rows in the model quantized
    so far (None: the float rows); `shift` (c_out,) is subtracted from the output by the correction; `start` is a scale of the
    weight to begin with in place of the whole range.
    """

    rows: Tensor
    weight: Tensor
    range: Range
    attention: Attention | None = None
    bias: Tensor | None = None
    read: Tensor | None = None
    shift: Tensor | None = None
    start: QParams | None = None

    @property
    def given(self) -> Tensor:
        return self.rows if self.read is None else self.read

    @property
    def first(self) -> QParams:
        """The scale of the weight where the search begins."""
        return self.start or self.range.qparams(torch.ones(self.range.low.shape, device=self.range.low.device))

    @property
    def every(self) -> int:
        """A glimpse takes one of so many output channels; all where they read different inputs."""
        return 4 if groups_of(self.rows, self.weight) == 1 else 1

    def thinned(self, count: int) -> Product:
        """The same with about `count` rows, every few tokens of each image."""
        stride = max(1, round(self.rows.shape[0] * self.rows.shape[1] / count))
        stride = min(stride, self.rows.shape[1])
        return replace(self, rows=self.rows[:, ::stride], read=None if self.read is None else self.read[:, ::stride])

    def glimpse(self) -> Product:
        """Every second row and some channels of the output, without ranking: an eighth of the work."""
        low, high = (v[:: self.every] if v.ndim else v for v in (self.range.low, self.range.high))
        return replace(
            self.thinned(self.rows.shape[0] * self.rows.shape[1] // 2),
            weight=self.weight[:: self.every],
            range=Range(low, high, self.range.grid),
            attention=None,
            shift=None if self.shift is None else self.shift[:: self.every],
            start=None,
        )


@dataclass(frozen=True)
class Pair:
    """A product of two activations, the grids of both, and whether its rows are attention scores."""

    sample: PairSample
    left: Grid
    right: Grid
    ranked: bool


@dataclass(frozen=True)
class Found:
    """The scales of the input and of each weight, and the objective before and after."""

    input: QParams
    weights: tuple[QParams, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Score:
    """The objective of candidates, less `gamma` times the ranking loss where the output is attention scores.

    Where outputs are large, all candidates are scored on a part and the best `finalists` on all of it (0: all on all).
    """

    objective: Similarity
    ranking: RankingLoss | None = None
    gamma: float = 0.1
    finalists: int = 16

    def pair(self, pair: Pair, lefts: Sequence[QParams], rights: Sequence[QParams]) -> Tensor:
        """The objective of each candidate of a pair: many lefts and one right, or the other way round."""
        s = pair.sample
        left = s.left if s.left_read is None else s.left_read
        right = s.right if s.right_read is None else s.right_read
        exact = s.left @ s.right * s.scale
        count = max(len(lefts), len(rights))
        chunk = max(1, CHUNK // max(exact.numel(), left.numel(), right.numel()))
        scores = []
        for i in range(0, count, chunk):
            ls, rs = (part if len(part) == 1 else part[i : i + chunk] for part in (lefts, rights))
            a = torch.stack([fake(left, one, pair.left) for one in ls])
            b = torch.stack([fake(right, one, pair.right) for one in rs])
            quantized = a @ b * s.scale
            score = self.objective(exact.flatten(1), quantized.flatten(2))
            if self.ranking is not None and pair.ranked:
                score = score - self.gamma * self.ranking(exact.flatten(0, -2), quantized.flatten(1, -2))
            scores.append(score)
        return torch.cat(scores)

    def many(
        self, products: Sequence[Product], inputs: Sequence[QParams], weights: Sequence[Sequence[QParams]], grid: Grid
    ) -> Tensor:
        """The objective of each product (rows) for each candidate (columns); -inf for one that was no finalist."""
        count = max(len(inputs), *map(len, weights))
        finalists = list(range(count))
        if self.finalists and min(p.rows.shape[0] * p.rows.shape[1] * len(p.weight) for p in products) >= MANY:
            glimpses = [p.glimpse() for p in products]
            thin = [
                [QParams(*(v[:: p.every] if v.ndim else v for v in (w.scale, w.zero))) for w in candidates]
                for p, candidates in zip(products, weights, strict=True)
            ]
            first = [self.one(p, inputs, candidates, grid) for p, candidates in zip(glimpses, thin, strict=True)]
            finalists = sorted(torch.stack(first).mean(0).topk(min(self.finalists, count)).indices.tolist())
        pick = [inputs[k] for k in finalists] if len(inputs) > 1 else inputs
        full = [
            self.one(p, pick, [candidates[k] for k in finalists] if len(candidates) > 1 else candidates, grid)
            for p, candidates in zip(products, weights, strict=True)
        ]
        rows = torch.stack(full)
        scores = rows.new_full((len(products), count), -torch.inf)
        scores[:, finalists] = rows
        return scores

    def one(self, p: Product, inputs: Sequence[QParams], weights: Sequence[QParams], grid: Grid) -> Tensor:
        """The objective of each candidate: one input and many weights, or many inputs and one weight."""
        exact = times(p.rows, p.weight).flatten(1)
        similarities = [self.objective(exact, out.flatten(2)) for out in outputs(p.given, p, inputs, weights, grid)]
        score = torch.cat(similarities)
        if self.ranking is None or p.attention is None:
            return score
        ranking, attention = self.ranking, p.attention
        a = attention.scores(F.linear(attention.x, p.weight, p.bias)[None])[0]
        shift = 0 if p.bias is None else p.bias
        x = attention.x if attention.read is None else attention.read
        hinge = [ranking(a, attention.scores(out + shift)) for out in outputs(x, p, inputs, weights, grid)]
        return score - self.gamma * torch.cat(hinge)

    def channels(self, p: Product, x: QParams, candidates: Sequence[QParams], current: QParams, grid: Grid) -> QParams:
        """The scale of each channel with the highest correlation of that channel over all rows of all images."""
        exact = times(p.rows, p.weight).flatten(0, 1).t()
        options = [current, *candidates]
        results = outputs(p.given, p, [x], options, grid)
        each = [self.objective.each(exact, out.flatten(1, 2).transpose(1, 2)) for out in results]
        best = torch.cat(each).argmax(0)[None]
        scale, zero = (torch.stack([getattr(s, part) for s in options]) for part in ("scale", "zero"))
        return QParams(scale.gather(0, best)[0], zero.gather(0, best)[0])


def groups_of(x: Tensor, w: Tensor) -> int:
    """The groups of an op whose rows have (..., c_in) entries and whose weight is (..., c_out, c_in / groups)."""
    return x.shape[-1] // w.shape[-1]


def times(x: Float[Tensor, "*rows c_in"], w: Float[Tensor, "*candidates c_out m"]) -> Float[Tensor, "*candidates_rows c_out"]:
    """Rows times the rows of a weight; with groups, c_in = groups * m, each part of the channels reads its own part of a row.

    Candidates of the weight, a leading axis, are only for a weight with groups.
    """
    groups = groups_of(x, w)
    if groups == 1 and w.ndim == 2:
        return F.linear(x, w)
    parts, kernels = x.unflatten(-1, (groups, -1)), w.unflatten(-2, (groups, -1))
    product = torch.einsum("...gm,kgom->k...go" if w.ndim == 3 else "...gm,gom->...go", parts, kernels)
    return product.flatten(-2)


def outputs(x: Tensor, p: Product, inputs: Sequence[QParams], weights: Sequence[QParams], grid: Grid) -> Iterator[Tensor]:
    """Outputs (candidates, images, tokens, c_out) without bias, shifted, some candidates at a time."""
    size = x.shape[0] * x.shape[1] * p.weight.shape[0]
    chunk = max(1, CHUNK // max(size, p.weight.numel(), x.numel()))
    if len(inputs) == 1:
        left = fake(x, inputs[0], grid)
        for i in range(0, len(weights), chunk):
            right = torch.stack([fake(p.weight, w, p.range.grid) for w in weights[i : i + chunk]])
            if groups_of(x, p.weight) > 1:
                yield _subtract(times(left, right), p.shift)
                continue
            flat = F.linear(left.flatten(0, 1), right.flatten(0, 1))
            yield _subtract(flat.unflatten(1, right.shape[:2]).transpose(0, 1).unflatten(1, x.shape[:2]), p.shift)
        return
    right = fake(p.weight, weights[0], p.range.grid)
    for i in range(0, len(inputs), chunk):
        yield _subtract(times(torch.stack([fake(x, a, grid) for a in inputs[i : i + chunk]]), right), p.shift)


def _subtract(output: Tensor, shift: Tensor | None) -> Tensor:
    return output if shift is None else output - shift
