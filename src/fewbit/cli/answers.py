"""The four answers of a run on the terminal, and exit code 1 where it is not right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, out
from fewbit.errors import FewbitFailed


def show_answers(report: dict[str, Any]) -> None:
    """The four answers on the terminal, in the words of the report."""
    from fewbit.report.answers import answers

    table = Table(show_header=False, title=f"{report['model']} on {report['target']}, {report['recipe']}, {report['bits']}")
    warnings: list[str] = []
    for card in answers(report, {}):
        head = f"{card.word}: {card.big} {card.small}" if card.word else f"{card.big} {card.small}"
        wrong = card.loud if card.mood == "bad" else ()
        table.add_row(card.question, "\n".join((head.strip(), *wrong, *card.lines)).translate(PLAIN))
        warnings += [] if wrong else card.loud
    out.print(table)
    for warning in warnings:
        out.print(f"Warning: {warning}".translate(PLAIN), style="yellow", soft_wrap=True)


def fail_on_wrong(check: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Exit code 1 where the run is not right; `report` is its report.json."""
    if check["problems"]:
        message = "The run is not right. " + "; ".join(check["problems"]) + "."
        for fallback in report["fallbacks"]:
            if fallback["kind"] == "machine":
                message += f" {report['target']} needs {fallback['requested']}; `fewbit targets` lists what fits this machine."
        raise FewbitFailed(message)
