"""Which of several files or entries is an image's: that of its path, or of the end of its path where no other has the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from fewbit.errors import BadImages

Parts = tuple[str, ...]


def paired(
    images: Sequence[str],
    listed: Sequence[str],
    where: str,
    unclear: Callable[[str, Sequence[int]], BadImages],
    *,
    stems: bool = False,
) -> list[int]:
    """For each image the index of what is listed for it: under its path, else the one that shares the longest end of it, at
    least the last part. With `stems` the suffix of the last part is left out of the comparison.

    Raises BadImages where two images would get the same, where an image would get that of another folder beside images found
    by folder, and as `unclear` says where there are none or several; that gets the image and these.
    """
    ours, theirs = ([_parts(name, stems) for name in names] for names in (images, listed))
    by_last: dict[str, list[int]] = {}
    for i, parts in enumerate(theirs):
        by_last.setdefault(parts[-1], []).append(i)
    owners: dict[int, str] = {}
    found, by_folder, elsewhere = list[int](), "", ""
    for name, parts in zip(images, ours, strict=True):
        near = by_last.get(parts[-1], [])
        ends = [_shared_end(parts, theirs[i]) for i in near]
        best = [i for i in near if theirs[i] == parts] or [i for i, n in zip(near, ends, strict=True) if n == max(ends)]
        if len(best) != 1:
            raise unclear(name, best)
        one = best[0]
        if one in owners:
            raise BadImages(
                f"{where}: {listed[one]} could belong to {owners[one]} and to {name}; each image needs its own, under its "
                "path. Add it, or score other images: --score."
            )
        owners[one] = name
        found.append(one)
        if min(len(parts), len(theirs[one])) > 1:
            if _shared_end(parts, theirs[one]) > 1:
                by_folder = name
            else:
                elsewhere = f"{listed[one]}, of another folder, is all that there is for {name}"
    if by_folder and elsewhere:
        raise BadImages(
            f"{where}: {elsewhere}, and {by_folder} is there with its folder; each image needs its own, under its path. "
            "Add it, or score other images: --score."
        )
    return found


def plain(name: str) -> str:
    """A path as it is written here, where it may be one of Windows."""
    return PureWindowsPath(name).as_posix() if "\\" in name else name


def _parts(name: str, stems: bool) -> Parts:
    path = PurePosixPath(name)
    return (path.with_suffix("") if stems and path.name else path).parts or (name,)


def _shared_end(one: Parts, other: Parts) -> int:
    """How many parts at the end of two paths are the same."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
