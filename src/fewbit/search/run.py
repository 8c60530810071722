"""The loop of a search: propose and evaluate until the strategy, the evaluations or the time run out."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from fewbit.files import Journal
from fewbit.search.space import Candidate, Problem
from fewbit.search.strategies import Strategy, Trial
from fewbit.workers import LOCAL, Workers, in_order

REPEATS = 200  # known proposals in a row after which the search ends


@dataclass
class History:
    """Every evaluated candidate, once, in order; `stopped` says why the search ended early, if it did."""

    trials: list[Trial] = field(default_factory=list)
    stopped: str = ""

    def best(self, problem: Problem) -> Trial | None:
        """The smallest loss within the limits; of equal ones the coarser (HAGO's tie-break: fewer bits)."""
        allowed = [t for t in self.trials if problem.excess(t.candidate) == 0]
        return min(allowed, key=lambda t: (t.loss, -sum(t.candidate)), default=None)


def run(
    problem: Problem,
    strategy: Strategy,
    score: Callable[[Candidate], float],
    *,
    evaluations: int,
    history: History | None = None,
    seconds: float | None = None,
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda text: None,
    workers: Workers = LOCAL,
) -> History:
    """Run a strategy for up to `evaluations` new candidates. `history` is that of earlier searches, whose losses are known;
    `workers` evaluate what the strategy proposes at once, and the losses come and are stored in the order of the proposals.

    A search that is interrupted (Ctrl-C) or out of time returns what it has. The first candidate is always evaluated.
    """
    history, journal = history or History(), journal or Journal()
    losses = {trial.candidate: trial.loss for trial in history.trials}
    answers: list[float] = []
    count = repeats = 0
    least = math.inf
    try:
        while count < evaluations and repeats < REPEATS and (proposed := strategy.propose(answers)):
            new = [candidate for candidate in dict.fromkeys(proposed) if candidate not in losses][: evaluations - count]
            ahead, answers = _Ahead(score, new, workers), []
            for candidate in proposed:
                repeats += 1
                if candidate not in losses:
                    if losses and seconds is not None and not journal.replaying and journal.seconds >= seconds:
                        history.stopped = "time"
                        return history
                    losses[candidate] = journal.value(_key(problem, candidate), partial(ahead, candidate))
                    history.trials.append(Trial(candidate, losses[candidate], problem.costs(candidate)))
                    count, repeats = count + 1, 0
                answers.append(losses[candidate])
                if problem.excess(candidate) == 0:
                    least = min(least, losses[candidate])
                progress(f"{least:.4g} after {count}")
                if count == evaluations or repeats == REPEATS:
                    break
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it is answered: the command line need not send it again
        history.stopped = "interrupted"
    return history


class _Ahead:
    """The losses of new candidates, asked for in their order: behind the first that is not known from an earlier run, all are
    computed, as workers are free.
    """

    def __init__(self, score: Callable[[Candidate], float], new: Sequence[Candidate], workers: Workers) -> None:
        self.score, self.new, self.workers = score, new, workers
        self.coming: Iterator[float] | None = None

    def __call__(self, candidate: Candidate) -> float:
        if self.coming is None:
            rest = self.new[self.new.index(candidate) :]
            self.coming = in_order(self.workers, self.score, rest)
        return next(self.coming)


def _key(problem: Problem, candidate: Candidate) -> str:
    options = [(d.name, d.options[k]) for d, k in zip(problem.dimensions, candidate, strict=True)]
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]


def pareto(rows: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the Pareto-optimal rows: no other row is as small in every column and smaller in one."""
    front = []
    for i, row in enumerate(rows):
        beaten = any(
            all(a <= b for a, b in zip(other, row, strict=True)) and (tuple(other) != tuple(row) or j < i)
            for j, other in enumerate(rows)
            if j != i
        )
        if not beaten:
            front.append(i)
    return front
