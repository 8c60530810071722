"""The folder of a run, a search or a sensitivity: what may be replaced, who works in it, and the hashes of a finished one.

The work is done in `<out>.part`, which its process has locked, and renamed to `<out>` at the end. Then a record (run.json,
search.json) has the SHA-256 of every file, and of itself: whoever reads the folder checks them first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fewbit.errors import FULL, BadFile, Fault, FewbitError, FewbitFailed, InUse, Stopped, shortened, stopped
from fewbit.files import beside, read_json, read_sealed, sha256, write_json, write_sealed

EXPORTED = "exported.pt2"  # of a run: the model that was given
PLAN, NUMBERS = "plan.json", "plan.safetensors"
MODEL, TWIN, SAMPLE = "model.onnx", "float.onnx", "images.safetensors"
REPORT, TABLES, PAGE = "report.json", "tables.json", "report.html"
FILES = (EXPORTED, PLAN, NUMBERS, MODEL, TWIN, SAMPLE)  # whose bytes the report has

COMMANDS = {"run": "quantize", "search": "search", "sensitivity": "sensitivity", "sweep": "sweep"}
RECORDS = {kind: f"{kind}.json" for kind in COMMANDS}  # the file with the hashes of the others
RECORD = RECORDS["run"]
MARKS = {"run": PLAN, "search": "points", "sensitivity": "sensitivity.html", "sweep": "rows"}  # what stands beside it
COMMAND = "command"  # in the note
NOTE, LOCK = "request.json", "lock"  # whose work a `.part` is, and which process is at it
WRITTEN = "stages.json"  # of a `.part`: the digests of what its stages have written
SCRATCH = "scratch-"  # folders for a moment
ANOTHER = "give another folder: --out DIR."


def seal(folder: Path, kind: str = "run", only: Iterable[str] = ()) -> None:
    """Write the SHA-256 of every file into the folder's record; with `only` those of these, and the others stay."""
    path = folder / RECORDS[kind]
    record = dict(read_json(path)) if path.exists() else {}
    record.pop("digest", None)
    names = tuple(only) or [name for name in _files(folder) if name not in (RECORDS[kind], LOCK)]
    before = record.get("files", {}) if only else {}
    record["files"] = dict(sorted({**before, **{name: sha256(folder / name) for name in names}}.items()))
    write_sealed(path, record)


def checked(folder: Path, kind: str = "run") -> dict[str, Any]:
    """The record of a finished folder, once every file has been compared with it. Raises BadFile that names what changed."""
    if not os.path.isdir(folder):
        raise BadFile(f"{folder} is not a folder; give one that `fewbit {COMMANDS[kind]}` wrote.")
    path, again = folder / RECORDS[kind], f"write it again with fewbit {COMMANDS[kind]} --force"
    try:
        record = read_sealed(path)
    except (BadFile, ValueError, RecursionError) as error:
        if not path.exists():
            raise
        raise BadFile(
            f"{path} is not as fewbit wrote it, so nothing says what the other files should be; restore it, or remove {folder} "
            f"and write it again with fewbit {COMMANDS[kind]}."
        ) from error
    missing = [name for name in record["files"] if not (folder / name).is_file()]
    if missing:
        raise BadFile(f"{folder} has no {', '.join(missing)}; {again}.")
    changed = [name for name, digest in record["files"].items() if sha256(folder / name) != digest]
    if changed:
        names = ", ".join(str(folder / name) for name in changed)
        raise BadFile(
            f"{names}: changed after fewbit wrote it (SHA-256), so what was measured does not hold for it. Restore it, or "
            f"{again}. A file that you change on purpose belongs outside of the folder."
        )
    return record


def check_beside(file: Path) -> str | None:
    """What a file is part of, "run" or "search", if anything. Raises BadFile where that has changed; any other file passes."""
    above = file.absolute().parent
    for folder, kind in ((above, "run"), (above.parent, "search")):
        if (folder / RECORDS[kind]).is_file() and (folder / MARKS[kind]).exists():
            checked(folder, kind)
            return kind
    return None


def copy_file(source: str | Path, target: str | Path) -> str | Path:
    """Copy the bytes of a file, and give the target. Raises Stopped that names the one of the two that is at fault, which is no
    OSError: `shutil.copytree` would collect those as texts.
    """
    try:
        return shutil.copyfile(source, target)
    except OSError as error:
        if error.filename2 is None and error.filename == source:
            raise Stopped(f"{source} cannot be read: {error.strerror}. Fix that and give the same command again.") from error
        what = FULL.get(error.errno or errno.EIO) or error.strerror
        raise Stopped(f"{target} cannot be written: {what}. Free some space or give another folder.") from error


def check_utf8(path: Path) -> None:
    """Raise BadFile for a path that Python cannot write as UTF-8, as in the locale C: runtimes take none of these."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise BadFile(
            f"{path.absolute()} is not UTF-8 to Python here, and no runtime takes such a path; set PYTHONUTF8=1, or give a "
            "folder whose whole name is of plain letters."
        ) from error


def check_out(out: Path, kind: str, *, force: bool) -> None:
    """Raise BadFile where `out` cannot become a folder of fewbit: it is something else, or (without `force`) not empty."""
    if out.name in ("", ".."):
        raise BadFile(f"--out {out} has no name of its own; give the name of a folder, as in --out run.")
    check_utf8(out)
    if out.is_symlink():
        raise BadFile(f"{out} is a link to {os.readlink(out)}; give the folder itself: --out DIR.")
    if not out.exists():
        return
    if not out.is_dir():
        raise BadFile(f"{out} exists and is not a folder; {ANOTHER}")
    if os.path.ismount(out):
        raise BadFile(f"{out} is a mount point and cannot be replaced; give a folder inside of it: --out {out / 'run'}.")
    if not any(out.iterdir()):
        return
    if not all((out / name).exists() for name in (RECORDS[kind], MARKS[kind])):
        raise BadFile(f"{out} exists and is not a {kind} of fewbit; {ANOTHER}")
    if not force:
        raise BadFile(f"{out} exists; replace it with --force, or {ANOTHER}")
    if (own := _listed(out, kind)) is None:
        raise BadFile(f"{out / RECORDS[kind]} does not say which files are fewbit's; remove {out} yourself, or {ANOTHER}")
    if others := [str(out / name) for name in _files(out) if name not in own]:
        raise BadFile(f"{out} holds files that are not fewbit's, as {others[0]}; move them away, or {ANOTHER}")


def scratch(near: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder for a moment: in the `.part` where a run works at `near`, so that the next start clears what a killed one left;
    elsewhere in the system's folder for such.
    """
    above = () if near is None else (near, *near.absolute().parents)
    places = (folder for folder in above if folder.suffix == ".part" and _is_ours(folder))
    return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=next(places, None))


class Workplace:
    """`<out>.part`, locked: the place of one run or search until it is published as `out`.

    A refusal (a FewbitError) removes it, unless what lies there is of another request; anything else that stops the work leaves
    it, and the same request goes on there. Raises BadFile where `out` cannot be written or another process is at it.
    """

    def __init__(
        self, out: Path, kind: str = "run", *, force: bool = False, by: str = "fewbit", lasting: bool = True
    ) -> None:  # fmt: skip
        self.out, self.kind, self.force, self.by, self.lasting = out, kind, force, by, lasting
        with _named(out):
            check_out(out, kind, force=force)
            self.part = out.with_name(out.name + ".part")
            if self.part.is_symlink() or (self.part.exists() and not _is_ours(self.part)):
                raise BadFile(f"{self.part} is in the way and is not fewbit's; move it away, or {ANOTHER}")
            self._made = [folder for folder in (self.part, *self.part.parents) if not folder.exists()]
            try:
                self._lock = _locked(self.part, by)
            except OSError:
                if self.part in self._made:
                    self._unmake()
                raise
        self.ours = (self.part / NOTE).exists() is False  # nothing of an earlier request lies here
        self.published = False

    def resume(self, identity: Mapping[str, Any], say: Callable[[str], None] = lambda text: None) -> None:
        """Keep what a killed run of the same request left, and delete what one of another request did, once that is said."""
        note = self.part / NOTE
        before = read_json(note) if note.exists() else {}
        if {name: value for name, value in before.items() if name != COMMAND} != identity:
            lost = [path for path in self.part.iterdir() if path.name != LOCK]
            if any(path.name not in (NOTE, beside(note).name) for path in lost):
                command = f" of {shortened(str(before[COMMAND]), 300)}" if before.get(COMMAND) else ""
                say(
                    f"{self.part} has unfinished work{command}, which cannot be used: this command, its model, its images or "
                    "the versions are others. It is given up and deleted."
                )
            for path in lost:
                _remove(path)
            write_json(note, {**identity, COMMAND: self.by})
        for left in list(self.part.glob(f"{SCRATCH}*")):
            _remove(left)
        self.ours = True

    def publish(self, scratch: Iterable[str] = ()) -> Path:
        """Remove scratch files, seal the folder and rename it to `out`, which is returned. Raises Stopped where that fails."""
        try:
            for name in (NOTE, WRITTEN, *scratch):
                _remove(self.part / name)
            seal(self.part, self.kind)
            check_out(self.out, self.kind, force=self.force)
            self._replace()
        except (BadFile, OSError) as error:
            raise Stopped(f"{self.out} cannot be written: {error}. Fix that and give the same command again.") from error
        self.published = True
        return self.out

    def _replace(self) -> None:
        """Put the work in place of `out`; what stood there stays where that fails."""
        old = Path(tempfile.mkdtemp(prefix=f".{self.out.name[:200]}.", dir=self.out.parent))
        try:
            if self.out.exists():
                os.replace(self.out, old)
            try:
                (self.part / LOCK).unlink()
                os.replace(self.part, self.out)
            except OSError:
                if any(old.iterdir()):
                    os.replace(old, self.out)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def _unmake(self) -> None:
        """Remove the folder, and those above it that were made for it."""
        shutil.rmtree(self.part, ignore_errors=True)
        for folder in self._made[1:]:
            with suppress(OSError):
                folder.rmdir()

    def close(self) -> None:
        """Let others work here."""
        if not self.published:
            (self.part / LOCK).unlink(missing_ok=True)
        os.close(self._lock)

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        halt = stopped(error) if isinstance(error, Exception) else None
        refused = isinstance(error, FewbitError) and halt is None
        nothing = refused or not (self.part / NOTE).exists()
        if error is not None and nothing and self.ours and not self.published:
            self._unmake()
        self.close()
        last = halt or error
        if last is not None and self.lasting and not nothing and not self.published:
            last.add_note(f"{self.part} keeps what is done; {_then(last)}.")
        if halt is not None and halt is not error:
            raise halt from error


def _then(last: BaseException) -> str:
    """What to do with what is kept behind an error: an interruption is over, a failure comes again."""
    if isinstance(last, Stopped | OSError):
        return "the same command goes on from there once that is mended"
    if not isinstance(last, Exception):
        return "the same command goes on from there"
    report = f"attach this message and what is there of {NOTE} and {PLAN} to a report of it"
    if isinstance(last, FewbitFailed):
        return report if isinstance(last, Fault) else "the same command ends here again"
    return f"where the same command ends here again, it is a fault of fewbit: {report}"


@contextmanager
def _named(out: Path) -> Iterator[None]:
    """Name `out` in what the operating system says about it."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise BadFile(f"{str(out)[:300]} cannot be written: {why}; {ANOTHER}") from error


def _locked(part: Path, by: str) -> int:
    """The open lock of a folder, which the kernel frees when the process ends. Raises BadFile that says who has it."""
    while True:
        part.mkdir(parents=True, exist_ok=True)
        file = os.open(part / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise InUse(f"{part} is in use by {holder}. Wait until it is done, or {ANOTHER}") from error
        with suppress(OSError):  # its last owner may have renamed or removed it between the two calls
            if os.path.samestat(os.fstat(file), os.stat(part / LOCK)):
                text = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}: {by[:300]}"
                os.truncate(file, 0)
                os.pwrite(file, text.encode(errors="backslashreplace"), 0)
                return file
        os.close(file)


def _is_ours(part: Path) -> bool:
    """Whether a `.part` is empty or carries the note of a request."""
    if not part.is_dir():
        return False
    if not (part / NOTE).is_file():
        return all(path.name in (LOCK, beside(part / NOTE).name) for path in part.iterdir())
    with suppress(BadFile):
        note = read_json(part / NOTE)
        return isinstance(note, dict) and "request" in note
    return False


def _listed(folder: Path, kind: str) -> set[str] | None:
    """The files of a finished folder by its record; None where that lists none: it was changed, or is of an older fewbit."""
    try:
        return {RECORDS[kind], *read_json(folder / RECORDS[kind])["files"]}
    except (BadFile, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[str]:
    """Every file below a folder, as a relative path."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
