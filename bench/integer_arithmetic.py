"""The plan in integers, as the target's processor computes it: codes times codes, summed in accumulators that overflow.

A product's sum begins with its bias (where that is an integer) less the share of the input's zero point, and adds the products
of stored codes in order: input channel, then row and column of the kernel. `Accumulator` of the op's entry says in how many
bits, and in which chains; chains are added to the outer sum in the same order. Padding has the code of zero. Products of two
activations take both zero points off first. Additions, poolings and what stays float compute as in `simulate`.

Sums that wrap around do not depend on their order: one exact product, then a remainder. Sums that saturate do, and are added
term by term; but only where the weights' codes say that any input at all could leave the accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from fewbit.capture.kinds import KINDS, PADS
from fewbit.core.fx import argument, is_call
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import along, codes, values
from fewbit.core.plan import Choice, Plan
from fewbit.execute.executor import Executor
from fewbit.target import Target, rule_of
from fewbit.target.spec import Accumulator

EXACT32 = 2**24  # float32 adds integers exactly as long as every partial sum is below


@dataclass(frozen=True)
class HardwareRun:
    """Output (b, classes) for some images, the codes (int32) of each activation site, and by op how many of its sums came out
    otherwise than exact ones would have, of how many.
    """

    output: Tensor
    codes: Mapping[str, Tensor]
    overflowed: Mapping[str, tuple[int, int]]

    @property
    def overflow_share(self) -> float:
        """The share of all sums that overflowed."""
        lost, total = (sum(v[i] for v in self.overflowed.values()) for i in (0, 1))
        return lost / max(total, 1)


@dataclass(frozen=True)
class _Product:
    """An op whose products are of codes: its accumulator, and choices of its operands."""

    op: Op
    accumulator: Accumulator
    left: Choice
    right: Choice
    integer_bias: bool


class Hardware:
    """A plan on a target, ready to run images. `overflow=False` has the same arithmetic with sums of any size."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, *, overflow: bool = True) -> None:
        self.executor = Executor.of(graph, plan)
        rules = target if overflow else target.with_exact_sums()
        grids = {name: choice.grid for name, choice in plan.choices.items()}
        self.products: dict[str, _Product] = {}
        for name in plan.integer_ops:
            op = graph.op(name)
            rule = rule_of(graph, rules, op, grids) if op.reduction_size else None
            if rule is None:
                continue
            left, right = (plan.choices.get(site) for site in list(op.operands.values())[:2])
            if left is None or right is None or right.grid.group_size:  # real numbers times codes
                continue
            wide = max(torch.iinfo(c.grid.container).bits for c in (left, right))
            if wide <= rule.accumulator.operand_bits and not left.qparams.scale.ndim:
                integer = op.operands.get("bias", "") in plan.choices or (
                    name in plan.biases and op.operands.get("output", "") in plan.choices
                )
                self.products[op.node] = _Product(op, rule.accumulator, left, right, integer)

    def run(self, images: Tensor, forced: Mapping[str, Tensor] | None = None) -> HardwareRun:
        """Run images (b, c, h, w). With `forced` (site -> codes) what follows a site computes with those codes."""
        own, overflowed = dict[str, Tensor](), dict[str, tuple[int, int]]()
        stored: dict[str, Tensor] = {}  # the codes that are read, by site

        def read(x: Tensor, choice: Choice) -> Tensor:
            own[choice.site] = codes(x, choice.qparams, choice.grid)
            stored[choice.site] = (forced or {}).get(choice.site, own[choice.site]).to(torch.int32)
            return values(stored[choice.site], choice.qparams, choice.grid)

        def product(node: str, x: Tensor, w: Tensor, bias: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
            found = self.products[node]
            real, lost = self._product(self.executor.nodes[node], found, stored, kwargs.get("bias", bias))
            overflowed[found.op.name] = (lost, real.numel())
            return real

        with torch.no_grad():
            (output,) = self.executor(images, read=read, calls={node: partial(product, node) for node in self.products})
        return HardwareRun(output, own, overflowed)

    def _product(self, n: Node, product: _Product, stored: Mapping[str, Tensor], bias: Tensor | None) -> tuple[Tensor, int]:
        """The real numbers of an op's sums, and how many overflowed."""
        left, right, accumulator = product.left, product.right, product.accumulator
        x = _padded(cast(Node, n.args[0]), stored[left.site], int(left.qparams.zero))
        if not KINDS[product.op.kind].weighted:
            y = stored[right.site]
            total, lost = matmul_codes(x - left.qparams.zero, y - right.qparams.zero, accumulator)
            return (total.double() * left.qparams.scale.double() * right.qparams.scale.double()).float(), lost
        assert right.codes is not None
        step = left.qparams.scale.double() * right.qparams.scale.double()
        start = torch.zeros(len(right.codes), dtype=torch.float64)
        if bias is not None and product.integer_bias:
            start = (bias.double() / step).round()
        geometry = {} if product.op.kind == "linear" else conv_geometry(n)
        total, lost = weighted_codes(x, right.codes, start, int(left.qparams.zero), accumulator, **geometry)
        axis = total.ndim - 1 if product.op.kind == "linear" else 1
        real = (total * along(step, total, axis if step.ndim else None)).float()
        if bias is not None and not product.integer_bias:
            real = real + along(bias, real, axis)
        return real, lost


def _padded(node: Node, stored: Tensor, zero: int) -> Tensor:
    """Codes behind the paddings of zeros that lead to a node."""
    if not is_call(node, *PADS):
        return stored
    inner = _padded(cast(Node, node.args[0]), stored, zero)
    return cast(Callable[..., Tensor], node.target)(inner - zero, *node.args[1:], **node.kwargs) + zero


def simulate_hardware(graph: Graph, plan: Plan, target: Target, images: Tensor, *, overflow: bool = True) -> HardwareRun:
    """A plan on images (b, c, h, w) as the target's processor computes it; without `overflow` sums never leave it."""
    return Hardware(graph, plan, target, overflow=overflow).run(images)


def conv_geometry(n: Node) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution's node, as torch.nn.functional takes them."""
    names = ("stride", "padding", "dilation", "groups")
    return {name: argument(n, i, name, 0 if name == "padding" else 1) for i, name in enumerate(names, 3)}


def weighted_codes(
    x: Tensor, w: Tensor, start: Tensor, zero: int, accumulator: Accumulator, **geometry: Any
) -> tuple[Tensor, int]:
    """Sums (float64 integers) of a linear layer, or with `geometry` of a convolution, and how many overflowed.

    `x` are stored codes (..., c_in) or (b, c_in, ...), `w` (c_out, ...), `start` (c_out,) the integers that sums begin with,
    before the share of the zero point is taken off.
    """
    w = w.to(torch.int32)
    start = start.double() - zero * w.flatten(1).double().sum(1)
    if not geometry:
        exact = _exactly(x, w, F.linear) + start
        columns, grouped = _Columns(x.reshape(1, 1, -1, x.shape[-1]).transpose(2, 3), w[None]), exact.shape
        return _overflowing(exact, columns, start, accumulator, lambda t: t[0, 0].t().reshape(grouped))
    dims, groups = w.ndim - 2, geometry["groups"]
    padding = geometry["padding"]
    if isinstance(padding, str):
        span = [d * (k - 1) for d, k in zip(_each(geometry["dilation"], dims), w.shape[2:], strict=True)]
        ends = [(s // 2, s - s // 2) for s in span] if padding == "same" else [(0, 0)] * dims
    else:
        ends = [(p, p) for p in _each(padding, dims)]
    padded = F.pad(x, [p for pair in reversed(ends) for p in pair], value=zero)
    bare = {**geometry, "padding": 0}
    convolve = F.conv1d if dims == 1 else F.conv2d
    exact = _exactly(padded, w, lambda a, b: convolve(a, b, **bare)) + start.view(-1, *[1] * dims)

    def unfolded() -> Tensor:
        stride, dilation = _each(geometry["stride"], dims), _each(geometry["dilation"], dims)
        maps, kernel = padded.float(), tuple(w.shape[2:])
        if dims == 1:
            maps, kernel, stride, dilation = maps[:, :, None], (1, *kernel), [1, *stride], [1, *dilation]
        return F.unfold(maps, kernel, tuple(dilation), 0, tuple(stride)).unflatten(1, (groups, -1)).to(torch.int32)

    columns = _Columns(unfolded, w.flatten(1).unflatten(0, (groups, -1)))
    return _overflowing(exact, columns, start, accumulator, lambda t: t.flatten(1, 2).reshape(exact.shape))


def matmul_codes(x: Tensor, y: Tensor, accumulator: Accumulator) -> tuple[Tensor, int]:
    """Sums of products of centred codes (..., rows, terms) and (..., terms, columns), and how many overflowed."""
    exact = torch.matmul(x.double(), y.double())
    a = x.expand(*exact.shape[:-2], *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]).transpose(2, 3)  # (b, 1, terms, rows)
    b = y.expand(*exact.shape[:-2], *y.shape[-2:]).reshape(-1, 1, *y.shape[-2:]).transpose(2, 3)  # (b, 1, columns, terms)
    zero = torch.zeros(exact.shape[-1], dtype=torch.float64)
    shape = exact.shape
    return _overflowing(exact, _Columns(a, b), zero, accumulator, lambda t: t[:, 0].transpose(1, 2).reshape(shape))


@dataclass(frozen=True)
class _Columns:
    """Stored codes (b, groups, terms, places), perhaps made only when asked for, and weights (groups, c_out, terms), which
    may have a batch in front.
    """

    given: Tensor | Callable[[], Tensor]
    weight: Tensor
    cache: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        if not self.cache:
            self.cache.append(self.given if isinstance(self.given, Tensor) else self.given())
        return self.cache[0]

    def term(self, k: int) -> Tensor:
        """The k-th product of every sum: (b, groups, c_out, places), int32."""
        return self.x[:, :, k, None, :] * self.weight[..., k, None]

    @property
    def terms(self) -> int:
        return self.weight.shape[-1]


def _overflowing(
    exact: Tensor, columns: _Columns, start: Tensor, accumulator: Accumulator, shaped: Callable[[Tensor], Tensor]
) -> tuple[Tensor, int]:
    """What the accumulator gives for sums whose exact values are known."""
    chain, chain_bits, chain_overflow = accumulator.chain, accumulator.chain_bits, accumulator.overflow
    if accumulator.pair_bits is not None:
        chain, chain_bits, chain_overflow = 2, accumulator.pair_bits, "saturate"
    saturates = accumulator.overflow == "saturate" and not _fits(columns, start, accumulator.bits)
    chained = chain is not None and chain_bits is not None and not _fits(columns, None, chain_bits, chain)
    if not saturates and not chained:
        found = wrapped(exact, accumulator.bits)
    else:
        first = start.view(*columns.weight.shape[-3:-1] if columns.weight.ndim > 2 else (1, -1)) if start.numel() else start
        total = first.to(torch.int64)[None, ..., None]
        step = chain if chained and chain is not None else 1
        for k in range(0, columns.terms, step):
            part = columns.term(k).to(torch.int64)
            if chained:
                assert chain_bits is not None
                part = held(part, chain_bits, chain_overflow)
                for j in range(k + 1, min(k + step, columns.terms)):
                    part = held(part + columns.term(j), chain_bits, chain_overflow)
            total = held(total + part, accumulator.bits, accumulator.overflow)
        found = shaped(total).double()
    return found, int((found != exact).sum())


def held(total: Tensor, bits: int, overflow: str) -> Tensor:
    """Integers in a signed register of so many bits, which wraps around or saturates."""
    if overflow == "wrap":
        return wrapped(total, bits)
    return total.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wrapped(total: Tensor, bits: int) -> Tensor:
    """The remainder of integers in two's complement of so many bits; nothing changes from 53 bits on, float64's."""
    if bits >= 53:
        return total
    half = 2 ** (bits - 1)
    return torch.remainder(total + half, 2**bits) - half


def _fits(columns: _Columns, start: Tensor | None, bits: int, chain: int | None = None) -> bool:
    """Whether no partial sum can leave so many bits, for these weights and the largest of these codes; chains by themselves."""
    weight = columns.weight.double().abs()
    largest = float(columns.x.abs().max()) if columns.x.numel() else 0.0
    if chain is not None:
        weight = F.pad(weight, (0, -weight.shape[-1] % chain)).unflatten(-1, (-1, chain))
    worst = largest * weight.sum(-1)
    if start is not None:
        worst = worst + start.abs().max()
    return bool((worst <= 2 ** (bits - 1) - 1).all())


def _exactly(x: Tensor, w: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A product of codes in float32 where no partial sum can be rounded there, else in float64; integers in float64."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    worst = largest * float(w.flatten(1).double().abs().sum(1).max())
    kind = torch.float32 if worst < EXACT32 else torch.float64
    return product(x.to(kind), w.to(kind)).double()


def _each(value: Any, dims: int) -> list[int]:
    given = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return given if len(given) == dims else given * dims
