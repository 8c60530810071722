"""The folder of a run. Oracles: the folder itself, byte by byte, before and after; processes that are really killed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.errors import BadFile, BadImages, Fault, FewbitFailed, Stopped, stopped
from fewbit.files import read_json, write_json, write_stream
from fewbit.folder import Workplace, check_beside, checked, scratch, seal

RUN = {"plan.json": b'{"choices": []}\n', "model.onnx": bytes(range(256)), "deep/er.json": b"[]"}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def finished(folder: Path) -> Path:
    """A folder as a run leaves it."""
    for name, content in RUN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_json(folder / "run.json", {"command": "fewbit quantize", "seed": 0, "preprocess": {"mean": [0.5, 0.25]}})
    seal(folder)
    return folder


def test_what_was_sealed_is_read_back_and_a_part_can_be_sealed_again(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    record = checked(run)
    assert (record["seed"], list(record["files"])) == (0, ["deep/er.json", "model.onnx", "plan.json"])
    (run / "plan.json").write_bytes(b"{}")
    (run / "model.onnx").write_bytes(b"")
    seal(run, only=("plan.json",))
    with pytest.raises(BadFile, match=r"run/model\.onnx: changed after fewbit wrote it"):
        checked(run)


@pytest.mark.parametrize("name", ["run.json", *RUN])
def test_one_changed_bit_anywhere_is_caught_and_its_file_is_named(tmp_path: Path, name: str) -> None:
    path = finished(tmp_path / "run") / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(BadFile, match=name):
            checked(tmp_path / "run")
    path.write_bytes(whole)
    checked(tmp_path / "run")


MALFORMED = [
    "{}",
    "[]",
    "null",
    "3",
    '"text"',
    "",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"digest": 1, "files": []}',
    "NaN",
    "\xff",
]


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_file_is_one_message(tmp_path: Path, name: str, text: str) -> None:
    (finished(tmp_path / "run") / name).write_text(text, encoding="latin-1")
    with pytest.raises(BadFile, match=name):
        checked(tmp_path / "run")


@pytest.mark.parametrize("change", ["dropped", "added", "renamed", "retyped", "reordered"])
def test_a_changed_key_of_the_record_is_caught(tmp_path: Path, change: str) -> None:
    path = finished(tmp_path / "run") / "run.json"
    record = read_json(path)
    match change:
        case "dropped":
            del record["seed"]
        case "added":
            record["more"] = 1
        case "renamed":
            record["Seed"] = record.pop("seed")
        case "retyped":
            record["seed"] = "0"
        case "reordered":
            record = dict(reversed(record.items()))
    write_json(path, record)
    with pytest.raises(BadFile, match=r"run\.json is not as fewbit wrote it"):
        checked(tmp_path / "run")


def test_a_missing_file_and_a_folder_that_is_none_are_named(tmp_path: Path) -> None:
    (finished(tmp_path / "run") / "model.onnx").unlink()
    with pytest.raises(BadFile, match=r"has no model\.onnx"):
        checked(tmp_path / "run")
    with pytest.raises(BadFile, match="is not a folder"):
        checked(tmp_path / "nowhere")


def test_a_file_is_checked_with_the_run_or_search_that_it_lies_in(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "run.json").write_text("{}")  # of somebody else
    check_beside(tmp_path / "model.onnx")
    check_beside(run / "model.onnx")
    (run / "plan.json").write_bytes(b"{}")
    with pytest.raises(BadFile, match=r"plan\.json: changed"):
        check_beside(run / "model.onnx")
    (tmp_path / "search" / "points").mkdir(parents=True)
    (tmp_path / "search" / "points" / "01.json").write_text("{}")
    seal(tmp_path / "search", "search")
    check_beside(tmp_path / "search" / "points" / "01.json")
    (tmp_path / "search" / "points" / "01.json").write_text("[]")
    with pytest.raises(BadFile, match=r"01\.json: changed"):
        check_beside(tmp_path / "search" / "points" / "01.json")


def outs(place: Path) -> dict[str, Path]:
    """Places that cannot be written; `place` holds what they run into."""
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("mine")
    (place / "empty").mkdir()
    (place / "link").symlink_to(place / "empty")
    (place / "dangling").symlink_to(place / "nowhere")
    (place / "precious.part").mkdir()
    (place / "precious.part" / "thesis.txt").write_text("mine")
    (place / "noted.part").mkdir()
    (place / "noted.part" / "request.json").write_text("[]")
    (place / "linked.part").symlink_to(place / "full")
    paths = [
        "file",
        "file/run",
        "full",
        "link",
        "dangling",
        "precious",
        "noted",
        "linked",
        "x" * 300,
        "x" * 252,
        "new/" + "x" * 300,
        "a\0b",
    ]
    special = {name: Path(name) for name in (".", "..", "/", "/dev/null/x", "/dev/null", "/proc/run")}
    return {**{name: place / name for name in paths}, **special}


FILE, FOREIGN, LINK, NAMELESS = (
    "exists and is not a folder",
    "not fewbit's; move it away",
    "is a link to",
    "has no name of its own",
)
INSIDE, LONG = "cannot be written: Not a directory", "cannot be written: File name too long"
OUTS = {
    "file": FILE, "file/run": INSIDE, "full": "exists and is not a run of fewbit", "link": LINK, "dangling": LINK,
    "precious": FOREIGN, "noted": FOREIGN, "linked": FOREIGN, "x" * 300: LONG, "x" * 252: LONG, "new/" + "x" * 300: LONG,
    "a\0b": "cannot be written: embedded null", ".": NAMELESS, "..": NAMELESS, "/": NAMELESS, "/dev/null/x": INSIDE,
    "/dev/null": FILE, "/proc/run": "cannot be written: ",
}  # fmt: skip


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("name", "why"), OUTS.items(), ids=lambda name: f"{name[:12]} {len(name)}".replace("\0", "0"))
def test_an_output_that_cannot_be_written_is_one_message_before_any_work(
    tmp_path: Path, name: str, why: str, force: bool
) -> None:
    out = outs(tmp_path)[name]
    before = contents(tmp_path)
    with pytest.raises(BadFile, match=rf"{re.escape(why)}.*(--out|move it away)"):
        Workplace(out, force=force)
    assert contents(tmp_path) == before


def test_force_replaces_a_run_and_nothing_beside_it(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    with pytest.raises(BadFile, match="--force"):
        Workplace(run)
    (run / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(BadFile, match=r"not fewbit's, as .*notes\.txt"):
        Workplace(run, force=True)
    assert contents(tmp_path) == before
    (run / "notes.txt").unlink()
    record = (run / "run.json").read_bytes()
    (run / "run.json").write_text("{}")
    with pytest.raises(BadFile, match=r"remove .*run yourself"):
        Workplace(run, force=True)
    (run / "run.json").write_bytes(record)
    with Workplace(run, force=True) as place:
        place.resume({"request": "new"})
        (place.part / "plan.json").write_text("new")
        assert contents(run) == contents(finished(tmp_path / "again"))
        place.publish()
    assert (run / "plan.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "run"]


def work(out: Path, error: BaseException, *, begun: bool = True) -> None:
    """Work in a place until an error."""
    with Workplace(out) as place:
        if begun:
            place.resume({"request": 1})
            (place.part / "plan.json").write_text("half")
        raise error


def test_a_refusal_leaves_nothing_and_anything_else_leaves_the_work(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with pytest.raises(BadImages, match=r"^none$") as raised:
        work(out, BadImages("none"))
    assert (contents(tmp_path), getattr(raised.value, "__notes__", [])) == ({}, [])
    for error in (KeyboardInterrupt(), ZeroDivisionError(), MemoryError(), Stopped("the disk is full")):
        with pytest.raises(Stopped if isinstance(error, MemoryError) else type(error)) as stop:
            work(out, error)
        assert sorted(contents(tmp_path / "a" / "run.part")) == ["plan.json", "request.json"]
        mend = " once that is mended" if isinstance(stop.value, Stopped) else ""  # the message says what
        then = f"the same command goes on from there{mend}."
        if isinstance(error, ZeroDivisionError):
            then = "where the same command ends here again, it is a fault of fewbit: attach this message and what is there of"
        assert f"run.part keeps what is done; {then}" in stop.value.__notes__[0]


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (FewbitFailed("wrong"), "the same command ends here again."),
        (Fault("wrong."), "attach this message and what is there of request.json and plan.json to a report of it."),
    ],
)
def test_a_failure_is_not_said_to_go_on(tmp_path: Path, error: Exception, then: str) -> None:
    with pytest.raises(FewbitFailed) as stop:
        work(tmp_path / "run", error)
    assert stop.value.__notes__ == [f"{tmp_path / 'run.part'} keeps what is done; {then}"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_refusal_of_another_request_leaves_what_a_killed_run_did(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "run", KeyboardInterrupt())
    with pytest.raises(BadImages, match=r"^none$"):  # found before the two requests were compared
        work(tmp_path / "run", BadImages("none"), begun=False)
    assert (tmp_path / "run.part" / "plan.json").exists()


HOLD = """
import sys, time
from pathlib import Path
from fewbit.folder import Workplace
place = Workplace(Path(sys.argv[1]), by="fewbit quantize demo")
place.resume({"request": 1})
(place.part / "plan.json").write_text("half")
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_process_is_told_who_works_there_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = contents(tmp_path)
        with pytest.raises(BadFile, match=rf"in use by process {process.pid} on .*: fewbit quantize demo\. Wait"):
            Workplace(out)
        assert contents(tmp_path) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    with Workplace(out) as place:
        place.resume({"request": 1})
        assert (place.part / "plan.json").read_text() == "half"
        place.publish()
    assert sorted(contents(out)) == ["plan.json", "run.json"]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from fewbit.files import write_stream
net = torch.nn.Linear(300, 300)
program = torch.export.export(net, (torch.zeros(1, 300),))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for save, what in ((torch.export.save, program), (torch.save, net.state_dict())):
    try:
        write_stream(Path(sys.argv[1]) / "x.pt2", lambda file: save(what, file))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_ends_no_process(tmp_path: Path) -> None:
    """torch's own writers abort the process here (SIGABRT)."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Stopped") and "x.pt2 cannot be written: the file is too large" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_the_file_that_was_written(tmp_path: Path) -> None:
    write_stream(tmp_path / "x", lambda file: [file.write(piece) for piece in (b"a", memoryview(b"bc"))])
    assert (tmp_path / "x").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 b"
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("bad allocation"),
        RuntimeError("Failed to allocate memory for requested buffer of size 4096"),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
)
def test_no_memory_is_recognised_however_it_is_called(error: Exception) -> None:
    outer = BadImages("a.png cannot be read")
    outer.__cause__ = error
    for one in (error, outer):
        assert "not enough memory" in str(stopped(one))


@pytest.mark.parametrize("error", [BadImages("allocated by hand"), OSError(2, "No such file", "x"), ValueError()])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert stopped(error) is None


def test_an_error_that_was_raised_from_itself_is_looked_at_once() -> None:
    error = ValueError("one")
    error.__cause__ = OSError("two")
    error.__cause__.__cause__ = error
    assert stopped(error) is None


def test_the_record_is_json_that_others_can_check(tmp_path: Path) -> None:
    """With sha256sum alone: the digest of each file is that of its bytes."""
    run = finished(tmp_path / "run")
    lines = "".join(f"{digest}  {name}\n" for name, digest in json.loads((run / "run.json").read_text())["files"].items())
    done = subprocess.run(
        ["sha256sum", "-c", "-"], input=lines, cwd=run, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert (done.returncode, done.stdout.count(": OK")) == (0, 3)


def test_what_stood_at_out_stays_where_the_new_one_cannot_be_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path / "run")
    before, moved = contents(run), os.replace
    with Workplace(run, force=True) as place:
        place.resume({"request": "new"})
        (place.part / "plan.json").write_text("new")

        def refuse(a: str | Path, b: str | Path) -> None:
            if Path(a) == place.part:
                raise OSError(errno.ENOSPC, "No space left on device")
            moved(a, b)

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(Stopped, match="No space left"):
            place.publish()
    assert contents(run) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.part"]


def test_a_kill_before_the_note_is_written_leaves_a_folder_that_is_ours(tmp_path: Path) -> None:
    part = tmp_path / "run.part"
    part.mkdir()
    (part / "lock").touch()
    (part / ".request.json.part.json").write_text("{")
    with Workplace(tmp_path / "run") as place:
        place.resume({"request": 1})
        assert sorted(path.name for path in part.iterdir()) == ["lock", "request.json"]


def test_a_scratch_folder_lies_in_the_part_at_work_and_nowhere_else_of_anybody(tmp_path: Path) -> None:
    for name in ("theirs", "theirs.part"):  # a note that is not fewbit's
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "request.json").write_text("{}")
        with scratch(tmp_path / name / "deep") as folder:
            assert not Path(folder).is_relative_to(tmp_path / name)
    identity = {"request": {"seed": 0}}
    with Workplace(tmp_path / "out") as place:
        place.resume(identity)
        (place.part / "goal").mkdir()
        with scratch(place.part / "goal") as folder:
            assert Path(folder).parent == place.part
        (place.part / "scratch-left").mkdir()
    with Workplace(tmp_path / "out") as place:
        place.resume(identity)
        assert sorted(path.name for path in place.part.iterdir()) == ["goal", "lock", "request.json"]
