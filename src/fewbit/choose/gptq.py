"""GPTQ: the error of rounding one column of a weight goes into the columns that are not rounded yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.capture.fx import argument
from fewbit.capture.sites import tensor_of
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import MEMORY, Context, few_enough
from fewbit.choose.fisher import Importance, position_weights
from fewbit.choose.headroom import headroom, real_weight, sums_are_safe, weight_of
from fewbit.choose.layer_rows import Layers, moments_of
from fewbit.choose.moments import Moments
from fewbit.core.device import wide
from fewbit.core.grid import Grid, QParams, along, fake, in_multiples, rowwise
from fewbit.core.inputs import Batch
from fewbit.core.pages import give_back
from fewbit.core.shelf import count_of
from fewbit.core.values import Choice, Fallback, Json, Op, PassLog, Plan

BLOCK = 32  # columns whose later ones are corrected together: what changes at once stays in a core's cache
TRIES = 12  # to make a matrix positive definite
TINY = torch.finfo(torch.float32).tiny
WORK = 1 << 23  # elements of all candidates that are held at a time


@dataclass(frozen=True)
class Solved:
    """The codes of a weight, the bias (c_out,) that belongs to them (None: unchanged) and the ridge that was selected."""

    choice: Choice
    bias: Tensor | None
    ridge: float | None


@dataclass(frozen=True)
class Gptq:
    """Codes with which a layer's output, on its inputs in the quantized model, is closest to the float output.

        min over integer W'   E ||W x + d - W' q||²      q its quantized input, x the float input, d the residual error after it

    First the best real weights, by ridge regression (Zhong et al. 2024, ERQ; Li et al. 2025, GPTAQ: float output, quantized
    input):

        W* = W + (W (C - H) + D) (H + λ I)⁻¹     H = cov(q, q), C = cov(x, q), D = cov(d, q); λ from `ridges`, in units of the
                                                 mean of H's diagonal, by the error on a quarter of the images ("off" as well)

    then GPTQ on W* (Frantar et al. 2023, algorithm 1) with `damp` times the mean of the diagonal added to it, columns of large
    variance first, once for each of `shares` of the weight's range as its scale; each output channel takes its best scale.
    Where a row has groups, once more with the share for each group that has the smallest squared error, weighted with H's
    diagonal. Then `sweeps` of coordinate descent over the codes: each moves to its best value with all others fixed.
    With `bias` the mean error of each output on all rows goes into its bias, and the fit is of the rest; with `gain` each
    output is then multiplied by cov(y, ŷ) / var(ŷ), which goes into its scale (y the float output, ŷ the quantized layer's).
    """

    ridges: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    damp: float = 0.01
    shares: tuple[float, ...] = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.56)
    sweeps: int = 2
    order: bool = True
    residual: bool = True
    places: int = 256
    bias: bool = False
    gain: bool = False
    importance: Importance | None = None

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < s <= 1 for s in self.shares) or self.damp <= 0 or min(self.ridges, default=1) <= 0:
            raise ValueError(f"0 < shares <= 1, damp > 0 and ridges > 0 are allowed, not {self}")

    def check(self, context: Context) -> None:
        """Raises BadImages without images."""
        context.need_images()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with each weight's codes solved in graph order, on inputs from the model quantized so far."""
        graph, batches = context.graph, few_enough(context.graph, context.batches)
        layers = Layers(graph, plan.integer_ops, batches, context.folder)
        builder = PlanBuilder(plan, context, layers.quantized.overlay)
        builder.fallbacks += left_out(context.batches, batches)
        weights = self._weights(plan, context, batches)
        rows: list[dict[str, Json]] = []
        for site in graph.sites:
            choice = builder.choices.get(site.name)
            if choice is None:
                continue
            layers.quantized.overlay.set(choice)
            if site.role == "weight":
                context.progress(site.name)
                op = graph.op(site.readers[0][0])
                result = self._solve_layer(layers, op, choice, builder, weights.get(op.name))
                if result is not None:
                    builder.set(result.choice)
                    rows.append({"op": op.name, "ridge": result.ridge})
                if result is not None and result.bias is not None:
                    builder.correct(op.name, result.bias)
                else:
                    builder.decide_bias(op)
                give_back()
        return builder.plan(PassLog("gptq", repr(self), tuple(rows)))

    def _weights(self, plan: Plan, context: Context, batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        """Those of the positions of each op's output; none without `importance`."""
        if self.importance is None:
            return {}
        graph = context.graph
        sites = [site for site in graph.sites if site.role == "weight" and site.name in plan.choices]
        ops = [graph.op(site.readers[0][0]) for site in sites]
        return position_weights(graph, ops, batches, self.importance, context.seed)

    def _solve_layer(
        self, layers: Layers, op: Op, choice: Choice, builder: PlanBuilder, positions: Tensor | None
    ) -> Solved | None:
        """The codes of a weight whose range is chosen; None where the op's rows cannot be cut, or no codes are safe."""
        graph, grids = layers.graph, builder.allowed.sites[choice.site]
        site = graph.site(choice.site)
        activation = builder.choices.get(op.operands["input"])
        pieces = layers.rows(op, activation, self.places, residual=self.residual, positions=positions)
        if pieces is None or choice.grid.widths:
            return None
        w = weight_of(graph, site)
        groups = argument(layers.nodes[op.node], 6, "groups", 1) if op.kind != "linear" else 1
        fit, outside = moments_of(pieces, groups, len(w))
        whole = fit if outside is None else fit + outside
        ridge = None if outside is None else self.ridge(w.flatten(1), fit.centre(), outside.centre())
        del fit, outside
        bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
        min_scale = headroom(graph, site, builder.choices, grids).rows(choice.qparams, choice.grid)
        result = self.layer(choice, w, bias, whole, ridge, min_scale)
        return result if sums_are_safe(graph, result.choice, builder.choices, grids) else None

    def layer(
        self, choice: Choice, w: Tensor, bias: Tensor | None, whole: Moments, ridge: float | None, min_scale: Tensor
    ) -> Solved:
        """The codes of a weight w (c_out, ...), its scale and its bias (c_out,); `choice` has the scale that covers its range.

        `whole` are the moments of all rows, which are gone then, `ridge` is λ; no scale is below `min_scale`.
        """
        rows, (read, exact, residual) = w.flatten(1), whole.means()
        real, fitted = rows, replace(whole, count=1)
        if self.bias:
            fitted = whole.centre()
        if ridge is not None:
            real = regressed(rows, fitted if self.bias else whole.centred(), ridge)
        new_codes, qparams = self.solve(real, choice.qparams, choice.grid, fitted, min_scale)
        integers = new_codes.view_as(w).to(choice.grid.container)
        result = replace(choice, qparams=qparams, codes=integers, method=repr(self))
        if self.gain and choice.grid.axis is not None:
            factor = gain(real_weight(result), fitted.target(rows), fitted)
            scale = (qparams.scale * rowwise(factor, qparams.scale)).maximum(min_scale)
            result = replace(result, qparams=replace(qparams, scale=in_multiples(scale, choice.grid)))
        if not self.bias:
            return Solved(result, None, ridge)
        missing = _product(rows, exact) - _product(real_weight(result), read) + residual
        shift = missing if bias is None else wide(bias) + missing
        return Solved(result, shift.float(), ridge)

    def ridge(self, w: Float[Tensor, "o m"], inside: Moments, outside: Moments) -> float | None:
        """The λ of W* (None: W itself is better), selected on held-out moments; both are centred."""
        target = outside.target(w)
        best, best_share = float(outside.error(target, w).sum()), None
        for share in self.ridges:
            error = float(outside.error(target, regressed(w, inside, share)).sum())
            if error < best:
                best, best_share = error, share
        return best_share

    def solve(
        self, w: Float[Tensor, "o m"], qparams: QParams, grid: Grid, moments: Moments, floor: Tensor
    ) -> tuple[Int[Tensor, "o m"], QParams]:
        """Codes and scales for real weights on centred moments; `qparams` covers the whole range, no scale is below `floor`."""
        o, m = w.shape
        shares = self.shares if grid.axis is not None else self.shares[:1]
        scales = [qparams.scale * share for share in torch.tensor(shares)]
        if grid.group_size:
            scales.append(_by_block(w, scales, grid, moments.gram))
        scales = [in_multiples(s.maximum(floor), grid) if grid.group_size else s.maximum(floor).expand(o) for s in scales]
        scale = torch.stack(scales)
        gram, best_error, best_codes = moments.gram.float(), None, None
        for part in scale.split(max(1, WORK // (o * m))):
            part_codes = self._gptq_codes(w, part, grid, moments)
            error = torch.stack([_error(q * along(s, q, 0) - w, gram) for q, s in zip(part_codes, part, strict=True)])
            index = error.argmin(0)
            rows = torch.arange(o, device=w.device)
            if best_error is None or best_codes is None:
                best_error, best_codes, best_scale = error[index, rows], part_codes[index, rows], part[index, rows]
            else:
                better = error[index, rows] < best_error
                best_error = torch.where(better, error[index, rows], best_error)
                best_codes = torch.where(better[:, None], part_codes[index, rows], best_codes)
                best_scale = torch.where(better if best_scale.ndim == 1 else better[:, None], part[index, rows], best_scale)
        assert best_codes is not None
        q = self._coordinate_descent(w, best_codes, best_scale, grid, moments)
        final_scale = best_scale if grid.axis is not None else qparams.scale
        return q.to(torch.int32), replace(qparams, scale=final_scale.float().contiguous())

    def _gptq_codes(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "k o ..."], grid: Grid, moments: Moments
    ) -> Float[Tensor, "k o m"]:
        """GPTQ's codes of all groups for several scales of each channel, or of each of its groups."""
        k, groups = len(scale), len(moments.gram)
        parts = w.unflatten(0, (groups, -1))
        group_scales = scale.unflatten(1, (groups, -1))
        result = w.new_empty(k, *w.shape)
        outputs = parts.shape[1]
        for g in range(groups):
            h = moments.gram[g]
            order = h.diagonal().argsort(descending=True) if self.order else torch.arange(len(h), device=h.device)
            upper = torch.linalg.cholesky(torch.cholesky_inverse(factor(h[order][:, order], self.damp)), upper=True)
            rows = parts[g].repeat(k, 1)
            row_scale = along(group_scales[:, g].flatten(0, 1), rows, 0)
            row_scale = row_scale if row_scale.shape[1] == 1 else row_scale[:, order]
            q = _column_codes(rows[:, order], row_scale, grid, upper.float())
            unordered = torch.empty_like(q)
            unordered[:, order] = q
            result[:, g * outputs : (g + 1) * outputs] = unordered.unflatten(0, (k, outputs))
        return result

    def _coordinate_descent(self, w: Tensor, q: Tensor, scale: Tensor, grid: Grid, moments: Moments) -> Tensor:
        """The codes after `sweeps` of coordinate descent on the error, each output on its own."""
        if not self.sweeps:
            return q
        groups = len(moments.gram)
        outputs = len(w) // groups
        parts = []
        for g in range(groups):
            rows = slice(g * outputs, (g + 1) * outputs)
            s = along(scale[rows], w[rows], 0)
            parts.append(_descended(w[rows], q[rows], s, grid, moments.gram[g].float(), self.sweeps))
        return torch.cat(parts)


def _descended(
    w: Float[Tensor, "o m"], q: Float[Tensor, "o m"], scale: Float[Tensor, "o c"], grid: Grid, h: Float[Tensor, "m m"],
    sweeps: int,
) -> Float[Tensor, "o m"]:  # fmt: skip
    """Codes of weights with one H after sweeps over their columns; `scale` is of each row (c = 1) or of each weight.

    The gradient of the error follows each move within a block of columns, and each block outside of it.
    """
    codes = q.T.contiguous()
    s = scale.T.contiguous().expand_as(codes)
    diagonal = h.diagonal().clamp_min(max(1e-12 * float(h.diagonal().max()), TINY)).tolist()
    gradient = h @ (codes * s - w.T)
    m, moves = len(codes), codes.new_empty(BLOCK, len(q))
    for _ in range(sweeps):
        before = codes.clone()
        for first in range(0, m, BLOCK):
            last = min(first + BLOCK, m)
            block = gradient[first:last].clone()
            for j in range(first, last):
                better = torch.addcdiv(codes[j], block[j - first], s[j], value=-1 / diagonal[j]).round_()
                move = torch.mul(better.clamp_(grid.low, grid.high).sub_(codes[j]), s[j], out=moves[j - first])
                codes[j].add_(better)
                block[j + 1 - first :].addr_(h[j + 1 : last, j], move)
            gradient.addmm_(h[:, first:last], moves[: last - first])
        if bool((codes == before).all()):
            break
    return codes.T


def _error(change: Float[Tensor, "o m"], gram: Float[Tensor, "g m m"]) -> Float[Tensor, "o"]:
    """The squared error of each output whose weights change so; in float32, since no large numbers cancel."""
    parts = change.unflatten(0, (len(gram), -1))
    return ((parts @ gram) * parts).sum(2).flatten()


def damped(h: Float[Tensor, "m m"], share: float) -> Float[Tensor, "m m"]:
    """H with a share of the mean of its diagonal added to the diagonal; of nothing but zeros, the identity."""
    mean = float(h.diagonal().mean())
    result = h.clone()
    result.diagonal().add_(share * mean if mean > 0 else 1.0)
    return result


def factor(h: Float[Tensor, "m m"], share: float) -> Float[Tensor, "m m"]:
    """The lower Cholesky factor of H with a share of its diagonal's mean added, ten times more until it succeeds: for inputs
    that are nearly constant, H is only rounding noise.
    """
    for _ in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(h, share))
        if not bool(failed):
            return lower
        share *= 10
    return torch.linalg.cholesky(damped(h, share))


def _by_block(
    w: Float[Tensor, "o m"], candidates: Sequence[Float[Tensor, "o b"]], grid: Grid, gram: Float[Tensor, "1 m m"]
) -> Float[Tensor, "o b"]:
    """For each group the candidate scale with the smallest squared error of its weights rounded to the nearest code, each
    weighted with the power of its input: the output error where inputs are not correlated.
    """
    candidate_qparams = [QParams(in_multiples(scale, grid), torch.zeros_like(scale, dtype=torch.int32)) for scale in candidates]
    errors = [
        ((fake(w, a, grid) - w).square() * gram[0].diagonal().float()).unflatten(1, (-1, grid.group_size)).sum(2)
        for a in candidate_qparams
    ]
    best = torch.stack(errors).argmin(0)
    return torch.stack(list(candidates)).gather(0, best[None])[0]


def regressed(w: Float[Tensor, "o m"], moments: Moments, share: float) -> Float[Tensor, "o m"]:
    """W*; `moments` are centred."""
    change = moments.target(w) - moments.through(wide(w))
    parts = change.unflatten(0, (len(moments.gram), -1))
    solutions = [torch.cholesky_solve(c.T, factor(h, share)).T for c, h in zip(parts, moments.gram, strict=True)]
    return (wide(w) + torch.cat(solutions)).float()


def _column_codes(
    w: Float[Tensor, "r m"], scale: Float[Tensor, "r c"], grid: Grid, upper: Float[Tensor, "m m"]
) -> Float[Tensor, "r m"]:
    """Codes of rows, column by column; `scale` is of each row (c = 1) or of each weight, `upper` the Cholesky factor of the
    inverse of H.

    Transposed, so that a column lies in one piece.
    """
    columns = w.T.contiguous()
    scales = scale.T.contiguous().expand_as(columns)
    codes, errors = torch.empty_like(columns), columns.new_empty(BLOCK, len(w))
    m, diagonal = len(columns), upper.diagonal().tolist()
    for first in range(0, m, BLOCK):
        last = min(first + BLOCK, m)
        for j in range(first, last):
            code = torch.div(columns[j], scales[j], out=codes[j]).round_().clamp_(grid.low, grid.high)
            error = torch.addcmul(columns[j], code, scales[j], value=-1, out=errors[j - first]).div_(diagonal[j])
            columns[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].T, errors[: last - first], alpha=-1)
    return codes.T


def gain(w: Float[Tensor, "o m"], target: Float[Tensor, "o m"], moments: Moments) -> Float[Tensor, "o"]:
    """The best factor for each output of quantized weights to match the target output; it goes into the scale."""
    v = wide(w)
    power = (moments.through(v) * v).sum(1)
    best = (target * v).sum(1) / power.clamp_min(1e-30)
    return torch.where((power > 0) & (best > 0.5) & (best < 2), best, torch.ones_like(best)).float()


def left_out(batches: Sequence[Batch], used: Sequence[Batch]) -> tuple[Fallback, ...]:
    """The fallback where `few_enough` has dropped some of the images."""
    requested, actual = count_of(batches), count_of(used)
    if requested == actual:
        return ()
    why = f"the largest tensor of more would take over {MEMORY >> 20} MB; ranges are those of all images"
    return (Fallback("calibration images", f"{requested} for the codes of weights", f"{actual}", why, kind="calibration"),)


def _product(w: Tensor, mean: Tensor) -> Tensor:
    """W times a mean row (groups, m) -> (c_out,)."""
    return torch.einsum("gom,gm->go", wide(w).unflatten(0, (len(mean), -1)), mean).flatten()
