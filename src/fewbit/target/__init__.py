"""Targets: hardware and runtime as data, and the one function that decides what is allowed."""

from fewbit.target.allowed import Allowed, allowed, rule_of, widest
from fewbit.target.spec import Target, detect, load_target, target_names

__all__ = ["Allowed", "Target", "allowed", "detect", "load_target", "rule_of", "target_names", "widest"]
