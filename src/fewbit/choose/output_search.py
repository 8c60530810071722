"""Op scope: the steps of an op's input and weight, searched on the op's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fewbit.choose.correct import OutputBias
from fewbit.choose.objectives import Pearson, RankingLoss, Similarity
from fewbit.core.grid import Grid, QParams, fake, qparams_from_range
from fewbit.execute.samples import Attention, PairSample

CHUNK = 1 << 20  # elements of candidate outputs that are held at a time: 4 MB, which stay in a processor's cache
MANY = 1 << 15  # elements of an output from which on candidates are looked at on a part of it first
GAIN = 1e-6  # what a move must gain: float32 sums in another order differ by less


@dataclass(frozen=True)
class Range:
    """What was seen of a tensor: low and high of shape () or (channels,), and the grid that it gets."""

    low: Tensor
    high: Tensor
    grid: Grid

    @staticmethod
    def of(qparams: QParams, grid: Grid) -> Range:
        """The range that the codes of a grid cover with a step and zero point."""
        high = (grid.high - qparams.zero) * qparams.scale
        return Range(-high if grid.symmetric else (grid.low - qparams.zero) * qparams.scale, high, grid)

    def qparams(self, factor: Tensor) -> QParams:
        """The step and zero point where the range is multiplied by a factor of shape () or (channels,)."""
        return qparams_from_range(self.low * factor, self.high * factor, self.grid)


@dataclass(frozen=True)
class Product:
    """One op that reads the searched input: float rows (images, tokens, c_in), weight (c_out, c_in / groups) and its range.

    `attention` and `bias` are there for a projection whose ranking counts; `read` are the rows in a model that is quantized
    so far (None: the float rows); `shift` (c_out,) is what correction takes out of the output; `start` is a step of the weight
    to begin with in place of the whole range.
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
        """The step of the weight where the search begins."""
        return self.start or self.range.qparams(torch.ones(self.range.low.shape))

    @property
    def every(self) -> int:
        """A glimpse takes every so many channels of the output; all where they read different inputs."""
        return 4 if groups_of(self.rows, self.weight) == 1 else 1

    def thinned(self, count: int) -> Product:
        """The same with about `count` rows, every few tokens of each image."""
        step = max(1, round(self.rows.shape[0] * self.rows.shape[1] / count))
        step = min(step, self.rows.shape[1])
        return replace(self, rows=self.rows[:, ::step], read=None if self.read is None else self.read[:, ::step])

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
    """The steps of the input and of each weight, and the objective before and after."""

    input: QParams
    weights: tuple[QParams, ...]
    before: float
    after: float


@dataclass(frozen=True)
class OutputSearch:
    """The steps Δ^W, Δ^X whose product Ô = Ψ(X) Ψ(W) Δ^W Δ^X is most like O = X W (Liu et al. 2021, sections 3.1 and 3.2).

        maximise   (1/N) Σ_i Γ(O_i, Ô_i)  -  γ · L_rank      (the second term for what makes attention scores)

    Steps start at the whole range and are searched on [low, high] times that, `candidates` of them, the weight's with the
    input fixed and the input's with the weight fixed, until neither moves. A step moves only where the objective gains, so
    the result is never worse than the start; of candidates that are equally good (Pearson does not see a step that leaves
    the codes as they are) the one nearest to the whole range is taken. One factor for all channels of a weight; with
    `per_channel` each channel has the factor that is best for its own output, taken where the whole objective gains too.

    Ops that read one tensor (queries, keys and values) are searched together: each has a weight step of its own, and the
    input step is the best for the mean of their objectives. `rows` of the sample are scored. Where they are many, all
    candidates are scored on a part of the output and the best `finalists` on all of it (0: all on all). The op reads its float
    input, or with `sequential` what the quantized model gives it; O is float in both. The bias is left out of O.

    `inverse`: [low, high] and its candidates are of 1/Δ. `start`: the factors multiply the whole range or the range that the
    recipe gives the tensor. `sides`: both steps are searched in turn, or only one of them. (EasyQuant: [0.5, 2] of 1/Δ, from
    the recipe's range; Wu et al. 2020, section 3.)
    """

    objective: Similarity = Pearson()
    low: float = 0.5
    high: float = 1.2
    candidates: int = 100
    rounds: int = 20
    ranking: RankingLoss | None = None
    gamma: float = 0.1
    per_channel: bool = False
    rows: int = 512
    finalists: int = 16
    sequential: bool = False
    inverse: bool = False
    start: Literal["seen", "recipe"] = "seen"
    sides: Literal["both", "weights", "inputs"] = "both"

    def __post_init__(self) -> None:
        if (
            not 0 < self.low < self.high
            or min(self.candidates, self.rounds, self.rows) < 1
            or min(self.gamma, self.finalists) < 0
        ):
            raise ValueError(
                f"0 < low < high, candidates, rounds and rows >= 1, gamma and finalists >= 0 are allowed, not {self}"
            )

    @property
    def factors(self) -> Tensor:
        """The candidates, and as the last the start: (candidates + 1,)."""
        tried = torch.linspace(self.low, self.high, self.candidates)
        return torch.cat([1 / tried if self.inverse else tried, torch.ones(1)])

    def __call__(
        self, products: Sequence[Product], given: Range | QParams, grid: Grid, correction: OutputBias | None = None
    ) -> Found:
        """Search the weights of the products and, where a range is given, the step of the input that they share.

        A `correction` that is made after each round shifts the outputs that the next round scores.
        """
        products = [p.thinned(self.rows) for p in products]
        factors, one = self.factors, torch.tensor(1.0)
        x = given.qparams(one) if isinstance(given, Range) else given
        weights = [p.first for p in products]
        scores = [self._score(p, [x], [w], grid).item() for p, w in zip(products, weights, strict=True)]
        before = math.fsum(scores) / len(scores)
        for _ in range(self.rounds):
            moved = False
            for i, p in enumerate(products if self.sides != "inputs" else ()):
                tried = [p.range.qparams(f.expand(p.range.low.shape)) for f in factors]
                score = self._scores([p], [x], [tried], grid)[0]
                best = _best(score, factors)
                if self.per_channel and p.range.grid.axis is not None:
                    own = self._channels(p, x, tried, weights[i], grid)
                    tried, score = [*tried, own], torch.cat([score, self._score(p, [x], [own], grid)])
                    best = len(factors) if score[-1] > score[best] + GAIN else best
                if score[best] > scores[i] + GAIN:
                    weights[i], scores[i], moved = tried[best], score[best].item(), True
            if isinstance(given, Range) and self.sides != "weights":
                inputs = [given.qparams(f) for f in factors]
                each = self._scores(products, inputs, [[w] for w in weights], grid)
                mean = each.mean(0)
                best = _best(mean, factors)
                if mean[best] > math.fsum(scores) / len(scores) + GAIN:
                    x, scores, moved = inputs[best], each[:, best].tolist(), True
            if not moved:
                break
            if correction is not None and correction.each_round:
                products = [_shifted(p, x, w, grid, correction) for p, w in zip(products, weights, strict=True)]
                scores = [self._score(p, [x], [w], grid).item() for p, w in zip(products, weights, strict=True)]
        return Found(x, tuple(weights), before, math.fsum(scores) / len(scores))

    def pair(self, pair: Pair, left: Range | QParams, right: Range | QParams) -> tuple[QParams, QParams]:
        """The steps of the two operands of a product, searched in turn; one that is given as a step stays."""
        factors, one = self.factors, torch.tensor(1.0)
        found = [g.qparams(one) if isinstance(g, Range) else g for g in (left, right)]
        score = self._pair_score(pair, *([a] for a in found)).item()
        for _ in range(self.rounds):
            moved = False
            for side, given in enumerate((left, right)):
                if not isinstance(given, Range) or self.sides == "weights":
                    continue
                tried = [given.qparams(f) for f in factors]
                each = self._pair_score(pair, tried, [found[1]]) if side == 0 else self._pair_score(pair, [found[0]], tried)
                best = _best(each, factors)
                if each[best] > score + GAIN:
                    found[side], score, moved = tried[best], each[best].item(), True
            if not moved:
                break
        return found[0], found[1]

    def _pair_score(self, pair: Pair, lefts: Sequence[QParams], rights: Sequence[QParams]) -> Tensor:
        """The objective of each candidate of a pair: many lefts and one right, or the other way round."""
        s = pair.sample
        left = s.left if s.left_read is None else s.left_read
        right = s.right if s.right_read is None else s.right_read
        exact = s.left @ s.right * s.scale
        count = max(len(lefts), len(rights))
        step = max(1, CHUNK // max(exact.numel(), left.numel(), right.numel()))
        scores = []
        for i in range(0, count, step):
            ls, rs = (part if len(part) == 1 else part[i : i + step] for part in (lefts, rights))
            a = torch.stack([fake(left, one, pair.left) for one in ls])
            b = torch.stack([fake(right, one, pair.right) for one in rs])
            found = a @ b * s.scale
            score = self.objective(exact.flatten(1), found.flatten(2))
            if self.ranking is not None and pair.ranked:
                score = score - self.gamma * self.ranking(exact.flatten(0, -2), found.flatten(1, -2))
            scores.append(score)
        return torch.cat(scores)

    def _scores(
        self, products: Sequence[Product], inputs: Sequence[QParams], weights: Sequence[Sequence[QParams]], grid: Grid
    ) -> Tensor:
        """The objective of each product (rows) for each candidate (columns); -inf for one that was no finalist."""
        count = max(len(inputs), *map(len, weights))
        kept = list(range(count))
        if self.finalists and min(p.rows.shape[0] * p.rows.shape[1] * len(p.weight) for p in products) >= MANY:
            glimpses = [p.glimpse() for p in products]
            thin = [
                [QParams(*(v[:: p.every] if v.ndim else v for v in (w.scale, w.zero))) for w in tried]
                for p, tried in zip(products, weights, strict=True)
            ]
            first = [self._score(p, inputs, tried, grid) for p, tried in zip(glimpses, thin, strict=True)]
            kept = sorted(torch.stack(first).mean(0).topk(min(self.finalists, count)).indices.tolist())
        pick = [inputs[k] for k in kept] if len(inputs) > 1 else inputs
        full = [
            self._score(p, pick, [tried[k] for k in kept] if len(tried) > 1 else tried, grid)
            for p, tried in zip(products, weights, strict=True)
        ]
        scores = torch.full((len(products), count), -torch.inf)
        scores[:, kept] = torch.stack(full)
        return scores

    def _score(self, p: Product, inputs: Sequence[QParams], weights: Sequence[QParams], grid: Grid) -> Tensor:
        """The objective of each candidate: one input and many weights, or many inputs and one weight."""
        exact = times(p.rows, p.weight).flatten(1)
        found = [self.objective(exact, out.flatten(2)) for out in _outputs(p.given, p, inputs, weights, grid)]
        score = torch.cat(found)
        if self.ranking is None or p.attention is None:
            return score
        ranking, attention = self.ranking, p.attention
        a = attention.scores(F.linear(attention.x, p.weight, p.bias)[None])[0]
        shift = 0 if p.bias is None else p.bias
        x = attention.x if attention.read is None else attention.read
        hinge = [ranking(a, attention.scores(out + shift)) for out in _outputs(x, p, inputs, weights, grid)]
        return score - self.gamma * torch.cat(hinge)

    def _channels(self, p: Product, x: QParams, tried: Sequence[QParams], current: QParams, grid: Grid) -> QParams:
        """The step of each channel with the highest correlation of that channel over all rows of all images."""
        exact = times(p.rows, p.weight).flatten(0, 1).t()
        steps = [current, *tried]
        outputs = _outputs(p.given, p, [x], steps, grid)
        each = [self.objective.each(exact, out.flatten(1, 2).transpose(1, 2)) for out in outputs]
        best = torch.cat(each).argmax(0)[None]
        scale, zero = (torch.stack([getattr(s, part) for s in steps]) for part in ("scale", "zero"))
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
    found = torch.einsum("...gm,kgom->k...go" if w.ndim == 3 else "...gm,gom->...go", parts, kernels)
    return found.flatten(-2)


def _best(score: Tensor, factors: Tensor) -> int:
    """Of the candidates with the highest score, to `GAIN`, the one whose factor is nearest to 1."""
    away = torch.where(score >= score.max() - GAIN, (factors - 1).abs(), torch.inf)
    return int(away.argmin())


def _outputs(x: Tensor, p: Product, inputs: Sequence[QParams], weights: Sequence[QParams], grid: Grid) -> Iterator[Tensor]:
    """Outputs (candidates, images, tokens, c_out) without bias, shifted, some candidates at a time."""
    size = x.shape[0] * x.shape[1] * p.weight.shape[0]
    step = max(1, CHUNK // max(size, p.weight.numel(), x.numel()))
    if len(inputs) == 1:
        left = fake(x, inputs[0], grid)
        for i in range(0, len(weights), step):
            right = torch.stack([fake(p.weight, w, p.range.grid) for w in weights[i : i + step]])
            if groups_of(x, p.weight) > 1:
                yield _less(times(left, right), p.shift)
                continue
            flat = F.linear(left.flatten(0, 1), right.flatten(0, 1))
            yield _less(flat.unflatten(1, right.shape[:2]).transpose(0, 1).unflatten(1, x.shape[:2]), p.shift)
        return
    right = fake(p.weight, weights[0], p.range.grid)
    for i in range(0, len(inputs), step):
        yield _less(times(torch.stack([fake(x, a, grid) for a in inputs[i : i + step]]), right), p.shift)


def _less(output: Tensor, shift: Tensor | None) -> Tensor:
    return output if shift is None else output - shift


def _shifted(p: Product, x: QParams, w: QParams, grid: Grid, correction: OutputBias) -> Product:
    """The product with the mean error of each channel taken out."""
    exact = times(p.rows, p.weight).flatten(0, 1)
    found = times(fake(p.given, x, grid), fake(p.weight, w, p.range.grid)).flatten(0, 1)
    return replace(p, shift=-correction(exact, found, torch.zeros(exact.shape[1])))
