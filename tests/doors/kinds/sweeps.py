"""Sweeps: files that are broken or name what there is not, folders in the way, workers that are nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, done, refused
from fewbit.errors import BadFile
from fewbit.files import read_json
from fewbit.folder import checked

TEXT = """
models = [{model = "net.py:model", images = "flat"}]
targets = ["ort-x86-vnni", "ort-x86-w4"]
bits = [8, 4]
[options]
labels = false
calibration = 4
seconds = 0.01
"""
COMMAND = ("sweep", "sweep.toml", "--out", "out")
FILES = {  # what is wrong -> the text, and words of the message
    "an empty file": ("", "models"),
    "no list": ('models = "demo"', "models"),
    "an empty list": ("models = []", "models"),
    "a list of lists": ('models = [["demo"]]', "models"),
    "a cut file": (TEXT[:30], "TOML"),
    "bytes": ("\udcff\udcfe", "TOML"),
    "deep": ("models = " + "[" * 5000, "TOML"),
    "a key twice": (TEXT + "calibration = 5\n", "TOML"),
    "an unknown key": ("colour = 1\n" + TEXT, "colour"),
    "an unknown option": (TEXT + "colour = 1\n", "colour"),
    "an option that is not a list of its own": (TEXT + 'bits = "8"\n', "bits"),
    "an option out of its limits": (TEXT + "seed = -1\n", "--seed"),
    "a number that is none": (TEXT + "max_drop = nan\n", "--max-drop"),
    "a date": (TEXT + "time = 2020-01-01\n", "--time"),
    "an unknown target": (TEXT.replace("ort-x86-w4", "ort-x86-w5"), "ort-x86-w5"),
    "an unknown recipe": ('recipes = ["mse", "nope"]\n' + TEXT, "nope"),
    "a width that nobody has": (TEXT.replace("[8, 4]", "[8, 4, 33]"), "33"),
    "a model that is nowhere": ('models = ["nowhere.onnx"]', "nowhere.onnx"),
    "a model without a name": ('models = [{images = "flat"}]', "no name"),
    "images that are nowhere": (TEXT.replace("flat", "nowhere"), "nowhere"),
    "one model twice": ('models = ["demo", "demo"]', "twice"),
    "too many rows": (f'models = ["demo"]\nbits = {[8] * 400}\nrecipes = {["mse"] * 400}', "160,000"),
    "a name that escapes": ('models = ["../../etc/passwd.onnx"]', "passwd.onnx"),
    "a name with an escape sequence": ('models = ["\\u001b[2J"]', "model"),
}
NO_RAY = ("not installed", "no cluster of Ray", "cannot be started")


def cases() -> Iterator[Case]:
    for name, (text, word) in FILES.items():
        yield Case(f"sweep of {name}", COMMAND, refused(word), before=_text(text), fast=name in ("no list", "an unknown key"))
    for file in ("nope.toml", "flat", "", "/dev/null"):
        yield Case(f"sweep {file!r}", ("sweep", file, "--out", "out"), refused((file or "empty", "models")))
    for flag, value, word in (
        ("--workers", "0", "--workers"), ("--workers", "-1", "--workers"), ("--workers", "many", "--workers"),
        ("--ray", "", "--ray"), ("--ray", "nowhere", "--ray"), ("--ray", "127.0.0.1:0", "--ray"),
        ("--ray", "127.0.0.1:9", NO_RAY),
    ):  # fmt: skip
        yield Case(f"sweep {flag} {value!r}", (*COMMAND, flag, value), refused(word), before=_text(TEXT))
    yield Case(
        "sweep --workers with --ray", (*COMMAND, "--workers", "2", "--ray", "auto"), refused("leave"), before=_text(TEXT)
    )
    for out in ("flat", "net.py", "/dev/null", "."):
        yield Case(f"sweep --out {out}", ("sweep", "sweep.toml", "--out", out), refused(out), before=_text(TEXT))
    yield Case("sweep", COMMAND, done(_has_rows), before=_text(TEXT), seconds=120)


def _text(text: str) -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        (folder / "sweep.toml").write_bytes(text.encode(errors="surrogateescape"))

    return put


def _has_rows(folder: Path) -> str:
    """What is wrong with a finished sweep."""
    try:
        checked(folder / "out", "sweep")
    except BadFile as error:
        return str(error)
    ends = [row["end"] for row in read_json(folder / "out" / "report.json")["rows"]]
    return "" if ends == ["right", "right", "refused", "right"] else f"rows ended {ends}"
