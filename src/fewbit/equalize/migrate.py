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


def step_of(x: Tensor, grid: Grid, other: Tensor | None = None) -> Tensor:
    """x, or another tensor, quantized with the share of x's range that has the smallest squared error on x."""
    low, high = x.amin(), x.amax()
    ranges = [qparams_from_range(low * s, high * s, grid) for s in SHARES]
    if other is None:
        return min((fake(x, one, grid) for one in ranges), key=lambda q: float((q - x).square_().sum()))
    return fake(other, min(ranges, key=lambda one: float((fake(x, one, grid) - x).square_().sum())), grid)


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
    few: bool = False,
) -> Migration:
    """The strength with the smallest squared error of the quantized layer's output, its mean aside, which the bias takes.

    Candidates are no change, the shift alone (where there is one) and each of the strengths. Where these are all rows that
    there are, and `few`, ranges and factors of one half are judged on the other: channels that just fill the range with the
    rows that were seen do not stay in it with others.
    """
    plans: list[tuple[float | None, bool]] = [(None, False)]
    plans += [(0.0, True)] if shift else []
    plans += [(strength, shift) for strength in strengths]

    def factors(rows: Tensor, strength: float | None, moves: bool) -> tuple[Tensor, Tensor]:
        middle, _ = middle_and_reach(rows)
        move = middle if moves else torch.zeros_like(middle)
        if not strength:
            return torch.ones_like(middle), move
        reach = middle_and_reach(rows - move)[1] if shift else _reach(rows)
        return scales(reach, strength), move

    exact = (x - x.mean(0)) @ w.T  # the product with the mean, and what the shift takes from it, are the bias's
    half = len(x) // 2
    halves = [(slice(half), slice(half, None)), (slice(half, None), slice(half))] if few and half else []

    def error(strength: float | None, moves: bool) -> float:
        scale, offset = factors(x, strength, moves)
        heavier = rows_of(w * scale, weight).T
        if not halves:
            return _off(step_of((x - offset) / scale, activation) @ heavier, exact)
        sums = 0.0
        for seen, judged in halves:
            own, moved = factors(x[seen], strength, moves)
            quantized = step_of((x[seen] - moved) / own, activation, (x[judged] - moved) / own)
            sums += _off(((quantized * own + moved - offset) / scale) @ heavier, exact[judged]) / 2
        return sums

    errors = [error(*plan) for plan in plans]
    best = min(range(len(errors)), key=errors.__getitem__)
    scale, offset = factors(x, *plans[best])
    return Migration(scale, offset, plans[best][0], errors[0], errors[best])


def _off(found: Tensor, exact: Tensor) -> float:
    """The mean square of a difference without its own mean; `found` is gone then."""
    difference = found.sub_(exact)
    return float(difference.sub_(difference.mean(0)).square_().mean())


def _reach(x: Float[Tensor, "rows c"]) -> Float[Tensor, "c"]:
    """The largest number of each channel, without its sign; at least a thousandth of their mean."""
    reach = x.abs().amax(0)
    return reach.clamp_min(float(reach.mean()) * 1e-3 + 1e-30)


def balanced_keys(q: Tensor, k: Tensor, strengths: Iterable[float | None], codes: tuple[int, int] | None = None) -> Migration:
    """The scale that keys are divided by and queries multiplied with, for the smallest expected error of their products.

    A tensor's rounding error is uniform with a width of its whole range over the codes, which are as many on both sides. With
    `codes`, how many steps queries and keys have, these are few rows, and all that there are: the range of each half is held
    against the other, and what lies outside is an error as well.
    """

    def factors(seen: slice, strength: float | None) -> Tensor:
        reach = [_reach(x[seen]) for x in (q, k)]
        return torch.ones_like(reach[0]) if strength is None else scales(reach[1] / reach[0], strength / 2)

    def error(strength: float | None) -> float:
        scale = factors(slice(None), strength)
        sides = q * scale, k / scale
        widths = [float(x.amax() - x.amin()) ** 2 for x in sides]
        for number, count in enumerate(codes or ()):
            widths[number] += 12 * count**2 * outside(number, strength)
        a, b = (x.square().sum(1).mean() for x in sides)
        return float(widths[0] * b + widths[1] * a)

    def outside(number: int, strength: float | None) -> float:
        """The mean square of what of one half lies outside of the range of the other."""
        half, sums = len(k) // 2, 0.0
        for seen, judged in ((slice(half), slice(half, None)), (slice(half, None), slice(half))) if half else ():
            scale = factors(seen, strength)
            x = k / scale if number else q * scale
            beyond = x[judged] - x[judged].clamp(x[seen].amin(), x[seen].amax())
            sums += float(beyond.square().mean()) / 2
        return sums

    candidates = list(strengths)
    errors = [error(strength) for strength in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    scale = factors(slice(None), candidates[best])
    return Migration(scale, torch.zeros_like(scale), candidates[best], errors[0], errors[best])
