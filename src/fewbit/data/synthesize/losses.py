"""What images from a model are held to: statistics of batch norms (FDDA) and the variety of patches (PSAQ-ViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewbit.data.synthesize.teacher import Moments


def distance(moments: Moments, target: Moments) -> Float[Tensor, ""]:
    """Squared differences of means and of variances, each the mean over channels, both added, the mean over layers.

    With the running statistics as `target` it is L_BNS, with those of a class's calibration image L_C (FDDA, equations 3, 5).
    """
    pairs = [
        F.mse_loss(mean, other) + F.mse_loss(variance, spread)
        for mean, variance, other, spread in zip(moments.means, moments.variances, target.means, target.variances, strict=True)
    ]
    return torch.stack(pairs).mean()


def apart(moments: Moments, target: Moments, eps: Sequence[float]) -> Float[Tensor, ""]:
    """How far statistics are apart in units of each channel's spread: the mean over channels, then over layers.

    The squared Wasserstein distance of two normal distributions, over the target variance. `eps` of each batch norm is added to
    variances, as it does itself, so that a channel that is always the same does not count for all others.
    """
    layers = []
    pairs = zip(moments.means, moments.variances, target.means, target.variances, eps, strict=True)
    for mean, variance, other, spread, e in pairs:
        unit = (spread + e).sqrt()
        layers.append(((mean - other) / unit).square().mean() + ((variance + e).sqrt() / unit - 1).square().mean())
    return torch.stack(layers).mean()


def distorted(moments: Moments, means: float, variances: float, generator: torch.Generator) -> Moments:
    """The statistics of a class with Gaussian noise of these standard deviations, for L_D (FDDA, equation 6)."""

    def noisy(x: Tensor, deviation: float) -> Tensor:
        return x + deviation * torch.randn(x.shape, generator=generator).to(x.device)

    return Moments(
        tuple(noisy(m, means) for m in moments.means),
        tuple(noisy(v, variances) for v in moments.variances),
    )


def deep_from(layers: int) -> int:
    """The index of the first deep batch norm of so many: the paper's, 8 of 20, 12 of 27, 24 of 52; never below 0."""
    return max((layers + 1) // 2 - 2, 0)


def density(x: Float[Tensor, "rows n"], points: int, bandwidth: float) -> tuple[Tensor, Tensor]:
    """A Gaussian kernel density of numbers in [-1, 1]: the points (points,), and the density there (rows, points).

    The numbers are shared out to the two points beside each, in proportion, and the points are smoothed: the same density up
    to the spacing squared, in time that does not grow with points times numbers, and differentiable in the numbers.
    """
    margin = 4 * bandwidth
    places = torch.linspace(-1 - margin, 1 + margin, points, device=x.device)
    spacing = float(places[1] - places[0])
    position = ((x - places[0]) / spacing).clamp(0, points - 1.001)
    below = position.detach().floor()
    upper = position - below
    shares = x.new_zeros(len(x), points)
    shares = shares.scatter_add(1, below.long(), 1 - upper).scatter_add(1, below.long() + 1, upper)
    kernel = torch.exp(-0.5 * ((places[:, None] - places) / bandwidth) ** 2) / (bandwidth * math.sqrt(2 * math.pi))
    return places, shares @ kernel / x.shape[1]


def patch_entropy(
    attention: Float[Tensor, "rows heads tokens width"], points: int, bandwidth: float, prefix: int = 0
) -> Float[Tensor, ""]:
    """Differential entropy of the cosine similarities of patches in one attention's output, mean over images (or windows).

    Li et al. 2022 (PSAQ-ViT), equations 4 to 6: the mean over heads of a token is its patch's vector; the first `prefix`
    tokens are no patches. Similarities of a patch to itself say nothing and are left out.
    """
    patches = F.normalize(attention.mean(1)[:, prefix:], dim=-1)
    count = patches.shape[1]
    above = torch.ones(count, count, dtype=torch.bool, device=patches.device).triu(1)
    similar = (patches @ patches.transpose(1, 2))[:, above]
    places, heights = density(similar, points, bandwidth)
    inside = torch.special.entr(heights.clamp_min(0))
    return torch.trapezoid(inside, places, dim=1).mean()


def prefix_of(tokens: int) -> int:
    """How many tokens stand before a square of patches: 1 of 197 (a class token), 0 of 196."""
    return tokens - math.isqrt(tokens) ** 2


def roughness(images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Root mean square of the differences between neighbours, the mean of right, down and both diagonals."""
    x = images
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., 1:, 1:] - x[..., :-1, :-1],
    )
    return torch.stack([difference.square().mean().clamp_min(1e-12).sqrt() for difference in differences]).mean()
