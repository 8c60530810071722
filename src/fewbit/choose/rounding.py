"""Codes of a weight on the second moments of what it reads: GPTQ, for several scales, and coordinate descent behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.choose.columns import block_scales, by_row, column_codes, descended, errors_of, factor
from fewbit.choose.moments import Moments
from fewbit.core.grid import Grid, QParams, along, in_multiples

WORK = 1 << 23  # elements of all candidates that are held at a time


@dataclass(frozen=True)
class Ordered:
    """The order in which the columns of each group are rounded, and the Cholesky factor of H⁻¹ in that order."""

    order: Int[Tensor, "groups m"]
    upper: Float[Tensor, "groups m m"]


@dataclass(frozen=True)
class Rounding:
    """`damp` times the mean of H's diagonal is added to it; `shares` of the range are tried as scales; `sweeps` of coordinate
    descent follow; with `order` columns of large variance come first.
    """

    damp: float
    shares: tuple[float, ...]
    sweeps: int
    order: bool

    def solve(
        self, w: Float[Tensor, "o m"], qparams: QParams, grid: Grid, moments: Moments, floor: Tensor
    ) -> tuple[Int[Tensor, "o m"], QParams]:
        """Codes and scales for real weights on centred moments; `qparams` covers the whole range, no scale is below `floor`."""
        power = moments.gram[0].diagonal() if grid.group_size else None
        scales = self.scales(w, qparams, grid, power, floor)
        chosen = scales[0]
        ordered = self._ordered(moments)
        if len(scales) > 1:
            best_codes, chosen = self._best(w, scales, grid, moments, ordered)
        else:
            best_codes = self._gptq_codes(w, scales, grid, ordered)[0]
        del ordered
        q = self._coordinate_descent(w, best_codes, chosen, grid, moments)
        final_scale = chosen if grid.axis is not None else qparams.scale
        return q.to(torch.int32), replace(qparams, scale=final_scale.float().contiguous())

    def scales(
        self, w: Float[Tensor, "o m"], qparams: QParams, grid: Grid, power: Float[Tensor, "m"] | None, floor: Tensor
    ) -> Float[Tensor, "k o ..."]:
        """The scales that are tried for each row; `power` is that of each input, where rows have groups."""
        shares = self.shares if grid.axis is not None else self.shares[:1]
        scales = [qparams.scale * share for share in torch.tensor(shares)]
        if power is not None:
            scales.append(block_scales(w, scales, grid, power))
        scales = [in_multiples(s.maximum(floor), grid) if grid.group_size else s.maximum(floor).expand(len(w)) for s in scales]
        return torch.stack(scales)

    def codes(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "o ..."], grid: Grid, moments: Moments
    ) -> Float[Tensor, "o m"]:
        """The codes for one scale of each row."""
        q = self._gptq_codes(w, scale[None], grid, self._ordered(moments))[0]
        return self._coordinate_descent(w, q, scale, grid, moments)

    def lost(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "k o ..."], grid: Grid, moments: Moments
    ) -> Float[Tensor, "k o"]:
        """The error of each output with GPTQ's codes for each of the scales."""
        ordered, gram = self._ordered(moments), moments.gram.float()
        return torch.cat([self._tried(w, part, grid, gram, ordered)[1] for part in self._at_once(w, scale)])

    def _at_once(self, w: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The scales, as many as are tried together."""
        return scale.split(max(1, WORK // w.numel()))

    def _tried(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "k o ..."], grid: Grid, gram: Tensor, ordered: Ordered
    ) -> tuple[Float[Tensor, "k o m"], Float[Tensor, "k o"]]:
        """GPTQ's codes for each of the scales, and their errors."""
        codes = self._gptq_codes(w, scale, grid, ordered)
        return codes, torch.stack([errors_of(q * along(s, q, 0) - w, gram) for q, s in zip(codes, scale, strict=True)])

    def _best(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "k o ..."], grid: Grid, moments: Moments, ordered: Ordered
    ) -> tuple[Float[Tensor, "o m"], Float[Tensor, "o ..."]]:
        """GPTQ's codes of each output with the one of its scales that has the smallest error, and that scale."""
        gram, best_error, best_codes = moments.gram.float(), None, None
        for part in self._at_once(w, scale):
            part_codes, error = self._tried(w, part, grid, gram, ordered)
            index = error.argmin(0)
            rows = torch.arange(len(w), device=w.device)
            if best_error is None or best_codes is None:
                best_error, best_codes, best_scale = error[index, rows], part_codes[index, rows], part[index, rows]
            else:
                better = error[index, rows] < best_error
                best_error = torch.where(better, error[index, rows], best_error)
                best_codes = torch.where(better[:, None], part_codes[index, rows], best_codes)
                best_scale = torch.where(better if best_scale.ndim == 1 else better[:, None], part[index, rows], best_scale)
        assert best_codes is not None
        return best_codes, best_scale

    def _ordered(self, moments: Moments) -> Ordered:
        """Of the columns of each group."""
        h = moments.gram
        order = h.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
        if not self.order:
            order = torch.arange(h.shape[1], device=h.device).expand_as(order)
        h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
        upper = torch.linalg.cholesky(torch.cholesky_inverse(factor(h, self.damp)), upper=True).float()
        return Ordered(order, upper)

    def _gptq_codes(
        self, w: Float[Tensor, "o m"], scale: Float[Tensor, "k o ..."], grid: Grid, ordered: Ordered
    ) -> Float[Tensor, "k o m"]:
        """GPTQ's codes of all groups for several scales of each channel, or of each of its groups."""
        k, groups, order = len(scale), len(ordered.order), ordered.order
        rows = w.unflatten(0, (groups, -1)).repeat(1, k, 1)
        row_scale = by_row(scale.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2), rows)
        place = order[:, None].expand_as(rows)
        if row_scale.shape[2] > 1:
            row_scale = row_scale.gather(2, place)
        q = column_codes(rows.gather(2, place), row_scale, grid, ordered.upper)
        unordered = torch.empty_like(rows).scatter_(2, place, q)
        return unordered.unflatten(1, (k, -1)).transpose(0, 1).flatten(1, 2)

    def _coordinate_descent(self, w: Tensor, q: Tensor, scale: Tensor, grid: Grid, moments: Moments) -> Tensor:
        """The codes after `sweeps` of coordinate descent on the error, each output on its own."""
        if not self.sweeps:
            return q
        h = moments.gram.float()
        w, q, scale = (v.expand(len(w), *v.shape[1:]).unflatten(0, (len(h), -1)) for v in (w, q, scale))
        return descended(w, q, by_row(scale, w), grid, h, self.sweeps).flatten(0, 1).contiguous()
