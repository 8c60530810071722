"""Op scope: the scales of an op's input and weight, searched on the op's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.choose.correct import OutputBias
from fewbit.choose.headroom import pairs_are_safe, weight_of
from fewbit.choose.objectives import Pearson, RankingLoss, Similarity
from fewbit.choose.output_scores import Found, Pair, Product, Range, Score, times
from fewbit.choose.range_method import Samples
from fewbit.choose.ranges import Ranges
from fewbit.choose.rank_flips import rank_flips
from fewbit.core.graph import Op, Site
from fewbit.core.grid import Grid, QParams, codes, fake
from fewbit.core.plan import Choice, Json, PassLog, Plan, described
from fewbit.execute.executor import Executor
from fewbit.execute.samples import OpSample, PairSample, read_as
from fewbit.execute.stream import Stream

GAIN = 1e-6  # the smallest gain of a move: float32 sums in another order differ by less


@dataclass(frozen=True)
class OutputSearch:
    """The scales Δ^W, Δ^X whose product Ô = Ψ(X) Ψ(W) Δ^W Δ^X is most like O = X W (Liu et al. 2021, sections 3.1 and 3.2).

        maximise   (1/N) Σ_i Γ(O_i, Ô_i)  -  γ · L_rank      (the second term for attention scores only)

    Scales start at the whole range and are searched on [low, high] times that, `candidates` of them, the weight's with the
    input fixed and the input's with the weight fixed, until neither moves. A scale moves only where the objective gains, so
    the result is never worse than the start; of candidates that are equally good (Pearson does not see a scale that leaves
    the codes unchanged) the one nearest to the whole range wins. One factor for all channels of a weight; with
    `per_channel` each channel has the factor that is best for its own output, if the whole objective gains too.

    Ops that read one tensor (queries, keys and values) are searched together: each has a weight scale of its own, and the
    input scale is the best for the mean of their objectives. `rows` of the sample are scored. Where they are many, all
    candidates are scored on a part of the output and the best `finalists` on all of it (0: all on all). The op reads its float
    input, or with `sequential` that of the quantized model; O is float in both. The bias is left out of O.

    `inverse`: [low, high] and its candidates are of 1/Δ. `start`: the factors multiply the range that these methods give the
    tensor (None: its whole range). `sides`: both scales are searched in turn, or only one of them. With `resume` weights begin
    at the scales that the plan has. (EasyQuant: [0.5, 2] of 1/Δ, from an entropy range; Wu et al. 2020, section 3.)
    `correction` takes the mean error of each output channel out of its bias, after each round and at the end.
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
    sides: Literal["both", "weights", "inputs"] = "both"
    start: Ranges | None = None
    resume: bool = False
    correction: OutputBias | None = None

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        turn = ", op by op" if self.sequential else ""
        return f"scales with which each op's output is most like the float one{turn}"

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
        values = torch.linspace(self.low, self.high, self.candidates)
        return torch.cat([1 / values if self.inverse else values, torch.ones(1)])

    @property
    def score(self) -> Score:
        """What a candidate is worth."""
        return Score(self.objective, self.ranking, self.gamma, self.finalists)

    def check(self, context: Context) -> None:
        """Raises FewbitError where an activation or a row of weights has many scales, BadImages without images."""
        context.refuse_channel_scales(self)
        context.refuse_groups(self)
        context.need_samples()
        if self.sequential:
            context.need_images()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the scales of what linear layers, convolutions and products of two activations read."""
        refuse_channel_widths(plan)
        return _Walk(self, plan, context).plan()

    def search(self, products: Sequence[Product], start: Range | QParams, grid: Grid) -> Found:
        """Search the weights of the products and, where `start` is a range, the scale of the input that they share.

        A correction after each round shifts the outputs that the next round scores.
        """
        products = [p.thinned(self.rows) for p in products]
        factors, one = self.factors, torch.tensor(1.0)
        x = start.qparams(one) if isinstance(start, Range) else start
        weights = [p.first for p in products]
        scores = [self.score.one(p, [x], [w], grid).item() for p, w in zip(products, weights, strict=True)]
        before = math.fsum(scores) / len(scores)
        for _ in range(self.rounds):
            improved = False
            for i, p in enumerate(products if self.sides != "inputs" else ()):
                candidates = [p.range.qparams(f.expand(p.range.low.shape).to(p.weight.device)) for f in factors]
                score = self.score.many([p], [x], [candidates], grid)[0]
                best = _best(score, factors)
                if self.per_channel and p.range.grid.axis is not None:
                    own = self.score.channels(p, x, candidates, weights[i], grid)
                    candidates, score = [*candidates, own], torch.cat([score, self.score.one(p, [x], [own], grid)])
                    best = len(factors) if score[-1] > score[best] + GAIN else best
                if score[best] > scores[i] + GAIN:
                    weights[i], scores[i], improved = candidates[best], score[best].item(), True
            if isinstance(start, Range) and self.sides != "weights":
                inputs = [start.qparams(f) for f in factors]
                each = self.score.many(products, inputs, [[w] for w in weights], grid)
                mean = each.mean(0)
                best = _best(mean, factors)
                if mean[best] > math.fsum(scores) / len(scores) + GAIN:
                    x, scores, improved = inputs[best], each[:, best].tolist(), True
            if not improved:
                break
            if self.correction is not None and self.correction.each_round:
                products = [_correct_product(p, x, w, grid, self.correction) for p, w in zip(products, weights, strict=True)]
                scores = [self.score.one(p, [x], [w], grid).item() for p, w in zip(products, weights, strict=True)]
        return Found(x, tuple(weights), before, math.fsum(scores) / len(scores))

    def pair(self, pair: Pair, left: Range | QParams, right: Range | QParams) -> tuple[QParams, QParams]:
        """The scales of the two operands of a product, searched in turn; an operand without a range keeps its scale."""
        factors, one = self.factors, torch.tensor(1.0)
        both = [g.qparams(one) if isinstance(g, Range) else g for g in (left, right)]
        score = self.score.pair(pair, *([a] for a in both)).item()
        for _ in range(self.rounds):
            improved = False
            for side, start in enumerate((left, right)):
                if not isinstance(start, Range) or self.sides == "weights":
                    continue
                options = [start.qparams(f) for f in factors]
                each = self.score.pair(pair, options, [both[1]]) if side == 0 else self.score.pair(pair, [both[0]], options)
                best = _best(each, factors)
                if each[best] > score + GAIN:
                    both[side], score, improved = options[best], each[best].item(), True
            if not improved:
                break
        return both[0], both[1]


def _best(score: Tensor, factors: Tensor) -> int:
    """Of the candidates with the highest score, to `GAIN`, the one whose factor is nearest to 1."""
    distance = torch.where(score >= score.max() - GAIN, (factors - 1).abs().to(score.device), torch.inf)
    return int(distance.argmin())


def _correct_product(p: Product, x: QParams, w: QParams, grid: Grid, correction: OutputBias) -> Product:
    """The product with the mean error of each channel subtracted from its output."""
    exact = times(p.rows, p.weight).flatten(0, 1)
    quantized = times(fake(p.given, x, grid), fake(p.weight, w, p.range.grid)).flatten(0, 1)
    return replace(p, shift=-correction.corrected(exact, quantized, exact.new_zeros(exact.shape[1])))


class _Walk:
    """The sites of a plan in graph order: each activation is searched with the weights of the ops that read it.

    `samples` are inputs of the ops, in a sequential search from the model quantized so far; `searched` are weights with a new
    scale and no codes yet; `unranked` are the scales of the same search without ranking.
    """

    def __init__(self, search: OutputSearch, plan: Plan, context: Context) -> None:
        self.method, self.context, self.graph = search, context, context.graph
        self.samples = dict(context.samples)
        overlay = Executor(self.graph, plan.integer_ops)
        self.stream = Stream(overlay, context.batches, folder=context.folder) if search.sequential else None
        self.builder = PlanBuilder(plan, context, overlay if search.sequential else None)
        self.passed: set[str] = set()
        self.searched: dict[str, Choice] = {}
        self.unranked: dict[str, QParams] = {}
        self.rows: list[dict[str, Json]] = []
        self.flips: list[dict[str, Json]] = []

    def plan(self) -> Plan:
        for site in self.graph.sites:
            choice = self.builder.choices.get(site.name)
            if choice is None:
                continue
            self.context.progress(site.name)
            self.passed.add(site.name)
            if site.role == "weight":
                self._weight(choice)
            else:
                self._activation(site, choice)
        for op in self.builder.weighted_ops() if self.method.correction is not None else ():
            self._correct(op)
        logs = [PassLog.of("output search", self.method, self.rows)]
        if self.flips:
            logs.append(PassLog.of("ranking", self.method.ranking, self.flips))
        return self.builder.plan(*logs)

    def _activation(self, site: Site, choice: Choice) -> None:
        """Search the scale of a tensor: with those of weights that multiply it, then as an operand of products."""
        self.builder.set(choice)
        ops = [op for op in self.builder.readers(site) if op.name in self.samples]
        if self.stream is not None and ops:
            read = self.stream.at(self.stream.overlay.nodes[site.tensor])
            for op in ops:
                self.samples[op.name] = read_as(self.graph, op, self.samples[op.name], site.tensor, read)
        weighted = [op for op in ops if "weight" in op.operands]
        if weighted:
            self._search(choice, weighted)
        for op in ops:
            both = [s for s in op.operands.values() if s in self.passed]
            if isinstance(self.samples[op.name], PairSample) and len(both) == 2:
                self._search_pair(op)

    def _weight(self, choice: Choice) -> None:
        """The codes of a weight with its final scale, and the bias that goes with them."""
        site, builder = self.graph.site(choice.site), self.builder
        grids, searched_choice = builder.allowed.sites[site.name], self.searched.pop(site.name, None)
        if searched_choice is None:
            builder.set(builder.recoded(choice))
        else:
            narrower = searched_choice.grid != grids.grids[0]
            why = f"two products can saturate {grids.pair_bits} bits on {self.context.target.name}" if narrower else ""
            builder.set_weight(builder.recoded(searched_choice), grids.grids[0], why)
        op = self.graph.op(site.readers[0][0])
        if self.stream is not None and self.method.correction is not None:
            self._correct(op)
        else:
            builder.decide_bias(op)

    def _correct(self, op: Op) -> None:
        sample, correction = self.samples.get(op.name), self.method.correction
        if isinstance(sample, OpSample) and correction is not None:
            self.builder.correct(op.name, correction.bias(self.graph, op, sample, self.builder.choices))

    def _start_range(self, choice: Choice) -> Range | QParams:
        """Where a search starts: the range that was observed, or that of the plan; the scale itself where it is not free."""
        if not choice.is_free:
            return choice.qparams
        if self.method.start is not None:
            return Range.of(choice.qparams, choice.grid)
        return observed_range(self.context, choice.site, choice.grid)

    def _weight_range(self, site: str, grid: Grid) -> Range:
        """The same for a weight."""
        if self.method.start is None:
            return observed_range(self.context, site, grid)
        w = weight_of(self.graph, self.graph.site(site))
        return Range.of(self.method.start.weight_range(w, grid), grid)

    def _products(self, ops: Sequence[Op], level: Mapping[str, int]) -> list[Product]:
        """What is scored: each op with its weight on the grid of its level."""
        products, graph = [], self.graph
        for op in ops:
            site, sample = op.operands["weight"], self.samples[op.name]
            assert isinstance(sample, OpSample)
            weight_range = self._weight_range(site, self.builder.allowed.sites[site].grids[level[op.name]])
            bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
            previous = self.builder.choices[site] if self.method.resume else None
            start = previous.qparams if previous is not None and previous.grid == weight_range.grid else None
            w = weight_of(graph, graph.site(site)).flatten(1)
            products.append(Product(sample.rows, w, weight_range, sample.attention, bias, sample.read, start=start))
        return products

    def _search(self, choice: Choice, ops: Sequence[Op]) -> None:
        """Search the scale of an input and of the weights of all ops that read it.

        A weight goes to the next grid where its codes are not safe.
        """
        level, start = {op.name: 0 for op in ops}, self._start_range(choice)
        while True:
            products = self._products(ops, level)
            best = self.method.search(products, start, choice.grid)
            unsafe = []
            for op, p, qparams in zip(ops, products, best.weights, strict=True):
                grids = self.builder.allowed.sites[op.operands["weight"]]
                q, last = codes(p.weight, qparams, p.range.grid), level[op.name] == len(grids.grids) - 1
                if grids.pair_bits is not None and not last and not pairs_are_safe(q, choice.grid, grids.pair_bits):
                    unsafe.append(op.name)
            if not unsafe:
                break
            level |= {name: level[name] + 1 for name in unsafe}
        weights = [op.operands["weight"] for op in ops]
        if self.method.ranking is not None and any(p.attention is not None for p in products):
            plain = replace(self.method, ranking=None).search(products, start, choice.grid)
            self.unranked |= {choice.site: plain.input, **dict(zip(weights, plain.weights, strict=True))}
        for site, p, qparams in zip(weights, products, best.weights, strict=True):
            self.searched[site] = Choice(site, "weight", p.range.grid, qparams, described(self.method))
        if isinstance(start, Range):
            self.builder.set(replace(choice, qparams=best.input, method=described(self.method)))
        names = [op.name for op in ops]
        self.rows.append({"input": choice.site, "ops": names, "before": best.before, "after": best.after})

    def _search_pair(self, op: Op) -> None:
        """Search the scales of the two operands of a product; an operand that others read as well keeps its own."""
        sample, builder = self.samples[op.name], self.builder
        assert isinstance(sample, PairSample)
        both = [builder.choices[site] for site in list(op.operands.values())[:2]]
        alone = [len(builder.readers(self.graph.site(choice.site))) == 1 for choice in both]
        starts = [self._start_range(choice) if own else choice.qparams for choice, own in zip(both, alone, strict=True)]
        pair = Pair(sample, both[0].grid, both[1].grid, "query" in op.operands)
        best = self.method.pair(pair, starts[0], starts[1])
        for choice, start, qparams in zip(both, starts, best, strict=True):
            if isinstance(start, Range):
                builder.set(replace(choice, qparams=qparams, method=described(self.method)))
        if self.method.ranking is not None and pair.ranked:
            plain = replace(self.method, ranking=None).pair(pair, starts[0], starts[1])
            self.unranked |= {choice.site: qparams for choice, qparams in zip(both, plain, strict=True)}
            choices = {**builder.choices, **self.searched}
            self.flips += rank_flips(self.graph, op, self.samples, choices, self.unranked)


def refuse_channel_widths(plan: Plan) -> None:
    """Raise ValueError where channels of a tensor have widths of their own: a search moves one scale on one grid."""
    if any(choice.grid.widths for choice in plan.choices.values()):
        raise ValueError("widths of channels come with ranges; a search has one width for a tensor")


def observed_range(context: Context, name: str, grid: Grid) -> Range:
    """What was observed of an activation, or is there of a weight."""
    site = context.graph.site(name)
    if site.role != "weight":
        samples = Samples.of_histogram(context.stats.sites[name])
        return Range(samples.low[0], samples.high[0], grid)
    rows = Samples.of_weight(weight_of(context.graph, site), grid)
    low, high = (rows.low, rows.high) if grid.axis is not None else (rows.low[0], rows.high[0])
    return Range(low, high, grid)
