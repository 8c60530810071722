"""Files as memory, and memory that is given back to the system."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

M_MMAP_THRESHOLD = -3  # of malloc.h
APART, LARGE = 4 << 20, 256 << 20

_MAPPED: WeakSet[mmap.mmap] = WeakSet()


def mapped(path: Path) -> mmap.mmap:
    """A file as memory that nobody writes to: a page is read when it is first needed, and the system may drop it.

    From the first file above `LARGE` bytes on, large tensors are memory of their own as well (`large_apart`).
    """
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of what is read-only
    _MAPPED.add(pages)
    if len(pages) >= LARGE:
        large_apart()
    return pages


def large_apart() -> None:
    """Let each tensor above `APART` bytes be memory of its own, which goes back when it is freed. Among smaller ones that stay,
    glibc would keep the holes, half a gigabyte of a vision transformer's activations; it costs time to get fresh pages.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)


def give_back() -> None:
    """Give back what was freed (glibc keeps it for itself), and drop the pages of mapped files, which are read again."""
    for pages in list(_MAPPED):
        with suppress(AttributeError, ValueError):  # a system without madvise; a file that is closed
            pages.madvise(mmap.MADV_DONTNEED)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
