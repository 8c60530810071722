"""Inputs that are right but for a few bytes, drawn with a seed: each is refused in words, or gives a right result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, caught, either, write
from doors.kinds.images import encoded, opened
from doors.kinds.runs import COMMANDS

TARGETS, BITS, PROGRAMS, GRAPHS, WEIGHTS, IMAGES, ARRAYS, RUNS = 500, 300, 240, 200, 100, 420, 160, 360


def cases() -> Iterator[Case]:
    yield from _targets()
    yield from _bits()
    yield from _files("net.pt2", PROGRAMS, _program, ("net.pt2",))
    yield from _files("run/model.onnx", GRAPHS, None, ("run",), COMMANDS["lint"])
    yield from _files("weights.safetensors", WEIGHTS, _weights, ("weights.safetensors",))
    yield from _images()
    yield from _arrays()
    yield from _runs()


def mutated(content: bytes, seed: int) -> bytes:
    """One of: a bit or a few flipped, cut, a piece taken out, doubled, zeroed or replaced by noise."""
    rng, data = random.Random(seed), bytearray(content)
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 64))
    kind = rng.randrange(7)
    if kind < 2:
        for _ in range(1 if kind else rng.randrange(2, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + size]
    elif kind == 4:
        data[at:at] = data[at : at + size]
    elif kind == 5:
        data[at : at + size] = bytes(len(data[at : at + size]))
    else:
        data[at : at + size] = rng.randbytes(size)
    return bytes(data)


WORDS = (
    "nan",
    "inf",
    "-1",
    "0",
    "true",
    "[]",
    "{}",
    '""',
    "1e999",
    "99999999999999999999",
    "null",
    "=",
    "[",
    "]",
    '"',
    "#",
    "\n",
    ",",
    "'''",
    "int8",
    "float",
    "[[op]]",
    "1979-05-27",
)


def mutated_text(text: str, seed: int) -> str:
    """One of: a word replaced by another of the file or by an odd one, a line taken out or doubled, a character changed."""
    rng, lines = random.Random(seed), text.splitlines(keepends=True)
    at, kind = rng.randrange(len(lines)), rng.randrange(7)
    if kind < 3:
        words = lines[at].split(" ")
        place = rng.randrange(len(words))
        words[place] = rng.choice(WORDS if kind else rng.choice(lines).split(" "))
        lines[at] = " ".join(words) + ("" if place + 1 < len(words) else "\n")
    elif kind == 3:
        del lines[at]
    elif kind == 4:
        lines.insert(at, rng.choice(lines))
    elif kind == 5:
        return mutated(text.encode(), seed).decode(errors="replace")
    else:
        place = rng.randrange(len(lines[at]))
        lines[at] = lines[at][:place] + rng.choice("[]{}\"'=,.#\\\x00é \t-0") + lines[at][place + 1 :]
    return "".join(lines)


def _targets() -> Iterator[Case]:
    import fewbit

    folder = Path(fewbit.__file__).parent / "target"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.toml"))]
    for seed in range(TARGETS):
        text = mutated_text(texts[seed % len(texts)], seed)
        yield Case(f"target file {seed}", load_target, either(".toml"), before=write("t.toml", text), fast=seed % 100 == 0)


def load_target() -> None:
    import fewbit

    fewbit.load_target("t.toml")


def _bits() -> Iterator[Case]:
    good = ("8", "w4a8", "4,first=8,last=8", "mixed:6.0", "mixed:6.0:4,6,8", "4,*.fc2=w4a8", "w4a8,head=8")
    for seed in range(BITS):
        rng = random.Random(seed)
        text = list(rng.choice(good))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(2)] = rng.choice([*"0123456789,=:.wa*[]-+ \n\x1b٣８eE", "first", "mixed", "nan"])

        def call(bits: str = "".join(text)) -> None:
            import fewbit

            fewbit.Request(model="demo", bits=bits)

        yield Case(f"--bits {seed} {''.join(text)[:30]!r}", call, either("--bits"), fast=seed % 100 == 0)


def _files(
    file: str, count: int, does: Callable[[], object] | None, needs: tuple[str, ...], command: tuple[str, ...] = ()
) -> Iterator[Case]:
    for seed in range(count):

        def before(folder: Path, seed: int = seed) -> None:
            (folder / file).write_bytes(mutated((folder / file).read_bytes(), seed))

        yield Case(
            f"{file} {seed}",
            does or command,
            either(file),
            before=before,
            needs=needs,
        )


def _program() -> None:
    """Load the exported program: it is the one that was written, weights, graph and all, or it is refused."""
    import torch

    from doors.place import net
    from fewbit.load import load_model

    x = torch.randn(2, 3, 16, 16)
    found = load_model("net.pt2").program.module(check_guards=False)(x)
    assert torch.equal(found, net()(x)), "the program that was loaded is another one"


def _weights() -> None:
    """Load weights into a net as timm's are."""
    import timm

    from doors.place import net
    from fewbit.load import load_model

    timm.create_model = lambda *_, **__: net()
    load_model("test_vit", weights=Path("weights.safetensors"), overrides={"input_size": (3, 16, 16)})


def _images() -> Iterator[Case]:
    kinds = {
        "png": encoded(),
        "jpg": encoded("JPEG", size=(64, 64)),
        "gif": encoded("GIF"),
        "webp": encoded("WEBP"),
        "bmp": encoded("BMP"),
        "tiff": encoded("TIFF"),
        "ppm": encoded("PPM"),
    }
    for seed in range(IMAGES):
        suffix = list(kinds)[seed % len(kinds)]
        content = mutated(kinds[suffix], seed)
        yield Case(
            f"{suffix} {seed}", _opened, either(f"x.{suffix}"), before=write(f"one/x.{suffix}", content), fast=seed % 140 == 0
        )


def _opened() -> None:
    opened("one")


def _arrays() -> Iterator[Case]:
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    array = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    buffers = {"npy": io.BytesIO(), "npz": io.BytesIO(), "parquet": io.BytesIO()}
    np.save(buffers["npy"], array)
    np.savez(buffers["npz"], images=array)
    pq.write_table(pa.table({"image": [encoded() for _ in range(4)]}), buffers["parquet"])
    for seed in range(ARRAYS):
        suffix = list(buffers)[seed % 3]
        content = mutated(buffers[suffix].getvalue(), seed)
        yield Case(
            f"{suffix} {seed}",
            lambda suffix=suffix: opened(f"x.{suffix}"),
            either(f"x.{suffix}"),
            before=write(f"x.{suffix}", content),
            fast=seed % 100 == 0,
        )


def _runs() -> Iterator[Case]:
    """Files of a run: any change is caught."""
    files = (
        "run.json",
        "plan.json",
        "report.json",
        "tables.json",
        "plan.safetensors",
        "images.safetensors",
        "model.onnx",
        "exported.pt2",
        "float.onnx",
    )
    for seed in range(RUNS):
        file = files[seed % len(files)]
        command = COMMANDS["report"] if file in ("report.json", "tables.json") else COMMANDS["verify"]

        def before(folder: Path, file: str = file, seed: int = seed) -> None:
            path = folder / "run" / file
            old = path.read_bytes()
            text = file.endswith(".json") and seed % 2
            new = mutated_text(old.decode(), seed).encode() if text else mutated(old, seed)
            path.write_bytes(new if new != old else old + b"}")

        yield Case(f"{file} of a run {seed}", command, caught(file), before=before, needs=("run",))
