"""The files below a folder, each found in the same way: images, what is known of them, and what options name."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any


def natural(path: Path | str) -> list[Any]:
    """A sort key by which 2 comes before 10, the one that timm uses."""
    text = path if isinstance(path, str) else path.as_posix()
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def below(root: Path) -> tuple[list[Path], list[str]]:
    """The files below a folder, as paths in it, through links too, and in words what cannot be read; hidden ones are left out.

    Both are in natural order. Raises OSError where `root` itself is not there.
    """
    files: list[Path] = []
    unreadable: list[str] = []
    own = os.stat(root)
    folders = [(Path(), frozenset({(own.st_dev, own.st_ino)}))]
    while folders:
        folder, above = folders.pop()
        try:
            entries = [entry for entry in os.scandir(root / folder) if not entry.name.startswith(".")]
        except OSError as error:
            unreadable.append(f"{folder} cannot be opened: {error.strerror}")
            continue
        for entry in entries:
            path = folder / entry.name
            shown = os.fsencode(path).decode(errors="backslashreplace")
            try:
                about = entry.stat()
            except OSError as error:
                unreadable.append(f"{shown} is a link to nothing" if entry.is_symlink() else f"{shown}: {error.strerror}")
                continue
            inode = (about.st_dev, about.st_ino)
            if stat.S_ISDIR(about.st_mode) and inode not in above:
                folders.append((path, above | {inode}))
            elif stat.S_ISDIR(about.st_mode):
                unreadable.append(f"{shown} is a link to a folder that it is in")
            elif not stat.S_ISREG(about.st_mode):
                unreadable.append(f"{shown} is a pipe, a socket or a device")
            elif shown != path.as_posix():
                unreadable.append(f"{shown} has a name that is not UTF-8")
            else:
                files.append(path)
    return sorted(files, key=natural), sorted(unreadable, key=natural)
