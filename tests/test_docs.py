"""What the pages and the maps of the rooms say: links lead somewhere, options exist, tables are those of the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent for path in (ROOT / "src" / "fewbit").glob("*/__init__.py"))
BY_TABLE = "stages"  # whose files are those of a table in docs/how-it-works.md
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = page if not name else page.parent / name
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
    assert len((ROOT / "bench" / "README.md").read_text(encoding="utf-8").splitlines()) <= 350


def rows_of(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with a word."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = text.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_stages_is_that_of_the_source() -> None:
    from fewbit.stages import STAGES

    rows = rows_of("how-it-works.md", "stage")
    assert [row[0] for row in rows] == [stage.name for stage in STAGES]
    for row, stage in zip(rows, STAGES, strict=True):
        assert row[2] == ", ".join(stage.gives), stage.name
        assert row[3] == ", ".join(stage.files), stage.name
        named = set(row[1].split(", "))
        if stage.name not in ("curve", "summarize", "report"):
            assert named <= set(stage.takes(stage.run)), stage.name


def test_the_order_of_rooms_is_that_of_the_source() -> None:
    from test_imports import COMMON, ORDER

    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert " < ".join(ORDER) in text
    assert ", ".join(f"`{room}`" for room in sorted(COMMON)[:-1]) + f" and `{max(COMMON)}` are for all" in text


@pytest.mark.parametrize("room", [room for room in ROOMS if room.name != BY_TABLE], ids=lambda room: room.name)
def test_the_map_of_a_room_names_its_modules(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/__init__.py")}
    assert modules - {"__init__"} - set(re.findall(r"\w+", text)) == set()


def test_the_commands_of_the_pages_have_the_options_of_the_request() -> None:
    from fewbit.request import Request
    from fewbit.request.types import option

    known = {option(name) for name in Request.model_fields}
    used = set()
    for page in PAGES[:-1]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"fewbit quantize [^\n`#]*", text):
            used |= set(re.findall(r"(?<= )--[a-z][a-z-]+", command))
    assert used
    assert used <= known, used - known


def test_the_recipes_of_the_methods_page_are_those_that_have_a_name() -> None:
    from fewbit.recipes import RECIPES

    named = {name for row in rows_of("methods.md", "recipe") for name in re.findall(r"`([\w-]+)`", row[0])}
    assert named == set(RECIPES)


def test_each_cell_beside_other_tools_has_a_command_or_a_source() -> None:
    text = (ROOT / "docs" / "beside-others.md").read_text(encoding="utf-8")
    tables, _, better = text.partition("## Where the others are better")
    for part, ours in ((tables, r"`fewbit \w+ |^the same$"), (better, r"`fewbit \w+ |^no|^PyTorch, ONNX$")):
        rows = [
            line.strip("| ").split(" | ")
            for line in part.splitlines()
            if re.match(r"\| [^|]", line) and "| fewbit |" not in line
        ]
        assert len(rows) > 6
        for what, own, *others in rows:
            assert re.search(ours, own), f"{what}: {own}"
            assert len(others) == 5, what
            assert [cell for cell in others if cell != "–" and "](" not in cell and "][" not in cell] == [], what
