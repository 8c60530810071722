"""Oracles: Python's integers, bit by bit, for packing; the folder itself for atomic writes."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fewbit.core.grid import Grid
from fewbit.errors import BadFile, Stopped
from fewbit.files import (
    Journal,
    mapped_tensors,
    pack,
    read_json,
    read_state,
    read_tensors,
    sha256,
    unpack,
    write_atomic,
    write_json,
    write_state,
    write_tensors,
)


@st.composite
def codes_on_a_grid(draw):
    grid = Grid(draw(st.integers(1, 8)), signed=draw(st.booleans()), narrow=draw(st.booleans()))
    code = st.integers(min(grid.low, grid.high), grid.high)
    return grid, draw(st.lists(code, max_size=40))


@given(codes_on_a_grid())
def test_packed_bytes_are_the_bits_of_one_long_integer(drawn):
    grid, codes = drawn
    packed = pack(torch.tensor(codes, dtype=torch.int32), grid.bits, grid.low)
    long = sum((code - grid.low) << (i * grid.bits) for i, code in enumerate(codes))
    size = math.ceil(len(codes) * grid.bits / 8)
    assert bytes(packed.tolist()) == long.to_bytes(size, "little")
    assert (packed.dtype, packed.shape) == (torch.uint8, (size,))


@given(codes_on_a_grid())
def test_unpacking_gives_back_what_was_packed(drawn):
    grid, codes = drawn
    q = torch.tensor(codes, dtype=torch.int32)
    assert torch.equal(unpack(pack(q, grid.bits, grid.low), grid.bits, grid.low, (len(codes),)), q)


def test_unpacking_restores_the_shape_in_row_order():
    q = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    assert torch.equal(unpack(pack(q, 5, 0), 5, 0, (2, 3, 4)), q)


@pytest.mark.parametrize("code", [-8, 9])
def test_a_code_outside_of_the_bits_is_refused_rather_than_wrapped(code):
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.tensor([0, code]), 4, -7)


@pytest.mark.parametrize("size", [4, 6])
def test_bytes_that_are_not_exactly_those_of_the_shape_are_refused(size):
    with pytest.raises(ValueError, match="bytes for 10 codes of 4 bits"):
        unpack(torch.zeros(size, dtype=torch.uint8), 4, 0, (10,))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_write_that_succeeds_leaves_the_file_alone_in_its_new_folder(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", lambda part: part.write_bytes(b"whole"))
    assert contents(tmp_path / "new") == {"a.txt": b"whole"}


def fails(error):
    def write(part):
        part.write_bytes(b"ha")
        raise error

    return write


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_raises_leaves_nothing_half_written(tmp_path, old):
    if old is not None:
        (tmp_path / "a.txt").write_bytes(old)
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "a.txt", fails(ZeroDivisionError()))
    assert contents(tmp_path) == ({} if old is None else {"a.txt": old})


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(Stopped, match=r"a\.txt cannot be written: the disk is full"):
        write_atomic(tmp_path / "a.txt", fails(OSError(errno.ENOSPC, "No space left on device")))
    assert contents(tmp_path) == {}


def test_a_folder_that_is_a_file_stops_the_work(tmp_path):
    (tmp_path / "run").write_bytes(b"in the way")
    with pytest.raises(Stopped, match="cannot be written"):
        write_atomic(tmp_path / "run" / "a.txt", lambda part: part.write_bytes(b"whole"))
    assert contents(tmp_path) == {"run": b"in the way"}


def test_a_folder_where_the_file_should_be_stops_the_work(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(Stopped, match="cannot be written"):
        write_atomic(tmp_path / "a.txt", lambda part: part.write_bytes(b"whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_keeps_its_values_and_the_order_of_its_keys(tmp_path):
    value = {"b": [1, 2.5, None], "a": "×"}
    write_json(tmp_path / "a.json", value)
    found = read_json(tmp_path / "a.json")
    assert found == value
    assert list(found) == ["b", "a"]


def test_json_with_nan_is_refused_and_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert contents(tmp_path) == {}


def test_a_json_file_that_is_missing_is_named_with_its_folder(tmp_path):
    with pytest.raises(BadFile, match=r"gone\.json does not exist; is .* a folder that `fewbit quantize` wrote"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe\x00", b""])
def test_a_broken_json_file_is_a_bad_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadFile, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")


def test_a_folder_where_json_should_be_is_a_bad_file(tmp_path):
    with pytest.raises(BadFile, match="cannot be read"):
        read_json(tmp_path)


def test_sha256_of_a_file_longer_than_a_piece_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_file_may_be_read_by_whom_the_umask_says_whichever_library_wrote_it(tmp_path: Path) -> None:
    for name, write in {"a": lambda p: p.write_text("x"), "b": lambda p: save_file({"x": torch.zeros(1)}, p)}.items():
        before = os.umask(0o027)
        try:
            write_atomic(tmp_path / name, write)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_tensors_of_any_layout_and_in_the_same_memory_are_read_as_they_were(tmp_path: Path) -> None:
    whole = torch.arange(120.0).view(2, 3, 4, 5)
    given = {
        "whole": whole, "same": whole, "part": whole[:, 1:2], "last": whole.contiguous(memory_format=torch.channels_last),
        "turned": whole[0, 0].t(), "spread": torch.tensor([3.0]).expand(4), "empty": whole[:0], "nothing": torch.zeros(0),
    }  # fmt: skip
    write_tensors(tmp_path / "a", given)
    for read in (read_tensors, mapped_tensors):
        assert {name: value.tolist() for name, value in read(tmp_path / "a").items()} == {
            name: value.tolist() for name, value in given.items()
        }


def test_a_changed_or_cut_line_of_a_journal_ends_it_and_is_computed_again(tmp_path):
    path, calls = tmp_path / "journal", []

    def run() -> list[float]:
        calls.clear()
        journal = Journal(path)
        return [journal.value(key, lambda key=key: calls.append(key) or float(len(key)) / 4) for key in ("a", "bb", "ccc")]

    assert run() == [0.25, 0.5, 0.75]
    whole = path.read_bytes()
    for found in (
        whole.replace(b'"value": 0.5', b'"value": 0.1'),
        whole[: len(whole) // 2],
        whole.replace(b'"check": ', b'"x": '),
    ):
        path.write_bytes(found)
        assert run() == [0.25, 0.5, 0.75]
        assert calls[-2:] == ["bb", "ccc"]
    assert (run(), calls) == ([0.25, 0.5, 0.75], [])


def test_unfinished_work_with_one_changed_bit_is_refused(tmp_path):
    path, tensors = tmp_path / "state", {"a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7), "none": torch.zeros(0)}
    write_state(path, tensors, {"loss": 0.25})
    found, about = read_state(path)
    assert about == {"loss": 0.25}
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {n: (t.dtype, t.tolist()) for n, t in tensors.items()}
    whole = path.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip()
    for place in (*range(8, 8 + len(header)), *range(len(whole) - 32, len(whole))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BadFile, match=r"is damaged .*starts anew"):
            read_state(path)
    path.write_bytes(whole[:-3])
    with pytest.raises(BadFile, match=r"is damaged .*starts anew"):
        read_state(path)
