"""What the terminal is told. Oracles: the text itself; exit codes of processes that really get a signal or a full device."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewbit.cli.answers import show_answers
from fewbit.cli.ending import ending
from fewbit.cli.table import Table
from fewbit.cli.terminal import Terminal, escape_what_is_lacking, plain
from fewbit.errors import BadFile
from fewbit.progress import Lines

NAME = "[/b][red]a\x1b[31m\x07\u202e:smile:\udcff\x9b2J"
SHOWN = "[/b][red]a\\x1b[31m\\x07\\u202e:smile:\\udcff\\x9b2J"


def test_a_name_is_shown_as_it_is_and_never_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.width = 200
    table = Table(NAME, title=NAME)
    table.add_row(NAME)
    terminal.print(NAME)
    terminal.print(table)
    text = capsys.readouterr().out
    assert text.count(SHOWN) == 4
    assert all(char.isprintable() or char == "\n" for char in text)
    assert plain("blocks.0.fc1:weight, größer\n") == "blocks.0.fc1:weight, größer\n"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_figures_stay_whole_in_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the words themselves. Names longer than the screen go on in the next line."""
    heads = ("", "float", "quantized", "change", "agreement", "95 % interval", "path")
    rows = [("onnxruntime", "81.25 %", "80.47 %", "-0.78", "99.31 %", "-2.04 to +0.48", "a" * 70 + f".{i}") for i in (1, 2)]
    table = Table(*heads, title="runs")
    for row in rows:
        table.add_row(*row)
    terminal = Terminal()
    terminal.width = width
    terminal.print(table)
    text = capsys.readouterr().out
    found = re.sub(r"[\s─-╿]+", " ", text).split()
    for word in itertools.chain(*(cell.split() for row in rows for cell in row[1:-1])):
        assert found.count(word) >= 2, word
    assert "…" not in text
    assert text.count("a") >= 140
    assert max(map(len, text.splitlines())) <= width
    assert ("─" in text) == (width >= 80)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_a_stream_lacks_are_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Python's own escapes, and rows of a table that are all as wide."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    name, wanted = "ğ é –", "ğ é –".encode(encoding, "backslashreplace").decode(encoding)
    table = Table("", "")
    table.add_row("flat", "b" * 200)
    table.add_row(name, "a")
    terminal = Terminal()
    terminal.width = 60

    @ending()
    def work() -> None:
        terminal.print(table)
        sys.stdout.write(f"{name}\n")
        raise BadFile(f"{name} is broken.")

    with pytest.raises(SystemExit):
        work()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]
    *rows, last = out.splitlines()
    assert last == wanted
    assert sum(wanted in row for row in rows) == 1
    assert len({len(row) for row in rows}) == 1
    assert err == f"BadFile: {wanted} is broken.\n"


@pytest.mark.parametrize("words", [["quantize", "--help"], ["show", "飞机"], ["show", "飞机\udcff", "--飞机"], ["飞机"]])
def test_no_command_ends_in_a_traceback_where_there_is_ascii_alone(words: list[str]) -> None:
    streams = {"PYTHONIOENCODING": "ascii:strict", "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-m", "fewbit", *words], capture_output=True, env=os.environ | streams)
    said = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in said, said
    assert (done.returncode, "\\u98de" in said) == ((0, False) if "--help" in words else (2, True)), said


def test_a_missed_goal_is_the_first_that_the_terminal_says_of_what_is_not_as_requested(capsys) -> None:
    about = {"model": "m", "target": "t", "recipe": "mse", "bits": "w8a8", "integer_share": 0.5}
    show_answers({**about, "missed": ["accuracy fell by 7.23 points; --max-drop allows 1."]})
    said = " ".join(cell.strip() for line in capsys.readouterr().out.splitlines() for cell in line.split("│")[2:3])
    assert "not kept: 1 missed goal accuracy fell by 7.23 points; --max-drop allows 1. 50.00 % of the multiply" in said
    show_answers(about)
    assert "missed" not in capsys.readouterr().out


ACT = """
import os, signal, sys, time
from fewbit.cli import app
from fewbit.cli.app import command
from fewbit.cli.terminal import out
from fewbit.errors import BadFile

@command
def act(how: str) -> None:
    if how.isdigit():
        os.kill(os.getpid(), int(how))
        time.sleep(10)
    if how == "swallowed":
        sys.modules["fewbit.cli.ending"].AGAIN = 0.05
        try:
            os.kill(os.getpid(), 2)
        except:
            pass
        time.sleep(10)
    if how == "child":
        import multiprocessing
        fork = multiprocessing.get_context("fork")
        begun = fork.Event()  # a fork forgets the signals that come before Python knows of it
        child = fork.Process(target=lambda: (begun.set(), time.sleep(30)))
        child.start()
        begun.wait()
        child.terminate()
        child.join()
        raise BadFile(f"the child ended with {child.exitcode}.")
    if how == "memory":
        try:
            raise MemoryError("Unable to allocate 8 GiB")
        except MemoryError as error:
            raise BadFile("x is broken") from error
    if how == "print":
        out.print("x" * 1_000_000, soft_wrap=True)
    if how == "open":
        open("/nowhere/x")
    if how == "note":
        error = BadFile("x [/b] is broken.")
        error.add_note("run.part keeps what is done.")
        raise error
    1 / 0

app(["act", sys.argv[1]])
"""


def _heard() -> None:
    """A process that is started in the background ignores these, and what it starts does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("15", 143, "Ended by SIGTERM."),
        ("1", 129, "Ended by SIGHUP."),
        ("2", 130, "Interrupted."),
        ("swallowed", 130, "Interrupted."),
        ("child", 2, "BadFile: the child ended with"),
        ("memory", 2, "Stopped: there is not enough memory (MemoryError: Unable to allocate 8 GiB)"),
        ("print > /dev/full", 2, "Stopped: standard output cannot be written: No space left on device."),
        ("open", 2, "Stopped: /nowhere/x: No such file or directory."),
        ("note", 2, "BadFile: x [/b] is broken. run.part keeps what is done."),
        ("bug", 1, "Traceback"),
    ],
)
def test_what_ends_a_command_is_one_line_and_an_exit_code(how: str, code: int, says: str) -> None:
    words = ["bash", "-c", f'"$0" -c "$1" {how}; exit "${{PIPESTATUS[0]}}"', sys.executable, ACT]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=_heard)
    assert done.returncode == code, done.stderr
    if says == "Traceback":
        assert says in done.stderr
    else:
        assert done.stderr.strip().splitlines() == [next(line for line in done.stderr.splitlines() if line.startswith(says))]


def test_without_a_terminal_each_stage_says_its_time_and_a_long_one_that_it_lives(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Lines(every=0.05)
    with progress.stage("load"):
        pass
    with progress.stage("observe"):
        progress.expect(12)
        progress.advance(5)
        time.sleep(0.2)
    with pytest.raises(ZeroDivisionError), progress.stage("choose"):
        raise ZeroDivisionError
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[1]) == ("load: 0.0 s", "observe: 0 s so far, 5 of 12")
    assert lines[-2].startswith("observe: 0.")
    assert lines[-1] == "choose: 0.0 s (not finished)"


def test_interrupted_while_it_is_imported_it_says_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "fewbit", "targets"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": _first(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_help_that_cannot_be_printed_says_one_line() -> None:
    done = subprocess.run(["bash", "-c", '"$0" -m fewbit --help > /dev/full', sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "Stopped: the disk is full. Free some space.\n")


def test_a_name_with_a_line_break_makes_no_second_line() -> None:
    done = subprocess.run([sys.executable, "-m", "fewbit", "verify", "a\nBadFile: b"], capture_output=True, text=True)
    assert done.stderr.startswith("BadFile: a\\nBadFile: b is not a folder")
    assert done.stderr.count("\n") == 1


def _first(folder: Path) -> str:
    """A folder in front of where modules are looked for."""
    return os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))


def test_a_pipe_in_the_place_of_a_file_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell or a harness puts it there, once Python has opened the file."""
    read, write = os.pipe()
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        stream.write("a")
        stream.flush()
        os.dup2(write, stream.fileno())
        monkeypatch.setattr(sys, "stdout", stream)
        escape_what_is_lacking()
        stream.write("b")
        stream.flush()
        assert os.read(read, 9) == b"b"
    os.close(read), os.close(write)
