"""The machines on which workers are: what each has to have before any work is given to it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from fewbit import __version__
from fewbit.errors import FewbitError
from fewbit.workers.local import Workers


def refuse_missing(workers: Workers, paths: Sequence[str]) -> None:
    """Raise FewbitError where a machine lacks one of the paths, or has another version of fewbit."""
    for machine, (theirs, missing) in workers.everywhere(_looked, paths).items():
        if theirs != __version__:
            raise FewbitError(f"{machine} has fewbit {theirs} and this machine {__version__}; give both the same version.")
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise FewbitError(
                f"{machine} has no {missing[0]}{more}; every machine needs models, images and the folder that is written under "
                "the same paths, as on a shared disk."
            )


def file_of(text: str) -> str:
    """The path in file.py:function or synthetic:DIR; any other text as it is."""
    return re.sub(r"(?<=\.py):\w+$", "", text.removeprefix("synthetic:"))


def _looked(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The version of fewbit on a machine, and those of the paths that it has not."""
    return __version__, [path for path in paths if not os.path.exists(file_of(path))]
