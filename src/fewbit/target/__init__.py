"""Targets: hardware and runtime as data, and the one function that decides what is allowed.

spec       what a target file may say; contradictions: what it may not say at once
load       a target by its name or its file, and which fits this machine
allowed    what a target allows for each op of a graph
grids      the grids of an op's operands
shapes     sizes for which a target has a kernel, and operands that share one scale
lines      where something stands in a target file, for messages
sums       widths for which no sum overflows its accumulator
versions   opsets and IR versions of files
"""

from fewbit.target.allowed import Allowed, allowed, rule_of, widest
from fewbit.target.load import absent, detect, load_target, processor_flags, target_names
from fewbit.target.spec import Target

__all__ = [
    "Allowed",
    "Target",
    "absent",
    "allowed",
    "detect",
    "load_target",
    "processor_flags",
    "rule_of",
    "target_names",
    "widest",
]
