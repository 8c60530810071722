"""The model of the cost. Oracle: closed forms where one thing alone takes time."""

from __future__ import annotations

import math

import pytest
from bench.scale import played


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (7, 2), (10, 5), (3, 10)])
def test_where_only_the_tasks_take_time_they_go_in_rounds(count: int, workers: int) -> None:
    total, busy, command = played([2.0] * count, workers, 0.0, [0.0] * count)
    assert total == 2.0 * math.ceil(count / workers)
    assert busy == 2.0 * count / (workers * total)
    assert command == 0


def test_where_only_the_command_takes_time_workers_bring_nothing() -> None:
    for workers in (1, 4):
        total, busy, command = played([0.0] * 8, workers, 0.25, [0.5] * 8)
        assert (total, busy, command) == (8 * 0.75, 0.0, 1.0)


def test_a_long_task_goes_on_while_another_worker_does_the_others() -> None:
    assert played([3.0, 1.0, 1.0, 1.0], 2, 0.0, [0.0] * 4)[0] == 3.0
    assert played([1.0, 1.0, 1.0, 3.0], 2, 0.0, [0.0] * 4)[0] == 4.0
