"""report.json and tables.json -> report.html: one file, no network, the same bytes for the same two files.

The four answers come first, then what was refused, then pictures, then every site. Shares (`*_share`) are
0 to 1, accuracies and agreements are percent, `ratio` is float over integer time (2 is twice as fast). A table that is
missing or empty says so in one sentence; `units` and `runs` are there for mixed precision and on request only.

    python -m fewbit.report.page RUN        reads RUN/report.json and RUN/tables.json, writes RUN/report.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from fewbit.errors import BadFile
from fewbit.report.answers import fallbacks, good, not_got, right, small_and_fast
from fewbit.report.pieces import Json, nothing
from fewbit.report.sections import images, made, pictures, site_table


def render(report: Json, tables: Json) -> str:
    """The whole page. What came from the user is escaped where it enters."""
    model, target, recipe, wanted = (escape(str(report.get(k, "?"))) for k in ("model", "target", "recipe", "bits"))
    caption = f"{model}, target {target}, recipe {recipe}, bits {wanted}."
    sections = {
        "refused": ("What was refused", fallbacks(report)),
        "pictures": ("Pictures", pictures(report, tables, caption)),
        "sites": ("Every site", site_table(tables.get("sites") or ())),
        "images": ("Some of the images", images(tables.get("images") or (), (tables.get("run") or {}).get("classes") or ())),
        "made": ("How this was made", made(report, tables.get("run") or {})),
    }
    cards = right(report, tables) + good(report) + small_and_fast(report) + not_got(report)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in sections.items())
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{inner}</section>' for name, (title, inner) in sections.items())
    here = files("fewbit.report")
    css, js = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{model} on {target}: fewbit</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head><body>'
        f'<header><p class="eyebrow">fewbit, post-training quantization</p><h1>{model}</h1><p class="lead">'
        f"Target <b>{target}</b>, recipe <b>{recipe}</b>, bits <b>{wanted}</b></p></header>"
        f'<main><div class="cards">{cards}</div><nav>{links}</nav>'
        f"<noscript>{nothing('The figures need JavaScript; their numbers are in tables.json.')}</noscript>{body}</main>"
        f"<script>{get_plotlyjs()}</script><script>{js}</script></body></html>\n"
    )


def write(path: Path, report: Json, tables: Json) -> None:
    """Write `path`, a pure function of the two."""
    path.write_text(render(report, tables), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m fewbit.report.page RUN", file=sys.stderr)
        return BadFile.exit_code
    run = Path(arguments[0])
    if not (run / "report.json").is_file():
        print(f"{run} has no report.json; make one with: fewbit quantize MODEL --images DIR --out {run}", file=sys.stderr)
        return BadFile.exit_code
    found = [run / name for name in ("report.json", "tables.json")]
    report, tables = (json.loads(p.read_text(encoding="utf-8")) if p.is_file() else {} for p in found)
    write(run / "report.html", report, tables)
    print(run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
