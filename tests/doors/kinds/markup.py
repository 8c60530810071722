"""Names that carry markup, terminal escapes or scripts: they are text on the terminal and on the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, Right, done, either, quantize, refused, write
from doors.kinds.images import encoded, has_run

MARKUP = (
    "[/b]",
    "[red]x[/red]",
    "[link=http://x]y[/link]",
    "[bold",
    "\\[x",
    ":smile:",
    "<script>touch()</script>",
    "&lt;b&gt;",
    "{x}",
    "%s%n",
    "`x`",
    "$(touch x)",
)
ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\bb", "\x1b[2J", "\u202egnp.exe", "a\nFewbitError: b")
SCRIPT = "<script>alert(1)</script>"
SCRIPTED = """
from net import Net
from torch import nn
INPUT_SIZE = (3, 16, 16)
def model():
    net = nn.Sequential()
    net.add_module("<script>alert(1)<_script>", Net())
    return net
"""


def cases() -> Iterator[Case]:
    yield from _names()
    yield from _pages()


def _names() -> Iterator[Case]:
    """Markup and escapes in names that are printed."""
    for text in (*MARKUP, *ESCAPES):
        shown = repr(text)
        plain = text.replace("/", "_")
        yield Case(f"--target {shown}", quantize("--target", text), refused())
        yield Case(f"--recipe {shown}", quantize("--recipe", text), refused())
        yield Case(f"--bits {shown}", quantize("--bits", text), refused("--bits"))
        yield Case(f"--keep-float {shown}", quantize("--keep-float", text), refused())
        yield Case(f"MODEL {shown}", quantize(model=text), refused())
        yield Case(f"verify {shown}", ("verify", text), refused())
        yield Case(f"a broken image called {shown}", quantize(), refused(), before=write(f"flat/{plain}.png", b""))
        yield Case(
            f"a model file called {shown}",
            quantize(model=f"{plain}.py:nope"),
            refused(),
            before=write(f"{plain}.py", "def model(): pass"),
        )
        yield Case(
            f"a model that raises {shown}",
            quantize(),
            refused(),
            before=write("net.py", f"def model(): raise ValueError({text!r})"),
        )
        yield Case(
            f"a target file with {shown}",
            quantize("--target", "t.toml"),
            refused("t.toml"),
            before=write("t.toml", f"name = {json.dumps(text)}\nextends = {json.dumps(text)}\n"),
        )
        yield Case(f"a plan with {shown}", ("diff", "run", "run"), either(), before=_site(text), needs=("run",))
    for text in ("[/b]", "[red]", "\x1b[31mred"):
        model = quantize(model=f"./d{text}/net.py:model")
        yield Case(
            f"a whole run of a model in {text!r}", model, done(has_run), before=lambda folder, text=text: _moved(folder, text)
        )


def _moved(folder: Path, text: str) -> None:
    (folder / f"d{text}").mkdir(parents=True)
    (folder / "net.py").rename(folder / f"d{text}" / "net.py")


def _site(text: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        path = folder / "run" / "plan.json"
        plan = json.loads(path.read_text())
        plan["choices"][0]["site"] = text
        path.write_text(json.dumps(plan))

    return put


def _pages() -> Iterator[Case]:
    """Scripts in what the report shows: the page holds them as text."""

    def page(folder: Path) -> str:
        return (
            "a script of the input is on the page"
            if SCRIPT in (folder / "out" / "report.html").read_text(encoding="utf-8")
            else ""
        )

    right = Right((0,), (), page)
    names = "".join(f"{SCRIPT}{i}\n" for i in range(4))
    yield Case("a class called a script", quantize("--classes", "c.txt"), right, before=write("c.txt", names))
    yield Case("an image called a script", quantize(), right, before=write(f"flat/{SCRIPT.replace('/', '')}.png", encoded()))
    yield Case("a folder called a script", quantize(images=f"x{SCRIPT}/flat"), right, before=_scripted)
    yield Case("a target about a script", quantize("--target", "t.toml"), right, before=write(
        "t.toml", f'extends = "ort-x86-vnni"\nname = "t"\nabout = "{SCRIPT}"\n'))  # fmt: skip
    text = SCRIPTED
    yield Case("a module called a script", quantize(model="s.py:model"), right, before=write("s.py", text))


def _scripted(folder: Path) -> None:
    shutil.copytree(folder / "flat", folder / f"x{SCRIPT}" / "flat")
