"""The outputs behind a tail: what it chooses is discrete, so it is held to what the tail alone chooses from the same numbers.

What the tail reads are outputs of the layers, and compared like all of these (compare.py). Here the tail of the file that went
in, run by itself as written, is given what the layers of a written file gave in a session. As written its outputs must be the
same numbers; in a runtime that computes in another order they may move as far as rounding moves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.core.checks import OutputCheck
from fewbit.core.graph import Graph, Tail
from fewbit.core.inputs import Batch, arrays_of
from fewbit.folder import scratch
from fewbit.runtimes import AS_WRITTEN, OnnxRuntime, Session, open_session
from fewbit.verify.outputs import DISTURBANCES, MARGIN, STEP, apart

NEAR = 0.02  # two rows are the same where no number differs by more, as a share of the largest of its column
MOST = 1000  # rows of an output that are looked for in another
Arrays = Mapping[str, NDArray[Any]]


@contextmanager
def written(tail: Tail, near: Path | None = None) -> Iterator[Path]:
    """A tail as a file, for a moment; `near` is the folder of the file in front of it, if there is one."""
    with scratch(near) as folder:
        path = Path(folder) / "tail.onnx"
        path.write_bytes(tail.model)
        yield path


def tail_checks(
    graph: Graph, path: Path, runtime: str | None, images: Sequence[Batch], place: str = ""
) -> tuple[OutputCheck, ...]:
    """The outputs of a written file behind its tail, as written and, if there is a `runtime`, as it ships."""
    if graph.tail is None:
        return ()
    with written(graph.tail, path.parent) as file:
        alone = OnnxRuntime(file, optimise=False)
    sessions: dict[str, Session] = {"as written": OnnxRuntime(path, optimise=False, outputs=graph.inside)}
    if runtime is not None:
        sessions[f"{runtime}, as it ships"] = open_session(runtime, path, outputs=graph.inside)
    return tuple(
        check for name, session in sessions.items()
        for check in _checked(graph, session, alone, images, f"{place}{name}", exact=name == "as written")
    )  # fmt: skip


def _checked(
    graph: Graph, session: Session, alone: Session, images: Sequence[Batch], place: str, *, exact: bool
) -> Iterator[OutputCheck]:
    assert graph.tail is not None
    rows: dict[str, list[OutputCheck]] = {name: [] for name in graph.behind}
    for batch in images:
        arrays = arrays_of(graph.inputs, batch)
        found = session.run(*arrays)
        given = {**dict(zip((one.name for one in graph.inputs), arrays, strict=True)), **found}
        read = [given[name] for name in graph.tail.reads]
        expected, moved = alone.run(*read), list[Arrays]()
        if not exact and any(not np.array_equal(expected[name], found[name]) for name in rows):
            moved = [alone.run(*(_disturbed(array, seed) for array in read)) for seed in range(DISTURBANCES)]
        for name, checks in rows.items():
            ours, theirs, *others = (torch.from_numpy(np.array(values[name])) for values in (expected, found, *moved))
            checks.append(_check(place, name, ours, theirs, others))
    yield from map(_worst, rows.values())


def other_rows(graph: Graph, path: Path, runtime: str, images: Sequence[Batch]) -> str:
    """Words about the first output behind a tail that has another shape in a runtime than the tail alone as written gives for
    the same numbers; empty where there is none.
    """
    assert graph.tail is not None
    with written(graph.tail, path.parent) as file:
        alone = OnnxRuntime(file, optimise=False)
    session, found = open_session(runtime, path, outputs=graph.inside), dict[str, list[str]]()
    for batch in images:
        arrays = arrays_of(graph.inputs, batch)
        theirs = session.run(*arrays)
        given = {**dict(zip((one.name for one in graph.inputs), arrays, strict=True)), **theirs}
        ours = alone.run(*(given[name] for name in graph.tail.reads))
        for name in graph.behind:
            a, b = np.shape(theirs[name]), np.shape(ours[name])
            if a != b:
                rows = (f"{a[0]} row{'s' * (a[0] != 1)}", b[0]) if a and b and a[1:] == b[1:] else (f"the shape {a}", b)
                found.setdefault(name, []).append(f"{rows[0]} where {AS_WRITTEN} gives {rows[1]}")
    if not found:
        return ""
    name, what = next(iter(found.items()))
    return f"output {name} has {what[0]} for the same numbers (in {len(what)} of {len(images)} batches that were compared)"


def _disturbed(array: NDArray[Any], seed: int) -> NDArray[Any]:
    """Real numbers moved by rounding, up or down at random."""
    if array.dtype.kind != "f":
        return array
    signs = 2 * np.random.default_rng(seed).integers(0, 2, array.shape) - 1
    return array * (1 + STEP * signs).astype(array.dtype)  # type: ignore[no-any-return]


def _check(place: str, name: str, ours: Tensor, theirs: Tensor, moved: Sequence[Tensor]) -> OutputCheck:
    """One image. Where rounding alone changes how many rows there are, the share of them that both have is judged."""
    same, largest = (
        shared(ours, theirs),
        float(ours.abs().max()) if moved and ours.is_floating_point() and ours.numel() else 0.0,
    )
    numbers, limit = _apart(ours, theirs), MARGIN * max((_apart(ours, other) for other in moved), default=0.0)
    if limit < float("inf") or numbers == 0:
        return OutputCheck(place, name, numbers, STEP * largest + (limit if numbers else 0.0), same, 100 * same)
    lost = MARGIN * max(1 - shared(ours, other) for other in moved)
    return OutputCheck(f"{place}, share of rows", name, 1 - same, lost, same, 100 * same)


def _apart(a: Tensor, b: Tensor) -> float:
    return apart(a, b.to(a.dtype)).largest if a.shape == b.shape else float("inf")


def _worst(checks: Sequence[OutputCheck]) -> OutputCheck:
    """The check of the image that is furthest off, with the mean agreement."""
    worst = max(checks, key=lambda check: (check.wrong, check.difference))
    same = sum(check.agreement for check in checks) / len(checks)
    return OutputCheck(worst.place, worst.output, worst.difference, worst.limit, worst.cosine, same)


def shared(exact: Tensor, actual: Tensor) -> float:
    """The share of rows of two outputs that both have, in whatever order: boxes, their classes, their scores."""
    a, b = (t.double().reshape(-1, t.shape[-1] if t.ndim > 1 else 1)[:MOST] for t in (exact, actual))
    if not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        return float(a.shape == b.shape)
    limits = NEAR * a.abs().amax(0) if exact.is_floating_point() else torch.zeros(a.shape[1])
    near = torch.ones(len(a), len(b), dtype=torch.bool)
    for x, y, limit in zip(a.unbind(1), b.unbind(1), limits, strict=True):
        near &= (x[:, None] - y[None]).abs() <= limit
    return float(near.any(1).sum() + near.any(0).sum()) / (len(a) + len(b))
