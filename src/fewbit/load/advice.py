"""What to type where a model cannot be run with the inputs that it is given: one that is missing, or is without a batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import nn

from fewbit.core.inputs import Input
from fewbit.errors import BadModel
from fewbit.load.export import ADVICE
from fewbit.load.inputs import about_flag, is_flag

NEEDS = re.compile(r"\b(specify|provide[ds]?|pass|require[ds]?|needs?|needed|must|missing|expected)\b", re.IGNORECASE)
SHOWN = 8  # numbers of a list in a message


def about_inputs(error: BadModel, module: nn.Module, inputs: Sequence[Input]) -> BadModel | None:
    """The error of a module that cannot be exported, with what to do about its inputs; None where nothing is known."""
    if "cannot be exported" not in str(error):
        return None
    return _about_needed(error, module, inputs) or _about_numbers(error, inputs)


def _about_needed(error: BadModel, module: nn.Module, inputs: Sequence[Input]) -> BadModel | None:
    """The error of a model that says, as it runs, that it needs an argument that nothing is given for, with what to type."""
    said = str(error.__cause__)
    if not NEEDS.search(said):
        return None
    given = {one.name.partition(".")[0] for one in inputs}
    named = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is None]
    found = {name: place.start() for name in named if name not in given and (place := re.search(rf"\b{name}\b", said))}
    if not found:
        return None
    name = min(found, key=lambda one: found[one])
    return _with_advice(
        error,
        f"Give it: --input {name}=VALUE, where VALUE is a .npy file or a list of numbers with the batch in front, as "
        f"[[2, 5, 7]] (in Python inputs={{'{name}': ...}}).",
    )


def _about_numbers(error: BadModel, inputs: Sequence[Input]) -> BadModel | None:
    """The error of a model that cannot be run, with what may be wrong with inputs that are given one number or a flat list."""
    short = {one.name: one.value for one in inputs if one.value is not None and one.value.ndim < 2 and not one.each}
    numbers, lists = [n for n in short if not short[n].ndim], [n for n in short if short[n].ndim]
    if not short:
        return None
    if flag := next((one for one in inputs if is_flag(one.value)), None):
        assert flag.value is not None
        return BadModel(f"{error} Perhaps {about_flag(flag.name, flag.value)}")
    said = list[str]()
    if numbers:
        typed = f"--input {numbers[0]}=[NUMBER] (in Python inputs={{'{numbers[0]}': [NUMBER]}})"
        said.append(f"Input {' and '.join(numbers)} is given a number without a batch; give one for each image: {typed}.")
    if lists:
        shown = [*map(str, short[lists[0]][:SHOWN].tolist()), *["..."] * (len(short[lists[0]]) > SHOWN)]
        value = f"[[{','.join(shown)}]]"
        typed = f"--input {lists[0]}={value} (in Python inputs={{'{lists[0]}': {value}}})"
        said.append(f"Input {' and '.join(lists)} is given a flat list; where it needs a list for each image: {typed}.")
    return _with_advice(error, " ".join(said))


def _with_advice(error: BadModel, advice: str) -> BadModel:
    """The error with better advice in front of what is said where nothing is known."""
    before, usual, after = str(error).partition(ADVICE)
    return BadModel(f"{before.rstrip()} {advice}{f' Or: {usual}{after}' if usual else ''}")
