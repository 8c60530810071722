"""Sweep: models × targets × recipes × bits from a TOML file, each a run of its own, on one page.

sweep   the rows as tasks, then one page of all
file    the TOML file
row     one row: its run, and what is said of it
"""

from fewbit.sweep.sweep import execute

__all__ = ["execute"]
