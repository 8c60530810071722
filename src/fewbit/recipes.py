"""The recipes that have a name. A recipe is a value; a user's own is one as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.choose.rounding.nearest import Nearest
from fewbit.choose.scales.ranges import MinMax, MseRange, Percentile, RangeMethod
from fewbit.errors import UnknownName


@dataclass(frozen=True)
class Recipe:
    """How each slot of choose is filled: ranges of activations, ranges of weights, rounding of weights."""

    activations: RangeMethod = MinMax()
    weights: RangeMethod = MinMax()
    rounding: Nearest = Nearest()
    about: str = ""


RECIPES: Mapping[str, Recipe] = {
    "minmax": Recipe(about="the whole range that was seen"),
    "percentile": Recipe(Percentile(), MinMax(), about="99.99 % of the activations, all of the weights"),
    "mse": Recipe(MseRange(), MseRange(), about="the ranges with the smallest squared error of each tensor"),
}
DEFAULT = "mse"


def recipe_named(name: str) -> Recipe:
    """The recipe with a name. Raises UnknownName with near matches."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
