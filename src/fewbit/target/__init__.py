"""Targets: hardware and runtime as data, and the one function that decides what is allowed."""

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
