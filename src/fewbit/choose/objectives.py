"""What a search maximises or minimises: one number for each candidate, all candidates at once.

Candidates are a leading axis of the quantized outputs; float outputs have no such axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FLIP_PAIRS = 512  # key pairs sampled for each row where flips are counted


class Similarity(ABC):
    """How alike a float output and quantized ones are, larger is better: for all candidates at once, mean over images."""

    def __call__(
        self, exact: Float[Tensor, "images m"], quantized: Float[Tensor, "candidates images m"]
    ) -> Float[Tensor, "candidates"]:
        return self.each(exact, quantized).mean(1)

    @abstractmethod
    def each(
        self, exact: Float[Tensor, "images m"], quantized: Float[Tensor, "candidates images m"]
    ) -> Float[Tensor, "candidates images"]:
        """Each image on its own."""


@dataclass(frozen=True)
class Cosine(Similarity):
    """The cosine of the angle between two outputs, each image's flattened; 1 is the best.

        <O, Ô> / (|O| |Ô|)        (Wu et al. 2020, EasyQuant, equation 4)

    Unchanged when either output is scaled. An output that is 0 has no direction: 0.
    """

    def each(
        self, exact: Float[Tensor, "images m"], quantized: Float[Tensor, "candidates images m"]
    ) -> Float[Tensor, "candidates images"]:
        norms = torch.linalg.vector_norm(exact, dim=1) * torch.linalg.vector_norm(quantized, dim=2)
        return torch.where(norms > 0, torch.einsum("im,cim->ci", exact, quantized) / norms, torch.zeros_like(norms))


@dataclass(frozen=True)
class Pearson(Similarity):
    """The correlation over all entries of an image's output: the cosine after subtracting the means; 1 is the best.

        Γ(O, Ô) = Σ_j (O_j - mean O)(Ô_j - mean Ô) / ( sqrt(Σ_j (O_j - mean O)²) · sqrt(Σ_j (Ô_j - mean Ô)²) )

    (Liu et al. 2021, section 3.1.) Unchanged when either output is scaled or shifted as a whole. An output that is constant
    has no correlation with anything: 0.
    """

    def each(
        self, exact: Float[Tensor, "images m"], quantized: Float[Tensor, "candidates images m"]
    ) -> Float[Tensor, "candidates images"]:
        return Cosine().each(exact - exact.mean(1, keepdim=True), quantized - quantized.mean(2, keepdim=True))


@dataclass(frozen=True)
class SquaredError(Similarity):
    """Minus the squared error over the energy of the float output, each image's; 0 is the best.

        - |O - Ô|² / |O|²

    Sees scale and shift, which Pearson does not.
    """

    def each(
        self, exact: Float[Tensor, "images m"], quantized: Float[Tensor, "candidates images m"]
    ) -> Float[Tensor, "candidates images"]:
        energy = exact.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        return -(quantized - exact).square().sum(2) / energy


@dataclass(frozen=True)
class RankingLoss:
    """How badly quantized attention scores keep the order of the keys; 0 is the best.

        mean over rows and pairs (i, j) of   max(0, θ - (Â_i - Â_j) · sign(A_i - A_j))

    (Liu et al. 2021, section 3.2, with the mean in place of the sum.) A row holds the scaled logits of one query. Each row
    has `pairs` pairs of keys of its own, drawn with `seed` and the same for every candidate; all pairs where there are no
    more than that. Pairs that are equal in the float row have no order and are left out.
    """

    theta: float = 0.2
    pairs: int = 32
    seed: int = 0

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "quantized attention scores that keep the order of the keys"

    def __post_init__(self) -> None:
        if self.theta < 0 or self.pairs < 1:
            raise ValueError(f"theta >= 0 and pairs >= 1 are allowed, not {self}")

    def __call__(
        self, exact: Float[Tensor, "rows keys"], quantized: Float[Tensor, "candidates rows keys"]
    ) -> Float[Tensor, "candidates"]:
        i, j = (places.to(exact.device) for places in self._pairs(*exact.shape))
        order = (exact.gather(1, i) - exact.gather(1, j)).sign()
        shape = (len(quantized), -1, -1)
        gaps = quantized.gather(2, i.expand(shape)) - quantized.gather(2, j.expand(shape))
        hinge = (self.theta - gaps * order).clamp_min(0) * order.abs()
        return hinge.sum((1, 2)) / order.abs().sum().clamp_min(1)

    def _pairs(self, rows: int, keys: int) -> tuple[Tensor, Tensor]:
        """Two different keys for each pair: indices (rows, pairs)."""
        if keys * (keys - 1) // 2 <= self.pairs:
            i, j = torch.triu_indices(keys, keys, 1)
            return i.expand(rows, -1), j.expand(rows, -1)
        generator = torch.Generator().manual_seed(self.seed)
        i = torch.randint(keys, (rows, self.pairs), generator=generator)
        offset = torch.randint(1, keys, (rows, self.pairs), generator=generator)
        return i, (i + offset) % keys


def flipped(
    before: Float[Tensor, "images heads queries keys"], after: Float[Tensor, "images heads queries keys"], seed: int = 0
) -> Float[Tensor, "heads"]:
    """The share of sampled key pairs of each row whose order is another one after quantization; ties are dropped."""
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(before.shape[-1], (2, FLIP_PAIRS), generator=generator)
    a, b = ((m[..., i] - m[..., j]).sign() for m in (before, after))
    counted = a != 0
    return ((a != b) & counted).sum((0, 2, 3)) / counted.sum((0, 2, 3)).clamp_min(1)
