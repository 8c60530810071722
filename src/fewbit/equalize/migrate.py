"""How much of the range of channels goes from an activation into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.grid import Grid, fake, qparams_from_range

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of a range; the one with the smallest squared error wins
WHOLE = 8  # bits from which on a channel of a weight loses less to rounding than to a smaller range
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
NOISE = 1e-5  # of a tensor's largest number; what varies by less is rounding
WORK = 1 << 18  # numbers of a weight that are tried at a time: they stay in the cache


@dataclass(frozen=True)
class Migration:
    """x' = (x - shift) / scale, per channel; `strength` is the power of the range, None for an unchanged tensor.

    `before` and `after` are the errors that decided, in the same unit.
    """

    scale: Tensor
    shift: Tensor
    strength: float | None
    before: float
    after: float


def middle_and_reach(x: Float[Tensor, "rows c"]) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    """The middle of each channel's range and half of its width, at least a thousandth of the mean width."""
    low, high = x.amin(0), x.amax(0)
    reach = (high - low) / 2
    return (low + high) / 2, reach.clamp_min(float(reach.mean()) * 1e-3 + 1e-30)


def varies(x: Float[Tensor, "rows c"]) -> bool:
    """Whether more than rounding is left of a tensor without the middle of each channel. The values in a detector's first
    attention are the same for every image and query: moved by their middle they would be noise, on codes of its size.
    """
    middle, _ = middle_and_reach(x)
    return float((x - middle).abs().max()) > NOISE * float(x.abs().max())


def scales(reach: Float[Tensor, "c"], strength: float) -> Float[Tensor, "c"]:
    """Reach to a power, its geometric mean 1."""
    logs = reach.log()
    return ((logs - logs.mean()) * strength).exp()


def step_of(x: Tensor, grid: Grid) -> Tensor:
    """x quantized with the share of its range that has the smallest squared error."""
    low, high = x.amin(), x.amax()
    candidates = [fake(x, qparams_from_range(low * s, high * s, grid), grid) for s in SHARES]
    return min(candidates, key=lambda q: float((q - x).square_().sum()))


def rows_of(w: Float[Tensor, "o c"], grid: Grid) -> Float[Tensor, "o c"]:
    """A weight quantized in the same way, each channel with its own share where the grid has a scale for each."""
    if grid.axis is None:
        return step_of(w, grid)
    if grid.group_size:
        alone = replace(grid, group_size=0, multiples=0)
        return rows_of(w.unflatten(1, (-1, grid.group_size)).flatten(0, 1), alone).view_as(w)
    return torch.cat([_rows_alone(part, grid) for part in w.split(max(1, WORK // w.shape[1]))])


def _rows_alone(w: Float[Tensor, "o c"], grid: Grid) -> Float[Tensor, "o c"]:
    low, high = w.amin(1), w.amax(1)
    if grid.bits >= WHOLE:
        return fake(w, qparams_from_range(low, high, grid), grid)
    best, least = w, torch.full_like(low, torch.inf)
    for share in SHARES:
        candidate = fake(w, qparams_from_range(low * share, high * share, grid), grid)
        error = (candidate - w).square_().sum(1)
        best = torch.where((error < least)[:, None], candidate, best)
        least = torch.minimum(error, least)
    return best


def migrated(
    x: Float[Tensor, "rows c"],
    w: Float[Tensor, "o c"],
    activation: Grid,
    weight: Grid,
    strengths: Sequence[float] = STRENGTHS,
    *,
    shift: bool = True,
) -> Migration:
    """The strength with the smallest squared error of the quantized layer's output, its mean aside, which the bias takes.

    Candidates are no change, the shift alone (where there is one) and each of the strengths.
    """
    middle, _ = middle_and_reach(x)
    move = middle if shift else torch.zeros_like(middle)
    _, reach = middle_and_reach(x - move)
    if not shift:
        reach = x.abs().amax(0).clamp_min(float(x.abs().amax(0).mean()) * 1e-3 + 1e-30)
    one, zero = torch.ones_like(middle), torch.zeros_like(middle)
    candidates: list[tuple[float | None, Tensor, Tensor]] = [(None, one, zero)]
    candidates += [(0.0, one, move)] if shift else []
    candidates += [(strength, scales(reach, strength), move) for strength in strengths]

    centred = x - x.mean(0)  # the product with the mean, and what the shift takes from it, are the bias's
    exact = centred @ w.T

    def error(scale: Tensor, offset: Tensor) -> float:
        lower, heavier = (x - offset) / scale, w * scale
        difference = (step_of(lower, activation) @ rows_of(heavier, weight).T).sub_(exact)
        return float(difference.sub_(difference.mean(0)).square_().mean())

    errors = [error(scale, offset) for _, scale, offset in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    strength, scale, offset = candidates[best]
    return Migration(scale, offset, strength, errors[0], errors[best])


def balanced_keys(q: Tensor, k: Tensor, strengths: Iterable[float | None]) -> Migration:
    """The scale that keys are divided by and queries multiplied with, for the smallest expected error of their products.

    A tensor's rounding error is uniform with a width of its whole range over the codes, which are as many on both sides.
    """
    reach = [x.abs().amax(0).clamp_min(float(x.abs().amax(0).mean()) * 1e-3 + 1e-30) for x in (q, k)]

    def error(scale: Tensor) -> float:
        a, b = q * scale, k / scale
        widths = [float(x.amax() - x.amin()) for x in (a, b)]
        return float(widths[0] ** 2 * b.square().sum(1).mean() + widths[1] ** 2 * a.square().sum(1).mean())

    one = torch.ones_like(reach[0])
    candidates = [(s, one if s is None else scales(reach[1] / reach[0], s / 2)) for s in strengths]
    errors = [error(scale) for _, scale in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Migration(candidates[best][1], torch.zeros_like(one), candidates[best][0], errors[0], errors[best])
