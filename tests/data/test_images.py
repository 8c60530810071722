"""Oracles: timm's transform, torch and Pillow recomputed by hand, and small folders made in tmp_path."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewbit.data import prepare
from fewbit.data.images import Images, Preprocess, open_images, read_classes
from fewbit.errors import BadFile, BadImages, UnknownName

SHARED = Path(__file__).parents[2].parent / "shared"
TINY = Preprocess(size=(3, 8, 8))
needs_shared = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data beside the checkout")


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(height, width, seed))


def encoded(seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed=seed).save(buffer, kind)
    return buffer.getvalue()


def folder(root: Path, **classes: int) -> Path:
    """A folder of class folders with that many images each; `flat` puts them directly into `root`."""
    for name, count in classes.items():
        where = root if name == "flat" else root / name
        where.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(seed=i).save(where / f"{i}.png")
    return root


def parquet(path: Path, rows: int, label: list[int] | None = None, start: int = 0, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(rows)]
    pq.write_table(pa.table({"image": cells} | ({"label": label} if label else {})), path, row_group_size=group)
    return path


def everything(images: Images, size: int = 4) -> torch.Tensor:
    return torch.cat(list(images.batches(size)))


# Preprocess


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (100, 90), (224, 224), (61, 500)])
@pytest.mark.parametrize(
    "cfg",
    [
        {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic"},
        {
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "interpolation": "bilinear",
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        },
        {"input_size": (3, 112, 112), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 96, 128), "crop_pct": 0.95, "crop_mode": "center"},
        {"input_size": (3, 96, 128), "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "lanczos"},
        {"input_size": (3, 96, 128), "crop_pct": 0.9, "crop_mode": "border", "interpolation": "nearest"},
        {"input_size": (3, 64, 64), "crop_pct": None},
        {},
    ],
)
def test_preprocess_from_timm_equals_timms_transform_exactly(cfg: dict[str, Any], shape: tuple[int, int]) -> None:
    data = pytest.importorskip("timm.data")
    resolved = data.resolve_data_config(pretrained_cfg={"url": "", **cfg})
    wanted = data.create_transform(**resolved, is_training=False)(picture(*shape))
    assert torch.equal(Preprocess.from_timm(cfg)(picture(*shape)), wanted)
    assert Preprocess.from_timm(cfg) == Preprocess.from_timm(resolved)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "LA", "1"])
def test_pictures_that_are_not_rgb_are_converted_as_timm_converts_them(mode: str) -> None:
    data = pytest.importorskip("timm.data")
    cfg = {"input_size": (3, 8, 8), "crop_pct": 1.0}
    other = picture().convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    wanted = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg), is_training=False)(other.convert("RGB"))
    assert torch.equal(Preprocess.from_timm(cfg)(other), wanted)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_without_antialias_the_whole_float_picture_is_interpolated_and_not_clamped(interpolation: str) -> None:
    x = torch.from_numpy(pixels(30, 40)).permute(2, 0, 1)[None].float() / 255
    wanted = torch.nn.functional.interpolate(x, (16, 20), mode=interpolation, align_corners=False)[0]
    plain = Preprocess((3, 16, 20), (0.0,) * 3, (1.0,) * 3, interpolation=interpolation, antialias=False)
    torch.testing.assert_close(plain(picture(30, 40)), wanted, atol=2e-6, rtol=0)  # sums of 16 products in another order
    assert (wanted.max() > 1) == (interpolation == "bicubic")


def test_nearest_is_the_same_with_and_without_antialias() -> None:
    nearest = Preprocess((3, 7, 9), interpolation="nearest")
    assert torch.equal(nearest(picture(30, 40)), nearest.replace(antialias=False)(picture(30, 40)))


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_picture_of_an_input_is_rounded_and_what_is_beyond_black_and_white_is_black_and_white(order: str) -> None:
    preprocess = Preprocess((3, 1, 4), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0), channel_order=order)
    unit = torch.tensor([[-0.2, 0.0, 0.3, 1.2], [0.11, 1.5, -9.0, 1.0], [7.0, 0.5, 0.7, -0.1]])
    x = (unit - torch.tensor([0.5, 0.25, 0.0])[:, None]) / torch.tensor([0.5, 0.25, 2.0])[:, None]
    rows = np.rint(255 * unit.clamp(0, 1).numpy()).astype(np.uint8)
    wanted = rows[::-1] if order == "bgr" else rows
    np.testing.assert_array_equal(np.asarray(preprocess.undo(x[:, None]))[0].T, wanted)


def test_mean_and_std_are_in_units_of_0_to_1() -> None:
    white, black = (Image.new("RGB", (8, 8), (n, n, n)) for n in (255, 0))
    preprocess = Preprocess((3, 8, 8), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    x = preprocess(white)
    assert x.dtype == torch.float32
    assert x.amax((1, 2)).tolist() == x.amin((1, 2)).tolist() == [1.0, 3.0, 0.5]
    for end, picture_of_it in zip(preprocess.ends(), (black, white), strict=True):
        assert torch.equal(end.expand(3, 8, 8), preprocess(picture_of_it))


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(8, 8).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(everything(open_images(tmp_path, TINY))[0], TINY(picture(8, 8)))


def test_preprocess_comes_back_from_json() -> None:
    odd = Preprocess((3, 9, 8), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bilinear", "center", 0.9, antialias=False)
    assert Preprocess.from_json(json.loads(json.dumps(odd.to_json()))) == odd
    assert Preprocess.from_json({"size": [3, 8, 8]}) == TINY
    with pytest.raises(BadFile, match="size"):
        Preprocess.from_json({"mean": [0, 0, 0]})


def test_replace_changes_only_what_it_is_told() -> None:
    changed = TINY.replace(size=[3, 4, 5], resize="center")
    assert changed == Preprocess(size=(3, 4, 5), resize="center")


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ({"meen": 1}, UnknownName, "Did you mean mean"),
        ({"interpolation": "bicubik"}, UnknownName, "Did you mean bicubic"),
        ({"interpolation": "area"}, UnknownName, "'area'.* Allowed are nearest, bilinear, bicubic, lanczos"),
        ({"resize": "crop"}, UnknownName, "resize 'crop'"),
        ({"size": (0, 8, 8)}, BadImages, r"channels \(1 to 1024\), height and width"),
        ({"size": (1, 8, 8)}, BadImages, "mean has 3 numbers and the model 1 channel"),
        ({"std": (1.0, 0.0, 1.0)}, BadImages, "from 0.0001 to 10"),
        ({"crop_pct": 0.0}, BadImages, "crop_pct"),
        ({"interpolation": "lanczos", "antialias": False}, BadImages, "lanczos needs antialias"),
    ],
)
def test_an_impossible_preprocess_says_what_is_allowed(override: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        TINY.replace(**override)


# Folders and labels


def test_a_flat_folder_has_no_labels_and_natural_order(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, flat=11), TINY)
    assert images.names == tuple(f"{i}.png" for i in range(11))
    assert images.labels is None
    wanted = torch.stack([TINY(picture(seed=i)) for i in range(11)])
    batches = list(images.batches(4))
    assert [len(b) for b in batches] == [4, 4, 3]
    assert torch.equal(torch.cat(batches), wanted)


def test_class_folders_are_labelled_in_sorted_order(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, cow=1, ant=2, bee=1), TINY, classes=3)
    assert images.names == ("ant/0.png", "ant/1.png", "bee/0.png", "cow/0.png")
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 0, 1, 2]


def test_given_class_names_decide_the_order_and_may_be_more_than_the_folders(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, ant=2, bee=1), TINY, classes=["cow", "bee", "ant"])
    assert images.labels is not None
    assert images.labels.tolist() == [2, 2, 1]


@pytest.mark.parametrize("file", ["synset_words.txt", "classes.json"])
@pytest.mark.parametrize("count", [3, None])
def test_wnid_folders_are_labelled_by_the_list_beside_them(tmp_path: Path, file: str, count: int | None) -> None:
    words = {"n00000003": "cow, cattle", "n00000001": "ant", "n00000002": "bee"}
    text = json.dumps(words) if file == "classes.json" else "\n".join(f"{k} {v}" for k, v in words.items())
    (tmp_path / file).write_text(text)
    images = open_images(folder(tmp_path / "val", n00000003=1, n00000002=1), TINY, classes=count)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 2]


def test_a_wnid_list_of_another_length_than_the_model_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "synset_words.txt").write_text("n00000001 ant\nn00000002 bee\nn00000003 cow\n")
    with pytest.raises(BadImages, match=r"1 class folders .*the model has 1000 classes"):
        open_images(folder(tmp_path / "val", n00000003=1), TINY, classes=1000)


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path: Path) -> None:
    folder(tmp_path, ant=1, bee=1, **{".cache": 1})
    (tmp_path / "ant" / "._0.png").write_bytes(b"a mac was here")
    images = open_images(tmp_path, TINY, classes=2)
    assert images.names == ("ant/0.png", "bee/0.png")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize("classes", [3, ["cat", "dog"], 1000])
def test_folders_that_are_not_the_models_classes_are_an_error_that_says_what_to_type(
    tmp_path: Path, classes: int | list[str]
) -> None:
    with pytest.raises(BadImages, match=r"class folders \(ant, bee\).*--classes FILE.*--no-labels"):
        open_images(folder(tmp_path, ant=1, bee=1), TINY, classes=classes)
    assert open_images(tmp_path, TINY, classes=classes, labels=False).labels is None


def test_folders_whose_order_torchvision_and_timm_disagree_on_need_a_list(tmp_path: Path) -> None:
    folder(tmp_path, c2=1, c10=1)
    with pytest.raises(BadImages, match=r"torchvision puts c10 before c2.*--classes FILE"):
        open_images(tmp_path, TINY, classes=2)
    assert open_images(tmp_path, TINY, classes=["c2", "c10"]).labels.tolist() == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.txt", "great white shark\n\n cat \n", ["great white shark", "cat"]),
        ("a.txt", "n01440764 tench, Tinca\nn01443537 goldfish\n", ["n01440764", "n01443537"]),
        ("a.json", '["cat", "ant"]', ["cat", "ant"]),
        ("a.json", '{"cat": 1, "ant": 0}', ["ant", "cat"]),
        ("a.json", json.dumps({str(i): "abcdefghijk"[i] for i in (10, *range(10))}), [*"abcdefghijk"]),
        ("a.json", '{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}', ["n01440764", "n01443537"]),
        ("a.json", '{"n01443537": "goldfish", "n01440764": "tench"}', ["n01440764", "n01443537"]),
    ],
)  # fmt: skip
def test_class_lists_are_read_in_output_order(tmp_path: Path, name: str, text: str, wanted: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == wanted


def test_a_class_list_of_another_encoding_is_named_and_one_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\nant\n", encoding="utf-8-sig")
    assert read_classes(tmp_path / "a.txt") == ["cat", "ant"]
    (tmp_path / "a.txt").write_text("cat\nant\n", encoding="utf-16")
    with pytest.raises(BadFile, match="is not text in UTF-8; save it as UTF-8"):
        read_classes(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", ""),
        ("a.txt", "cat\ncat\n"),
        ("a.json", "{"),
        ("a.json", '{"cat": 0, "ant": 2}'),
        ("a.json", '{"a": "b"}'),
    ],
)
def test_a_class_list_that_orders_nothing_is_a_bad_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadFile, match=name):
        read_classes(tmp_path / name)


# Drawing


def test_a_limit_is_spread_evenly_over_classes_that_differ_in_size(tmp_path: Path) -> None:
    folder(tmp_path, ant=9, bee=2, cow=6)
    images = open_images(tmp_path, TINY, limit=9, seed=1)
    assert images.labels is not None
    assert sorted(Counter(images.labels.tolist()).values()) == [2, 3, 4]
    assert Counter(images.labels.tolist())[1] == 2
    all_readers = open_images(tmp_path, TINY).names
    assert list(images.names) == [name for name in all_readers if name in images.names]
    assert "9 of 17 at random (seed 1)" in images.source


def test_a_limit_is_a_matter_of_the_seed_alone_and_a_smaller_one_is_a_subset(tmp_path: Path) -> None:
    folder(tmp_path, ant=9, bee=9)
    drawn = {seed: open_images(tmp_path, TINY, limit=6, seed=seed).names for seed in range(4)}
    assert drawn[0] == open_images(tmp_path, TINY, limit=6).names
    assert len(set(drawn.values())) > 1
    assert set(open_images(tmp_path, TINY, limit=3).names) < set(drawn[0])
    assert len(open_images(tmp_path, TINY, limit=99)) == 18
    with pytest.raises(BadImages, match="limit is 0"):
        open_images(tmp_path, TINY, limit=0)


def test_a_batch_of_no_images_is_refused() -> None:
    with pytest.raises(BadImages, match="batch size is 0"):
        everything(open_images(torch.zeros(1, 3, 8, 8), TINY), size=0)


def test_a_subset_keeps_the_order_it_is_given(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, ant=2, bee=2), TINY)
    few = images.subset([3, 0])
    assert few.names == ("bee/1.png", "ant/0.png")
    assert few.labels is not None
    assert few.labels.tolist() == [1, 0]
    assert torch.equal(everything(few), everything(images)[[3, 0]])
    with pytest.raises(IndexError):
        images.subset([4])


# Parquet, NumPy, memory


@pytest.mark.parametrize("order", [range(10), [7, 8], [9, 0, 4, 4]])
def test_parquet_rows_are_the_images_of_their_bytes_in_any_order(tmp_path: Path, order: list[int]) -> None:
    images = open_images(parquet(tmp_path / "x.parquet", 10, label=[*range(10)]), TINY, classes=10).subset(order)
    assert torch.equal(everything(images), torch.stack([TINY(picture(seed=i)) for i in order]))
    assert images.labels is not None
    assert images.labels.tolist() == list(order)
    assert images.names == tuple(f"x.parquet:{i}" for i in order)


def test_a_folder_of_parquet_shards_is_read_in_natural_order_across_files(tmp_path: Path) -> None:
    parquet(tmp_path / "train-10.parquet", 3, start=4)
    parquet(tmp_path / "train-9.parquet", 4)
    images = open_images(tmp_path, TINY)
    assert torch.equal(everything(images), torch.stack([TINY(picture(seed=i)) for i in range(7)]))
    assert images.names[3:5] == ("train-9.parquet:3", "train-10.parquet:0")
    assert images.labels is None


def test_a_plain_binary_column_is_read_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(0), encoded(1)]}), tmp_path / "x.parquet")
    images = open_images(tmp_path / "x.parquet", TINY)
    assert torch.equal(everything(images)[1], TINY(picture(seed=1)))


def test_a_folder_with_two_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", 2)
    with pytest.raises(BadImages, match="splits test and train"):
        open_images(tmp_path, TINY)


def test_parquet_shards_that_disagree_about_labels_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", 2, label=[0, 1])
    parquet(tmp_path / "b.parquet", 2)
    with pytest.raises(BadImages, match=r"with and without a label column.*--no-labels"):
        open_images(tmp_path, TINY)
    assert len(open_images(tmp_path, TINY, labels=False)) == 4


@pytest.mark.parametrize("chw", [True, False])
@pytest.mark.parametrize("kind", ["array", "tensor", "npy", "npz"])
def test_uint8_pixels_are_preprocessed_wherever_they_lie(tmp_path: Path, kind: str, chw: bool) -> None:
    values = np.stack([pixels(12, 10, seed) for seed in range(3)])
    wanted = torch.stack([TINY(picture(seed=seed)) for seed in range(3)])
    values = np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if chw else values
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.npz", images=values, labels=np.arange(3))
    held: dict[str, Any] = {"array": values, "tensor": torch.from_numpy(values)}
    images = open_images(held.get(kind, tmp_path / f"x.{kind}"), TINY, classes=3)
    assert torch.equal(everything(images), wanted)
    assert (images.labels is not None) == (kind == "npz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_are_taken_as_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    images = open_images((x, [0, 1, 2, 3, 4]), TINY, classes=5)
    assert everything(images).dtype == torch.float32
    assert torch.equal(everything(images), x.float())
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 3, 9, 9), np.float32), r"shape \(2, 3, 9, 9\); allowed is normalized floats \(n, 3, 8, 8\)"),
        (np.zeros((2, 3, 9, 9), np.float32), "Resize them, or give uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), r"normalized floats .*\. The channels are last; .* x\.transpose\(0, 3, 1, 2\) in"),
        ([np.zeros((8, 8, 3), np.float32)], r"floats \(3, 8, 8\)\. The channels are last; .* x\.permute\(2, 0, 1\) in torch"),
        (np.zeros((2, 3, 4, 8, 8), np.float32), r"Of clips fold the time into the channels: images \(channels \* time, height"),
        (np.zeros((2, 1, 8, 8), np.uint8), "neither end has 3 channels"),
        (np.zeros((2, 3, 8, 3), np.uint8), "both ends"),
        (np.zeros((8, 8, 3), np.uint8), "allowed is uint8"),
        (np.zeros((2, 3, 8, 8), np.int64), "type int64"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0]), r"shape \(1,\).*\(2,\)"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0.5, 1.0]), "array:0: its label is 0.5; a class is an integer"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, 7]), "array:1 has label 7; allowed is 0 to 6"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [-1, 0]), "array:0 has label -1"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, 0], 3), "tuple of 3"),
    ],
)
def test_an_array_that_cannot_be_images_says_what_is_allowed(source: Any, words: str) -> None:
    with pytest.raises(BadImages, match=words):
        open_images(source, TINY, classes=7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_not_finite_are_named(value: float) -> None:
    x = torch.zeros(4, 3, 8, 8)
    x[2, 1, 0, 0] = value
    with pytest.raises(BadImages, match="array:2 has 1 NaN or infinite"):
        open_images(x, TINY)
    assert open_images(x, TINY, skip_bad=True).names == ("array:0", "array:1", "array:3")


# What is broken, missing or in the way


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_a_broken_image_is_named_at_once_and_skipped_only_on_request(tmp_path: Path, damage: str) -> None:
    folder(tmp_path, ant=2, bee=1)
    whole = encoded(kind="JPEG")
    (tmp_path / "ant" / "bad.jpg").write_bytes({"text": b"hello", "truncated": whole[:-40], "empty": b""}[damage])
    with pytest.raises(BadImages, match=r"ant/bad\.jpg cannot be decoded.*--skip-bad") as refused:
        open_images(tmp_path, TINY)
    assert ("it is empty, of 0 bytes" in str(refused.value)) == (damage == "empty")
    images = open_images(tmp_path, TINY, skip_bad=True)
    assert [note for note in images.notes if "cannot be read and are left out: ant/bad.jpg." in note] == list(images.notes[-1:])
    assert images.names == ("ant/0.png", "ant/1.png", "bee/0.png")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    assert len(everything(images)) == len(images) == 3


def test_a_parquet_row_without_bytes_is_named(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(), "path": "a"}, {"bytes": None, "path": "b"}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    with pytest.raises(BadImages, match=r"x\.parquet:1 cannot be decoded.*missing"):
        open_images(tmp_path / "x.parquet", TINY)


def test_an_image_that_breaks_after_opening_is_still_named(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path, flat=3), TINY)
    (tmp_path / "1.png").write_bytes(b"gone")
    with pytest.raises(BadImages, match=r"1\.png cannot be decoded"):
        everything(images)
    (tmp_path / "1.png").unlink()
    with pytest.raises(BadImages, match=r"1\.png cannot be read"):
        images.fingerprint()


def test_only_broken_images_are_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(BadImages, match=r"none of its 1 images can be read, e\.g\. bad\.png"):
        open_images(tmp_path, TINY, skip_bad=True)


def test_sources_without_images_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "x.npy").write_text("no array")
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "y.parquet")
    np.savez(tmp_path / "z.npz", a=np.zeros(1), b=np.zeros(1))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    folder(tmp_path / "mixed", flat=1, ant=1)
    parquet(folder(tmp_path / "both", flat=1) / "x.parquet", 1)
    for name, words in {
        "nowhere": "does not exist",
        "empty": "is empty",
        "notes.txt": "is a '.txt' file",
        "x.parquet": "not a readable parquet file",
        "x.npy": "not a readable NumPy file",
        "y.parquet": "columns picture: int64",
        "z.npz": "arrays a, b",
        "none.parquet": "has no rows",
        "both": "holds images .0.png. and parquet",
        "mixed": "beside folders of images.*--no-labels",
    }.items():
        with pytest.raises(BadImages, match=words) as error:
            open_images(tmp_path / name, TINY)
        assert name in str(error.value)


# Kinds of pictures


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_formats_that_are_said_to_be_allowed_are_those_that_can_be_read(tmp_path: Path) -> None:
    """Each is written by Pillow where it can, and read as RGB of the same size; the message lists the same ones."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadImages) as refused:
        open_images(tmp_path / "empty", TINY)
    allowed = re.findall(r"\.\w+", str(refused.value).split("Give")[1].split(")")[0])
    assert {".png", ".jpg", ".bmp", ".gif", ".ppm", ".tif"} <= set(allowed)
    for i, suffix in enumerate(allowed):
        kind = Image.registered_extensions()[suffix]
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / f"{i}{suffix}").write_bytes(saved(picture(16, 16), kind))
    assert len(open_images(tmp_path / "all", TINY)) == len(allowed)


def test_a_sentence_of_pillow_ends_with_one_full_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(BadImages, match=r"huge\.png .* decompression bomb DOS attack\. Fix or remove it"):
        open_images(tmp_path, TINY)
    assert (
        str(BadImages("the folder .. is here, and ../a... too.. (`x()`.. Fix it."))
        == "the folder .. is here, and ../a... too. (`x()`. Fix it."
    )


@pytest.mark.parametrize("suffix", [".heic", ".png", ".jpg"])
@pytest.mark.parametrize(
    "content", [b"\0\0\0\x18ftypheic", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 0 0 255\n"]
)
def test_a_file_of_a_format_that_is_not_read_is_named_with_those_that_are(tmp_path: Path, suffix: str, content: bytes) -> None:
    """HEIC, PostScript (which Pillow would hand to another program) and a picture without pixels, under any suffix."""
    folder(tmp_path, flat=1)
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(BadImages, match=rf"x\{suffix} cannot be decoded as an image: .*--skip-bad"):
        open_images(tmp_path, TINY)


@pytest.mark.parametrize(
    ("image", "kind", "wanted"),
    [
        (Image.new("RGBA", (9, 9), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("LA", (9, 9), (70, 5)), "PNG", (70, 70, 70)),
        (Image.new("1", (9, 9), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (9, 9), (200, 10, 60)).quantize(4), "GIF", (200, 10, 60)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    ],
)
def test_one_colour_is_that_colour_in_any_mode(
    tmp_path: Path, image: Image.Image, kind: str, wanted: tuple[int, int, int]
) -> None:
    """Alpha is dropped, grey is repeated, a palette is looked up, inks are turned to light, as timm does."""
    (tmp_path / f"x.{kind.lower()}").write_bytes(saved(image, kind))
    (x,) = open_images(tmp_path, Preprocess((3, 4, 4), (0.0,) * 3, (1.0,) * 3)).batches(1)
    assert (x[0, :, 0, 0] * 255).round().tolist() == list(wanted)


def test_of_several_frames_the_first_is_shown(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    (tmp_path / "x.gif").write_bytes(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert open_images(tmp_path, TINY).thumbnail(0, 9).getpixel((0, 0)) == (255, 0, 0)


def test_a_small_file_of_too_many_pixels_is_refused_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(12, 10).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImages, match=r"x\.png cannot be decoded .*120 pixels"):
            open_images(tmp_path, TINY)


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (2, 2500), (2500, 3)])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(3, 32, 32), (3, 24, 40)])
def test_a_very_long_picture_is_cropped_as_a_short_one(shape: tuple[int, int], antialias: bool, size: Any) -> None:
    """Oracle: the whole picture resized, the middle taken; steps of the two resizes differ by less than a thousandth."""
    preprocess = Preprocess(size, (0.0,) * 3, (1.0,) * 3, "bilinear", "center", 0.9, antialias=antialias)
    smooth = np.add.outer(np.linspace(0, 90, shape[0]), np.linspace(0, 90, shape[1]))[..., None] + np.array([0, 30, 60])
    image = Image.fromarray(smooth.astype(np.uint8))
    high, wide = prepare.resized(*shape, preprocess.to_json())
    if antialias:
        whole = torch.from_numpy(np.array(image.resize((wide, high), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    else:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        whole = torch.nn.functional.interpolate(x, (high, wide), mode="bilinear")[0]
    wanted = torch.from_numpy(prepare.centred(whole.numpy(), preprocess.to_json()))
    assert (preprocess(image) - wanted).abs().max() <= 1.01 / 255


def test_a_very_long_picture_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 x 5000 pixels at 224 would be 224 x 1,120,000: 3 GB as floats; what is resized is at most 16 frames long."""
    sizes: list[tuple[int, int]] = []
    once = prepare.resized

    def watched(high: int, wide: int, how: Any) -> tuple[int, int]:
        sizes.append(once(high, wide, how))
        return sizes[-1]

    monkeypatch.setattr(prepare, "resized", watched)
    for shape in ((1, 5000), (5000, 1), (3, 100_000)):
        assert Preprocess((3, 224, 224), resize="center")(Image.new("RGB", shape[::-1])).shape == (3, 224, 224)
    assert max(high * wide for high, wide in sizes) <= 20 * 224 * 224


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((2, 0, 8, 3), np.uint8), "holds no pixels"),
        (np.zeros((2, 3, 8, 0), np.uint8), "holds no pixels"),
        (np.full((2, 3, 8, 8), 3e38, np.float32), r"array:0 has values up to 3e\+38; normalized pixels are at most"),
        (np.full((2, 3, 8, 8), -3e38, np.float32), r"up to 3e\+38"),
        (np.full((2, 3, 8, 8), 1e300, np.float64), "192 NaN or infinite"),
        (np.full((2, 3, 8, 8), None, object), "type object"),
        (np.zeros((2, 3, 8, 8), np.complex64), "type complex64"),
        (np.zeros((2, 8, 8, 3), [("r", "u1")]), "type"),
        (torch.zeros(2, 3, 8, 8).to_sparse(), "not a plain array"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "not a plain array"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [[0], [0, 1]]), "no list of integers"),
        (
            (np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"]),
            "array:0: its label is the text 'a'; a class is an integer, or with --classes FILE",
        ),
        ((np.zeros((2, 8, 8, 3), np.uint8), [True, False]), "integers"),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.array([2**63, 0], np.uint64)), "label 9223372036854775808"),
    ],
)
def test_an_array_that_is_not_pixels_is_refused_in_words(source: Any, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImages, match=words):
            open_images(source, TINY)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [1, 2]}, "has the columns image: int64; it needs"),
        ({"image": [{"bytes": 1}, {"bytes": 2}]}, "it needs image"),
        ({"image": [[1], [2]]}, "it needs image"),
        ({"picture": [b"", b""]}, "it needs image"),
        ({"image": [b"x", None]}, r"x\.parquet:0 cannot be decoded"),
        ({"image": [encoded(0), encoded(1)], "label": ["a", "b"]}, "x.parquet:0: its label is the text"),
        ({"image": [encoded(0), encoded(1)], "label": [[0], [1, 2]]}, "labels that are no list|labels of type"),
        ({"image": [encoded(0), encoded(1)], "label": [0, None]}, "x.parquet:1: it has no label"),
        ({"image": [encoded(0), encoded(1)], "label": [0, -3]}, "label -3"),
    ],
)
def test_a_parquet_file_of_other_columns_is_refused_in_words(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(BadImages, match=words):
        open_images(tmp_path / "x.parquet", TINY)


@given(data=st.data())
def test_a_damaged_file_is_an_image_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of whole files of each kind are changed or cut off; nothing but BadImages may come out."""
    root = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "npy", "npz", "parquet"]))
    path = root / f"x.{kind}"
    if kind == "parquet":
        parquet(path, 2, label=[0, 1])
    elif kind in ("npy", "npz"):
        values = np.stack([pixels(9, 7), pixels(9, 7, 1)])
        np.save(path, values) if kind == "npy" else np.savez(path, images=values, labels=[0, 1])
    else:
        path.write_bytes(encoded(kind=kind.upper()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(BadImages):
        images = open_images(path if kind in ("npy", "npz", "parquet") else root, TINY)
        x, black, white = everything(images), *TINY.ends()
        assert x.shape == (len(images), 3, 8, 8)
        assert bool(((x >= black) & (x <= white)).all())


# The rest


def test_a_fingerprint_changes_with_bytes_names_order_and_nothing_else(tmp_path: Path) -> None:
    images = open_images(folder(tmp_path / "a", flat=3), TINY)
    first = images.fingerprint()
    assert len(first) == 64
    assert first == open_images(folder(tmp_path / "b", flat=3), TINY.replace(size=(3, 4, 4))).fingerprint()
    assert first != images.subset([1, 0, 2]).fingerprint()
    assert first != images.subset([0, 1]).fingerprint()
    (tmp_path / "a" / "2.png").write_bytes(encoded(seed=9))
    second = images.fingerprint()
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "3.png")
    assert len({first, second, open_images(tmp_path / "a", TINY).fingerprint()}) == 3


def test_a_thumbnail_is_the_whole_picture_and_small(tmp_path: Path) -> None:
    picture(60, 30).save(tmp_path / "x.png")
    thumbnail = open_images(tmp_path, TINY).thumbnail(0, 20)
    assert (thumbnail.size, thumbnail.mode) == ((10, 20), "RGB")


def test_a_thumbnail_of_normalized_floats_is_the_picture_they_came_from() -> None:
    x = TINY(picture(8, 8))[None]
    assert np.array_equal(np.array(open_images(x, TINY).thumbnail(0, 8)), pixels(8, 8))


@needs_shared
def test_imagenet_folders_get_the_index_of_their_wnid_among_the_thousand() -> None:
    wnids = [line.split()[0] for line in (SHARED / "data/synset_words.txt").read_text().splitlines()]
    images = open_images(SHARED / "data/ilsvrc_val", TINY, classes=1000, limit=40)
    assert images.labels is not None
    assert [wnids[label] for label in images.labels.tolist()] == [name.split("/")[0] for name in images.names]
    assert len(set(images.labels.tolist())) == 40


@needs_shared
def test_cifar_parquet_is_streamed_with_its_labels() -> None:
    images = open_images(SHARED / "data/cifar10/test.parquet", Preprocess((3, 32, 32)), classes=10, limit=30)
    assert images.labels is not None
    assert Counter(images.labels.tolist()) == dict.fromkeys(range(10), 3)
    assert everything(images).shape == (30, 3, 32, 32)


def test_an_array_that_is_said_to_be_larger_than_its_file_reserves_nothing(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 48,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("images.npy", header.getvalue() + bytes(64))
    with pytest.raises(BadImages, match=r"x\.npz is not a readable NumPy file: array images of shape .* needs 1,125,899"):
        open_images(tmp_path / "x.npz", Preprocess((3, 8, 8)))
