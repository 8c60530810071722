"""Choose: a grid, a step and, for weights, the codes of every site. The slots of a recipe, in order."""

from fewbit.choose.allocate import Allocation, allocate
from fewbit.choose.choose import choose
from fewbit.choose.finetune import LabelledImages, finetune
from fewbit.choose.joint_search import lapq
from fewbit.choose.reconstruct import reconstruct
from fewbit.core.bits import Bits, Mixed, parse_bits

__all__ = [
    "Allocation",
    "Bits",
    "LabelledImages",
    "Mixed",
    "allocate",
    "choose",
    "finetune",
    "lapq",
    "parse_bits",
    "reconstruct",
]
