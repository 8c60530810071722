"""The recipes that have a name. A recipe is a value; a user's own is one as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.choose.correct import OutputBias
from fewbit.choose.objectives import RankHinge
from fewbit.choose.rounding.nearest import Nearest
from fewbit.choose.scales.ranges import MinMax, MseRange, Percentile, RangeMethod
from fewbit.choose.scales.search import OutputSearch
from fewbit.errors import UnknownName


@dataclass(frozen=True)
class Recipe:
    """How each slot of choose is filled: ranges of activations and of weights, rounding of weights, and on the outputs of
    single ops a search of the steps and a correction of the biases (None: none).

    `search` takes linear layers and convolutions of one group; whatever else is quantized has the ranges of `activations`
    and `weights`.
    """

    activations: RangeMethod = MinMax()
    weights: RangeMethod = MinMax()
    rounding: Nearest = Nearest()
    about: str = ""
    search: OutputSearch | None = None
    correction: OutputBias | None = None

    @property
    def needs_samples(self) -> bool:
        """Whether choose needs what single ops read (fewbit.replay)."""
        return self.search is not None or self.correction is not None


RECIPES: Mapping[str, Recipe] = {
    "minmax": Recipe(about="the whole range that was seen"),
    "percentile": Recipe(Percentile(), MinMax(), about="99.99 % of the activations, all of the weights"),
    "mse": Recipe(MseRange(), MseRange(), about="the ranges with the smallest squared error of each tensor"),
    "liu2021-similarity": Recipe(about="steps searched for the correlation of each op's output", search=OutputSearch()),
    "liu2021-ranking": Recipe(
        about="the same, and queries and keys keep the order of attention scores", search=OutputSearch(ranking=RankHinge())
    ),
    "liu2021-bias": Recipe(
        about="similarity, and the mean error of each channel taken out of its bias",
        search=OutputSearch(),
        correction=OutputBias(),
    ),
    "liu2021": Recipe(
        about="Liu et al. 2021 without mixed precision: similarity, ranking and bias",
        search=OutputSearch(ranking=RankHinge()),
        correction=OutputBias(),
    ),
}
DEFAULT = "mse"


def recipe_named(name: str) -> Recipe:
    """The recipe with a name. Raises UnknownName with near matches."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
