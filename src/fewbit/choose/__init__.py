"""Choose: a grid, a step and, for weights, the codes of every site. The slots of a recipe, in order."""

from fewbit.choose.bits import Bits, parse_bits
from fewbit.choose.choose import choose

__all__ = ["Bits", "choose", "parse_bits"]
