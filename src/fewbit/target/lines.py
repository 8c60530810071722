"""Where something stands in a TOML text, for error messages: tomllib does not report the lines of fields."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

Location = tuple[int | str, ...]
HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
KEY = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
FARTHEST = 400  # lines that a statement goes on, at most
PART = re.compile(r"[\w-]+|\"[^\"]*\"|'[^']*'")
FAULTS = (  # how a message of tomllib begins, and what is wrong in plain words
    ("Expected '=' after a key", "a key has no value; write key = value"),
    ("Invalid value", 'a value is missing or no value; write a number, true, false, "a text", [a list] or {a table}'),
    ("Unclosed array", "a list is not closed by ], or a comma is missing in it"),
    ("Unclosed inline table", "a table is not closed by }, or a comma is missing in it"),
    ("Unterminated string", 'a text is not closed by "'),
    ("Illegal character '\\n'", 'a text is not closed by " in its line'),
    ("Expected \"'", "a text is not closed by '"),
    ("Expected ']", "a name in brackets is not closed; write [name], or [[name]] for one of several"),
    ("Invalid initial character for a key part", "a name is missing or has a sign that a name cannot have, and no quotes"),
    ("Invalid statement", "this is not a key; write key = value, [name] or [[name]]"),
    ("Expected newline", "more follows behind a value, or the value is not written as TOML writes it; one key in each line"),
    ("Cannot overwrite a value", "a key is given twice"),
    ("Duplicate inline table key", "a key is given twice"),
    ("Cannot declare", "a table is given twice; one of several is written [[name]]"),
    ("Cannot mutate", "a table is given twice, once in braces"),
    ("Unescaped", "a text has a single \\; write \\\\, or the text between single quotes"),
)


def syntax_error(text: str, error: ValueError) -> tuple[int, str]:
    """The line where the statement at fault begins, and what is wrong with it, in words."""
    lines = text.split("\n")
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
    last = int(found[1]) if found and found[1] else len(lines)
    first = next((n for n in range(last - 1, max(last - FARTHEST, 0), -1) if _is_toml("\n".join(lines[:n]))), 0) + 1
    first = next((n for n in range(first, last) if lines[n - 1].strip() and not lines[n - 1].lstrip().startswith("#")), last)
    raw = str(error)[: found.start()] if found else str(error)
    plain = next((words for start, words in FAULTS if raw.startswith(start)), raw)
    return first, f"{plain}: {lines[first - 1].strip()[:60]!r}"


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except ValueError:
        return False
    return True


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
