"""What more workers bring: measured here with none, one and two, and predicted for many from what was measured.

    python bench/scale.py measure run-eff --images ../shared/data/ilsvrc_val --limit 640 --out scale.json
    python bench/scale.py candidates ../shared/models/vit_s14_tiny200.py:model --images ../shared/data/tiny200/train
    python bench/scale.py predict scale.json --runs run-eff run-vit run-resnet20 --trial 0.41

The prediction plays the tasks through: the command hands them out one after the other, each goes to the worker that is free
first, and then the command takes the results, one after the other, in the time that each of these took here. It knows no slow
machine and no shared disk that is too slow for its readers; the network is one of 10 Gbit.
"""

from __future__ import annotations

import argparse
import heapq
import importlib
import math
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fewbit import Run
from fewbit.choose.gptq import Gptq
from fewbit.choose.moments import Moments
from fewbit.choose.sensitivity import Losses
from fewbit.core.graph import Graph
from fewbit.files import read_json, write_json
from fewbit.request import SensitivityRequest
from fewbit.search.model import Loss, Model, Scored
from fewbit.stages import SENSITIVITY
from fewbit.stages.sensitivity import some, units
from fewbit.stages.times import context_of
from fewbit.verify.evaluate import TOGETHER
from fewbit.workers import LOCAL, Local, Workers, in_order, opened

Tasks = tuple[Sequence[float], Sequence[float]]  # seconds of each on a worker, and for its result in the command

WHATS = ("sensitivity", "search", "ridges")
EMPTY = 500  # tasks that do nothing
NETWORK = 1.25e9  # bytes a second into the machine of the command: 10 Gbit
IMAGENET, MODELS, TRIALS = 50_000, 1_000, 10_000


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes. `image` is what a worker needs for an image, `opening` what it needs once in a task, `taking` what the
    command needs for the outputs of an image, `task` what it needs to hand out a task and to take its result.
    """

    start: float
    task: float
    opening: float
    image: float
    taking: float
    image_bytes: float
    sent_bytes: int
    throughput: dict[str, float]
    load: tuple[float, float]


class Kept(Local):
    """Keeps what was given, and gives it again."""

    def __init__(self) -> None:
        object.__setattr__(self, "kept", [])

    def each(self, function: Callable[[range], Iterable[Any]], count: int, size: int) -> Iterator[Any]:
        if not self.kept:
            self.sent = len(pickle.dumps(function))
            self.kept.extend(function(range(count)))
        yield from self.kept


def nothing(item: int) -> int:
    return item


def warm(item: int) -> None:
    """Import what a task imports, on each worker: one that is done sleeps until the others are."""
    importlib.import_module("fewbit.verify")
    time.sleep(5)


def measure(folder: Path, source: str, limit: int, threads: int) -> Measured:
    """Evaluate a run here, then on one and on two workers; the scores have to be the same."""
    run = Run.open(folder)
    images = run.unseen(run.images(source, limit=limit))
    load = os.getloadavg()[0]

    def scored(workers: Workers, images: Any = images) -> tuple[float, Any]:
        begin = time.perf_counter()
        score = run.do("evaluate", scored=images, threads=threads, workers=workers)
        return time.perf_counter() - begin, score.to_json()

    run.do("twin")
    few, first = scored(LOCAL, images.subset(range(16)))[0], scored(LOCAL)
    image = (first[0] - few) / (len(images) - 16)
    kept = Kept()
    scored(kept)
    throughput, empty = {"this process": len(images) / first[0]}, []
    for count in (1, 2):
        begin = time.perf_counter()
        with opened(count, None, threads) as workers:
            list(workers.map(warm, range(count)))
            started = time.perf_counter() - begin - 5
            seconds, score = scored(workers)
            assert score == first[1], "the score is another one"
            throughput[f"{count} of Ray"] = len(images) / seconds
            begin = time.perf_counter()
            list(workers.map(nothing, range(EMPTY)))
            empty.append((time.perf_counter() - begin) / EMPTY)
    return Measured(
        started, min(empty), max(few - 16 * image, 0.0), image, scored(kept)[0] / len(images),
        len(pickle.dumps(kept.kept)) / len(images), kept.sent, throughput, (load, os.getloadavg()[0]),
    )  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """`count` losses of `fewbit sensitivity` or `fewbit search`, or ridges of a layer: seconds of each round by who computed
    them, with what workers open first; the seconds that one needs for that, and the bytes that go to each machine once.
    """

    what: str
    count: int
    seconds: dict[str, list[float]]
    opening: float
    sent_bytes: int
    load: tuple[float, float]

    def rows(self) -> Iterator[str]:
        """Of a table: who, losses a second (the middle round), and how many times as many as in this process."""
        here = self.seconds["this process"]
        for who, found in self.seconds.items():
            ratio = statistics.median(a / b for a, b in zip(here, found, strict=True))  # of rounds, which lie side by side
            yield f"| {self.what} | {who} | {self.count / statistics.median(found):.2f} | {ratio:.2f} |"


def opened_alone(function: Callable[[Any], float], item: Any) -> tuple[float, int]:
    """(seconds that another process needs to open a function and for a first loss, more than for one; bytes that are sent)."""
    text = pickle.dumps(function)
    begin = time.perf_counter()
    theirs = pickle.loads(text)
    theirs(item)
    first = time.perf_counter()
    theirs(item)
    return (first - begin) - (time.perf_counter() - first), len(text)


def candidates(
    ref: str, source: str, whats: Sequence[str], count: int, rounds: int, threads: int
) -> tuple[list[Candidates], float]:
    """Losses of both commands, here, on one and on two workers in turns; they have to be the same. Seconds of an empty task."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as folder:
        request = SensitivityRequest(
            model=ref, images=source, recipe="minmax", calibration=64, scored=16, labels=False, threads=threads,
            out=Path(folder) / "out",
        )  # fmt: skip
        with Run.start(request, SENSITIVITY, kind="sensitivity") as run:
            graph, plan, batches = run["graph"], run["plan"], some(run["scored"], run["graph"], request.scored)
            sets = [(one.ops, one.ops) for one in units(graph, plan)]
            context, images = context_of(graph, run["stats"], request), list(run["calibration"].batches(8))
            dimensions = Model(context, request.method).dimensions({})
            layer, draw = largest(graph), random.Random(0)
            trials = [tuple(draw.randrange(len(one.options)) for one in dimensions) for _ in range(count)]

            def score() -> Scored:
                return Scored(Model(context, request.method), Loss(graph, images, None), dimensions)

            kinds: dict[str, tuple[int, Callable[[], Callable[[Workers], Iterator[float]]]]] = {
                "sensitivity": (len(sets), lambda: partial(Losses(graph, plan, batches).of_each, sets)),
                "search": (count, lambda: partial(in_order, function=score(), items=trials)),
                "ridges": (len(Gptq().ridges), lambda: partial(ridge_of, *layer)),
            }
            alone = {
                "sensitivity": lambda: opened_alone(partial(loss_of, Losses(graph, plan, batches)), sets[0]),
                "search": lambda: opened_alone(score(), trials[0]),
                "ridges": lambda: (0.0, len(pickle.dumps([layer[0], *(one.to_read() for one in layer[1:])]))),
            }
            kinds = {what: kinds[what] for what in whats}
            found: dict[str, dict[str, list[float]]] = {what: {} for what in kinds}
            right, load, empty = {what: list(made()(LOCAL)) for what, (_, made) in kinds.items()}, os.getloadavg()[0], []
            for _ in range(rounds):
                for who, number in (("this process", None), ("1 of Ray", 1), ("2 of Ray", 2)):
                    with opened(number, None, threads) as workers:
                        list(workers.map(warm, range(number or 0)))
                        for what, (_, made) in kinds.items():
                            losses, begin = made(), time.perf_counter()
                            assert list(losses(workers)) == right[what], "a loss is another one"
                            found[what].setdefault(who, []).append(time.perf_counter() - begin)
                        begin = time.perf_counter()
                        list(workers.map(nothing, range(EMPTY)))
                        empty += [(time.perf_counter() - begin) / EMPTY] if number else []
    loads = load, os.getloadavg()[0]
    return [Candidates(what, n, found[what], *alone[what](), loads) for what, (n, _) in kinds.items()], statistics.median(empty)


def largest(graph: Graph) -> tuple[torch.Tensor, Moments, Moments]:
    """What GPTQ selects a ridge by, of the shape of the layer with the longest rows; the numbers are drawn."""
    weights = [site.shape for site in graph.sites if site.role == "weight" and len(site.shape) == 2]
    o, m = max(weights, key=lambda shape: (shape[1], shape[0]))
    x, y, noise = (torch.randn(2 * m, m, generator=torch.Generator().manual_seed(k)) for k in range(3))
    inside, outside = (Moments.of([(some + noise, some, None)], 1, o).centre() for some in (x, y))
    return torch.randn(o, m, generator=torch.Generator().manual_seed(3)), inside, outside


def ridge_of(w: torch.Tensor, inside: Moments, outside: Moments, workers: Workers) -> Iterator[float]:
    yield Gptq().ridge(w, inside, outside, workers) or 0.0


def loss_of(losses: Losses, both: tuple[Sequence[str], Sequence[str]]) -> float:
    return losses(*both)


def played(seconds: Sequence[float], workers: int, handing: float, taking: Sequence[float]) -> tuple[float, float, float]:
    """(time until the last result is taken, share of it that workers are busy, share that the command is) of tasks."""
    free, clock, ends = [0.0] * workers, 0.0, []
    for needed in seconds:
        clock += handing
        begin = max(heapq.heappop(free), clock)
        heapq.heappush(free, begin + needed)
        ends.append(begin + needed)
    for end, work in sorted(zip(ends, taking, strict=True)):
        clock = max(clock, end) + work
    return clock, sum(seconds) / (workers * clock), (sum(taking) + handing * len(seconds)) / clock


def table(title: str, what: str, tasks: Tasks, task: float) -> None:
    """Rows for 1 to 1,000 workers."""
    head = ["workers", what, "time", "times as fast as one", "workers busy", "command busy"]
    print(f"\n{title}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    seconds, taking = tasks
    alone = played(seconds, 1, task, taking)[0]
    for workers in (1, 2, 10, 100, 1000):
        total, busy, command = played(seconds, workers, task, taking)
        print(f"| {workers:,} | {len(seconds):,} | {told(total)} | {alone / total:.1f} | {busy:.0%} | {command:.0%} |")


def told(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def predict(found: Measured, rows: Sequence[float], trial: float) -> None:
    """The tables of docs/scale.md."""
    each = found.taking + found.image_bytes / NETWORK

    def imagenet(size: int) -> Tasks:
        parts = [min(size, IMAGENET - k) for k in range(0, IMAGENET, size)]
        return [found.opening + n * found.image for n in parts], [n * each for n in parts]

    def some(seconds: Sequence[float], count: int) -> Tasks:
        return [seconds[k % len(seconds)] for k in range(count)], [0.0] * count

    whole, apart = 16 * TOGETHER, "that do not depend on each other"
    for size in (whole, 16 * whole):
        table(f"{IMAGENET:,} images, {size:,} in a task", "tasks", imagenet(size), found.task)
    table(f"A sweep of {MODELS:,} models, {statistics.mean(rows):.0f} s each", "rows", some(rows, MODELS), found.task)
    table(f"{TRIALS:,} trials {apart}, {trial:g} s each", "trials", some([trial], TRIALS), found.task)
    least = each + found.task / whole
    most = math.ceil(found.image / least)
    print(f"\nThe command takes {1e6 * least:.0f} µs for an image, a worker {1e3 * found.image:.0f} ms: enough for {most}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("measure")
    one.add_argument("run", type=Path)
    one.add_argument("--images", required=True)
    one.add_argument("--limit", type=int, default=512)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--out", type=Path, default=Path("scale.json"))
    two = parts.add_parser("predict")
    two.add_argument("found", type=Path)
    two.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs, for the seconds that they took")
    two.add_argument("--trial", type=float, default=1.0, help="seconds of a trial of a search")
    three = parts.add_parser("candidates")
    three.add_argument("model")
    three.add_argument("--images", required=True)
    three.add_argument("--what", nargs="+", choices=WHATS, default=WHATS)
    three.add_argument("--count", type=int, default=48, help="trials of a search")
    three.add_argument("--rounds", type=int, default=3)
    three.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.part == "candidates":
        both, empty = candidates(args.model, args.images, args.what, args.count, args.rounds, args.threads)
        print(
            "| losses of | by | a second | times as many |\n|---|---|---|---|",
            *(r for one in both for r in one.rows()),
            sep="\n",
        )
        for one in both:
            print(f"{one.what}: {one.sent_bytes:,} bytes sent, {one.opening:.2f} s to open, load {one.load}, {one.seconds}")
        print(f"An empty task takes {1e3 * empty:.2f} ms.")
    elif args.part == "measure":
        write_json(args.out, asdict(measure(args.run, args.images, args.limit, args.threads)))
        print(args.out.read_text())
    else:
        rows = [sum(read_json(folder / "report.json")["seconds"].values()) for folder in args.runs]
        predict(Measured(**read_json(args.found)), rows, args.trial)


if __name__ == "__main__":
    main()
