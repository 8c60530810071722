"""Oracle: identity. What is read from a shelf is what was put on it, and is the reader's own."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch

from fewbit.core.shelf import Rebatched, Shelf, count_of
from fewbit.errors import BadFile

X = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
VALUES = {
    "whole": X,
    "turned": X.permute(0, 2, 3, 1),
    "a part": X[:, 1:, :, ::2],
    "expanded": X[:, :1].expand(2, 7, 4, 5),
    "one number": X[0, 0, 0, 1],
    "empty": X[:0],
    "truth": X > 7,
    "bfloat16": X.bfloat16(),
    "int8": X.to(torch.int8)[:, :, 1],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_tensor_comes_back_with_its_strides(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    shelf = Shelf.of([value, value], tmp_path / "is made")
    for _ in range(2):
        found = shelf[1]
        assert found.dtype == value.dtype
        assert found.stride() == value.stride()
        assert torch.equal(found, value)
        found.as_strided((found.numel() and 1,), (1,)).zero_()  # the reader's own
    assert list((tmp_path / "is made").iterdir()) == []


def test_numbers_and_tuples_stay_what_they_are() -> None:
    shelf = Shelf.of([7, (X, 3), [X[0]]])
    assert shelf[0] == 7
    assert torch.equal(shelf[1][0], X)
    assert shelf[1][1] == 3
    assert torch.equal(shelf[2][0], X[0])
    assert len(list(shelf)) == 3


@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_those_of_all_batches(turned: bool) -> None:
    x = torch.randn(11, 3, 4)
    whole = x.transpose(1, 2) if turned else x
    shelf, wanted = Shelf.of(whole.split(4)), torch.tensor([10, 0, 3, 4, 4, 8])
    assert shelf.firsts == [0, 4, 8, 11]
    assert torch.equal(shelf.rows(wanted), whole[wanted])


@pytest.mark.parametrize("own", [1, 3, 4, 11])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [None, 1, 7, 100])
def test_batches_of_another_size_are_those_of_all_images_or_of_some_all_along(own: int, size: int, count: int | None) -> None:
    x = torch.randn(11, 2)
    some = x if count in (None, 100) else x[[math.floor(11 * k / count) for k in range(count)]]
    assert count_of(x.split(own)) == 11
    found, expected = list(Rebatched(x.split(own), size, count)), list(some.split(size))
    assert len(found) == len(Rebatched(x.split(own), size, count)) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_full_disk_is_said_and_what_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf.of([X])

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf, "_file", Full(shelf._file))
    with pytest.raises(BadFile, match=r"1 MB .* cannot be written: No space left on device.*--out DIR"):
        shelf.append(X)
    assert len(shelf) == 1
    assert torch.equal(shelf[0], X)
