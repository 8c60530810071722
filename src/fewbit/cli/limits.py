"""What a process may use of the machine, looked at before a command begins: with too little, libraries crash or never end."""

from __future__ import annotations

import os
from pathlib import Path

from fewbit.errors import FewbitError

FILES = 24  # open at a time
MEMORY = 128 << 20  # bytes more than the process has

PAGES = Path("/proc/self/statm")


def check_folder() -> None:
    """Raise FewbitError where the current folder has been deleted: torch does not load from there, and ends the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise FewbitError(
            f"the current folder is not there any more ({error.strerror}), and torch does not load without one; go to a folder "
            "that is there (cd DIR), and give the same command again."
        ) from error


def check_limits() -> None:
    """Raise FewbitError where the process may not open enough files, or not have enough memory."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES:
        raise FewbitError(f"this process may open {files} files, and {FILES} are needed: type ulimit -n 1024, and start again.")
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    if memory == resource.RLIM_INFINITY or not PAGES.exists():
        return
    more = memory - int(PAGES.read_text().split()[0]) * resource.getpagesize()
    if more < MEMORY:
        raise FewbitError(
            f"this process may have {max(more, 0) >> 20} MB more memory, and {MEMORY >> 20} MB are needed at the very least: "
            "type ulimit -v unlimited, and start again."
        )
