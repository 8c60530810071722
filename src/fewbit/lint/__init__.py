"""Lint: which nodes of any Q/DQ file run in integers on a target, and what the runtimes that are here really do with them."""

from fewbit.lint.lint import Lint, Row, disagreements, lint
from fewbit.lint.truth import Ran, truth

__all__ = ["Lint", "Ran", "Row", "disagreements", "lint", "truth"]
