"""Pages of the site that lie outside of docs/: the README as its first page, measurements, how to contribute, changes."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("bench/**/*.md")))
PAGES = {"README.md": "index.md", **dict(zip(OTHERS, OTHERS, strict=True))}  # in the repository: here
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work in the repository, as they work here."""
    here = page.file.src_uri
    source = next((at for at, name in PAGES.items() if name == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        at = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        name = PAGES.get(at) or at.removeprefix("docs/")
        return match[1] + posixpath.relpath(name, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
