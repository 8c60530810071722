"""Attention's scales: of probabilities, queries and keys, searched for what attention gives, not for the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.capture.kinds import by_rows
from fewbit.capture.structure import heads
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import BATCH, Context
from fewbit.core.device import widest
from fewbit.core.graph import Op
from fewbit.core.grid import QParams, fake
from fewbit.core.plan import Choice, Json, PassLog, Plan, SameAs, described
from fewbit.execute.samples import PairSample, op_samples

Factors = tuple[float, ...]  # of scales


@dataclass(frozen=True)
class AttentionSteps:
    """The scales with which the result of attention is closest to the float one, first of probabilities P, then of queries and
    keys together:

        min over s_P         E ||P̂ V̂ - P V||²
        min over s_Q, s_K    E ||δP V||²        δP = P (δ - Σ P δ), δ the error of the logits s Q Kᵀ

    δP is the softmax's derivative, so masks and position biases count without being known. Most probabilities are near zero and
    a few near one: a scale by their own squared error keeps the few, though the many decide the sum (the reason for AdaLog's
    and PTQ4ViT's grids; here the grid stays uniform, so that the kernel stays an ordinary one). Candidates are factors of the
    scale so far, `finer` of probabilities and `around` of queries and keys; sampled queries of `images` decide. Rows that
    equalization has divided by their maxima are divided by their sums here, which gives P again: they are whole rows of a
    softmax. Others are P as they are, also where a part of each row was cut off and no sum is one.
    """

    finer: tuple[float, ...] = tuple(2 ** (k / 8) for k in range(1, -21, -1))
    around: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
    images: int = 32

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "scales with which the result of attention is closest to the float one"

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the scales that are free and belong to one product alone."""
        graph, builder = context.graph, PlanBuilder(plan, context)
        scores = {h.mix.name: h.scores for h in heads(graph) if h.scores and _free(builder, h.scores, "query", "key")}
        mixes = [op for op in graph.ops if op.name in scores or _free(builder, op, "probs")]
        if not mixes or not context.images:
            return plan
        wanted = [op.name for op in (*mixes, *scores.values())]
        samples = op_samples(graph, context.batched(BATCH, self.images), wanted, seed=context.seed, ranked=self.images)
        nodes = {node.name: node for node in graph.module.graph.nodes}
        rows: list[dict[str, Json]] = []
        for op in mixes:
            sample = samples.get(op.name)
            if not isinstance(sample, PairSample):
                continue
            context.progress(op.name)
            sums = sample.left.sum(-1, keepdim=True) if by_rows(nodes[op.node].args[0]) else 1.0
            if _free(builder, op, "probs"):
                rows.append(self._probabilities(builder, op, sample, sums))
            if (below := scores.get(op.name)) is not None:
                seen = samples.get(below.name)
                if isinstance(seen, PairSample) and _fits(seen, sample):
                    rows.append(self._keys(builder, below, seen, sample.left / sums, sample.right))
        return builder.plan(PassLog.of("attention steps", self, rows))

    def _probabilities(self, builder: PlanBuilder, op: Op, sample: PairSample, sums: Tensor | float) -> dict[str, Json]:
        choice, values = builder.choices[op.operands["probs"]], builder.choices.get(op.operands["value"])
        right = sample.right if values is None else fake(sample.right, values.qparams, values.grid)
        exact = sample.left @ sample.right

        def error(factors: Factors) -> float:
            return _power((fake(sample.left, _times(choice, *factors), choice.grid) @ right - exact) / sums)

        factors, row = _best(error, [(factor,) for factor in self.finer])
        builder.set(replace(choice, qparams=_times(choice, *factors), method=described(self)))
        return {"op": op.name, "what": "probabilities", **row}

    def _keys(
        self, builder: PlanBuilder, op: Op, seen: PairSample, probs: Float[Tensor, "..."], values: Float[Tensor, "..."]
    ) -> dict[str, Json]:
        query, key = (builder.choices[op.operands[side]] for side in ("query", "key"))
        exact = seen.left @ seen.right

        def error(factors: Factors) -> float:
            left, right = (
                fake(x, _times(choice, factor), choice.grid)
                for x, choice, factor in zip((seen.left, seen.right), (query, key), factors, strict=True)
            )
            off = (left @ right - exact) * seen.scale
            return _power(probs * (off - (probs * off).sum(-1, keepdim=True)) @ values)

        factors, row = _best(error, list(product(self.around, repeat=2)))
        for choice, factor in zip((query, key), factors, strict=True):
            builder.set(replace(choice, qparams=_times(choice, factor), method=described(self)))
        return {"op": op.name, "what": "queries and keys", **row}


def _free(builder: PlanBuilder, op: Op, *operands: str) -> bool:
    """Whether these operands of an op have one scale each that is theirs and nobody else's."""
    choices = builder.choices
    shared = {choice.source.site for choice in choices.values() if isinstance(choice.source, SameAs)}
    found = [choices.get(op.operands.get(name, "")) for name in operands]
    return all(c is not None and c.is_free and c.qparams.scale.ndim == 0 and c.site not in shared for c in found)


def _fits(scores: PairSample, mixed: PairSample) -> bool:
    """Whether the sampled rows of the scores are those of the probabilities behind them."""
    shape = (*scores.left.shape[:-1], scores.right.shape[-1])
    return shape == tuple(mixed.left.shape) and torch.equal(scores.rows, mixed.rows)


def _times(choice: Choice, factor: float) -> QParams:
    return replace(choice.qparams, scale=choice.qparams.scale * factor)


def _power(error: Float[Tensor, "..."]) -> float:
    return float(error.square().sum(dtype=widest(error.device)))


def _best(error: Callable[[Factors], float], candidates: Sequence[Factors]) -> tuple[Factors, dict[str, Json]]:
    """The candidate with the smallest error, the first of equal ones, and its error as a share of that of factors of 1."""
    errors = {one: error(one) for one in candidates}
    best = min(errors, key=errors.__getitem__)
    return best, {"factors": list(best), "error": errors[best] / max(errors[(1.0,) * len(best)], 1e-300)}
