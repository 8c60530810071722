"""Drawn pictures of the zoo: the same for a seed, of the size that each kind says; heads stand where the annotations say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bench.pictures import KINDS, bands, heads, pages, turned
from PIL import Image

SIZES = {
    "bands": (256, 256, 4),
    "pages": (480, 480, 3),
    "turned": (480, 480, 3),
    "lines": (48, 320, 3),
    "riddles": (416, 416, 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photographs")
    for name, colour in (("a", (1, 2, 3)), ("b", (9, 8, 7)), ("c", (0, 0, 0))):
        Image.new("RGB", (5, 4), colour).save(place / f"{name}.png")
    return place


@pytest.mark.parametrize("kind", SIZES)
def test_a_kind_is_the_same_for_a_seed_and_another_for_another(folder: Path, kind: str) -> None:
    one, again, other = (KINDS[kind](folder, 4, seed) for seed in (0, 0, 1))
    assert one.shape == (4, *SIZES[kind])
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (kind == "bands") == np.array_equal(one, other)


def test_the_brightest_band_stands_for_near_infrared(folder: Path) -> None:
    found = bands(folder, 4, 0)
    wanted = [[3, 2, 1, 3], [7, 8, 9, 9], [0, 0, 0, 0], [3, 2, 1, 3]]
    assert [np.unique(one.reshape(-1, 4), axis=0).tolist() for one in found] == [[pixel] for pixel in wanted]


def test_pages_turn_by_quarters_in_pairs(folder: Path) -> None:
    for i, (page, quarter) in enumerate(zip(pages(folder, 6, 0), turned(folder, 6, 0), strict=True)):
        np.testing.assert_array_equal(np.rot90(quarter, -(i // 2)), page)


def test_a_head_fills_the_upper_part_of_its_square(tmp_path: Path) -> None:
    """One person of 20 x 60 pixels: the square has a side of 36, and begins a seventh of it above and 8 to the left."""
    (tmp_path / "images").mkdir()
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[30:90, 40:60] = 255
    Image.fromarray(picture).save(tmp_path / "images" / "x.png")
    known = {
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}],
        "images": [{"id": 5, "file_name": "x.png"}],
        "annotations": [
            {"image_id": 5, "category_id": 1, "bbox": [40, 30, 20, 60]},
            {"image_id": 5, "category_id": 1, "bbox": [0, 0, 60, 20]},
            {"image_id": 5, "category_id": 2, "bbox": [0, 0, 20, 80]},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(known))
    (found,) = heads(tmp_path / "images", 4, 0)
    white = np.argwhere(found[..., 0] > 127)
    scale = 320 / 36
    np.testing.assert_allclose(white.min(0), [0.15 * 320, 8 * scale], atol=scale)
    np.testing.assert_allclose(white.max(0), [319, 28 * scale], atol=scale)
