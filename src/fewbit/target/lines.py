"""The line number of a field in a TOML text, for error messages: tomllib does not report line numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

Location = tuple[int | str, ...]
HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
KEY = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
PART = re.compile(r"[\w-]+|\"[^\"]*\"|'[^']*'")


def line_of(text: str, location: Location) -> int:
    """The line (from 1) of a field, by its path as `("op", 2, "operands", "weight")`; that of the nearest part that exists.

    Tables, arrays of tables, dotted keys and tables in one or more lines are followed; a number counts entries from 0.
    """
    best, deepest = 1, 0
    for line, path in _places(text):
        common = 0
        while common < min(len(path), len(location)) and path[common] == location[common]:
            common += 1
        if common > deepest and common == len(path):
            best, deepest = line, common
    return best


def _places(text: str) -> Iterator[tuple[int, Location]]:
    """(line, path) of every table header and key, in order; keys of a table in braces behind the key that it belongs to."""
    table: Location = ()
    counts: dict[Location, int] = {}
    inside: Location = ()  # the key whose value goes on in the next line
    depth = 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = _without_strings_and_comment(raw)
        if depth == 0 and (header := HEADER.match(raw)) is not None:
            table = _resolved(header[2], counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            yield number, table
            continue
        if depth == 0 and (key := KEY.match(raw)) is not None:
            inside = (*table, *_parts(key[1]))
            yield number, inside
        if "{" in line or depth:
            for inner in re.finditer(r"(?:[{,]|^)\s*([\w-]+)\s*=", line):
                if depth or inner.start() >= line.find("{"):
                    yield number, (*inside, inner[1])
        depth += line.count("{") + line.count("[") - line.count("}") - line.count("]")


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in PART.findall(dotted))


def _resolved(dotted: str, counts: dict[Location, int]) -> Location:
    """The path of a header; a part that is an array of tables means its last entry, but for the last part."""
    path: Location = ()
    parts = _parts(dotted)
    for i, part in enumerate(parts):
        path = (*path, part)
        if path in counts and i < len(parts) - 1:
            path = (*path, counts[path])
    return path


def _without_strings_and_comment(line: str) -> str:
    """The line with strings blanked (at the same length) and its comment cut off."""
    blank = re.sub(r"\"(?:\\.|[^\"\\])*\"|'[^']*'", lambda match: "_" * len(match[0]), line)
    return blank.partition("#")[0]
