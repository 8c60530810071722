"""Choose: a grid, a scale and, for weights, the codes of every site, by the passes of a recipe in order."""

from fewbit.choose.allocate import Allocation, allocate
from fewbit.choose.choose import choose
from fewbit.choose.context import Context, LabelledImages
from fewbit.choose.recipe import Pass, Recipe
from fewbit.core.bits import Bits, Mixed, parse_bits

__all__ = ["Allocation", "Bits", "Context", "LabelledImages", "Mixed", "Pass", "Recipe", "allocate", "choose", "parse_bits"]
