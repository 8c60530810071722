"""Whether `--memory` is likely to be enough for a model and a recipe."""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram

from fewbit.choose import Recipe
from fewbit.choose.recipe import Solves
from fewbit.core.graph import Graph
from fewbit.core.limit import needed, parse, shown
from fewbit.errors import FewbitError


def check_memory_limit(limit: str | None, program: ExportedProgram, graph: Graph, recipe: Recipe) -> None:
    """Raise FewbitError that names the smallest limit that is likely to work, where the one given is below it."""
    if limit is None:
        return
    weights = sum(t.numel() * t.itemsize for t in program.state_dict.values() if isinstance(t, Tensor))
    solved = [one.widest(graph) for one in recipe.passes if isinstance(one, Solves)]
    widest = max(solved, default=0)
    least = needed(weights, widest)
    if parse(limit) < least:
        layer = f" and {widest:,} inputs to a layer at a time" if solved else ""
        raise FewbitError(
            f"--memory {limit} is too small: a model with {weights / 1e6:,.0f} MB of float weights{layer} takes about "
            f"{shown(least)}; type --memory {shown(least)}."
        )
