"""What outputs of the zoo's files mean: strings by hand and by force, faces where a map says, pixels above a threshold."""

from __future__ import annotations

from functools import cache
from itertools import groupby

import pytest
import torch
from bench.answers import BLANK, FACES, STRINGS, TEXT, decoded, distance

from fewbit.task.selection import select


def test_what_is_read_has_neither_blanks_nor_repetitions() -> None:
    steps = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert decoded(steps) == [c for c, _ in groupby(steps) if c != BLANK]
    assert decoded([]) == []
    assert decoded([3, 3, BLANK, 3]) == [3, 3]


@pytest.mark.parametrize(("a", "b"), [("kitten", "sitting"), ("", "abc"), ("abc", ""), ("flaw", "lawn"), ("abcabc", "cba")])
def test_the_distance_is_the_fewest_changes(a: str, b: str) -> None:
    @cache
    def fewest(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(fewest(i - 1, j) + 1, fewest(i, j - 1) + 1, fewest(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert distance([*map(ord, a)], [*map(ord, b)]) == fewest(len(a), len(b))


def test_lines_and_characters_that_are_read_alike_are_counted() -> None:
    one, two = (torch.eye(5)[torch.tensor(steps)] for steps in ([[1, 0, 2, 3], [4, 4, 0, 1]], [[1, 0, 2, 2], [4, 0, 1, 1]]))
    meter = STRINGS.meter(None)
    torch.testing.assert_close(meter.add([one], [two]), torch.tensor([1 / 3, 0.0]))
    rating = meter.rating([])
    assert rating.agreement == 50
    assert rating.rows[0]["agreement"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert STRINGS.divergence([one], [one]) == pytest.approx(0, abs=1e-5)
    assert STRINGS.divergence([one], [two]) > 1


def test_a_face_stands_where_its_cell_and_offset_say() -> None:
    scores, sizes, offsets = torch.zeros(1, 1, 8, 10), torch.zeros(1, 2, 8, 10), torch.zeros(1, 2, 8, 10)
    scores[0, 0, 3, 6], sizes[0, :, 3, 6] = 0.9, torch.tensor([4.0, 2.0]).log()
    offsets[0, :, 3, 6] = torch.tensor([0.25, -0.25])
    (found,) = select(FACES.decoder, [scores, sizes, offsets])
    row, column, height, width = 4 * (3 + 0.25 + 0.5), 4 * (6 - 0.25 + 0.5), 16, 8
    corners = [column - width / 2, row - height / 2, column + width / 2, row + height / 2]
    torch.testing.assert_close(found.boxes.float(), torch.tensor([corners]))
    assert found.scores.tolist() == pytest.approx([0.9])


def test_text_begins_at_the_threshold_of_its_detector() -> None:
    exact = torch.tensor([[[[0.29, 0.31], [0.6, 0.1]]]])
    meter = TEXT.meter(None)
    meter.add([exact], [torch.tensor([[[[0.31, 0.31], [0.6, 0.1]]]])])
    assert meter.rating([]).agreement == 75
