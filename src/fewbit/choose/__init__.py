"""Choose: a grid, a step and, for weights, the codes of every site. The slots of a recipe, in order."""

from fewbit.choose.bits import Bits, Mixed, parse_bits
from fewbit.choose.bits.mixed import Allocation, allocate
from fewbit.choose.choose import choose
from fewbit.choose.finetune import Lot, finetune
from fewbit.choose.lapq import lapq
from fewbit.choose.rebuild import reconstruct

__all__ = ["Allocation", "Bits", "Lot", "Mixed", "allocate", "choose", "finetune", "lapq", "parse_bits", "reconstruct"]
