"""GPTQ: the error of rounding one column of a weight goes into the columns that are not rounded yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import BATCH, MEMORY, Context, few_enough
from fewbit.choose.fisher import Importance, position_weights
from fewbit.choose.headroom import headroom, real_weight, sums_are_safe, unsafe_codes, weight_of
from fewbit.choose.layer_rows import Layers
from fewbit.choose.moments import Moments
from fewbit.choose.regression import agreement, factor_of, held_out_error, product, regressed
from fewbit.choose.rounding import Rounding
from fewbit.choose.wide_layers import solved_in_parts, variances
from fewbit.core.device import wide
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import in_multiples, rowwise
from fewbit.core.inputs import Batch
from fewbit.core.pages import give_back
from fewbit.core.plan import Choice, Fallback, Json, PassLog, Plan, described
from fewbit.core.shelf import count_of
from fewbit.workers import LOCAL, Workers, in_order

NAME = "GPTQ"  # in fallbacks
LONG = 1024  # columns from which on trying a ridge takes longer than to send what it is tried on
WHOLE = 6144  # inputs of a layer that is solved at once: those of Swin-L's MLP (a 3 x 3 convolution of 512 channels has 4,608).
# Their factors take 16 s of a core; of the 25,088 of VGG's first Linear 68 times as long, and 5 GB for each matrix
PART = 2048  # columns of a part of a wider layer, whose factors take 0.7 s


@dataclass(frozen=True)
class Solved:
    """The codes of a weight, the bias (c_out,) that belongs to them (None: unchanged) and the ridge that was selected (None:
    none is better), one for each part of the columns.
    """

    choice: Choice
    bias: Tensor | None
    ridges: tuple[float | None, ...]


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

    Where codes and what they multiply have at least `light` bits one GPTQ on the whole range with W itself, without a gain of
    linear layers, gives the same answers in a part of the time, with `few` tokens of each image, or as many as give `rows` for
    each input of a layer (bench/notes/accuracy-8-bits.md).

    Of a layer with more than `whole` inputs the columns are solved in parts of at most `part` (choose/wide_layers.py).
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
    light: int = 8
    few: int = 32
    rows: float = 2.5
    tokens: int | None = None  # of an image, of a linear layer; None: all
    images: int | None = None  # at most, evenly spread over all of them; None: all
    whole: int = WHOLE
    part: int = PART

    def widest(self, graph: Graph) -> int:
        """The inputs of the widest layer, or part of one, whose covariance is held."""
        return max((self.together(math.prod(site.shape[1:])) for site in graph.sites if site.role == "weight"), default=0)

    def together(self, inputs: int) -> int:
        """Of so many inputs of a layer, how many are solved together at most."""
        return inputs if inputs <= self.whole else self.part

    @property
    def rounding(self) -> Rounding:
        """How codes are found, of the weights that are fitted."""
        return Rounding(self.damp, self.shares, self.sweeps, self.order)

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        what = [word for word, is_on in (("codes", True), ("bias", self.bias), ("gain", self.gain)) if is_on]
        listed = " and ".join(filter(None, (", ".join(what[:-1]), what[-1])))
        return f"{listed} with which each layer's output is closest to the float one (GPTQ)"

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < s <= 1 for s in self.shares) or self.damp <= 0 or min(self.ridges, default=1) <= 0:
            raise ValueError(f"0 < shares <= 1, damp > 0 and ridges > 0 are allowed, not {self}")
        if not 1 <= self.part <= self.whole:
            raise ValueError(f"1 <= part <= whole is allowed, not {self}")

    def check(self, context: Context) -> None:
        """Raises BadImages without images."""
        context.need_images()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with each weight's codes solved in graph order, on inputs from the model quantized so far."""
        graph, wanted = context.graph, context.batched(BATCH, self.images)
        batches = few_enough(graph, wanted)
        layers = Layers(graph, plan.integer_ops, batches, context.folder)
        builder = PlanBuilder(plan, context, layers.quantized.overlay)
        builder.fallbacks += left_out(wanted, batches)
        weights = self._weights(plan, context, batches)
        rows: list[dict[str, Json]] = []
        divided: list[str] = []
        for site in graph.sites:
            choice = builder.choices.get(site.name)
            if choice is None:
                continue
            layers.quantized.overlay.set(choice)
            if site.role == "weight":
                context.progress(site.name)
                op = graph.op(site.readers[0][0])
                inputs = math.prod(site.shape[1:])
                divided += [f"{op.name} ({inputs:,} inputs)"] if inputs > self.whole else []
                read = builder.choices.get(op.operands["input"])
                method = self._for(op.kind, self.together(inputs), choice, read, count_of(batches))
                result = method._solve_layer(layers, op, choice, builder, weights.get(op.name))
                if result is not None:
                    builder.set(result.choice)
                    ridges = result.ridges if method.ridges else ()
                    part = [{"part": f"{i} of {len(ridges)}"} if len(ridges) > 1 else {} for i in range(1, len(ridges) + 1)]
                    rows += [{"op": op.name, **which, "ridge": ridge} for which, ridge in zip(part, ridges, strict=True)]
                if result is not None and result.bias is not None:
                    builder.correct(op.name, result.bias)
                else:
                    builder.decide_bias(op)
                give_back()
        return builder.plan(PassLog.of("gptq", self, rows, {"solved_in_parts": ", ".join(divided)} if divided else None))

    def _weights(self, plan: Plan, context: Context, batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        """Those of the positions of each op's output; none without `importance`."""
        if self.importance is None:
            return {}
        graph = context.graph
        sites = [site for site in graph.sites if site.role == "weight" and site.name in plan.choices]
        ops = [graph.op(site.readers[0][0]) for site in sites]
        return position_weights(graph, ops, batches, self.importance, context.seed)

    def _for(self, kind: str, inputs: int, weight: Choice, activation: Choice | None, images: int) -> Gptq:
        """The settings for the weight of an op of a kind, with so many inputs, and what it multiplies (None: real numbers)."""
        if min(one.grid.bits for one in (weight, activation) if one is not None) < self.light:
            return self
        return replace(
            self, ridges=(), shares=self.shares[:1], sweeps=0, gain=self.gain and kind != "linear",
            tokens=max(self.few, math.ceil(self.rows * inputs / images)),
        )  # fmt: skip

    def _solve_layer(
        self, layers: Layers, op: Op, choice: Choice, builder: PlanBuilder, positions: Tensor | None
    ) -> Solved | None:
        """The codes of a weight whose range is chosen; None where it keeps its codes. Where its op's rows cannot be cut, or the
        codes are not safe, that is a fallback; a weight with a width for each channel has its codes from who chose the widths.
        """
        graph, grids = layers.graph, builder.allowed.sites[choice.site]
        site = graph.site(choice.site)
        activation = builder.choices.get(op.operands["input"])
        if choice.grid.widths:
            return None
        w = weight_of(graph, site)
        see = partial(
            layers.moments, op, activation, self.places, len(w), tokens=self.tokens, positions=positions,
            target=bool(self.ridges) or self.gain,
        )  # fmt: skip
        parted = math.prod(w.shape[1:]) > self.whole
        rows = layers.rows(op, activation, self.places, residual=False) if parted else None
        found = None if parted else see(residual=self.residual)
        if found is None and rows is None:
            why, share = "rows of what it reads are cut for linear layers and Conv2d alone", graph.share(op.macs)
            builder.fallbacks.append(Fallback(choice.site, f"{NAME} weights", "those before", why, share))
            return None
        workers = builder.context.workers if self.together(math.prod(w.shape[1:])) >= LONG else LOCAL
        bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
        min_scale = headroom(graph, site, builder.choices, grids).rows(choice.qparams, choice.grid)
        if rows is not None:
            power = variances(read for read, *_ in rows) if choice.grid.group_size else None
            result = solved_in_parts(self, choice, w, bias, see, power, min_scale, workers)
        elif found is not None:
            (fit, outside), found = found, None
            whole = fit if outside is None else fit + outside
            ridge = None
            if outside is not None and self.ridges:
                ridge = self.ridge(w.flatten(1), fit.centre(), outside.centre(), workers)
            del fit, outside
            result = self.layer(choice, w, bias, whole, ridge, min_scale)
        if sums_are_safe(graph, result.choice, builder.choices, grids):
            return result
        builder.fallbacks.append(unsafe_codes(graph, result.choice, builder.choices, grids, NAME))
        return None

    def layer(
        self, choice: Choice, w: Tensor, bias: Tensor | None, whole: Moments, ridge: float | None, min_scale: Tensor
    ) -> Solved:
        """The codes of a weight w (c_out, ...), its scale and its bias (c_out,); `choice` has the scale that covers its range.

        `whole` are the moments of all rows, which are gone then, `ridge` is λ; no scale is below `min_scale`.
        """
        rows, means = w.flatten(1), whole.means()
        real, fitted = self.fitted(rows, whole, ridge)
        del whole
        new_codes, qparams = self.rounding.solve(real, choice.qparams, choice.grid, fitted, min_scale)
        result = replace(choice, qparams=qparams, codes=new_codes)
        agreement = self.agreement(result, rows, fitted) if self.gain and choice.grid.axis is not None else None
        return self.ended(result, w, bias, agreement, means, (ridge,), min_scale)

    def fitted(self, rows: Float[Tensor, "o m"], whole: Moments, ridge: float | None) -> tuple[Tensor, Moments]:
        """W* for the rows of a weight, and the moments that it and its codes are fitted on; those of `whole` are gone then."""
        fitted = whole.centre() if self.bias else replace(whole, count=1)
        if ridge is None:
            return rows, fitted
        return regressed(rows, fitted if self.bias else whole.centred(), ridge), fitted

    def agreement(self, quantized: Choice, rows: Float[Tensor, "o m"], fitted: Moments) -> tuple[Tensor, Tensor]:
        """cov(y, ŷ) and var(ŷ) of each output; y is what the rows of the real weight would give."""
        return agreement(real_weight(quantized), fitted.target(rows), fitted)

    def ended(
        self, solved: Choice, w: Tensor, bias: Tensor | None, agreed: tuple[Tensor, Tensor] | None,
        means: tuple[Tensor, Tensor, Tensor], ridges: tuple[float | None, ...], min_scale: Tensor,
    ) -> Solved:  # fmt: skip
        """The codes (c_out, m) of a weight in its own shape, with the gain of what `agreement` gives (None: no gain), and the
        bias.
        """
        qparams, codes = solved.qparams, solved.codes
        assert codes is not None
        result = replace(solved, codes=codes.view_as(w).to(solved.grid.container), method=described(self))
        if agreed is not None:
            scale = (qparams.scale * rowwise(factor_of(*agreed), qparams.scale)).maximum(min_scale)
            result = replace(result, qparams=replace(qparams, scale=in_multiples(scale, solved.grid)))
        if not self.bias:
            return Solved(result, None, ridges)
        read, exact, residual = means
        missing = product(w.flatten(1), exact) - product(real_weight(result), read) + residual
        shift = missing if bias is None else wide(bias) + missing
        return Solved(result, shift.float(), ridges)

    def ridge(
        self, w: Float[Tensor, "o m"], inside: Moments, outside: Moments, workers: Workers = LOCAL
    ) -> float | None:  # fmt: skip
        """The λ of W* (None: W itself is better), selected on held-out moments; both are centred. Each λ is a task of
        `workers`.
        """
        given = inside.lacking(w), inside.to_read(), outside.lacking(w), outside.to_read()
        best, best_share = 0.0, None
        for share, error in zip(self.ridges, in_order(workers, partial(held_out_error, *given), self.ridges), strict=True):
            if error < best:
                best, best_share = error, share
        return best_share


def left_out(batches: Sequence[Batch], used: Sequence[Batch]) -> tuple[Fallback, ...]:
    """The fallback where `few_enough` has dropped some of the images."""
    requested, actual = count_of(batches), count_of(used)
    if requested == actual:
        return ()
    why = f"the largest tensor of more would take over {MEMORY >> 20} MB; ranges are those of all images"
    return (Fallback("calibration images", f"{requested} for the codes of weights", f"{actual}", why, kind="calibration"),)
