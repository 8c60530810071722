"""Pictures of any number of bands, 8 bits and 16. Oracles: Pillow band by band, NumPy, and Pillow's own conversions."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewbit.data import bands
from fewbit.data.collection import Data
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.errors import BadImages, FewbitError

DRAW = np.random.default_rng(0)
GREY, RGB, RGBA, EIGHT = (DRAW.integers(0, 256, (12, 10, n), dtype=np.uint8) for n in (1, 3, 4, 8))
DEEP, DEEP3, DEEP4, DEEP8 = (DRAW.integers(0, 65536, (12, 10, n), dtype=np.uint16) for n in (1, 3, 4, 8))


def plain(channels: int, **options: Any) -> Preprocess:
    """Pixels of 12 x 10 pictures between 0 and 1 as they are."""
    return Preprocess((channels, 12, 10), 0.0, 1.0, **options)


def one(source: Any, channels: int) -> torch.Tensor:
    """The only image of a source, not resized."""
    (batch,) = open_images(source, plain(channels)).batches(1)
    return batch[0]


def unit(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    white = {"uint8": 255, "uint16": 65535}[pixels.dtype.name]
    return torch.from_numpy((pixels.astype(np.float64) / white).astype(np.float32)).permute(2, 0, 1)


def same(x: torch.Tensor, pixels: np.ndarray[Any, Any]) -> bool:
    return torch.allclose(x, unit(pixels), rtol=0, atol=1e-7)


def png16(pixels: np.ndarray[Any, Any]) -> bytes:
    """A PNG of 16 bits, written by hand: rows of big-endian samples, each with filter 0."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    high, wide, count = pixels.shape
    head = struct.pack(">IIBBBBB", wide, high, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray[Any, Any], order: str = "<", photometric: int = 1, kind: int = 1) -> bytes:
    """A TIFF of one strip, written by hand, whose samples lie beside each other (or each band by itself, if it is one)."""
    high, wide, count = pixels.shape
    bits, data = 8 * pixels.itemsize, pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    after = 8 + len(data)  # the lists of shorts, then the tags
    lists = struct.pack(f"{order}{count}H", *[bits] * count) + struct.pack(f"{order}{count}H", *[kind] * count)

    def several(at: int, value: int) -> tuple[int, int, int]:
        return (3, count, at) if count > 2 else (3, count, value if order == "<" else value << 16)

    extra = [] if count <= (3 if photometric == 2 else 1) else [(338, 3, 1, 2 if photometric == 2 else 0)]
    tags = [
        (256, 4, 1, wide), (257, 4, 1, high), (258, *several(after, bits)), (259, 4, 1, 1), (262, 4, 1, photometric),
        (273, 4, 1, 8), (277, 4, 1, count), (278, 4, 1, high), (279, 4, 1, len(data)), *(extra if count in (2, 4) else []),
        (339, *several(after + 2 * count, kind)),
    ]  # fmt: skip
    body = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", after + len(lists))
    return head + data + lists + struct.pack(f"{order}H", len(tags)) + body + bytes(4)


def files(folder: Path, name: str, content: bytes | Image.Image) -> Path:
    folder.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        content.save(folder / name)
    return folder


# Pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1"])
def test_a_model_of_one_channel_gets_the_luminance_that_pillow_has(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RGB).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    wanted = np.array(picture.convert("L"))[..., None]
    assert same(one([picture], 1), wanted)
    if mode != "CMYK":
        assert same(one(files(tmp_path / "x", "a.png", picture), 1), wanted)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_model_of_four_channels_gets_rgba(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RGBA).convert(mode)
    wanted = np.array(picture.convert("RGBA"))
    assert same(one([picture], 4), wanted)
    if mode != "PA":
        assert same(one(files(tmp_path / "x", "a.png", picture), 4), wanted)


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGB"), (4, "L"), (4, "CMYK"), (2, "LA"), (8, "RGBA"), (8, "L")])
def test_bands_that_do_not_fit_are_refused_with_both_numbers(tmp_path: Path, channels: int, mode: str) -> None:
    picture = Image.fromarray(RGB).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    found = rf"has {len(mode.replace('CMYK', 'abcd'))} bands? \({mode}\) and the model {channels} channels; allowed are"
    with pytest.raises(BadImages, match=rf"list:0: it {found}"):
        one([picture], channels)
    name = "a.png" if mode == "LA" else "a.tif"  # two bands are two bands in a TIFF
    with pytest.raises(BadImages, match=rf"{name}: it {found}.* --skip-bad"):
        one(files(tmp_path / "x", name, picture), channels)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_floats_and_wide_integers_have_no_black_and_white(tmp_path: Path, mode: str) -> None:
    for channels in (1, 3, 8):
        with pytest.raises(BadImages, match=rf"a\.tif: it has mode {mode}, whose black and white nobody knows; allowed are"):
            one(files(tmp_path / "x", "a.tif", Image.new(mode, (9, 9))), channels)


# 16 bits


@pytest.mark.parametrize("pixels", [DEEP, DEEP3, DEEP4, np.concatenate([DEEP, DEEP[::-1]], axis=2)])
def test_a_png_of_16_bits_keeps_them(tmp_path: Path, pixels: np.ndarray[Any, Any]) -> None:
    folder, count = files(tmp_path / "x", "a.png", png16(pixels)), pixels.shape[2]
    light = pixels[..., :3].astype(float) @ [19595, 38470, 7471] / 65536 if count > 2 else pixels[..., 0]
    assert torch.allclose(one(folder, 1)[0] * 65535, torch.from_numpy(np.array(light, np.float32)), rtol=0, atol=0.51)
    assert same(one(folder, 3), pixels[..., :3] if count > 2 else pixels[..., :1].repeat(3, 2))
    if count in (2, 4):
        assert same(one(folder, 4), pixels if count == 4 else pixels[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("order", "<>")
def test_a_grey_tiff_of_16_bits_keeps_them(tmp_path: Path, order: str) -> None:
    folder = files(tmp_path / "x", "a.tif", tiff(DEEP, order))
    assert same(one(folder, 1), DEEP)
    assert same(one(folder, 3), DEEP.repeat(3, axis=2))
    assert same(one([Image.fromarray(DEEP[..., 0])], 1), DEEP)


def test_a_grey_tiff_of_12_bits_or_with_white_as_0_is_refused(tmp_path: Path) -> None:
    packed = bytearray(tiff(DEEP))
    at = packed.index(struct.pack("<HHII", 258, 3, 1, 16))
    packed[at : at + 12] = struct.pack("<HHII", 258, 3, 1, 12)
    for content, says in (
        (bytes(packed), "it has 12 bits, and white is 4095"),
        (tiff(DEEP, photometric=0), "it has 16 bits, and white is 0;"),
    ):
        with pytest.raises(BadImages, match=says):
            one(files(tmp_path / "x", "a.tif", content), 1)


# Many bands in a TIFF


def test_what_pillow_cannot_read_needs_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    bands._tifffile.cache_clear()
    with pytest.raises(FewbitError, match=r"need tifffile: pip install 'fewbit\[tiff\]'") as refused:
        open_images(files(tmp_path / "x", "a.tif", tiff(EIGHT)), plain(8), skip_bad=True)
    assert not isinstance(refused.value, BadImages)  # it is no fault of one image, to be left out


@pytest.fixture
def tifffile() -> Any:
    bands._tifffile.cache_clear()
    return pytest.importorskip("tifffile")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("pixels", [EIGHT, DEEP8, DEEP4, RGBA])
def test_a_tiff_of_as_many_bands_as_channels(
    tifffile: Any, tmp_path: Path, pixels: np.ndarray[Any, Any], order: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert same(one(files(tmp_path / "x", "a.tif", tiff(pixels, order)), pixels.shape[2]), pixels)
    assert same(one([tiff(pixels, order)], pixels.shape[2]), pixels)
    assert capfd.readouterr() == ("", "")  # Pillow speaks of a file that it cannot read


@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
def test_a_tiff_may_have_its_bands_in_any_order(tifffile: Any, tmp_path: Path, planar: str) -> None:
    first = np.ascontiguousarray(DEEP8.transpose(2, 0, 1))
    file = tmp_path / "x" / "a.tif"
    file.parent.mkdir()
    options = {} if planar == "pages" else {"planarconfig": planar}
    tifffile.imwrite(file, DEEP8 if planar == "contig" else first, photometric="minisblack", **options)
    assert same(one(file.parent, 8), DEEP8)


def test_a_coloured_tiff_of_16_bits_keeps_them(tifffile: Any, tmp_path: Path) -> None:
    folder = files(tmp_path / "x", "a.tif", tiff(DEEP3, photometric=2))
    assert same(one(folder, 3), DEEP3)
    light = torch.from_numpy((DEEP3.astype(float) @ [19595, 38470, 7471] / 65536).astype(np.float32))
    assert torch.allclose(one(folder, 1)[0] * 65535, light, rtol=0, atol=0.51)


@pytest.mark.parametrize(
    ("content", "channels", "says"),
    [
        (tiff(EIGHT), 4, r"it has 8 bands .*and the model 4 channels"),
        (tiff(EIGHT), 3, r"it has 8 bands .*and the model 3 channels"),
        (tiff(DEEP4), 3, r"it has 4 bands and the model 3 channels"),
        (tiff(EIGHT.astype(np.float32), kind=3), 8, r"samples of type float32, 32 bits, MINISBLACK; allowed are TIFF"),
        (tiff(DEEP8.astype(np.int16), kind=2), 8, r"samples of type int16"),
        (tiff(EIGHT)[:200], 8, r"a\.tif cannot be decoded as an image"),
    ],
)  # fmt: skip
def test_a_tiff_of_other_bands_or_types_is_refused(
    tifffile: Any, tmp_path: Path, content: bytes, channels: int, says: str
) -> None:
    with pytest.raises(BadImages, match=says):
        one(files(tmp_path / "x", "a.tif", content), channels)


# Arrays


@pytest.mark.parametrize("kind", ["array", "tensor", "npy", "npz", "list", "labelled"])
@pytest.mark.parametrize("pixels", [GREY, RGB, RGBA, EIGHT, DEEP, DEEP8])
def test_arrays_are_pixels_of_any_number_of_bands(tmp_path: Path, kind: str, pixels: np.ndarray[Any, Any]) -> None:
    stack, channels = np.stack([pixels, pixels[::-1]]), pixels.shape[2]
    for values in (stack, np.ascontiguousarray(stack.transpose(0, 3, 1, 2)), *([stack[..., 0]] if channels == 1 else [])):
        np.save(tmp_path / "x.npy", values.astype(values.dtype.newbyteorder(">")))
        np.savez(tmp_path / "x.npz", images=values)
        source: Any = {
            "array": values, "tensor": torch.from_numpy(values), "list": list(values), "labelled": (values, [1, 0]),
        }.get(kind, tmp_path / f"x.{kind}")  # fmt: skip
        images = open_images(source, plain(channels), classes=2)
        assert torch.equal(next(iter(images.batches(2))), torch.stack([unit(stack[0]), unit(stack[1])]))
        assert (images.labels is not None) == (kind == "labelled")


def test_arrays_of_other_bands_say_how_many_are_needed() -> None:
    with pytest.raises(
        BadImages, match=r"\(2, 12, 10, 8\): neither end has 4 channels, which the model takes; allowed is uint8"
    ):
        open_images(np.stack([EIGHT, EIGHT]), plain(4))
    with pytest.raises(BadImages, match=r"list:0: it has type uint8 and shape \(12, 10, 3\); .* arrays of 1 band,"):
        open_images([RGB], plain(1))


def test_arrays_beside_pictures_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    for i in range(5):
        pixels = np.full((8, 8, 3), i, np.uint8)
        np.save(tmp_path / f"{i}.npy", pixels) if i < 2 else Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    images = open_images(tmp_path, Preprocess(size=(3, 8, 8)))
    assert images.names == ("2.png", "3.png", "4.png")
    (note,) = images.notes
    assert "holds .npy files (2: 0.npy, 1.npy) beside pictures (3), and the pictures alone are taken" in note


def test_a_folder_may_hold_an_array_of_pixels_for_each_image(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "0.npy", DEEP8)
    np.save(tmp_path / "x" / "1.npy", EIGHT.transpose(2, 0, 1))
    images = open_images(tmp_path / "x", plain(8))
    assert torch.equal(next(iter(images.batches(2))), torch.stack([unit(DEEP8), unit(EIGHT)]))
    np.save(tmp_path / "x" / "2.npy", EIGHT.astype(np.float32))
    with pytest.raises(BadImages, match=r"2\.npy: it has type float32 and shape \(12, 10, 8\); allowed are TIFF.* --skip-bad"):
        open_images(tmp_path / "x", plain(8))
    files(tmp_path / "x", "a.png", Image.fromarray(RGB))
    assert open_images(tmp_path / "x", plain(3)).names == ("a.png",)  # arrays beside pictures are something else


def test_floats_are_inputs_of_the_model_as_ever() -> None:
    x = torch.randn(2, 8, 12, 10)
    for source in (x, list(x), Data(x, transform=lambda one: one)):
        assert torch.equal(next(iter(open_images(source, plain(8)).batches(2))), x)


# Preprocess


@pytest.mark.parametrize("pixels", [GREY, RGBA, EIGHT, DEEP8])
@pytest.mark.parametrize("options", [{}, {"resize": "border", "crop_pct": 0.9}, {"resize": "center"}, {"antialias": False}])
def test_many_bands_are_prepared_as_each_by_itself(pixels: np.ndarray[Any, Any], options: dict[str, Any]) -> None:
    """Oracle: the same with one channel, which is a grey picture; and Pillow on the band."""
    count = pixels.shape[2]
    mean, std = (tuple((np.arange(count) + start) / 10) for start in (0, 5))
    whole = Preprocess((count, 8, 6), mean, std, interpolation="bilinear", **options)(pixels)
    for k in range(count):
        single = Preprocess((1, 8, 6), mean[k], std[k], interpolation="bilinear", **options)
        alone = single(np.ascontiguousarray(pixels[..., k : k + 1]))
        assert torch.allclose(whole[k : k + 1], alone, rtol=0, atol=1e-6)  # torch adds up many channels in another order
    if not options:
        white = np.iinfo(pixels.dtype).max
        band = Image.fromarray(pixels[..., 0] if white == 255 else pixels[..., 0].astype(np.float32))
        wanted = np.array(band.resize((6, 8), Image.Resampling.BILINEAR), np.float32) / white
        assert torch.allclose(whole[0], torch.from_numpy(wanted / np.float32(std[0])), rtol=0, atol=1e-6)


def test_16_bits_stay_between_black_and_white() -> None:
    edge = np.where(np.arange(40)[None, :, None] < 20, 0, 65535).astype(np.uint16).repeat(40, axis=0)
    x = Preprocess((1, 64, 64), 0.0, 1.0)(edge)
    assert (x.min(), x.max()) == (0, 1)


def test_one_mean_stands_for_all_channels_and_other_counts_are_refused() -> None:
    assert Preprocess((4, 8, 8), 0.25, "0.5") == Preprocess((4, 8, 8), (0.25,) * 4, (0.5,) * 4)
    assert Preprocess((3, 8, 8)).mean == (0.485, 0.456, 0.406)
    assert Preprocess((1, 8, 8)).std == Preprocess((1, 8, 8)).mean == (0.5,)
    with pytest.raises(
        BadImages, match=r"mean has 3 numbers and the model 4 channels; give 4 or one for all, as in --mean 0\.5"
    ):
        Preprocess((4, 8, 8), (0.1, 0.2, 0.3))
    with pytest.raises(BadImages, match="std has 2 numbers and the model 1 channel;"):
        Preprocess((1, 8, 8), 0, (1, 1))
    assert Preprocess.from_json(Preprocess((8, 9, 9), 0.1, 0.2).to_json()) == Preprocess((8, 9, 9), 0.1, 0.2)


# The report's pictures, and what tells images apart


def seen(images: Images) -> np.ndarray[Any, Any]:
    picture = images.thumbnail(0, 12)
    assert (picture.mode, picture.size) == ("RGB", (10, 12))
    return np.array(picture)


def test_a_thumbnail_shows_the_first_three_bands_or_the_first() -> None:
    assert np.array_equal(seen(open_images([RGBA], plain(4))), RGBA[..., :3])
    assert np.array_equal(seen(open_images([EIGHT], plain(8))), EIGHT[..., :3])
    assert np.array_equal(seen(open_images([GREY], plain(1))), GREY.repeat(3, axis=2))
    assert np.array_equal(seen(open_images([EIGHT[..., :2]], plain(2))), EIGHT[..., :1].repeat(3, axis=2))
    assert np.array_equal(seen(open_images([DEEP8], plain(8))), np.round(DEEP8[..., :3] / 257))
    for pixels in (GREY, EIGHT):
        prepared = open_images(plain(pixels.shape[2])(pixels)[None], plain(pixels.shape[2]))
        assert np.array_equal(seen(prepared), pixels[..., :3].repeat(3 if pixels is GREY else 1, axis=2))


def test_equal_pixels_are_told_in_any_file(tmp_path: Path) -> None:
    folder = files(tmp_path / "x", "a.png", png16(DEEP))
    files(tmp_path / "x", "b.tif", tiff(DEEP, ">"))
    a, b = open_images(folder, plain(1)).pixels
    assert a == b == open_images([DEEP], plain(1)).pixels[0]
    buffer = io.BytesIO()
    Image.fromarray(GREY[..., 0]).save(buffer, "PNG")
    assert open_images([buffer.getvalue()], plain(1)).pixels == open_images([GREY], plain(1)).pixels
