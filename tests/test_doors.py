"""The fast part of `make doors`, and its judge on endings that were made up: each that is wrong has a phrase of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from doors.case import Case, Right, done, refused
from doors.judge import Ended, judge

ROOT = Path(__file__).parent.parent
GOOD = "BadFile: x.toml does not exist. Give the path of a file."


def test_bad_inputs_at_every_door_are_answered_well() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))}
    words = [sys.executable, "-m", "doors", "--fast", "--every", "2"]
    tried = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert tried.returncode == 0, tried.stdout + tried.stderr


def ended(code: int | None = 2, err: str = GOOD, out: str = "", **more: object) -> Ended:
    return Ended(code, out, err, 0.1, **{"before": {}, "after": {}, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("end", "right", "says"),
    [
        (ended(), refused("x.toml"), ""),
        (ended(0, ""), done(), ""),
        (ended(1, "FewbitFailed: 3 codes differ; make the run again."), Right((1, 2)), ""),
        (
            ended(2, "Usage: fewbit\nTry 'fewbit --help' for help.\n╭─ Error ─╮\n│ No such option: --x │\n╰─╯"),
            refused("--x"),
            "",
        ),
        (ended(None), refused(), "did not end"),
        (ended(0, ""), refused(), "exit code 0"),
        (ended(), done(), "exit code 2"),
        (ended(-6, ""), refused(), "exit code -6"),
        (ended(2, "Traceback (most recent call last):\nValueError: x"), refused(), "traceback"),
        (ended(2, GOOD + "\n" + GOOD), refused(), "2 messages"),
        (ended(2, ""), refused(), "0 messages"),
        (ended(2, "BadFile: x.toml is broken."), refused("x.toml"), "what to type next"),
        (ended(2, GOOD), refused("y.toml"), "does not name y.toml"),
        (ended(2, GOOD), refused(("y.toml", "X.TOML")), ""),
        (ended(2, GOOD + " more" * 200), refused(), "characters"),
        (ended(2, "BadFile: give <class 'int'>."), refused(), "value of Python"),
        (ended(2, GOOD + "\x1b[31m"), refused(), "control character"),
        (ended(2, "/x.py:3: UserWarning: no\n" + GOOD), refused(), "library speaks"),
        (ended(0, GOOD), done(), "exit code 0 with an error"),
        (ended(0, ""), done(lambda folder: "no points"), "no points"),
        (ended(litter=("x",)), refused(), "temporary folder"),
        (ended(after={"out.part": (1,)}), refused(), "left or changed by a refusal: out.part"),
        (ended(before={"thesis.txt": (1,)}), refused(), "deleted by a refusal: thesis.txt"),
        (ended(before={"a": (1,)}, after={"a": (2,)}), refused(), "left or changed"),
    ],
)
def test_the_judge_says_what_is_wrong(end: Ended, right: Right, says: str, tmp_path: Path) -> None:
    wrong = judge(Case("x", ("x",), right), end, tmp_path)
    assert says in wrong
    assert bool(says) == bool(wrong)


def test_code_that_ran_is_seen_whatever_else_is_right(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    assert "code of the input ran" in judge(Case("x", ("x",), refused()), ended(), tmp_path)
