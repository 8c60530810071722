"""What every pass may read: the graph, its statistics, the target, the calibration images, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewbit.choose.parts import apart, joined
from fewbit.core.bits import Bits
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, count
from fewbit.core.plan import Plan
from fewbit.core.shelf import Rebatched, Shelf, count_of
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.samples import ROWS, ChannelSample, OpSample, PairSample, channel_samples, op_samples
from fewbit.files import Journal
from fewbit.observe.stats import Stats
from fewbit.target.allowed import Allowed, allowed
from fewbit.target.spec import Target
from fewbit.workers import LOCAL, Workers

BATCH = 8  # images of a batch that a stream carries
MEMORY = 1 << 30  # bytes of the largest tensor of all images together
EIGHTH = 8  # one of so many images is set aside for a recipe that judges what it has learned
LEAST = 4  # batches that are used whatever their size


def quiet(text: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, c, h, w) and their classes (n,), or None where only the float model's answers are known."""

    images: Shelf
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.images.firsts[-1]


@dataclass(frozen=True)
class Context:
    """What passes work on. `images` are the calibration batches (b, c, h, w), equally long but for the last, `labels` (n,)
    their classes where known.

    `aside` are images to judge by what a pass has learned, which no pass looks at otherwise. `synthetic` are additional images
    for a pass that trains; `real_images` says whether `images` are photographs. `sampled` are samples drawn earlier (None:
    drawn when a pass needs them). `slower` are ops that stay float for the time that they would lose in integers, and why.
    `journal` and `folder` store results, so that a killed run can continue, and values of all images lie in `folder` meanwhile.
    `workers` do what does not depend on each other.
    """

    graph: Graph
    stats: Stats
    target: Target
    bits: Bits = Bits()
    images: Sequence[Batch] = ()
    labels: Tensor | None = None
    aside: Sequence[Batch] = ()
    synthetic: LabelledImages | None = None
    real_images: bool = True
    keep_float: tuple[str, ...] = ()
    float_by_limit: tuple[str, ...] = ()
    everything: bool = False
    slower: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    folder: Path | None = None
    sampled: Mapping[str, OpSample | PairSample] | None = None
    progress: Callable[[str], None] = quiet
    workers: Workers = LOCAL

    @cached_property
    def widths(self) -> Bits:
        """The bits with their exceptions resolved to ops of the graph."""
        return self.bits.of(self.graph)

    @cached_property
    def allowed(self) -> Allowed:
        """What the target allows for these bits; concatenations of parts that one step would ruin stay float where they can."""
        kept: dict[str, str] = {}
        while True:
            answer = allowed(
                self.graph, self.target, weight_bits=self.widths.weights, activation_bits=self.widths.activations,
                widths=self.widths.ops, keep_float=self.exemptions, everything=self.everything,
                slower=self.slower, apart=kept, because=self._because,
            )  # fmt: skip
            more = apart(self.graph, self.target, answer, self.stats)
            if not more:
                warned = joined(self.graph, self.target, answer, self.stats)
                return replace(answer, fallbacks=(*answer.fallbacks, *warned))
            kept |= more  # what followed one of them is looked at again

    @property
    def exemptions(self) -> tuple[str, ...]:
        """Patterns of what stays float on request, or by the limit of the drop (`float_by_limit`)."""
        return (*self.keep_float, *self.widths.floats)

    @property
    def _because(self) -> dict[str, str]:
        """Why a pattern of `exemptions` stays float, where it is not by --keep-float."""
        by_bits = dict.fromkeys(self.widths.floats, "kept float on request (--bits)")
        return {**by_bits, **dict.fromkeys(self.float_by_limit, "in float by --max-drop")}

    @property
    def count(self) -> int:
        """How many calibration images there are."""
        return count_of(self.images)

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """The calibration images in small batches. Raises BadImages without any."""
        self.need_images()
        return self.batched(BATCH)

    def batched(self, most: int, count: int | None = None) -> Sequence[Tensor]:
        """The calibration images, or about `count` of them, in batches of at most `most`, or as the model takes them."""
        size = self.graph.at_a_time(most)
        if self.graph.batch is None:
            return Rebatched(self.images, size, count)
        return Rebatched(self.images, size, None if count is None else max(count - count % size, size))

    @cached_property
    def samples(self) -> Mapping[str, OpSample | PairSample]:
        """What single ops read in the float graph, a part of it, on all calibration images."""
        if self.sampled is not None:
            return self.sampled
        rows = max(1, ROWS // max(self.count, 1))
        return op_samples(self.graph, self.batches, [op.name for op in self.graph.ops], rows, self.seed)

    @cached_property
    def channels(self) -> Mapping[str, ChannelSample]:
        """Values by channel of each activation for which the target has a scale for each channel."""
        axes = self.allowed.channel_axes
        if not axes:
            return {}
        return channel_samples(self.graph, self.batches, axes, max(1, ROWS // max(self.count, 1)), self.seed)

    @property
    def label(self) -> str:
        """How `--bits` reads in the plan."""
        bits, slots = self.widths, self.allowed.sites
        weights_alone = bool(slots) and all(self.graph.site(name).role == "weight" for name in slots)
        if not bits.asked and not bits.exceptions and weights_alone:
            bits = replace(bits, asked=f"w{bits.weights}")
        return str(bits)

    def start(self, settings: str = "") -> Plan:
        """The plan before the first pass: what runs in integers, and what cannot."""
        answer = self.allowed
        return Plan(
            self.target.name, self.name or settings, self.label, {}, answer.integer_ops, answer.fallbacks, self.exemptions,
            settings=settings,
        )  # fmt: skip

    def need_images(self) -> None:
        """Raise BadImages where there are no calibration images."""
        if not self.images:
            raise BadImages(f"recipe {self.name or '?'} needs calibration images; a few dozen are needed: --images DIR.")

    def need_samples(self) -> None:
        """Raise BadImages where there are neither samples nor images to draw them from."""
        if self.sampled is None:
            self.need_images()

    def refuse_channel_scales(self, method: object) -> None:
        """Raise FewbitError for a pass that moves one scale where the target has one for each channel of an activation."""
        if self.allowed.channel_axes:
            raise FewbitError(
                f"recipe {self.name or method!r} searches one scale for an activation and {self.target.name} has one for each "
                "channel; give another target, or --recipe minmax, percentile, mse, kl or aciq."
            )

    def refuse_fixed_batch(self, method: object) -> None:
        """Raise FewbitError for a pass that draws batches of its own where one is written in the model itself."""
        sources = zip(self.graph.module.graph.find_nodes(op="placeholder"), self.graph.inputs, strict=True)
        image = next(node for node, one in sources if one.is_image)
        if isinstance(image.meta["val"].shape[0], int):
            raise FewbitError(
                f"recipe {self.name or method!r} trains on batches that it draws, and the model takes {self.graph.batch} at a "
                "time and no other; give a model whose batch is free, or --recipe mse or fast."
            )

    def refuse_groups(self, method: object) -> None:
        """Raise FewbitError for a pass that moves one scale for a row of weights where the target has one for each group."""
        if any(grid.group_size for grid in self.allowed.grids.values()):
            raise FewbitError(
                f"recipe {self.name or method!r} moves one scale for a row of weights and {self.target.name} has one for each "
                "group; give another target, or --recipe minmax, mse or fast."
            )


def set_aside(count: int) -> int:
    """How many of the calibration images judge what is learned from the others; none where there are too few."""
    return count // EIGHTH if count >= 2 * EIGHTH else 0


def counts_of(graph: Graph) -> list[int]:
    """How many numbers each value of a graph has for one image."""
    metas = [node.meta.get("tensor_meta") for node in graph.module.graph.nodes if node.op == "call_function"]
    return [torch.Size(meta.shape).numel() for meta in metas if hasattr(meta, "shape")]


def few_enough(graph: Graph, batches: Sequence[Batch]) -> Sequence[Batch]:
    """As many of the images as keep the largest tensor of all of them within `MEMORY`, evenly spread; four batches at least."""
    largest = max(counts_of(graph), default=1)
    whole, size = count_of(batches), count(batches[0])
    fitting = max(MEMORY // (4 * largest), LEAST * size)
    return Rebatched(batches, size, whole if whole <= fitting else fitting // size * size)
