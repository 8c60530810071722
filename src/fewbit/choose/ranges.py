"""Ranges: the scale of every activation and weight from its own values, and the nearest codes of the weights.

The first pass of nearly every recipe. A range method (`MinMax`, `Percentile`, `MseRange`; `EntropyRange` and `AnalyticClip`
beside this file) sees one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.capture.sites import owner_of
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.context import Context
from fewbit.choose.fisher import weighted_samples
from fewbit.choose.headroom import coded, headroom, pairs_are_safe, weight_of
from fewbit.choose.range_method import RangeMethod, Samples, ranged
from fewbit.core.device import wide
from fewbit.core.graph import Graph, Site
from fewbit.core.grid import Grid, QParams, qparams_from_range
from fewbit.core.plan import Choice, Fallback, Fixed, Plan, SameAs, SharedWith, described
from fewbit.observe.stats import Histogram
from fewbit.target.grids import AllowedGrids

CACHE = 1 << 17  # elements worked on at a time: half a megabyte stays in a core's cache


@dataclass(frozen=True)
class MinMax:
    """The whole observed range (Jacob et al. 2018)."""

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "the whole observed range"

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        return qparams_from_range(samples.low, samples.high, grid)


@dataclass(frozen=True)
class Percentile:
    """The range that holds `share` of the values, the same share cut off at both ends (Li et al. 2019, FQ-ViT's baseline)."""

    share: float = 0.9999

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return f"the range of {100 * self.share:g} % of the values"

    def __post_init__(self) -> None:
        if not 0.5 < self.share <= 1:
            raise ValueError(f"share is the part of values kept, above 0.5 and at most 1, not {self.share}")

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        values, order = samples.values.sort(dim=1)
        counts = samples.counts.expand_as(samples.values).gather(1, order)
        counts = wide(counts).cumsum(1)
        total = counts[:, -1:]
        cut = (1 - self.share) / 2
        first = torch.searchsorted(counts, total * cut).clamp(max=values.shape[1] - 1)
        last = torch.searchsorted(counts, total * (1 - cut)).clamp(max=values.shape[1] - 1)
        low = values.gather(1, first).squeeze(1) if self.share < 1 else samples.low
        high = values.gather(1, last).squeeze(1) if self.share < 1 else samples.high
        return qparams_from_range(low, high, grid)


@dataclass(frozen=True)
class MseRange:
    """The range with the smallest mean |x - fake(x)|^p (p = 2: mean squared error; LAPQ's layer-wise start for other p).

    Candidates shrink the observed range: both ends on their own for an asymmetric grid. A coarse grid of `steps` shares in
    [smallest, 1], then a fine one of as many between the neighbours of the best.
    """

    p: float = 2.0
    steps: int = 16
    smallest: float = 0.1

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        error = "squared error" if self.p == 2 else f"error to the power of {self.p:g}"
        return f"the range with the smallest {error}"

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.smallest < 1 or self.p <= 0:
            raise ValueError(f"steps >= 2, 0 < smallest < 1 and p > 0 are allowed, not {self}")

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        parts = [self._rows(part, grid) for part in _chunks(_near_one(samples))]
        low, high = (torch.cat(shares) for shares in zip(*parts, strict=True))
        return qparams_from_range(samples.low * low, samples.high * high, grid)

    def _rows(self, samples: Samples, grid: Grid) -> tuple[Tensor, Tensor]:
        """The shares of the lowest and the highest value of each row."""
        device = samples.low.device
        best_low = best_high = torch.ones(len(samples.low), device=device)
        reach = 1 - self.smallest
        for offsets in (
            torch.linspace(-reach, 0, self.steps, device=device),
            torch.linspace(-1, 1, 2 * self.steps - 1, device=device) * reach / (self.steps - 1),
        ):
            if grid.symmetric:
                pairs = torch.stack([offsets, offsets], 1)
            elif bool((samples.low < 0).any()):
                pairs = torch.cartesian_prod(offsets, offsets)
            else:
                pairs = torch.stack([torch.zeros_like(offsets), offsets], 1)
            low = (best_low + pairs[:, :1]).clamp(self.smallest, 1)  # (candidates, rows)
            high = (best_high + pairs[:, 1:]).clamp(self.smallest, 1)
            error = torch.cat([self._error(samples, lo, hi, grid) for lo, hi in _candidate_chunks(low, high)])
            best = error.argmin(0)
            best_low, best_high = (share.gather(0, best[None]).squeeze(0) for share in (low, high))
        return best_low, best_high

    def _error(self, samples: Samples, low_share: Tensor, high_share: Tensor, grid: Grid) -> Float[Tensor, "candidates rows"]:
        """The error of each row for shares of its range (candidates, rows)."""
        qparams = qparams_from_range(samples.low * low_share, samples.high * high_share, grid)
        scale, zero = qparams.scale[..., None], qparams.zero[..., None]
        error = samples.values / scale
        error = error.round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero).mul_(scale).sub_(samples.values)
        error = error.square_() if self.p == 2 else error.abs_().pow_(self.p)
        return error.mul_(samples.counts).sum(-1)


@dataclass(frozen=True)
class Ranges:
    """A range method for activations and one for weights; weights get the nearest codes.

    With `free_softmax` the scale of probabilities is searched like any other where the target's own is a convention. With
    `gradients` the range of an activation weighs each element by the square of the model's gradient there. `channel_bits`
    gives each channel a width of its own where the target can hold it.
    """

    activations: RangeMethod = MinMax()
    weights: RangeMethod = MinMax()
    free_softmax: bool = False
    gradients: bool = False
    channel_bits: ChannelBits | None = None

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        more = ["weighed by the gradients of the model"] * self.gradients
        more += ["a width for each channel"] * (self.channel_bits is not None)
        both = f"activations: {described(self.activations)}; weights: {described(self.weights)}"
        return "; ".join([both, *more])

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """A choice for every site that the target has a grid for. Raises BadValues where a weight is not finite."""
        builder = PlanBuilder(plan, context)
        gradient_samples = self._gradient_samples(context)
        for site in context.graph.sites:
            grids = context.allowed.sites.get(site.name)
            if grids is None or site.role == "bias":
                continue
            context.progress(site.name)
            if site.role == "weight":
                choice, why = self.weight(context, site, grids, builder.choices)
                builder.set_weight(choice, grids.grids[0], why)
            else:
                group = next((group for group in context.allowed.shared if site.name in group), ())
                same_codes = None if group else moved_codes(context.graph, site, grids, builder.choices)
                builder.set(same_codes or self.activation(context, site, grids, group, gradient_samples.get(site.name)))
        builder.fallbacks += self._one_width(context, builder.choices)
        return builder.plan()

    def activation(
        self, context: Context, site: Site, grids: AllowedGrids, group: tuple[str, ...] = (), samples: Samples | None = None
    ) -> Choice:
        """The choice of an activation by its range, or by that of the group that it shares one scale with."""
        grid, method = grids.grids[0], described(self.activations)
        if grids.fixed_scale is not None and not (self.free_softmax and grids.convention):
            qparams = QParams(torch.tensor(grids.fixed_scale), torch.tensor(grids.fixed_zero, dtype=torch.int32))
            return Choice(site.name, site.role, grid, qparams, "fixed", None, grids.all_readers, "fixed by the target", Fixed())
        if grid.axis is None:
            histogram = reduce(Histogram.merge, (context.stats.sites[name] for name in group or (site.name,)))
            qparams = self.activations(samples or Samples.of_histogram(histogram), grid)
            qparams = QParams(qparams.scale.squeeze(0), qparams.zero.squeeze(0))
            if group:
                others = tuple(name for name in group if name != site.name)
                why = "one scale with " + ", ".join(others)
                return Choice(site.name, site.role, grid, qparams, method, None, grids.all_readers, why, SharedWith(others))
        else:
            values, bits = context.channels[site.name], self.channel_bits
            if bits is not None and bits.activations and grid.bits <= bits.nominal:
                widths = bits(values.values.std(1, unbiased=False), grid.bits, symmetric=grid.symmetric)
                grid = replace(grid, bits=max(*widths, 1), widths=widths)
            qparams = ranged(self.activations, Samples.of_channels(values.values, values.low, values.high), grid)
        return Choice(site.name, site.role, grid, qparams, method, all_readers=grids.all_readers)

    def weight(self, context: Context, site: Site, grids: AllowedGrids, choices: Mapping[str, Choice]) -> tuple[Choice, str]:
        """The choice of a weight on the first grid whose products are safe in the accumulator, and why it is not the first."""
        w = weight_of(context.graph, site)
        room = headroom(context.graph, site, choices, grids)

        def on(grid: Grid) -> Choice:
            bits = self.channel_bits
            if bits is not None and bits.weights and grid.axis is not None and grid.bits <= bits.nominal:
                widths = bits(w.flatten(1).std(1, unbiased=False), grid.bits, symmetric=grid.symmetric)
                grid = replace(grid, bits=max(widths), widths=widths)
            qparams = self.weight_range(w, grid)
            return coded(Choice(site.name, site.role, grid, qparams, described(self.weights)), w, room)

        return first_safe(context, site, grids, choices, on)

    def weight_range(self, w: Float[Tensor, "c_out ..."], grid: Grid) -> QParams:
        """The scale and zero point of a weight on a grid, of shape (), (channels,) or (channels, groups)."""
        qparams = ranged(self.weights, Samples.of_weight(w, grid), grid)
        if grid.axis is None:
            return QParams(qparams.scale.squeeze(0), qparams.zero.squeeze(0))
        if grid.group_size:
            return QParams(qparams.scale.view(len(w), -1), qparams.zero.view(len(w), -1))
        return qparams

    def _gradient_samples(self, context: Context) -> Mapping[str, Samples]:
        if not self.gradients:
            return {}
        graph, sites = context.graph, context.allowed.sites
        names = [name for name, grids in sites.items() if graph.site(name).axis is None and grids.grids[0].axis is None]
        return weighted_samples(graph, names, context.batches, context.count)

    def _one_width(self, context: Context, choices: Mapping[str, Choice]) -> list[Fallback]:
        """The fallback for activations whose channels cannot have own widths: the target has one scale for all of them."""
        bits, graph = self.channel_bits, context.graph
        if bits is None or not bits.activations:
            return []
        plain = {c.site for c in choices.values() if c.codes is None and c.grid.axis is None and c.grid.bits <= bits.nominal}
        if not plain:
            return []
        share = graph.share(sum(op.macs for op in graph.ops if plain & {op.operands.get("input")}))
        why = f"{context.target.name} has one scale for all channels of an activation"
        return [Fallback(f"{len(plain)} activations", "a width for each channel", "one width", why, share)]


def first_safe(
    context: Context, site: Site, grids: AllowedGrids, choices: Mapping[str, Choice], on: Callable[[Grid], Choice]
) -> tuple[Choice, str]:
    """The choice of a weight, from `on`, for the first grid whose products are safe in the accumulator; and why it is not the
    first grid.
    """
    choice = on(grids.grids[0])
    if grids.pair_bits is None:
        return choice, ""
    activation = choices[context.graph.op(site.readers[0][0]).operands["input"]].grid
    for k, grid in enumerate(grids.grids):
        choice = choice if k == 0 else on(grid)
        assert choice.codes is not None
        if pairs_are_safe(choice.codes, activation, grids.pair_bits):
            break
    return choice, "" if k == 0 else f"two products can saturate {grids.pair_bits} bits on {context.target.name}"


def moved_codes(graph: Graph, site: Site, grids: AllowedGrids, choices: Mapping[str, Choice]) -> Choice | None:
    """The choice of a tensor that only rearranges another's codes, where all readers read those.

    Codes move without loss. Another scale would round them a second time, which runtimes leave out.
    """
    owners = {s.tensor: s.name for s in graph.sites if s.name in choices and choices[s.name].all_readers}
    name = owner_of(next(n for n in graph.module.graph.nodes if n.name == site.tensor), owners)
    owner = None if name is None else choices[name]
    if owner is None or owner.grid != grids.grids[0] or owner.site == site.name or grids.fixed_scale is not None:
        return None
    why = f"elements of {owner.site}"
    return replace(owner, site=site.name, role=site.role, all_readers=grids.all_readers, why=why, source=SameAs(owner.site))


def _near_one(samples: Samples) -> Samples:
    """Each row times a power of two, so that its errors have a p-th power in float32."""
    exponent = torch.frexp(torch.maximum(-samples.low, samples.high)).exponent
    unit = torch.ldexp(torch.ones_like(samples.low), -exponent.clamp_min(-120))
    return Samples(samples.values * unit[:, None], samples.counts, samples.low * unit, samples.high * unit)


def _chunks(samples: Samples) -> Iterator[Samples]:
    """The rows in pieces that fit the cache."""
    chunk = max(1, CACHE // samples.values.shape[1])
    for i in range(0, len(samples.low), chunk):
        counts = samples.counts if samples.counts.ndim == 1 else samples.counts[i : i + chunk]
        yield Samples(samples.values[i : i + chunk], counts, samples.low[i : i + chunk], samples.high[i : i + chunk])


def _candidate_chunks(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates (candidates, rows) in pieces: many at once for one row, one by one for many."""
    chunk = max(1, 16 // low.shape[1])
    return zip(low.split(chunk), high.split(chunk), strict=True)
