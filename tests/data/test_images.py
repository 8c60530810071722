"""Oracles: timm's transform, torch and Pillow recomputed by hand, and small folders made in tmp_path."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_with_more_than_8_bits_is_refused_instead_of_saturated(mode: str) -> None:
    with pytest.raises(BadImages, match="more than 8 bits"):
        TINY(Image.new(mode, (9, 9)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_without_antialias_the_whole_float_picture_is_interpolated_and_not_clamped(interpolation: str) -> None:
    x = torch.from_numpy(pixels(30, 40)).permute(2, 0, 1)[None].float() / 255
    wanted = torch.nn.functional.interpolate(x, (16, 20), mode=interpolation, align_corners=False)[0]
    plain = Preprocess((3, 16, 20), (0.0,) * 3, (1.0,) * 3, interpolation=interpolation, antialias=False)
    assert torch.equal(plain(picture(30, 40)), wanted)
    assert (wanted.max() > 1) == (interpolation == "bicubic")


def test_nearest_is_the_same_with_and_without_antialias() -> None:
    nearest = Preprocess((3, 7, 9), interpolation="nearest")
    assert torch.equal(nearest(picture(30, 40)), nearest.replace(antialias=False)(picture(30, 40)))


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
        ({"resize": "crop"}, UnknownName, "resize 'crop'"),
        ({"size": (1, 8, 8)}, BadImages, "3, height and width"),
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
        (np.zeros((2, 8, 8, 3), np.float32), "normalized floats"),
        (np.zeros((2, 1, 8, 8), np.uint8), "neither end has 3 channels"),
        (np.zeros((2, 3, 8, 3), np.uint8), "both ends"),
        (np.zeros((8, 8, 3), np.uint8), "allowed is uint8"),
        (np.zeros((2, 3, 8, 8), np.int64), "type int64"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0]), r"shape \(1,\).*\(2,\)"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0.0, 1.0]), "integers"),
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
    with pytest.raises(BadImages, match=r"ant/bad\.jpg cannot be decoded.*--skip-bad"):
        open_images(tmp_path, TINY)
    images = open_images(tmp_path, TINY, skip_bad=True)
    assert images.skipped == ("ant/bad.jpg",)
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
        "empty": "holds no images but no files",
        "notes.txt": "is a '.txt' file",
        "x.parquet": "not a readable parquet file",
        "x.npy": "no readable NumPy file",
        "y.parquet": "columns picture: int64",
        "z.npz": "arrays a, b",
        "none.parquet": "has no rows",
        "both": "holds images .0.png. and parquet",
        "mixed": "beside folders of images.*--no-labels",
    }.items():
        with pytest.raises(BadImages, match=words) as error:
            open_images(tmp_path / name, TINY)
        assert name in str(error.value)


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
