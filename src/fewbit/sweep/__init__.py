"""Sweep: models × targets × recipes × bits from a TOML file, each a run of its own, on one page."""

from fewbit.sweep.sweep import execute

__all__ = ["execute"]
