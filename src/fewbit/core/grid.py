"""THE arithmetic: real numbers to integer codes and back. Search, simulation, rounding and realization all call this file.

    real = (code - zero) * scale        code = clamp(round_half_even(real / scale) + zero, low, high)

`scale` is the real distance between neighbouring codes, always > 0. The division and the rounding are those
of ONNX QuantizeLinear in float32, so a simulation gives the codes that a runtime gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.core.device import CPU, on, wide, widest

TINY = 2.0**-60  # the smallest scale: a constant tensor still has one > 0, and so has a bias behind two of them


@dataclass(frozen=True)
class Grid:
    """The integers that a tensor may use. `narrow` drops the lowest code; `axis` is the channel axis, None is per tensor.

    `widths` are the bits of each channel where they differ, at most `bits`; a channel of 0 bits has the code 0 alone.
    `stored` are the bits of the container where it is not the smallest that holds the codes. `group_size`: each row of a weight
    (channels, inputs) has a scale for each group of that many inputs. `multiples`: these scales are 1 to `multiples` times one
    scale of the row, so that codes times multiple are codes on that scale.
    """

    bits: int = 8
    signed: bool = True
    narrow: bool = False
    symmetric: bool = True
    axis: int | None = None
    widths: tuple[int, ...] = ()
    stored: int = 0
    group_size: int = 0
    multiples: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32:
            raise ValueError(f"a grid has 1 to 32 bits, not {self.bits}")
        if self.group_size and (self.axis != 0 or self.widths or not self.symmetric):
            raise ValueError(f"blocks are those of a symmetric weight with steps along axis 0, not of {self}")
        if self.widths and (self.axis is None or not 0 <= min(self.widths) <= max(self.widths) <= self.bits):
            raise ValueError(f"widths of channels are 0 to {self.bits} along an axis, not {self.widths} along {self.axis}")

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else int(self.narrow)

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def largest(self) -> int:
        """The largest magnitude of a code as a kernel reads it: times the multiple where there is one."""
        return max(-self.low, self.high) * max(self.multiples, 1)

    @property
    def mean_bits(self) -> float:
        """Bits of a code, the mean over channels."""
        return sum(self.widths) / len(self.widths) if self.widths else float(self.bits)

    def of_channel(self, channel: int) -> Grid:
        """The grid of one channel."""
        bits = self.widths[channel] if self.widths else self.bits
        return replace(self, bits=max(bits, 1), axis=None, widths=())

    def ends(self, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """The lowest and the highest code: of shape (), or (channels,) where the widths of channels differ."""
        if not self.widths:
            return torch.tensor(self.low, device=device), torch.tensor(self.high, device=device)
        grids = [self.of_channel(c) if bits else None for c, bits in enumerate(self.widths)]
        low, high = [g.low if g else 0 for g in grids], [g.high if g else 0 for g in grids]
        return torch.tensor(low, device=device), torch.tensor(high, device=device)

    @property
    def container(self) -> torch.dtype:
        """The torch integer type that holds every code: the smallest, or the one of `stored` bits."""
        bits = max(self.bits, self.stored)
        if bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        if bits <= 16:
            return torch.int16 if self.signed else torch.uint16
        return torch.int32

    def __str__(self) -> str:
        sign = "s" if self.signed else "u"
        where = "per-tensor" if self.axis is None else f"per-channel (axis {self.axis})"
        if self.group_size:
            where = f"per block of {self.group_size}" + f", {self.multiples} multiples" * bool(self.multiples)
        width = f"{self.mean_bits:.2f} of {self.bits}" if self.widths else self.bits
        return f"{sign}{width} [{self.low}, {self.high}] {'symmetric' if self.symmetric else 'asymmetric'} {where}"


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of a tensor: float32 scale > 0 and int32 zero, of shape (), (channels,) or (channels, groups)."""

    scale: Tensor
    zero: Tensor

    def __post_init__(self) -> None:
        if not bool((self.scale > 0).all()) or not bool(torch.isfinite(self.scale).all()):
            raise ValueError(f"a scale is finite and > 0, found {self.scale.min().item()} to {self.scale.max().item()}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QParams) and torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)


def along(v: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`v` of shape (), (channels,) or (channels, groups) shaped so that it broadcasts over `x` along `axis`; groups have
    equal numbers of columns of x (channels, columns).
    """
    if axis is None or v.ndim == 0:
        return v
    if v.ndim == 2:
        return v.repeat_interleave(x.shape[1] // v.shape[1], 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    return v.view(shape)


def position(x: Float[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Float[Tensor, "*shape"]:
    """Where each element stands among the codes before rounding: x / scale + zero; verify measures ties with it."""
    return x / along(qparams.scale, x, grid.axis) + along(qparams.zero, x, grid.axis)


def codes(x: Float[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Int[Tensor, "*shape"]:
    """The integer of each element: round half to even, as ONNX QuantizeLinear does, then saturate."""
    if grid.bits > 24:  # float32 has no such integers: a bias in units of input scale times weight scale
        if widest(x.device) != torch.float64:
            return codes(on(x, CPU), on(qparams, CPU), grid).to(x.device)
        x = x.double()
    q = torch.round(x / along(qparams.scale, x, grid.axis)) + along(qparams.zero, x, grid.axis)
    return saturated(q, grid).to(torch.int32)


def saturated(q: Tensor, grid: Grid) -> Tensor:
    """Rounded numbers held inside the codes of a grid, in place."""
    if not grid.widths:
        return q.clamp_(grid.low, grid.high)
    low, high = (along(end, q, grid.axis) for end in grid.ends(q.device))
    return q.clamp_(low, high)


def values(q: Int[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Float[Tensor, "*shape"]:
    """The real number of each code, as ONNX DequantizeLinear gives it."""
    return (q - along(qparams.zero, q, grid.axis)).to(torch.float32) * along(qparams.scale, q, grid.axis)


def fake(x: Float[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Float[Tensor, "*shape"]:
    """Quantize and dequantize in float32: `values(codes(x))` without the integer tensor in between."""
    zero = along(qparams.zero, x, grid.axis)
    scale = along(qparams.scale, x, grid.axis)
    return saturated((x / scale).round_().add_(zero), grid).sub_(zero).mul_(scale)


def qparams_from_range(low: Tensor, high: Tensor, grid: Grid) -> QParams:
    """The scale and zero point that cover [low, high], for ranges of any shape; zero is always a code.

    Symmetric: scale = max(|low|, |high|) / high code. Asymmetric: the range is widened to contain 0, and the zero point
    is rounded to a code, as in ONNX's and TFLite's quantization specifications.
    """
    low, high = torch.minimum(low, torch.zeros_like(low)), torch.maximum(high, torch.zeros_like(high))
    if grid.symmetric:
        scale = (torch.maximum(-low, high) / (grid.high - middle(grid))).clamp_min(TINY).to(torch.float32)
        return QParams(scale, torch.full_like(scale, middle(grid), dtype=torch.int32))
    scale = ((wide(high) - wide(low)) / (grid.high - grid.low)).clamp_min(TINY).to(torch.float32)
    zero = torch.round(grid.low - low / scale).clamp(grid.low, grid.high)
    return QParams(scale, zero.to(torch.int32))


def rowwise(v: Tensor, like: Tensor) -> Tensor:
    """`v` of shape () or (channels,) shaped so that it broadcasts over scales (channels,) or (channels, groups)."""
    return v[:, None] if v.ndim == 1 and like.ndim == 2 else v


def in_multiples(scale: Float[Tensor, "*scales"], grid: Grid) -> Float[Tensor, "*scales"]:
    """Scales, those of groups rounded to whole multiples of the row's scale, 1 to `multiples`; the largest is unchanged."""
    if not grid.multiples:
        return scale
    return row_step(scale, grid)[:, None] * multiples_of(scale, grid)


def row_step(scale: Float[Tensor, "channels blocks"], grid: Grid) -> Float[Tensor, "channels"]:
    """The scale of each row of which those of its groups are whole multiples."""
    return scale.amax(1) / grid.multiples


def multiples_of(scale: Float[Tensor, "... channels blocks"], grid: Grid) -> Float[Tensor, "... channels blocks"]:
    """How many times the scale of its row each scale is."""
    share = scale / scale.amax(-1, keepdim=True)
    return (share * grid.multiples).round().clamp(1, grid.multiples)


def of_bias(read: QParams, weight: QParams, channels: int) -> QParams:
    """The scale of an int32 bias (channels,): that of the input times that of the weight, per channel, and zero at code 0."""
    return QParams((read.scale * weight.scale).expand(channels).contiguous(), weight.zero.new_zeros(channels))


def middle(grid: Grid) -> int:
    """The zero point of a symmetric grid: 0 for signed codes, half of the range for unsigned ones."""
    return 0 if grid.signed else 2 ** (grid.bits - 1)


def safe_terms(accumulator_bits: int, a: Grid, w: Grid) -> int:
    """How many products of two codes fit in a signed accumulator before it can overflow."""
    return (2 ** (accumulator_bits - 1) - 1) // (a.largest * w.largest)
