"""report.json of a sweep -> one HTML page: a line for each of its runs, and why the others are none."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any

from fewbit.report.page import templates
from fewbit.report.tables import around
from fewbit.report.views import Facts, Table
from fewbit.report.words import Json, speed

TABLE = Table((
    "model", "target", "recipe", "bits", "end", "float:float:measure", "score:score:measure", "95 % interval:ends:ends",
    "agreement:agreement:%", "codes wrong:codes_wrong:#", "of codes:codes_compared:#", "file:bytes:MB",
    "beside float:beside", "in integers:integer_share:share", "not had:fallbacks:#", "seconds:seconds:#",
), search=True)  # fmt: skip
REFUSED = Table(("model", "target", "recipe", "bits", "end", "why"))


def drawn(row: Json) -> dict[str, Any]:
    """A row with what the page shows of it."""
    if "faster" not in row:
        return dict(row)
    labelled = row["quantized"] is not None
    return {
        **row,
        "unit": row["unit"] if labelled else "%",
        "score": row["quantized"],
        "float": row["float"] if labelled else None,
        "ends": around(row),
        "beside": ", ".join(f"{speed(ratio)} in {name}" for name, ratio in row["faster"].items()),
    }


def flat(row: Json) -> dict[str, Any]:
    """A row for a file of columns: the two ends of the interval, and times by runtime, are columns of their own."""
    plain = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
    low, high = row.get("interval") or (None, None)
    times = {f"{key} {name}": value for key in ("faster", "ms") for name, value in row.get(key, {}).items()}
    return {**plain, **({"low": low, "high": high} if "interval" in row else {}), **times}


def render(summary: Json) -> str:
    """The page."""
    rows = [drawn(row) for row in summary["rows"]]
    counts = Counter(row["end"] for row in rows)
    facts = {
        "rows": ", ".join(f"{count} {end}" for end, count in counts.items()),
        "measures": ", ".join(dict.fromkeys(row["measure"] for row in rows if row.get("measure"))),
        "made at once": summary["at once"],
        "command": summary["command"],
    }
    done = [row for row in rows if "faster" in row]
    others = [row for row in rows if row["why"]]
    links = [
        (f"rows/{row['row']}/report.html", " ".join(str(row[k]) for k in ("model", "target", "recipe", "bits"))) for row in done
    ]
    return templates().get_template("sweep.html.j2").render(
        title=PurePath(summary["file"]).stem, facts=Facts()([facts]), table=TABLE(done), others=REFUSED(others), links=links,
    )  # fmt: skip
