"""Apply the time, loss, iterations and bits of a request to its recipe and target. Raises FewbitError where they have none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewbit.core.duration import parse_time
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.choose import Bits, Mixed, Recipe
    from fewbit.request import Options
    from fewbit.target import Target

DEFAULT = "fast"  # recipe
ROTATED = 6  # bits of activations below which rotations bring something
LOSSES = ("kl", "labels")
OPTIONS = {"time": "seconds", "loss": "loss", "steps": "in_steps"}  # option -> the setting, or method, of a pass that has it


def configured(recipe: Recipe, request: Options) -> Recipe:
    """A recipe with the time, loss and iterations of a request in the passes that have them. Raises FewbitError where none has.

    With synthetic images `steps` are also the iterations of synthesis, and `loss` says whether real ones have labels.
    """
    if request.loss is not None and request.loss not in LOSSES:
        raise FewbitError(
            f"--loss {request.loss} is not understood; allowed are kl (against the float model's answers) and labels "
            "(cross-entropy)."
        )
    passes = recipe.passes
    for name, setting in OPTIONS.items():
        value = getattr(request, name)
        if value is None or (name == "time" and request.drops):  # that of the walk to a file
            continue
        able = [hasattr(one, setting) for one in passes]
        if not any(able) and not (request.synthetic[0] and name != "time"):
            also = "" if name == "time" else ", and --images synthetic"
            raise FewbitError(
                f"--{name} {value}: recipe {request.recipe_name} has none, these have: {_having(setting)}{also}; leave it out."
            )
        passes = tuple(_with(one, setting, value) if has else one for one, has in zip(passes, able, strict=True))
    return replace(recipe, passes=passes)


def _with(one: Any, setting: str, value: Any) -> Any:
    if setting == "in_steps":
        return one.in_steps(value)
    return replace(one, **{setting: parse_time(value) if setting == "seconds" else value})


def _having(setting: str) -> str:
    """The names of the recipes that have a pass with a setting or a method."""
    from fewbit.recipes import RECIPES

    return ", ".join(name for name, recipe in RECIPES.items() if any(hasattr(one, setting) for one in recipe.passes))


def refuse_curve(recipe: Recipe, name: str) -> None:
    """Raise FewbitError for a recipe that is too slow to run once for each point of a curve."""
    from fewbit.recipes import RECIPES

    def is_slow(recipe: Recipe) -> bool:
        return any(hasattr(one, setting) for one in recipe.passes for setting in ("seconds", "in_steps"))

    if is_slow(recipe):
        quick = ", ".join(name for name, other in RECIPES.items() if not is_slow(other))
        raise FewbitError(
            f"--curve runs the recipe again for every number of images, and recipe {name} is slow; use one of {quick}."
        )


def refuse_times(target: Target, flag: str) -> None:
    """Raise FewbitError for an option that needs milliseconds of the target's runtime where they cannot be measured."""
    from fewbit.target import absent

    if why := absent(target):
        raise FewbitError(
            f"{flag} needs milliseconds that are the target's, and {why}; leave it out, or give a --target of this machine: "
            "fewbit targets."
        )


def recipe_for(bits: Bits | Mixed) -> str:
    """The recipe where none was asked for: the best that takes about a minute, by bench/notes/accuracy-8-bits.md."""
    from fewbit.core.bits import Bits

    return "fast-rotated" if isinstance(bits, Bits) and bits.activations < ROTATED else DEFAULT


def default_bits(target: Target) -> int:
    """8, or the widest that the target has."""
    return min(8, _most(target))


def check_bits(target: Target, bits: Bits | Mixed) -> None:
    """Raise FewbitError where a uniform or a mean width is larger than any of the target."""
    from fewbit.choose import Bits

    most = _most(target)
    if not isinstance(bits, Bits) and bits.mean > most:
        raise FewbitError(
            f"--bits {bits}: {target.name} has no integers wider than {most} bits, and {bits.mean:g} on average would need "
            f"some; give mixed:{most} or less, or a target that has wider ones: fewbit targets."
        )
    if isinstance(bits, Bits) and bits.most > most:
        raise FewbitError(
            f"--bits {bits}: {target.name} has no integers wider than {most} bits; allowed are 2 to {most}, or a target that "
            "has wider ones: fewbit targets."
        )


def _most(target: Target) -> int:
    from fewbit.target import widest

    return max((widest(target, rule.kind) for rule in target.op), default=8)
