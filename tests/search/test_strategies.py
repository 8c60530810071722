"""Strategies on scores that need no model. Oracle: brute force over the whole space."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from fewbit.errors import FewbitError
from fewbit.files import Journal
from fewbit.search.run import pareto, run
from fewbit.search.search import climb, pick
from fewbit.search.space import Dimension, Problem
from fewbit.search.strategies import STRATEGIES, Tpe, strategy_named
from fewbit.workers import Local

WIDTHS = (8, 7, 6, 5, 4)
NEED = (1.0, 9.0, 0.1, 3.0)  # how much each edge suffers
DIMENSIONS = tuple(Dimension(f"edge{i}", WIDTHS) for i in range(len(NEED)))


def widths(candidate):
    return [WIDTHS[k] for k in candidate]


def separable(candidate):
    """Rounding noise of every edge by itself."""
    return sum(need * 4.0**-w for need, w in zip(NEED, widths(candidate), strict=True))


def interacting(candidate):
    """The same, and two edges that should have the same width."""
    w = widths(candidate)
    return separable(candidate) + 1e-3 * abs(w[0] - w[3])


def bits(candidate):
    return {"bits": float(sum(widths(candidate))) / len(NEED)}


BUDGET = Problem(DIMENSIONS, bits, {"bits": 6.0})
FREE = Problem(DIMENSIONS, bits, {})


def optimum(problem, score):
    space = itertools.product(*(range(len(d.options)) for d in problem.dimensions))
    return min(score(c) for c in space if problem.excess(c) == 0)


def found(name, problem, score, evaluations=150, seed=0):
    return run(problem, STRATEGIES[name](problem, evaluations, seed), score, evaluations=evaluations)


@pytest.fixture(params=sorted(STRATEGIES))
def name(request):
    if request.param == "tpe" and importlib.util.find_spec("optuna") is None:
        pytest.skip("needs optuna")
    return request.param


@pytest.mark.parametrize("score", [separable, pytest.param(interacting, marks=pytest.mark.slow)])
def test_a_budget_is_kept_and_the_optimum_reached(name, score):
    history = found(name, BUDGET, score)
    best = history.best(BUDGET)
    assert BUDGET.excess(best.candidate) == 0
    slack = {"greedy": 1.0, "annealing": 1.0}.get(name, 1.6)  # random and tpe sample: near it
    assert best.loss <= slack * optimum(BUDGET, score) + 1e-12


def test_optuna_says_nothing_and_afterwards_as_much_as_before(capfd):
    optuna = pytest.importorskip("optuna")
    before = optuna.logging.get_verbosity()
    assert before < optuna.logging.ERROR
    found("tpe", BUDGET, separable, evaluations=15)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_greedy_sees_through_a_loss_that_is_flat_and_noisy_at_its_widest():
    """Forty edges and a hundred trials; one bit less moves the loss by less than its noise, as in a deep net."""
    rng = random.Random(0)
    need = [10.0 ** rng.uniform(-2, 2) for _ in range(40)]
    problem = Problem(
        tuple(Dimension(f"edge{i}", WIDTHS) for i in range(40)), lambda c: {"bits": sum(widths(c)) / 40}, {"bits": 5.0}
    )

    def exact(candidate):
        return sum(n * 4.0**-w for n, w in zip(need, widths(candidate), strict=True))

    def noisy(candidate):
        return exact(candidate) + random.Random(hash(candidate)).uniform(-1, 1) * 5e-3

    least = [0] * 40  # of a convex sum the best is found by the cheapest step again and again
    while problem.excess(tuple(least)) > 0:
        at = min((i for i in range(40) if least[i] < 4), key=lambda i: need[i] * 4.0 ** least[i])
        least[at] += 1
    even = exact(problem.repaired(problem.start))
    best = exact(found("greedy", problem, noisy, evaluations=100).best(problem).candidate)
    assert exact(tuple(least)) <= best <= 1.25 * exact(tuple(least)) < 0.5 * even


def test_no_strategy_is_worse_than_its_start(name):
    history = found(name, BUDGET, interacting, evaluations=12)
    start = interacting(BUDGET.repaired(BUDGET.start))
    assert history.best(BUDGET).loss <= start


def test_the_seed_decides(name):
    one, two = (found(name, BUDGET, interacting, 60, seed=3) for _ in range(2))
    assert [t.candidate for t in one.trials] == [t.candidate for t in two.trials]


def test_only_random_parts_depend_on_the_seed():
    one, two = (found("random", BUDGET, separable, 40, seed=s).trials for s in (0, 1))
    assert [t.candidate for t in one] != [t.candidate for t in two]


def papers_greedy(score, count, options):
    """HAGO's pseudocode (papers.md 2.5): lower the current edge while not worse, else fix it and go on."""
    best, loss = [0] * count, score((0,) * count)
    tried = [tuple(best)]
    for edge in range(count):
        while best[edge] + 1 < options:
            trial = best.copy()
            trial[edge] += 1
            tried.append(tuple(trial))
            if score(tuple(trial)) > loss:
                break
            best, loss = trial, score(tuple(trial))
    return tried, tuple(best)


def plateau(candidate):
    """Edges 0 and 2 do not matter down to 6 bits; edge 1 is even better at 7."""
    w = widths(candidate)
    return max(0, 6 - w[0]) + max(0, 6 - w[2]) + abs(7 - w[1]) + (8 - w[3])


def test_greedy_without_a_budget_is_the_papers_trial_by_trial():
    tried, best = papers_greedy(plateau, 4, len(WIDTHS))
    history = found("greedy", FREE, plateau)
    assert [t.candidate for t in history.trials] == list(dict.fromkeys(tried))
    assert history.best(FREE).candidate == best == (2, 1, 2, 0)


def test_every_trial_of_the_samplers_is_within_the_budget():
    for name in ("random", "annealing"):
        assert all(BUDGET.excess(t.candidate) == 0 for t in found(name, BUDGET, separable, 80).trials)


def test_two_limits_at_once():
    problem = Problem(DIMENSIONS, lambda c: {**bits(c), "first": float(widths(c)[0])}, {"bits": 6.0, "first": 5.0})
    for name in ("greedy", "annealing"):
        best = found(name, problem, separable).best(problem)
        assert widths(best.candidate)[0] <= 5
        assert best.loss == pytest.approx(optimum(problem, separable))


def test_a_budget_that_nothing_keeps_is_refused():
    with pytest.raises(FewbitError, match="the smallest that one keeps is --budget 4bit: give that or more"):
        STRATEGIES["greedy"](Problem(DIMENSIONS, bits, {"bits": 3.0}), 10)


def test_repair_goes_over_an_option_that_is_worse():
    """Milliseconds that only rise and then fall: float 3, 8 bits 4, 4 bits 1."""
    problem = Problem((Dimension("op", (0, 8, 4)),), lambda c: {"ms": (3.0, 4.0, 1.0)[c[0]]}, {"ms": 2.0})
    assert problem.repaired((0,)) == (2,)


def test_what_pays_for_many_dimensions_only_is_found():
    """Each narrower edge saves 2, but the first of a width costs 5 more: of one edge alone all are larger. By brute force."""

    def size(candidate):
        return {"bytes": 1e3 * (40 - 2 * sum(candidate) + 5 * len({k for k in candidate if k}))}

    space = [*itertools.product(range(3), repeat=4)]
    least = min(size(candidate)["bytes"] for candidate in space)
    dimensions = tuple(Dimension(f"edge{i}", (8, 7, 6)) for i in range(4))
    assert Problem(dimensions, size).least("bytes") == least == 29e3
    for limit in sorted({size(candidate)["bytes"] for candidate in space}):
        problem = Problem(dimensions, size, {"bytes": limit})
        for begin in space:
            for rng in (None, random.Random(0)):
                assert problem.excess(problem.repaired(begin, rng)) == 0
    with pytest.raises(FewbitError, match="the smallest that one keeps is --budget 29KB"):
        STRATEGIES["greedy"](Problem(dimensions, size, {"bytes": least - 1}), 10)


def test_an_interrupted_search_keeps_its_best():
    calls = []

    def score(candidate):
        calls.append(candidate)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return separable(candidate)

    history = found("random", BUDGET, score)
    assert history.stopped == "interrupted"
    assert history.best(BUDGET).loss == min(separable(c) for c in calls[:4])


def test_time_ends_a_search_after_the_first_evaluation():
    clock = iter(range(0, 10**6, 10))
    journal = Journal(clock=lambda: float(next(clock)))
    history = run(BUDGET, STRATEGIES["random"](BUDGET, 50), separable, evaluations=50, seconds=5.0, journal=journal)
    assert (len(history.trials), history.stopped) == (1, "time")


def test_a_killed_search_computes_nothing_twice(name, tmp_path):
    whole = found(name, BUDGET, interacting, 40)
    calls = []

    def score(candidate):
        calls.append(candidate)
        if len(calls) == 20:
            raise RuntimeError("killed")
        return interacting(candidate)

    path = tmp_path / "search.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        run(BUDGET, STRATEGIES[name](BUDGET, 40), score, evaluations=40, journal=Journal(path))
    again = run(BUDGET, STRATEGIES[name](BUDGET, 40), score, evaluations=40, journal=Journal(path))
    assert again.trials == whole.trials
    assert len(calls) == len(whole.trials) + 1


class Three(Local):
    """Workers that evaluate the last of three first, and say how many were asked for."""

    count = 3

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def each(self, function, count, size):
        self.asked.append(count)
        for first in range(0, count, 3):
            part = range(first, min(first + 3, count))
            found = {k: next(iter(function(range(k, k + 1)))) for k in reversed(part)}
            yield from (found[k] for k in part)


def test_several_workers_go_the_way_of_one(name):
    """But for tpe, which proposes three at a time then; nothing is evaluated twice, and a search at rest asks for no more."""
    calls = []

    def score(candidate):
        calls.append(candidate)
        return interacting(candidate)

    workers = Three()
    strategy = STRATEGIES[name](BUDGET, 60, 3, at_once=workers.count)
    history = run(BUDGET, strategy, score, evaluations=60, workers=workers)
    assert sorted(calls) == sorted(trial.candidate for trial in history.trials)
    assert [t.loss for t in history.trials] == [interacting(t.candidate) for t in history.trials]
    if name == "tpe":
        assert history.trials != found(name, BUDGET, interacting, 60, seed=3).trials
        assert 1.5 < len(calls) / len(workers.asked) <= 3
    else:
        assert history.trials == found(name, BUDGET, interacting, 60, seed=3).trials
    assert max(workers.asked) >= {"random": 30, "greedy": 4, "annealing": 1, "tpe": 3}[name]


def test_a_killed_search_with_workers_goes_on_with_what_was_stored(tmp_path):
    """One worker's early results are not in the journal before those ahead of them; all that is there is not computed again."""
    path, calls = tmp_path / "search.jsonl", []

    def score(candidate):
        calls.append(candidate)
        if len(calls) == 20:
            raise RuntimeError("killed")
        return interacting(candidate)

    with pytest.raises(RuntimeError, match="killed"):
        run(BUDGET, STRATEGIES["random"](BUDGET, 40), score, evaluations=40, journal=Journal(path), workers=Three())
    stored = len(path.read_text().splitlines())
    again = run(BUDGET, STRATEGIES["random"](BUDGET, 40), score, evaluations=40, journal=Journal(path), workers=Three())
    assert again.trials == found("random", BUDGET, interacting, 40).trials
    assert 17 <= stored < 20
    assert len(calls) == 20 + 40 - stored


def test_pareto_is_what_brute_force_leaves():
    rows = [(1, 5), (2, 4), (2, 5), (3, 3), (1, 5), (4, 3), (5, 0)]
    assert pareto(rows) == [0, 1, 3, 6]


def test_without_optuna_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FewbitError, match=r"pip install 'fewbit\[search\]'"):
        Tpe(BUDGET, 10)


def test_an_unknown_strategy_offers_the_nearest():
    with pytest.raises(FewbitError, match="greedy"):
        strategy_named("greedi")


@dataclass(frozen=True)
class Made:
    """A `SearchProblem` of these dimensions without a model."""

    limits: Mapping[str, float]
    model = loss = None
    dimensions, always = DIMENSIONS, ()

    def costs(self, candidate):
        return {**bits(candidate), "bytes": 100 * bits(candidate)["bits"]}

    def problem(self, limits):
        return Problem(self.dimensions, self.costs, limits)


@pytest.mark.parametrize("limits", [{}, {"bits": 5.0}, {"bytes": 450.0}, {"bits": 4.0, "bytes": 800.0}])
@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("seconds", [None, 0.0])
def test_the_points_of_any_number_of_evaluations_keep_the_budget(monkeypatch, name, limits, evaluations, seconds):
    monkeypatch.setattr(importlib.import_module("fewbit.search.search"), "Scored", lambda *_: separable)
    problem = Made(limits)
    history = climb(problem, STRATEGIES[name], evaluations, seconds=seconds)
    points = pick(problem, history, 3)
    assert 1 <= len(history.trials) <= max(evaluations, 2)  # without time one for the first stage, one for the budget
    assert 1 <= len(points) <= 3
    for point in points:
        costs = problem.costs(history.trials[point].candidate)
        assert all(costs[what] <= limit for what, limit in limits.items())


@pytest.mark.parametrize(("more", "fewest"), [(0, 0), (1, 5), (2.6, 6), (4, 7)])
@pytest.mark.parametrize("limits", [{}, {"bytes": 1100.0}])
def test_fewer_bits_than_weights_can_have_are_not_tried_where_nobody_asked_for_them(monkeypatch, name, limits, more, fewest):
    """Weights that stay float count 32 bits: with enough of them no other widths get the average down to 7."""

    class Heavy(Made):
        def costs(self, candidate):
            return {"bits": bits(candidate)["bits"] + more, "bytes": 100 * (bits(candidate)["bits"] + more)}

    monkeypatch.setattr(importlib.import_module("fewbit.search.search"), "Scored", lambda *_: separable)
    problem = Heavy(limits)
    history = climb(problem, STRATEGIES[name], 40)
    assert len(history.trials) > 4
    assert min(trial.costs["bits"] for trial in history.trials) >= fewest
    points = [problem.costs(history.trials[point].candidate) for point in pick(problem, history, 3)]
    assert all(costs[what] <= limit for costs in points for what, limit in limits.items())


def test_a_budget_that_nothing_keeps_is_refused_before_the_search(monkeypatch, name):
    monkeypatch.setattr(importlib.import_module("fewbit.search.search"), "Scored", lambda *_: pytest.fail)
    fewest = min(bits(candidate)["bits"] for candidate in itertools.product(*(range(len(d.options)) for d in DIMENSIONS)))
    says = rf"keeps the budget 3bit; the smallest that one keeps is --budget {fewest:g}bit: give that or more"
    with pytest.raises(FewbitError, match=says):
        climb(Made({"bits": 3.0}), STRATEGIES[name], 300)
    problem = Problem(DIMENSIONS, lambda c: {"bits": bits(c)["bits"], "ms": 20 - bits(c)["bits"]}, {"bits": 5.0, "ms": 14.0})
    with pytest.raises(FewbitError, match="keeps the budget 5bit and 14ms, though one keeps each part of it"):
        STRATEGIES[name](problem, 300)


def test_the_seconds_of_a_journal_begin_with_those_before_it(tmp_path):
    clock = iter(range(100, 200))
    journal = Journal(tmp_path / "j", clock=lambda: float(next(clock)), spent=30.0)
    assert journal.seconds == 31.0
    journal.value("a", lambda: 1.0)
    again = Journal(tmp_path / "j", clock=lambda: float(next(clock)), spent=7.0)
    again.value("a", lambda: 0.0)
    assert again.seconds > 31.0  # those of the first run, which had spent 30
