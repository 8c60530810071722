"""Tables on the terminal, whose figures stay whole however narrow it is."""

from __future__ import annotations

from collections.abc import Iterator

from rich import table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

FIGURE, NAME = 16, 9  # characters of a figure and of another word that are never parted; paths go on in the next line


class Table(table.Table):
    """A table of texts. Where its words do not fit side by side, each row is a list of names and values."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [[console.render_str(str(text)).plain for text in (one.header, *one.cells)] for one in self.columns]
        longest = [max(cell_len(line) for text in texts for line in text.split("\n")) for texts in columns]
        least = [max(_least(word) for text in texts for word in text.split() or [""]) for texts in columns]
        room = options.max_width - 3 * len(columns) - 1
        if sum(least) > room:
            yield Text("\n".join(self._lines(columns)), overflow="fold")
            return
        widths = longest
        while sum(widths) > room:
            widest = max((i for i, width in enumerate(widths) if width > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
        for column, width in zip(self.columns, widths, strict=True):
            column.width, column.overflow = width, "fold"
        yield from super().__rich_console__(console, options)

    def _lines(self, columns: list[list[str]]) -> Iterator[str]:
        """The title, and of each row its values behind the names of their columns."""
        if self.title:
            yield str(self.title)
        for values in zip(*(texts[1:] for texts in columns), strict=True):
            yield ""
            for (name, *_), value in zip(columns, values, strict=True):
                if value:
                    yield f"{name}: {value}" if name else value


def _least(word: str) -> int:
    """The narrowest column for a word."""
    return min(cell_len(word), FIGURE if word.lstrip("+-(<>")[:1].isdigit() else NAME)
