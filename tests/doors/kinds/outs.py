"""Folders to write: in the way, somebody else's, not writable, of odd names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, each, either, quantize, refused, search, sensitivity, write
from doors.kinds.images import has_run

FREE = {" ", "link", "dangling", "x" * 252}  # names that may as well be written to


def cases() -> Iterator[Case]:
    for name in (".", "", "..", "/", "flat", "net.py", "net.py/x", "net.py/x/y", "/dev/null", "/dev/null/x", "/proc/x",
        "/sys/x/y", "x" * 300, "x/" + "y" * 300,
                 "/".join("x" * 200 for _ in range(30)), "flat/0.png", " ", "x" * 252, "flat/..", "./.", "link", "dangling",
                 "loop", "linked file"):  # fmt: skip
        shown = f"{name[:12]!r} of {len(name)}" if len(name) > 40 else repr(name)
        says = ("--out", name[:40])
        right = either(says) if name in FREE else refused(says)
        yield Case(f"--out {shown}", quantize(out=name), right, before=_links, fast=name in (".", "", "net.py/x"))
        yield Case(f"search --out {shown}", (*search()[:6], name, *search()[7:]), right, before=_links)
        yield Case(f"sensitivity --out {shown}", (*sensitivity()[:6], name, *sensitivity()[7:]), right, before=_links)
        yield Case(f"--out {shown} --force", quantize("--force", out=name), right, before=_links)
    theirs = write("precious.part/thesis.txt", "years of work")
    for more in ((), ("--force",)):
        forced = " --force" if more else ""
        yield Case(
            f"a .part of somebody else{forced}",
            quantize(*more, out="precious"),
            refused("precious.part"),
            before=theirs,
            fast=not more,
        )
        yield Case(
            f"a .part that is a file{forced}",
            quantize(*more, out="precious"),
            refused("precious.part"),
            before=write("precious.part", "years of work"),
        )
        yield Case(
            f"a .part that is a link{forced}", quantize(*more, out="precious"), refused("precious.part"), before=_linked_part
        )
        yield Case(f"a .part with a broken note{forced}", quantize(*more, out="precious"), refused("precious.part"),
                   before=each(theirs, write("precious.part/request.json", "{")))  # fmt: skip
        yield Case(
            f"a folder of somebody else{forced}",
            quantize(*more, out="mine"),
            refused("mine"),
            before=write("mine/thesis.txt", "years of work"),
        )
        yield Case(f"a folder with a plan.json of somebody else{forced}", quantize(*more, out="mine"), refused("mine"),
                   before=each(write("mine/plan.json", '{"plan": "get up early"}'),
                   write("mine/thesis.txt", "years of work")))  # fmt: skip
        yield Case(f"a run with files of somebody else{forced}", quantize(*more, out="run"), refused("run"),
            before=write("run/thesis.txt", "years of work"),
                   needs=("run",))  # fmt: skip
    yield Case("a finished run in the way", quantize(out="run"), refused("run", "--force"), needs=("run",))
    yield Case(
        "an empty folder in the way",
        quantize(out="empty"),
        _finished("empty"),
        before=lambda folder: (folder / "empty").mkdir(),
    )
    yield Case("a finished run replaced", quantize("--force", out="run"), _finished("run"), needs=("run",))
    for name in ("a b", "ünï", "日本", "a'b", 'a"b', "a;b", "$HOME", "[/b]", "[red]x", "a%sb", "-x", "x.part", "a\tb", "a&<b>"):
        yield Case(f"--out {name!r}", quantize(out=f"./{name}"), _finished(name))
    for file in ("report.html", "tables.json", "report.json"):
        yield Case(
            f"report where {file} is a folder", ("report", "run"), refused(file), before=_folder_instead(file), needs=("run",)
        )
    if os.geteuid() != 0:
        yield Case(
            "a locked folder",
            quantize(out="locked/x"),
            refused("locked"),
            before=lambda folder: (folder / "locked").mkdir(mode=0o500),
        )


def _finished(name: str) -> object:
    from doors.case import done

    return done(lambda folder: "" if (folder / name / "report.html").is_file() else has_run(folder / name / ".."))


def _links(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to("elsewhere")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "linked file").symlink_to("net.py")


def _linked_part(folder: Path) -> None:
    (folder / "theirs").mkdir()
    (folder / "theirs" / "thesis.txt").write_text("years of work")
    (folder / "precious.part").symlink_to("theirs")


def _folder_instead(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / "run" / name).unlink()
        (folder / "run" / name).mkdir()

    return put
