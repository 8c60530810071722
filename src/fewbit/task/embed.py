"""An embedding for an image: whether the nearest neighbours stay the same, by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.core.task import Json, Outputs, OutputScore, Rating, Signature, Task
from fewbit.errors import BadImages, BadModel
from fewbit.task.interval import of_mean
from fewbit.task.telling import same_rows
from fewbit.task.tensors import rate_by_output

FIRST, MORE = 1, 10  # neighbours
APART = 4e-4  # of two embeddings of length 1, up to which their cosine is 1 in float32, so that no neighbour is nearer
ROWS = 1024  # images that are compared with all others at a time


@dataclass(frozen=True)
class Embed(Task):
    """Output number `index` is the embedding, (b, width)."""

    index: int
    name: ClassVar[str] = "embed"
    distance: ClassVar[str] = "1 minus cosine similarity"
    classes = None

    @staticmethod
    def of(model: Signature, variant: str = "") -> Embed:
        """By the one list of real numbers among the outputs. Raises BadModel without it."""
        lists = [i for i, one in enumerate(model.outputs) if one.is_list]
        if len(lists) != 1:
            raise BadModel("one list of real numbers (batch, width) is needed")
        return Embed(lists[0])

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """1 minus the cosine similarity with the exact embedding."""
        x, y = (one[self.index].double() for one in (exact, outputs))
        return (1 - F.cosine_similarity(x, y)).sum()

    def meter(self, truth: None) -> Neighbours:
        return Neighbours(self.index)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        return ("numbers",), {"index": self.index}


@dataclass
class Neighbours:
    """The embeddings of both models, of length 1; they are kept, 8 bytes a number for each image."""

    index: int
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        x, y = (F.normalize(one[self.index].float()) for one in (exact, outputs))
        self.before.append(x)
        self.after.append(y)
        return (1 - (x * y).sum(1).nan_to_num()).clamp_min(0)

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """Recall at 1: the share of images whose nearest neighbour among the others is the float model's; rows have that at 10,
        or at half of the others where these are fewer than 20, and the cosine similarity of the embeddings. Where all
        embeddings of the float model have one direction, their numbers are compared. Raises BadImages for fewer than three
        images, and where all embeddings are the same.
        """
        x, y = torch.cat(self.before), torch.cat(self.after)
        if len(x) < FIRST + 2:
            raise BadImages(f"{len(x)} images have no neighbours to compare; score at least {FIRST + 2}: --score DIR.")
        if same_rows(x, APART):
            why = (
                f"The float model's embeddings of all {len(x)} scored images have the same direction, so outputs are compared."
            )
            return rate_by_output(outputs, self.index, why)
        more = min(MORE, (len(x) - 1) // 2)  # of nearly all others the same are found, whatever the embeddings are
        first = recall(x, y, FIRST)
        further = [{"what": f"recall at {more}", "agreement": 100 * float(recall(x, y, more).mean())}] if more > FIRST else []
        cosine = (x * y).sum(1).nan_to_num().double()
        rows = (
            *further,
            {"what": "cosine similarity, mean", "agreement": 100 * float(cosine.mean())},
            {"what": "cosine similarity, smallest", "agreement": 100 * float(cosine.min())},
        )
        low, high = of_mean(first)
        measure = f"recall at {FIRST} of the float model's nearest neighbours"
        return Rating("", measure, None, None, 100 * float(first.mean()), (100 * low, 100 * high), rows=rows)


def recall(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The share of each image's `k` nearest neighbours in x (n, width) that are so in y too, (n,); rows have length 1."""
    shares = []
    for start in range(0, len(x), ROWS):
        own = torch.arange(start, min(start + ROWS, len(x)))
        near = []
        for t in (x, y):
            similar = t[own] @ t.T
            similar[torch.arange(len(own)), own] = -torch.inf
            near.append(similar.nan_to_num(nan=-torch.inf).topk(k).indices)
        shares.append((near[0][:, :, None] == near[1][:, None, :]).any(2).double().mean(1))
    return torch.cat(shares)
