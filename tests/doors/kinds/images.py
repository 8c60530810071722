"""Images that cannot be read, are no images, or make no sense as the input of a model."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from doors.case import Case, done, each, either, quantize, refused, write


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (20, 20), **options: object) -> bytes:
    """A picture of noise in a format of Pillow."""
    rng, buffer = np.random.default_rng(5), io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "a byte": b"\0",
    "text": b"this is not a picture",
    "zeros": bytes(5000),
    "html": b"<html>404 not found</html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "png cut": encoded()[:200],
    "png header": encoded()[:20],
    "png without pixels": png(20, 20),
    "png of no width": png(0, 20),
    "png of 2 billion pixels": png(50_000, 50_000),
    "png bomb": png(30_000, 30_000, bytes(30_000)),
    "jpeg cut": encoded("JPEG")[:100],
    "gif header": b"GIF89a" + bytes(4),
    "webp header": b"RIFF\x10\0\0\0WEBPVP8 ",
    "bmp of negative size": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, -5, -5, 1, 24, 0, 6, 1, 1, 0, 0),
    "tiff loop": b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 1, 5, 8),
    "zip": b"PK\x03\x04" + bytes(30),
    "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os.",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file closefile\n",
    "float tiff": encoded("TIFF", "F"),
    "32 bits": encoded("TIFF", "I"),
}
FINE: dict[str, tuple[str, bytes]] = {
    "png of 16 bits": ("x.png", png(2, 2, bytes(10), 16, 0)),
    "png of 16 bits in colour": ("x.png", png(2, 2, bytes(26), 16, 2)),
    "grey": ("x.png", encoded(mode="L")),
    "one bit": ("x.png", encoded(mode="1")),
    "palette": ("x.png", encoded(mode="P")),
    "alpha": ("x.png", encoded(mode="RGBA")),
    "grey and alpha": ("x.png", encoded(mode="LA")),
    "cmyk": ("x.jpg", encoded("JPEG", "CMYK")),
    "ycbcr": ("x.jpg", encoded("JPEG", "YCbCr")),
    "progressive": ("x.jpeg", encoded("JPEG", progressive=True)),
    "gif": ("x.gif", encoded("GIF")),
    "bmp": ("x.bmp", encoded("BMP")),
    "webp": ("x.webp", encoded("WEBP")),
    "tiff": ("x.tiff", encoded("TIFF")),
    "ppm": ("x.ppm", encoded("PPM")),
    "a pixel": ("x.png", encoded(size=(1, 1))),
    "a row": ("x.png", encoded(size=(300, 1))),
    "png called jpg": ("x.jpg", encoded()),
    "big letters": ("X.PNG", encoded()),
    "a name with spaces": ("a b\tc.png", encoded()),
    "a name of another language": ("画像 é.png", encoded()),
    "exif that is broken": ("x.jpg", encoded("JPEG", exif=b"Exif\0\0garbage")),
}


def cases() -> Iterator[Case]:
    for name, content in BROKEN.items():
        suffix = name.split()[0] if name.split()[0] in ("png", "jpeg", "gif", "webp", "bmp", "tiff") else "png"
        yield Case(f"broken: {name}", quantize(), refused(f"broken.{suffix}"), before=write(f"flat/broken.{suffix}", content),
                   fast=name in ("empty", "png cut", "jpeg cut"))  # fmt: skip
    for name in ("empty", "png cut"):
        yield Case(f"skipped: {name}", quantize("--skip-bad"), done(has_run), before=write("flat/broken.png", BROKEN[name]))
    for name, (file, content) in FINE.items():
        yield Case(f"fine: {name}", lambda: opened("one"), done(), before=write(f"one/{file}", content))
    yield from _folders()
    yield from _arrays()
    yield from _parquet()
    yield from _shapes()


def has_run(folder: Path) -> str:
    """Nothing where `out` is a finished run."""
    missing = [
        name
        for name in ("run.json", "plan.json", "model.onnx", "report.json", "report.html")
        if not (folder / "out" / name).is_file()
    ]
    return f"exit code 0, and there is no {', '.join(missing)}" if missing else ""


def opened(source: object, **options: object) -> None:
    """Open images and decode all, as a run does."""
    from fewbit.data.images import open_images
    from fewbit.data.preprocess import Preprocess

    images = open_images(source, Preprocess((3, 16, 16)), labels=False, **options)  # type: ignore[arg-type]
    for batch in images.batches(16):
        assert bool(np.isfinite(batch.numpy()).all())


def _folders() -> Iterator[Case]:
    def fifo(folder: Path) -> None:
        os.mkfifo(folder / "flat" / "pipe.png")

    def dangling(folder: Path) -> None:
        (folder / "flat" / "gone.png").symlink_to("nowhere.png")

    def loop(folder: Path) -> None:
        (folder / "flat" / "loop.png").symlink_to("loop.png")

    def socket(folder: Path) -> None:
        import socket as sockets

        here = os.getcwd()
        os.chdir(folder / "flat")
        with sockets.socket(sockets.AF_UNIX) as one:
            one.bind("talk.png")
        os.chdir(here)

    def unreadable(folder: Path) -> None:
        (folder / "flat" / "locked").mkdir(mode=0o000)

    def device(folder: Path) -> None:
        (folder / "flat" / "zero.png").symlink_to("/dev/zero")

    for name, before, says in (
        ("a FIFO", fifo, "pipe.png"), ("a dangling link", dangling, "gone.png"), ("a link to itself", loop, "loop.png"),
        ("a socket", socket, "talk.png"), ("an endless device", device, "zero.png"),
        ("a folder called png", lambda folder: (folder / "flat" / "x.png").mkdir(), "x.png"),
    ):  # fmt: skip
        yield Case(
            f"folder with {name}", quantize(), either(says) if "folder" in name else refused(says), before=before, seconds=60
        )
        yield Case(f"folder with {name}, skipped", quantize("--skip-bad"), done(has_run), before=before)
    if os.geteuid() != 0:
        yield Case("folder with a locked one", quantize(), refused("locked"), before=unreadable)
    for name, before in {
        "an empty folder": lambda folder: (folder / "x").mkdir(),
        "a folder of text": write("x/a.txt", "no"),
        "one image": write("x/a.png", encoded()),
        "hidden images alone": write("x/.a.png", encoded()),
        "images beside parquet": each(write("x/a.png", encoded()), write("x/a.parquet", b"PAR1")),
        "only broken ones": each(write("x/a.png", b""), write("x/b.png", b"")),
    }.items():
        yield Case(name, quantize(images="x"), refused(("x", "a.png")), before=before)
        yield Case(f"{name}, --skip-bad", quantize("--skip-bad", images="x"), refused("x"), before=before)
    heic = each(*(write(f"x/{i}.heic", b"\0\0\0\x18ftypheic" + bytes(100)) for i in range(3)))
    yield Case("heic", quantize(images="x"), refused(("heic", "no images")), before=heic)
    labelled = tuple(word for word in quantize(images="x") if word != "--no-labels")
    for name, before, says in (
        ("images beside class folders", each(*(write(f"x/{c}/0.png", encoded()) for c in "abcd"),
        write("x/1.png", encoded())), "1.png"),
        ("three class folders", each(*(write(f"x/{c}/0.png", encoded()) for c in "abc")), "3 class"),
        ("five class folders", each(*(write(f"x/{c}/0.png", encoded()) for c in "abcde")), "5 class"),
        ("classes 1, 2, 10, 11", each(*(write(f"x/{c}/0.png", encoded()) for c in ("1", "2", "10", "11"))), "order"),
    ):  # fmt: skip
        yield Case(name, labelled, refused(says), before=before)


def _arrays() -> Iterator[Case]:
    f32, nan, u8 = np.float32, float("nan"), np.uint8
    arrays: dict[str, np.ndarray] = {
        "no dimension": np.zeros((), f32), "no images": np.zeros((0, 3, 16, 16), f32), "flat": np.zeros(99, f32),
        "no pixels": np.zeros((4, 0, 0, 3), u8), "no height": np.zeros((4, 0, 20, 3), u8),
        "no width": np.zeros((4, 20, 0, 3), u8),
        "no channels": np.zeros((4, 16, 16, 0), u8), "3 dimensions": np.zeros((3, 16, 16), f32),
        "5 dimensions": np.zeros((1, 4, 3, 16, 16), f32), "1 channel": np.zeros((4, 16, 16, 1), u8),
        "4 channels": np.zeros((4, 16, 16, 4), u8), "1 channel first": np.zeros((4, 1, 16, 16), u8),
        "both ends 3": np.zeros((4, 3, 16, 3), u8), "another size": np.zeros((4, 3, 17, 16), f32),
        "channels last": np.zeros((4, 16, 16, 3), f32), "int64": np.zeros((4, 3, 16, 16), np.int64),
        "bool": np.zeros((4, 3, 16, 16), bool), "complex": np.zeros((4, 3, 16, 16), np.complex64),
        "text": np.full((4, 3, 16, 16), "x"), "dates": np.zeros((4, 3, 16, 16), "datetime64[s]"),
        "NaN": np.full((4, 3, 16, 16), nan, f32), "infinite": np.full((4, 3, 16, 16), np.inf, f32),
        "float64 over float32": np.full((4, 3, 16, 16), 1e300), "3e38": np.full((8, 3, 16, 16), 3e38, f32),
        "one NaN": np.where(np.arange(4 * 768).reshape(4, 3, 16, 16) == 99, nan, 0).astype(f32),
        "1e30": np.full((8, 3, 16, 16), 1e30, f32),
        "objects": np.array([None, {}], object), "records": np.zeros(4, [("a", f32), ("b", f32)]),
        "one image": np.zeros((1, 3, 16, 16), f32),
    }  # fmt: skip
    for name, array in arrays.items():

        def save(folder: Path, array: np.ndarray = array) -> None:
            np.save(folder / "x.npy", array, allow_pickle=True)

        def save_both(folder: Path, array: np.ndarray = array) -> None:
            np.savez(folder / "x.npz", images=array)

        yield Case(f"npy: {name}", quantize(images="x.npy"), refused(("x.npy", "input")), before=save, fast=name == "no pixels")
        if array.dtype != object:
            yield Case(f"npz: {name}", quantize(images="x.npz"), refused(("x.npz", "input")), before=save_both)
    for name, content in {"empty": b"", "text": b"no", "magic": b"\x93NUMPY", "header": b"\x93NUMPY\x01\0\xff\xff{'descr':",
        "zip": b"PK\5\6" + bytes(18),
                          "shape of a petabyte": _header("(1000000, 3, 16384, 16384)"),
                          "negative shape": _header("(-4, 3, 16, 16)"),
                          "code in the header": _header("__import__('os').system('touch $MARKER')")}.items():  # fmt: skip
        yield Case(f"npy of {name}", quantize(images="x.npy"), refused("x.npy"), before=write("x.npy", content))
        yield Case(f"npz of {name}", quantize(images="x.npz"), refused("x.npz"), before=write("x.npz", content))
    good = np.random.default_rng(0).standard_normal((12, 3, 16, 16)).astype(f32)
    for name, labels in {"too few": np.zeros(3, int), "floats": np.full(12, 0.5), "negative": -np.ones(12, int),
        "too large": np.full(12, 4),
                         "text": np.full(12, "a"), "one hot": np.zeros((12, 4), int),
                         "huge": np.full(12, 2**62)}.items():  # fmt: skip

        def labelled(folder: Path, labels: np.ndarray = labels) -> None:
            np.savez(folder / "x.npz", images=good, labels=labels)

        command = tuple(word for word in quantize(images="x.npz") if word != "--no-labels")
        yield Case(f"npz with labels: {name}", command, refused("label"), before=labelled)
    yield Case(
        "npz of two arrays", quantize(images="x.npz"), refused("x.npz"), before=lambda f: np.savez(f / "x.npz", a=good, b=good)
    )
    yield Case("npz of no array", quantize(images="x.npz"), refused("x.npz"), before=lambda f: np.savez(f / "x.npz"))


def _header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(64)


def _parquet() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(**columns: object) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            pq.write_table(pa.table(columns), folder / "x.parquet")

        return put

    good = [encoded() for _ in range(6)]
    for name, before in {
        "no image column": table(picture=good), "text": table(image=["a"] * 6), "numbers": table(image=[1] * 6),
        "no rows": table(image=pa.array([], pa.binary())),
        "a null": table(image=[*good, None]), "empty bytes": table(image=[*good, b""]),
        "struct of paths": table(image=[{"path": "a"}] * 3),
        "a null struct": table(image=[{"bytes": good[0], "path": "a"}, None]),
        "only nulls": table(image=pa.array([None] * 4, pa.binary())),
        "broken bytes": table(image=[b"no"] * 4), "not parquet": write("x.parquet", b"no"),
        "magic alone": write("x.parquet", b"PAR1PAR1"), "empty file": write("x.parquet", b""),
    }.items():  # fmt: skip
        yield Case(f"parquet: {name}", quantize(images="x.parquet"), refused("x.parquet"), before=before)
    labelled = tuple(word for word in quantize(images="x.parquet") if word != "--no-labels")
    for name, labels in {
        "text": list("abcdef"),
        "null": [0, 1, 2, 3, 0, None],
        "floats": [0.5] * 6,
        "lists": [[0, 2]] * 6,
        "too large": [9] * 6,
        "negative": [-1] * 6,
    }.items():
        yield Case(f"parquet with labels: {name}", labelled, refused("label"), before=table(image=good, label=labels))


def _shapes() -> Iterator[Case]:
    """Pictures of odd shapes: they are fine, in little memory, or refused."""
    wide, tall = (
        each(*(write(f"x/{i}.png", encoded(size=(5000, 1))) for i in range(4))),
        each(*(write(f"x/{i}.png", encoded(size=(1, 5000))) for i in range(4))),
    )
    for name, before in {"wide": wide, "tall": tall}.items():
        for resize in ("center", "squash", "border"):
            yield Case(f"{name}, --resize {resize}", quantize("--resize", resize, "--input-size", "3,224,224", images="x"),
                either("x"), before=before,
                       memory=2 << 30)  # fmt: skip
    alike = each(*(write(f"x/{i}.png", png(16, 16, (b"\0" + bytes(48)) * 16)) for i in range(6)))
    yield Case("all black", quantize(images="x"), either("x"), before=alike)
