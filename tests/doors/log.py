"""What was answered, one line of JSON each, and the table at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """The answer to a case: `wrong` is empty where it was answered well."""

    kind: str
    name: str
    wrong: str
    seconds: float
    said: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


class Log:
    """Answers by the name of their case, in a file where there is one; with `again` those that were wrong are forgotten."""

    def __init__(self, path: Path | None, *, again: bool = False) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.rows = {row.key: row for row in (Row(**json.loads(line)) for line in lines)}
        if again:
            self.rows = {name: row for name, row in self.rows.items() if not row.wrong}

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Cases and how many were answered well, by kind, as it stands in docs/reliability.md."""
    lines = ["| kind | cases | answered well | wrong |", "|---|---|---|---|"]
    kinds = dict.fromkeys(row.kind for row in rows)
    for kind in (*kinds, None):
        part = [row for row in rows if kind is None or row.kind == kind]
        wrong = sum(1 for row in part if row.wrong)
        lines.append(f"| {kind or 'all'} | {len(part):,} | {len(part) - wrong:,} | {wrong:,} |")
    return "\n".join(lines)
