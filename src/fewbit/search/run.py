"""The loop of a search: ask, evaluate, tell, until the strategy, the evaluations or the time have ended."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fewbit.files import Journal
from fewbit.search.space import Candidate, Problem
from fewbit.search.strategies import Strategy, Trial

REPEATS = 200  # proposals in a row that have been evaluated already: nothing new is left


@dataclass
class History:
    """Every candidate that was evaluated, once, in order; `stopped` says what ended the search before its evaluations."""

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
) -> History:
    """What a strategy finds with so many new evaluations. `history` is that of searches before, whose losses are known.

    A search that is interrupted (Ctrl-C) or out of time gives back what it has. The first candidate is always evaluated.
    """
    history, journal = history or History(), journal or Journal()
    known = {trial.candidate: trial.loss for trial in history.trials}
    told: list[Trial] = []
    made = repeated = 0
    least = math.inf
    try:
        while made < evaluations and repeated < REPEATS:
            candidate = strategy.propose(told)
            if candidate is None:
                break
            repeated += 1
            if candidate not in known:
                if known and seconds is not None and not journal.replaying and journal.seconds >= seconds:
                    history.stopped = "time"
                    break
                known[candidate] = journal.value(_key(problem, candidate), lambda c=candidate: score(c))  # type: ignore[misc]
                history.trials.append(Trial(candidate, known[candidate], problem.costs(candidate)))
                made, repeated = made + 1, 0
            told.append(Trial(candidate, known[candidate], {}))
            if problem.excess(candidate) == 0:
                least = min(least, known[candidate])
            progress(f"{least:.4g} after {made}")
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    return history


def _key(problem: Problem, candidate: Candidate) -> str:
    options = [(d.name, d.options[k]) for d, k in zip(problem.dimensions, candidate, strict=True)]
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]


def pareto(rows: Sequence[Sequence[float]]) -> list[int]:
    """The places of the rows that no other row beats: none is as small in every column and smaller in one."""
    kept = []
    for i, row in enumerate(rows):
        beaten = any(
            all(a <= b for a, b in zip(other, row, strict=True)) and (tuple(other) != tuple(row) or j < i)
            for j, other in enumerate(rows)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return kept
