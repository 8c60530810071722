"""Targets: hardware and runtime as data, and the one function that decides what is legal."""

from fewbit.target.legal import Legal, legal, rule_of, widest
from fewbit.target.spec import Target, detect, load_target, target_names

__all__ = ["Legal", "Target", "detect", "legal", "load_target", "rule_of", "target_names", "widest"]
