"""A recipe: how each slot of choose is filled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.correct import LayerOutput, OutputBias, WeightMean
from fewbit.choose.distill import Distill
from fewbit.choose.gptq import Gptq
from fewbit.choose.module_search import ModuleSearch
from fewbit.choose.nearest import Nearest
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.powell import JointSearch
from fewbit.choose.ranges import MinMax, RangeMethod
from fewbit.choose.sensitivity import Measure, OutputKL
from fewbit.choose.soft_codes import Reconstruct
from fewbit.equalize import Equalize


@dataclass(frozen=True)
class Recipe:
    """How each slot of choose is filled: ranges of activations and of weights, rounding of weights, and on the outputs of
    single ops a search of the steps and a correction of the biases (None: none). `sensitivity` is what mixed precision adds up.
    `module` searches the steps again, on the outputs of attention modules and MLPs, `joint` all of them on the model's loss;
    `tune` trains the weights behind them, `rebuild` learns their codes again unit by unit. `then` is a search in a second pass
    over the whole model; `channels` gives each channel a width of its own where the target can hold it. With `free_softmax` the
    step of probabilities is searched like any other where the target's own is mere custom. With `gradients` the range of an
    activation weighs each element by the square of the model's gradient there. `equalize` is the stage before choose, which
    moves ranges between tensors of the graph.

    A search takes linear layers, convolutions and products of two activations; whatever else is quantized has the ranges of
    `activations` and `weights`.
    """

    activations: RangeMethod = MinMax()
    weights: RangeMethod = MinMax()
    rounding: Nearest | Gptq = Nearest()
    about: str = ""
    search: OutputSearch | None = None
    correction: OutputBias | WeightMean | LayerOutput | None = None
    sensitivity: Measure = OutputKL()
    module: ModuleSearch | None = None
    then: OutputSearch | None = None
    channels: ChannelBits | None = None
    joint: JointSearch | None = None
    free_softmax: bool = False
    equalize: Equalize | None = None
    gradients: bool = False
    tune: Distill | None = None
    rebuild: Reconstruct | None = None

    def __post_init__(self) -> None:
        if isinstance(self.correction, LayerOutput) and not isinstance(self.rounding, Gptq):
            raise ValueError("correction on all rows comes with rounding on all rows: rounding=Gptq()")
        if self.channels is not None and (self.search is not None or self.module is not None):
            raise ValueError("widths of channels come with ranges; a search has one width for a tensor")

    @property
    def passes(self) -> tuple[Recipe, ...]:
        """The recipe of each pass over the model: one, or a second whose search starts at the weights of the first."""
        return (self,) if self.then is None else (self, replace(self, search=self.then, then=None))

    @property
    def sequential(self) -> bool:
        """Whether ops are searched and corrected on what the quantized model gives them."""
        return isinstance(self.rounding, Gptq) or (self.search is not None and self.search.sequential)

    @property
    def needs_images(self) -> bool:
        """Whether choose runs parts of the model on calibration images."""
        return self.sequential or self.gradients or self.module is not None

    @property
    def is_plain(self) -> bool:
        """Whether ranges and rounding are all of it."""
        return not (self.needs_samples or self.needs_images or self.joint or self.tune or self.rebuild or self.channels)

    @property
    def needs_samples(self) -> bool:
        """Whether choose needs what single ops read (fewbit.execute.samples)."""
        return self.search is not None or isinstance(self.correction, OutputBias | WeightMean)
