"""What a killed run has left: the SHA-256 of the files of each stage, written behind the stage into `<out>.part/stages.json`.

A file of a stage is used again only where it is as the stage wrote it. One without a digest is of a stage that was killed at
work, and is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.errors import BadFile, Stopped
from fewbit.files import read_sealed, sha256, write_sealed
from fewbit.folder import WRITTEN

if TYPE_CHECKING:
    from fewbit.stages import Stage

REMOVE = "Restore it, or remove it: the same command makes it anew, and what was made of it."


def rows_so_far(path: Path) -> list[dict[str, Any]]:
    """The rows that `keep_rows` wrote in a killed run; none where there is no file. Raises Stopped where it has changed."""
    try:
        return list(read_sealed(path)["rows"]) if path.exists() else []
    except (BadFile, KeyError, TypeError, ValueError) as error:
        raise Stopped(f"{path} is not as fewbit wrote it. {REMOVE}") from error


def keep_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, with the digest that says whether they have changed."""
    write_sealed(path, {"rows": rows})


class Unfinished:
    """The digests of the files in a folder, in the order in which its stages wrote them; each change is on the disk at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file. Raises Stopped where the list is not as it was written."""
        path = self.folder / WRITTEN
        if not path.exists():
            return {}
        try:
            return dict(read_sealed(path)["files"])
        except (BadFile, KeyError, TypeError, ValueError) as error:
            raise Stopped(
                f"{path} is not as fewbit wrote it, so nothing says whether the other files there are. Restore it, or remove "
                "it: the same command makes them anew."
            ) from error

    def usable(self, names: Iterable[str]) -> set[str]:
        """Those of the files that a stage wrote in full. What else there is under these names is removed. Raises Stopped that
        names a file that has changed since.
        """
        known, found = self.digests, set[str]()
        for name in self._with_weights(names):
            path = self.folder / name
            if name not in known:
                path.unlink(missing_ok=True)
            elif path.is_file():
                if sha256(path) != known[name]:
                    raise Stopped(f"{path} was changed after fewbit wrote it (SHA-256), and is not used. {REMOVE}")
                found.add(name)
        return found

    def is_whole(self, names: Sequence[str]) -> bool:
        """Whether all of the files are there as a stage wrote them. Raises Stopped for one that has changed."""
        return self.usable(names) >= {*names, *self.recorded(names)}

    def begin(self, stage: Stage) -> Sequence[str]:
        """The files whose digests are to be kept once a stage has run; while it runs nothing is known of what it changes."""
        if not stage.files:
            return ()
        if stage.reuses:
            self.forget_from(set(self.recorded(stage.files)) - self.usable(stage.files))
            return stage.files
        if stage.load is not None:
            self.forget_from(stage.files)
            return stage.files
        changed = self.recorded(stage.files)
        self.forget(changed)
        return changed

    def recorded(self, names: Iterable[str]) -> list[str]:
        """Those of the files that have a digest."""
        known = self.digests
        return [name for name in self._with_weights(names) if name in known]

    def add(self, names: Iterable[str]) -> None:
        """The files have been written."""
        there = [name for name in self._with_weights(names) if (self.folder / name).is_file()]
        if there:
            self._write({**self.digests, **{name: sha256(self.folder / name) for name in there}})

    def take(self, digests: Mapping[str, str]) -> None:
        """Files of another folder lie here as well, with their digests."""
        if digests:
            own = self.digests
            self._write({**own, **{name: digest for name, digest in digests.items() if name not in own}})

    def forget(self, names: Iterable[str]) -> None:
        """The files will be written anew."""
        known, gone = self.digests, set(self._with_weights(names))
        if gone & set(known):
            self._write({name: digest for name, digest in known.items() if name not in gone})

    def forget_from(self, names: Iterable[str]) -> None:
        """The files will be written anew, and so will all that were written after them: they may have been made of these."""
        known = list(self.digests.items())
        places = [i for i, (name, _) in enumerate(known) if name in set(self._with_weights(names))]
        if places:
            self._write(dict(known[: min(places)]))

    def _write(self, digests: Mapping[str, str]) -> None:
        write_sealed(self.folder / WRITTEN, {"files": dict(digests)})

    @staticmethod
    def _with_weights(names: Iterable[str]) -> list[str]:
        """The files, without folders, and of ONNX files those beside them that have large weights."""
        files = [name for name in names if not name.endswith("/")]
        return [one for name in files for one in ((name, f"{name}.data") if name.endswith(".onnx") else (name,))]
