"""Correction: the mean error that remains after rounding, subtracted from the bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.choose.headroom import headroom, real_weight
from fewbit.choose.output_scores import times
from fewbit.core.device import wide
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import QParams, fake, rowwise
from fewbit.core.plan import Choice, PassLog, Plan
from fewbit.execute.samples import OpSample


@dataclass(frozen=True)
class OutputBias:
    """The mean error of each output channel, subtracted from the bias (Liu et al. 2021, section 3.3).

        b' = b - E[Ô - O]      so that the mean over the samples of each channel is that of the float op

    Over images and tokens. With `each_round` a search that has it corrects after each of its rounds as well, so that the next
    one scores outputs without the error that the correction removes; otherwise once, after the search.
    """

    each_round: bool = True

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "the mean error of each output channel, taken off the bias"

    def check(self, context: Context) -> None:
        """Raises FewbitError where activations have many scales, BadImages without images."""
        context.refuse_channel_scales(self)
        context.need_samples()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the biases of all sampled ops corrected."""
        builder = PlanBuilder(plan, context)
        for op in builder.weighted_ops():
            sample = context.samples.get(op.name)
            if isinstance(sample, OpSample):
                builder.correct(op.name, self.bias(context.graph, op, sample, builder.choices))
        return builder.plan(PassLog.of("output bias", self))

    def bias(self, graph: Graph, op: Op, sample: OpSample, choices: Mapping[str, Choice]) -> Float[Tensor, "c_out"]:
        """The bias of an op after correction on its samples."""
        activation, weight = choices.get(op.operands["input"]), choices[op.operands["weight"]]
        w, bias = weight_and_bias(graph, op)
        rows = sample.rows.flatten(0, 1)
        inputs = rows if sample.read is None else sample.read.flatten(0, 1)
        inputs = inputs if activation is None else fake(inputs, activation.qparams, activation.grid)
        return self.corrected(times(rows, w), times(inputs, real_weight(weight)), bias)

    def corrected(
        self, exact: Float[Tensor, "rows channels"], quantized: Float[Tensor, "rows channels"], bias: Float[Tensor, "channels"]
    ) -> Float[Tensor, "channels"]:
        """The bias less the mean error of each channel."""
        error = (wide(quantized) - wide(exact)).mean(0)
        return (wide(bias) - error).to(bias.dtype)


@dataclass(frozen=True)
class WeightMean:
    """The mean of each output channel of a weight as it was before rounding (Banner et al. 2019, section 5).

        ŵ' = ξ ŵ + mean w - ξ mean ŵ        ξ = std w / std ŵ with `variance`, else 1 (the released code's form)

    No integer kernel has an offset for each channel of a weight. ξ goes into the scale, exactly; the offset is multiplied
    by the sum of the weight's inputs, whose mean over the calibration images goes into the bias.
    """

    variance: bool = False

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "the mean of each output channel of a weight, kept as it was before rounding"

    def check(self, context: Context) -> None:
        """Raises BadImages without images."""
        context.need_samples()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the means of all weights of sampled ops back, and with `variance` the spread of all weights."""
        builder, graph = PlanBuilder(plan, context), context.graph
        for op in builder.weighted_ops():
            weight = builder.choices[op.operands["weight"]]
            if self.variance and weight.grid.axis is not None:
                builder.set(weight := self._rescale(builder, op, weight))
            sample = context.samples.get(op.name)
            if isinstance(sample, OpSample):
                w, bias = weight_and_bias(graph, op)
                mean = sample.rows.flatten(0, 1).mean(0)
                builder.correct(op.name, bias + self.offset(w, real_weight(weight)) * times(mean, torch.ones_like(w)))
        return builder.plan(PassLog.of("weight mean", self))

    def ratio(self, exact: Float[Tensor, "channels m"], quantized: Float[Tensor, "channels m"]) -> Float[Tensor, "channels"]:
        """ξ of each channel."""
        spread = wide(quantized).std(1, unbiased=False)
        if not self.variance:
            return torch.ones(len(exact), device=exact.device)
        exact_spread = wide(exact).std(1, unbiased=False)
        return torch.where(spread > 0, exact_spread / spread.clamp_min(1e-30), torch.ones_like(spread)).float()

    def offset(self, exact: Float[Tensor, "channels m"], quantized: Float[Tensor, "channels m"]) -> Float[Tensor, "channels"]:
        """The mean that each channel lost; `quantized` has been multiplied by ξ."""
        return (wide(exact).mean(1) - wide(quantized).mean(1)).float()

    def _rescale(self, builder: PlanBuilder, op: Op, weight: Choice) -> Choice:
        w, _ = weight_and_bias(builder.graph, op)
        ratio, scale = self.ratio(w, real_weight(weight)), weight.qparams.scale
        site, grids = builder.graph.site(weight.site), builder.allowed.sites[weight.site]
        min_scale = headroom(builder.graph, site, builder.choices, grids).min_scale
        new_scale = (scale * rowwise(ratio, scale)).maximum(rowwise(min_scale, scale))
        return replace(weight, qparams=QParams(new_scale, weight.qparams.zero))


def weight_and_bias(graph: Graph, op: Op) -> tuple[Float[Tensor, "c_out m"], Float[Tensor, "c_out"]]:
    """The float weight of an op as rows, and its bias; zeros where it has none."""
    w = tensor_of(graph, graph.site(op.operands["weight"])).flatten(1)
    return w, tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else w.new_zeros(len(w))
