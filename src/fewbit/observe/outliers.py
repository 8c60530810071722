"""Outlier channels and outlier tokens: the few elements of an activation that stretch the range of all the others.

Large vision transformers grow a few tokens of background to ten times the norm of the others (Darcet et al. 2024, "Vision
transformers need registers") and a few channels of large magnitude in all tokens (Dettmers et al. 2022 for language; Li et
al. 2023, RepQ-ViT, section 3.2, behind layer norms). With one scale for the whole tensor both cost the others precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.core.fx import shape_of
from fewbit.core.graph import Graph, Json
from fewbit.execute.watch import watch

LIMIT = 10.0  # times the median: the tokens of Darcet et al. have ten times the norm of others
SHOWN = 8  # most channels or positions that are listed


@dataclass(frozen=True)
class Outliers:
    """The outliers of one activation. Reach is the largest magnitude of a channel over all tokens, or of a token over all
    channels; ratios are the largest reach over the median reach.

    `channels` are the outlier channels, the largest first, `token_share` is the share of outlier tokens and `positions` are
    their positions, the most frequent first; of both at most SHOWN, of `channel_count` and `position_count`.
    `rest_of_channels` and `rest_of_tokens` are the reach without all outliers, over the reach with them.
    """

    site: str
    reach: float
    channel_ratio: float
    channel_count: int
    channels: tuple[int, ...]
    rest_of_channels: float
    token_ratio: float | None
    token_share: float
    position_count: int
    positions: tuple[int, ...]
    rest_of_tokens: float

    @property
    def any(self) -> bool:
        return bool(self.channels) or self.token_share > 0

    def to_json(self) -> dict[str, Json]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def outliers(graph: Graph, batches: Iterable[Tensor], limit: float = LIMIT) -> list[Outliers]:
    """The outliers of each activation with channels, in graph order, over batches of (b, c, h, w) images.

    Tokens (b, n, c) or (n, b, c) are checked for both kinds, maps (b, c, h, w) and rows (b, c) for outlier channels only; what
    holds NaN or infinities is left out. Memory: one number for each channel and for each token of each image.
    """
    axes = {name: axis for name in _activations(graph) if (axis := _channels(graph, name)) is not None}
    nodes = {node.name: node for node in graph.module.graph.nodes}
    tokens_first = {name for name in axes if _tokens_first(nodes[graph.site(name).tensor], graph.batch)}
    reach: dict[str, Tensor] = {}
    tokens: dict[str, list[Tensor]] = {}

    def record(name: str, value: Tensor, images: range) -> None:
        largest = value.abs().movedim(axes[name], -1).flatten(0, -2).amax(0)
        reach[name] = torch.maximum(reach[name], largest) if name in reach else largest
        if value.ndim == 3:
            of_tokens = value.abs().amax(2)
            tokens.setdefault(name, []).append(of_tokens.t() if name in tokens_first else of_tokens)

    watch(graph, batches, {graph.site(name).tensor: partial(record, name) for name in axes})
    return [
        standing_out(s.name, reach[s.name], torch.cat(tokens[s.name]) if s.name in tokens else None, limit)
        for s in graph.sites
        if s.name in reach and bool(reach[s.name].isfinite().all())
    ]


def standing_out(site: str, channels: Float[Tensor, "c"], tokens: Float[Tensor, "b n"] | None, limit: float) -> Outliers:
    """The outliers among the reaches of channels, and of the tokens of each image."""
    reach = max(float(channels.max()), 1e-30)
    median = float(channels.median().clamp_min(1e-30))
    is_outlier = channels > limit * median
    channel_rest = float(channels[~is_outlier].max()) / reach
    many = int(is_outlier.sum())
    indices = tuple(channels.argsort(descending=True)[: min(many, SHOWN)].tolist())
    ratio, share, places, token_rest = None, 0.0, Counter[int](), 1.0
    if tokens is not None and tokens.shape[1] > 1:
        is_outlier_token = tokens > limit * tokens.median().clamp_min(1e-30)
        ratio, share = float(tokens.max() / tokens.median().clamp_min(1e-30)), float(is_outlier_token.float().mean())
        places = Counter(is_outlier_token.nonzero()[:, 1].tolist())
        token_rest = float(tokens[~is_outlier_token].max()) / max(float(tokens.max()), 1e-30)
    positions = tuple(place for place, _ in places.most_common(SHOWN))
    return Outliers(site, reach, reach / median, many, indices, channel_rest, ratio, share, len(places), positions, token_rest)


def _activations(graph: Graph) -> list[str]:
    """The sites that an op with a weight or an addition reads."""
    weighted = {op.name for op in graph.ops if "weight" in op.operands or op.kind == "add"}
    return [
        s.name
        for s in graph.sites
        if s.role not in ("weight", "bias") and any(op in weighted and operand != "output" for op, operand in s.readers)
    ]


def _tokens_first(node: Node, batch: int | None) -> bool:
    """Whether a tensor is (tokens, batch, c), as in torch.nn.MultiheadAttention: the batch alone has no fixed size, or has the
    one that is written in the model.
    """
    sizes = shape_of(node)[:2]
    is_batch = [not isinstance(size, int) or size == batch for size in sizes]
    return is_batch == [False, True]


def _channels(graph: Graph, name: str) -> int | None:
    """The axis of the channels; None for other shapes than rows, tokens and maps."""
    node = next(n for n in graph.module.graph.nodes if n.name == graph.site(name).tensor)
    shape = tuple(node.meta["tensor_meta"].shape)
    linear = any(graph.op(op).kind == "linear" and operand == "input" for op, operand in graph.site(name).readers)
    return {2: 1, 3: 2, 4: -1 if linear else 1}.get(len(shape))
