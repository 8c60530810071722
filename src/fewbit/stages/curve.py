"""The curve: accuracy after calibration on 1, 2, 4, ... 256 images, each set a subset of the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewbit.core.graph import Graph
from fewbit.data.images import Images
from fewbit.folder import scratch
from fewbit.progress import Progress
from fewbit.request import Request
from fewbit.run import Run
from fewbit.unfinished import keep_rows, rows_so_far

COUNTS = tuple(2**i for i in range(9))  # 1 to 256 images
FILE = "curve.json"


def curve(
    run: Run, request: Request, exact: Graph, calibration: Images, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each number of images, by the stages from observe to evaluate; empty where the request has no curve.

    Rows of a killed run are reused.
    """
    if not request.curve:
        return []
    path, count = folder / FILE, len(calibration)
    rows = rows_so_far(path)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(request.seed)).tolist()
    one = exact.at_a_time(1)
    counts = sorted({n - n % one for n in (*COUNTS, count) if n <= min(count, COUNTS[-1])} - {0})
    progress.expect(len(counts))
    for n in counts:
        if n not in {row["images"] for row in rows}:
            with scratch(folder) as own:
                part = run.fork(Path(own), calibration=calibration.subset(sorted(order[:n])))
                change = part["verdict"]["range_change"]
                rows.append({"images": n, "range_change": change, **part.do("evaluate", drawn=False).to_json()})
            keep_rows(path, rows)
        progress.advance()
    return rows
