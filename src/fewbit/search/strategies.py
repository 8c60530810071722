"""Strategies: each proposes the next candidates from the losses of the earlier ones.

`propose(losses)` returns candidates of which none depends on the loss of another, so that they may be evaluated at once; none
when the strategy is done. The first one is the start (all maxima, lowered evenly where that is over a limit), so no strategy
ends worse than it began.
"""

from __future__ import annotations

import importlib.util
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError, UnknownName
from fewbit.search.budget import too_small
from fewbit.search.space import Candidate, Problem

Steps = Generator[Sequence[Candidate], Sequence[float], None]
MANY = 256  # candidates of a proposal at most


@dataclass(frozen=True)
class Trial:
    """A candidate, its loss (smaller is better), and what it costs."""

    candidate: Candidate
    loss: float
    costs: Mapping[str, float]


class Strategy(ABC):
    """A way through the space of a problem. `evaluations` is the total number of candidates that will be evaluated, `at_once`
    how many of them can be at the same time: what `tpe` proposes depends on it, and nothing else does.
    """

    def __init__(
        self, problem: Problem, evaluations: int, seed: int = 0, start: Candidate | None = None, at_once: int = 1
    ) -> None:  # fmt: skip
        self.problem, self.evaluations, self.at_once = problem, evaluations, at_once
        self.rng = random.Random(seed)
        self.seed = seed
        begin = problem.repaired(problem.start if start is None else start)
        if begin is None:
            raise too_small(problem.limits, {name: problem.least(name) for name in problem.limits})
        self.start = begin
        self._steps: Steps | None = None

    def propose(self, losses: Sequence[float]) -> Sequence[Candidate]:
        """The next candidates, given the losses of the last ones."""
        try:
            if self._steps is None:
                self._steps = self.steps()
                return next(self._steps)
            return self._steps.send(losses)
        except StopIteration:
            return ()

    @abstractmethod
    def steps(self) -> Steps:
        """Yields candidates that may be evaluated at once; receives the loss of each."""


class Greedy(Strategy):
    """HAGO's: edges in order, each one bit lower as long as the trial is not worse than the best so far (2103.14949).

    Of equal losses the one with fewer bits is better, so edges that do not matter go down to the end. The paper has no budget;
    with one that the maxima are over, three steps are ours: the maxima are lowered by the edge that costs the least loss for
    what it saves (`descent`), and behind the paper's pass pairs are exchanged (`exchange`): one edge finer, others coarser.
    """

    growth = 4.0  # of a rise with each further bit: the power of rounding errors

    def steps(self) -> Steps:
        best, tight = self.start, self.problem.excess(self.problem.start) > 0
        (loss,) = yield [best]
        if tight:
            candidate = yield from self.descent()
            if candidate is not None:
                (value,) = yield [candidate]
                best, loss = (candidate, value) if value <= loss else (best, loss)
        for at in range(len(best)):
            while (neighbour := self.problem.moved(best, at, 1)) is not None and self.problem.excess(neighbour) == 0:
                (value,) = yield [neighbour]
                if value > loss:
                    break
                best, loss = neighbour, value
        if tight:
            yield from self.exchange(best, loss)

    def descent(self) -> Generator[Sequence[Candidate], Sequence[float], Candidate | None]:
        """From the maxima to a candidate within the limits; None where no step leads there. Its trials exceed the limits.

        Each dimension alone is measured where an even lowering would put it: one bit less than the maximum moves the loss of
        a deep net by less than its noise. What the steps to there and beyond add follows from the law of rounding errors, and
        those that add least for what they save are taken.
        """
        best, even = self.problem.start, self.start
        over = self.problem.excess(best)
        moves: list[tuple[int, int, Candidate]] = []  # of each dimension alone: the dimension, how far it goes, and where to
        for at, (now, level) in enumerate(zip(best, even, strict=True)):
            for by in (level - now,) if level != now else (1, -1):
                alone = self.problem.moved(best, at, by)
                if alone is not None and (level != now or self.problem.excess(alone) != over):
                    moves.append((at, by, alone))
                    break
        loss, *losses = yield [best, *(alone for _, _, alone in moves)]
        first: dict[int, tuple[int, float]] = {}  # by dimension: the direction that it goes, and what its first step adds
        for (at, by, _), value in zip(moves, losses, strict=True):
            rise, count = max(value - loss, 0.0), abs(by)
            first[at] = (by // count, rise * (self.growth - 1) / (self.growth**count - 1))
        steps = dict.fromkeys(first, 0)

        while over > 0:
            ahead: list[tuple[float, int, Candidate]] = []  # what a step adds for what it saves, its dimension, where it leads
            for at, (by, rise) in first.items():
                neighbour = self.problem.moved(best, at, by)
                if neighbour is not None and (gain := over - self.problem.excess(neighbour)) > 0:
                    ahead.append((rise * self.growth ** steps[at] / gain, at, neighbour))
            if not ahead:
                return None
            _, at, best = min(ahead)
            steps[at] += 1
            over = self.problem.excess(best)
        return best

    def exchange(self, best: Candidate, loss: float) -> Steps:
        """Move one dimension one option finer, repair at random places, and accept where the loss falls."""
        for _ in range(10 * self.evaluations):
            at = self.rng.randrange(len(best))
            finer = self.problem.moved(best, at, -1)
            neighbour = None if finer is None else self.problem.repaired(finer, self.rng)
            if neighbour is None or neighbour == best:
                continue
            (value,) = yield [neighbour]
            if value < loss:
                best, loss = neighbour, value


class Random(Strategy):
    """Uniform random options in every dimension, repaired at random places where over a limit."""

    def steps(self) -> Steps:
        yield [self.start]
        while True:
            samples = (
                tuple(self.rng.randrange(len(d.options)) for d in self.problem.dimensions)
                for _ in range(min(self.evaluations, MANY))
            )
            candidates = [self.problem.repaired(sample, self.rng) for sample in samples]
            yield [candidate for candidate in candidates if candidate is not None]


class Annealing(Strategy):
    """HAGO's old tuner: temperature 0.5 to 0.0005, a tenth of the dimensions moved by up to two options at a time.

    Temperatures are in units of the start's loss, which has no scale of its own (the paper's is an accuracy); cooling is set
    so that the last evaluation is the coldest. A move over a limit is brought back at random places.
    """

    hottest, coldest, share, farthest = 0.5, 0.0005, 0.1, 2

    def steps(self) -> Steps:
        at, (loss,) = self.start, (yield [self.start])
        unit = loss if 0 < loss < math.inf else 1.0
        cooling = (self.coldest / self.hottest) ** (1 / max(self.evaluations - 1, 1))
        temperature = self.hottest
        while True:
            neighbour = self.near(at)
            (value,) = yield [neighbour]
            if value <= loss or self.rng.random() < math.exp(-(value - loss) / (unit * temperature)):
                at, loss = neighbour, value
            temperature = max(temperature * cooling, self.coldest)

    def near(self, at: Candidate) -> Candidate:
        """A random neighbour within the limits."""
        count = max(1, round(self.share * len(at)))
        for _ in range(100):
            places = list(at)
            for i in self.rng.sample(range(len(at)), count):
                by = self.rng.choice([k for k in range(-self.farthest, self.farthest + 1) if k])
                places[i] = min(max(places[i] + by, 0), len(self.problem.dimensions[i].options) - 1)
            candidate = self.problem.repaired(tuple(places), self.rng)
            if candidate is not None and candidate != at:
                return candidate
        return at


class Tpe(Strategy):
    """Optuna's tree-structured Parzen estimator; a proposal over a limit is repaired, then reported. Of those evaluated
    at once each is proposed without the losses of the others.
    """

    def __init__(
        self, problem: Problem, evaluations: int, seed: int = 0, start: Candidate | None = None, at_once: int = 1
    ) -> None:  # fmt: skip
        if importlib.util.find_spec("optuna") is None:
            raise FewbitError(
                "--strategy tpe needs Optuna: pip install 'fewbit[search]'; greedy, random and annealing need nothing more."
            )
        super().__init__(problem, evaluations, seed, start, at_once)

    def steps(self) -> Steps:
        import optuna

        names = [f"{i}" for i in range(len(self.problem.dimensions))]
        kinds: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(0, len(d.options) - 1)
            for name, d in zip(names, self.problem.dimensions, strict=True)
        }
        said = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        finally:
            optuna.logging.set_verbosity(said)
        proposals: list[Candidate] = [self.start]
        while True:
            losses = yield proposals
            for proposal, loss in zip(proposals, losses, strict=True):
                values = dict(zip(names, proposal, strict=True))
                value = loss if math.isfinite(loss) else 1e30
                study.add_trial(optuna.trial.create_trial(params=values, distributions=kinds, value=value))
            proposals = []
            while len(proposals) < self.at_once:
                trial = study.ask(kinds)
                sample = tuple(trial.params[name] for name in names)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                candidate = self.problem.repaired(sample, self.rng)
                proposals += [] if candidate is None else [candidate]


STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    "greedy": Greedy,
    "random": Random,
    "annealing": Annealing,
    "tpe": Tpe,
}


def strategy_named(name: str) -> Callable[..., Strategy]:
    """The strategy with a name. Raises UnknownName with near matches."""
    if name not in STRATEGIES:
        raise UnknownName("strategy", name, STRATEGIES)
    return STRATEGIES[name]
