"""Oracle: identity. A plan decides bit for bit what it decided before: every recipe, on three nets and a few targets.

plans.json pins two hashes of each case, `structure` and `numbers` (replay/plans.py says what is in them), each with four digits
for every site, so that a failure can say where it begins. Structure is checked everywhere. The order of float sums is that of a
processor's kernels, so numbers are kept by processor and skipped where there are none for it. Where a case cannot be, the name
of the error is pinned.

    FEWBIT_REPLAY=write pytest tests/replay -m "slow or not slow"

writes what is decided now into plans.json. A case that has changed loses the numbers of other processors.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from bench.ablations import ABLATIONS

from fewbit.core.plan import Bias
from replay.nets import NETS
from replay.plans import ERRORS, Rows, decisions, plan_of, processor

PINS = Path(__file__).with_name("plans.json")
WRITE = os.environ.get("FEWBIT_REPLAY") == "write"
DIGITS, SHORT = 16, 4  # of a hash, and of that of one row

ORT, MIXED = "4,first=8,last=8", "mixed:5:4,6"
FROM_IMAGES = ("fast", "fast-rotated", "best", "best-rotated", "blocks", "liu2021-module")  # which mixed bits do not give
UNMIXED = dict.fromkeys(FROM_IMAGES, "w4a8")

# Twice is enough for these: they learn, or vary a recipe that is there already.
VARIANTS = tuple(name for name in ABLATIONS if name.startswith("liu2021-"))
SLOW = ("best", "best-rotated", "blocks", "brecq", "qdrop", "lapq", "fdda-paper", "easyquant-onepass", *VARIANTS)


@dataclass(frozen=True)
class Asked:
    """What is asked of a target: bits, other bits for some recipes, which nets, and the recipes that are `slow` there."""

    bits: str
    own: Mapping[str, str] = field(default_factory=dict)
    everything: bool = False
    nets: tuple[str, ...] = tuple(NETS)
    slow: tuple[str, ...] = ()


TARGETS: Mapping[str, Asked] = {
    "ort-x86-vnni": Asked(ORT, everything=True),  # results and biases in integers, products of activations
    "openvino-x86": Asked(MIXED, UNMIXED, slow=SLOW),  # a width for each module
    "npu-int16": Asked("8", slow=SLOW),  # sums that narrow, additions with one step
    "ort-x86-channel": Asked("4", everything=True, slow=("kl", *SLOW)),  # a step and a width for each channel of an activation
    "ort-x86-block": Asked("w4a8", nets=("vit", "mixed"), slow=SLOW),  # a step for each block of a weight
    "ort-x86-avx2": Asked("8", slow=tuple(ABLATIONS)),  # pairs of products that saturate
}


@dataclass(frozen=True)
class Case:
    net: str
    target: str
    recipe: str

    def __str__(self) -> str:
        return f"{self.net} {self.target} {self.recipe}"

    def decided(self) -> tuple[Rows, Rows] | str:
        """Structure and numbers, or the name of the error."""
        asked = TARGETS[self.target]
        bits = asked.own.get(self.recipe, asked.bits)
        try:
            return decisions(*plan_of(self.net, self.target, self.recipe, bits, everything=asked.everything))
        except ERRORS as error:
            return type(error).__name__


CASES = [Case(net, target, recipe) for net in NETS for target in TARGETS for recipe in ABLATIONS if net in TARGETS[target].nets]


def pin_of(rows: Rows | str) -> str:
    """What is kept of rows: a hash of all, then the first digits of each; an error is its name."""
    if isinstance(rows, str):
        return rows
    whole = hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:DIGITS]
    return f"{whole} {''.join(digest[:SHORT] for _, digest in rows)}"


def change(rows: Rows | str, pinned: str) -> str | None:
    """What is not as it was pinned, None where nothing is."""
    found = pin_of(rows)
    if found == pinned:
        return None
    (whole, _, old), (_, _, new) = pinned.partition(" "), found.partition(" ")
    if isinstance(rows, str) or not old:
        return f"it was {'a plan' if old else whole}, and is {rows if isinstance(rows, str) else 'a plan'}"
    count = len(old) // SHORT
    for i, (name, _) in enumerate(rows):
        if old[i * SHORT : (i + 1) * SHORT] != new[i * SHORT : (i + 1) * SHORT]:
            return f"first at {name!r}, row {i} of {len(rows)} (pinned: {count})"
    if len(rows) < count:
        return f"the last {count - len(rows)} of {count} rows are gone, behind {rows[-1][0]!r}"
    return "in a name, or in digits that are not kept"


def written(pins: dict[str, Any], case: str, structure: str, numbers: str | None, key: str) -> None:
    """Put what is decided now into the pins. A case that has changed loses the numbers of other processors."""
    known = pins["numbers"].setdefault(key, {})
    if pins["structure"].get(case, structure) != structure or known.get(case, numbers) != numbers:
        for others in pins["numbers"].values():
            others.pop(case, None)
    pins["structure"][case] = structure
    if numbers is None:
        known.pop(case, None)
    else:
        known[case] = numbers


def write(case: Case, structure: str, numbers: str | None) -> None:
    """The same in the file, which the processes of pytest-xdist share; cases that are no more are left out."""
    with PINS.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        pins = json.loads(file.read() or '{"structure": {}, "numbers": {}}')
        written(pins, str(case), structure, numbers, processor())
        names = [str(case) for case in CASES]
        pins["structure"] = {name: pins["structure"][name] for name in names if name in pins["structure"]}
        kept = {key: {n: known[n] for n in names if n in known} for key, known in sorted(pins["numbers"].items())}
        pins["numbers"] = {key: known for key, known in kept.items() if known}
        file.truncate(0)
        file.write(json.dumps(pins, indent=0) + "\n")
        file.flush()


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """Sums of one thread have one order; shapes are checked in other tests, and here that would take most of the time."""
    threads, unchecked = torch.get_num_threads(), jaxtyping.config.jaxtyping_disable
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    torch.set_num_threads(threads)
    jaxtyping.config.update("jaxtyping_disable", unchecked)


@pytest.fixture(scope="module")
def pins() -> dict[str, Any]:
    if WRITE or not PINS.exists():
        return {"structure": {}, "numbers": {}}
    return json.loads(PINS.read_text(encoding="utf-8"))


def marked(case: Case) -> Any:
    slow = case.recipe in TARGETS[case.target].slow
    return pytest.param(case, id=str(case).replace(" ", "-"), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_plan_decides_what_it_decided(case: Case, pins: dict[str, Any]) -> None:
    decided = case.decided()
    structure, numbers = (decided, None) if isinstance(decided, str) else decided
    if WRITE:
        write(case, pin_of(structure), None if numbers is None else pin_of(numbers))
        return
    name, key = str(case), processor()
    assert name in pins["structure"], f"{name} is not pinned: {__doc__}"
    if (found := change(structure, pins["structure"][name])) is not None:
        pytest.fail(f"{name}: structure changed, {found}")
    if numbers is None:
        return
    if name not in pins["numbers"].get(key, {}):
        pytest.skip(f"{name}: structure is as it was; numbers are not pinned for {key}")
    if (found := change(numbers, pins["numbers"][key][name])) is not None:
        pytest.fail(f"{name}: numbers changed, {found}")


@pytest.mark.skipif(WRITE, reason="the pins are being written")
def test_all_cases_are_pinned_and_no_others(pins: dict[str, Any]) -> None:
    names = [str(case) for case in CASES]
    assert list(pins["structure"]) == names
    for key, known in pins["numbers"].items():
        assert set(known) <= {name for name in names if " " in pins["structure"][name]}, key


# The test of the test.


@pytest.fixture(scope="module")
def planned() -> tuple[Any, Any]:
    return plan_of("mixed", "ort-x86-vnni", "liu2021", ORT, everything=True)


def differing(planned: tuple[Any, Any], choice: Any) -> tuple[list[str], list[str]]:
    """The rows of structure and of numbers that another choice of one site changes."""
    graph, plan = planned
    changed = replace(plan, choices={**plan.choices, choice.site: choice})
    pairs = zip(decisions(graph, plan), decisions(graph, changed), strict=True)
    return tuple([a for a, b in zip(old, new, strict=True) if a != b] for old, new in pairs)


def test_one_code_one_step_and_one_grid_are_noticed_where_they_are(planned: tuple[Any, Any]) -> None:
    graph, plan = planned
    choice = next(c for c in plan.choices.values() if c.role == "weight")
    codes = choice.codes.clone()
    codes.view(-1)[0] += 1 if codes.view(-1)[0] < 0 else -1
    longer = replace(choice.qparams, scale=choice.qparams.scale * (1 + 2**-23))
    for other, expected in (
        (replace(choice, codes=codes), ([], [choice.site])),
        (replace(choice, qparams=longer), ([], [choice.site])),
        (replace(choice, grid=replace(choice.grid, narrow=not choice.grid.narrow)), ([choice.site], [])),
        (replace(choice, all_readers=not choice.all_readers), ([choice.site], [])),
        (replace(choice, codes=choice.codes.to(torch.int64), method="another", why="another"), ([], [])),
    ):
        assert tuple([name for name, _ in rows] for rows in differing(planned, other)) == expected
    structure, numbers = decisions(graph, plan)
    assert len({bias.integer is None for bias in plan.biases.values()}) == 2
    for op, bias in plan.biases.items():
        integer = bias.integer and replace(bias.integer, codes=bias.integer.codes + 1)
        moved = replace(plan, biases={**plan.biases, op: Bias(bias.real * (1 + 2**-23), integer)})
        assert decisions(graph, moved)[0] == structure
        changed = [a[0] for a, b in zip(numbers, decisions(graph, moved)[1], strict=True) if a != b]
        assert changed == [f"bias of {op}"]
    fewer = replace(plan, integer_ops=plan.integer_ops[1:], fallbacks=())
    assert next(a[0] for a, b in zip(structure, decisions(graph, fewer)[0], strict=True) if a != b) == "integer ops"


def test_a_failure_says_where_it_begins() -> None:
    rows = [("a", "1" * 64), ("b", "2" * 64), ("c", "3" * 64)]
    assert change(rows, pin_of(rows)) is None
    assert change([rows[0], ("b", "4" * 64), rows[2]], pin_of(rows)) == "first at 'b', row 1 of 3 (pinned: 3)"
    assert change([*rows, ("d", "4" * 64)], pin_of(rows)) == "first at 'd', row 3 of 4 (pinned: 3)"
    assert change(rows[:2], pin_of(rows)) == "the last 1 of 3 rows are gone, behind 'b'"
    assert change([rows[0], ("b", "2" * 63 + "4"), rows[2]], pin_of(rows)) == "in a name, or in digits that are not kept"
    assert change("FewbitError", pin_of(rows)) == "it was a plan, and is FewbitError"
    assert change(rows, "FewbitError") == "it was FewbitError, and is a plan"
    assert change("BadModel", "FewbitError") == "it was FewbitError, and is BadModel"


def test_a_changed_case_loses_the_numbers_of_other_processors() -> None:
    pins: dict[str, Any] = {"structure": {}, "numbers": {"other": {"a": "1 1", "b": "1 1"}}}
    for case in ("a", "b"):
        written(pins, case, "s s", "2 2", "here")
    assert pins["numbers"] == {"other": {"a": "1 1", "b": "1 1"}, "here": {"a": "2 2", "b": "2 2"}}
    written(pins, "a", "s s", "3 3", "here")
    written(pins, "b", "FewbitError", None, "here")
    assert pins == {"structure": {"a": "s s", "b": "FewbitError"}, "numbers": {"other": {}, "here": {"a": "3 3"}}}
