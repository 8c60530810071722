"""Lint: which nodes of any Q/DQ file run in integers on a target, and how the installed runtimes really run them."""

from fewbit.lint.lint import Lint, Row, disagreements, lint
from fewbit.lint.truth import Ran, truth

__all__ = ["Lint", "Ran", "Row", "disagreements", "lint", "truth"]
