"""What answered well means. One function, for every kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from doors.case import Case
from fewbit import errors

LONGEST = 700  # characters of a message
ERRORS = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)]
MESSAGE = re.compile(rf"^(?:{'|'.join(ERRORS)}): ", re.MULTILINE)
NEXT = re.compile(
    r"--[a-z]|`|\b(?:give|use|write|leave|type|check|fix|remove|choose|download|install|export|resize|transpose|set|see|free|"
    r"make|move|pick|needs?|needed|must|expected|docs/|allowed|"
    r"ha[sv]e? to|in use|same command|did you mean|there are|wait|close|run|try|take|rename|name|is \S+ for)\b|\?",
    re.IGNORECASE,
)
TRACEBACK = re.compile(r"Traceback \(most recent call last\)|^\s+File \".*\", line \d+", re.MULTILINE)
REPR = re.compile(r"<class '|<function |object at 0x|<built-in")
NOISE = re.compile(r"\b\w*Warning: |\[[WEF]:onnxruntime|^\[ ?(?:ERROR|WARNING) ?\]|c10::Error|terminate called", re.MULTILINE)
OURS = re.compile(r"^\s*Warning: ", re.MULTILINE)  # fewbit's own
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Snapshot = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), what it printed, what stood in its folder before and after."""

    code: int | None
    out: str
    err: str
    seconds: float
    before: Snapshot
    after: Snapshot
    litter: tuple[str, ...] = ()  # left in the temporary folder

    @property
    def message(self) -> str:
        """The one message: fewbit's own, or the box in which the command line says what is wrong with an option."""
        found = MESSAGE.search(self.err)
        text = self.err[found.start() :] if found else self.err.partition("Usage:")[2]
        return re.sub(r"[\s│╭╮╰╯─]+", " ", text).strip()


def snapshot(folder: Path) -> Snapshot:
    """Every path below a folder, with what changes when it is written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_mode, *((0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)))
    return found


def judge(case: Case, ended: Ended, folder: Path) -> str:
    """What is wrong, in a phrase; nothing where the case was answered well."""
    if ended.code is None:
        return f"did not end within {case.seconds:g} s of work"
    text = ended.out + ended.err
    if (folder / "marker").exists():
        return "code of the input ran"
    if TRACEBACK.search(text):
        return f"traceback: {text.strip().splitlines()[-1][:200]}"
    if found := CONTROL.search(text):
        return f"a control character reaches the terminal: {found[0]!r}"
    if found := NOISE.search(OURS.sub("", text)):
        return f"a library speaks: {text[found.start() :].splitlines()[0][:160]}"
    if ended.code not in case.right.codes:
        said = (MESSAGE.search(ended.err) and ended.message) or ended.err.strip()[-200:]
        return f"exit code {ended.code}, right is {' or '.join(map(str, case.right.codes))}. {said[:300]}"
    if ended.litter:
        return f"left in the temporary folder: {', '.join(ended.litter[:3])}"
    if ended.code == 0:
        if MESSAGE.search(ended.err):
            return "exit code 0 with an error message"
        return case.right.holds(folder) if case.right.holds is not None else ""
    return _message(case, ended) or (_left(case, ended) if ended.code == 2 else "")


def _message(case: Case, ended: Ended) -> str:
    """What is wrong with the message of a refusal or a failure."""
    count, message = len(MESSAGE.findall(ended.err)), ended.message
    if case.right.silent:
        return ""
    if ended.code not in (1, 2):  # ended by a signal: any line will do
        message = ended.err
    elif count > 1 or (count == 0 and "Usage:" not in ended.err):
        return f"{count} messages, one is right: {ended.err.strip()[-200:]!r}"
    if len(message) > LONGEST:
        return f"a message of {len(message)} characters: {message[:120]} ..."
    if REPR.search(message):
        return f"a value of Python in the message: {message[:300]}"
    if not NEXT.search(message):
        return f"the message does not say what to type next: {message[:300]}"
    for words in case.right.says:
        choice = (words,) if isinstance(words, str) else words
        if not any(word.lower() in message.lower() for word in choice):
            return f"the message does not name {' or '.join(choice)}: {message[:300]}"
    return ""


def _left(case: Case, ended: Ended) -> str:
    """What a refusal has changed."""
    paths = {path for path in {*ended.before, *ended.after} if ended.before.get(path) != ended.after.get(path)}
    wrong = sorted(path for path in paths if path.split("/")[0] not in case.keeps)
    gone = [path for path in wrong if path not in ended.after]
    return f"{'deleted' if gone else 'left or changed'} by a refusal: {', '.join((gone or wrong)[:4])}" if wrong else ""
