"""`predict.py` of a run. Oracles: fewbit's own pixels, bit for bit; its tasks' own predictions; onnxruntime by itself."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import ExifTags, Image

from fewbit.capture import capture
from fewbit.core.inputs import Input
from fewbit.core.record import Record
from fewbit.core.task import Output, Signature
from fewbit.data.decode import decode
from fewbit.data.preprocess import Preprocess
from fewbit.deploy.folder import About, decoded, rendered, write
from fewbit.deploy.program import program
from fewbit.errors import BadImages
from fewbit.request import Request
from fewbit.stages.load import load
from fewbit.task import Classify, Depth, Detect, Restore, Segment, Task
from fewbit.task.decode import DECODERS
from fewbit.task.detect import SURE
from fewbit.task.selection import select
from onnx_reader.test_files import net, written

PREPARE = ("prepare", "pictures")
RNG = np.random.default_rng(0)


def names_of(*pieces: str) -> SimpleNamespace:
    """What a program of these pieces defines."""
    names: dict[str, Any] = {"__name__": "predict", "__file__": __file__}
    exec(compile(program("A program.", pieces), "predict.py", "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture of each kind that a file may be, wide and high, small and large."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for name, (high, wide) in {"wide": (31, 57), "high": (90, 22), "small": (9, 9)}.items():
        pixels = Image.fromarray(RNG.integers(0, 256, (high, wide, 3), np.uint8))
        for mode, suffix in (("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "bmp")):
            found[f"{name} {mode}"] = folder / f"{name}{mode}.{suffix}"
            pixels.convert(mode).save(found[f"{name} {mode}"])
    found["deep"] = folder / "deep.png"
    Image.fromarray(RNG.integers(0, 65536, (40, 30)).astype(np.uint16)).save(found["deep"])
    for n, kind in ((3, np.uint16), (5, np.uint8)):
        found[f"bands {n}"] = folder / f"bands{n}.npy"
        np.save(found[f"bands {n}"], RNG.integers(0, np.iinfo(kind).max, (33, 47, n)).astype(kind))
    return found


def same(predict: SimpleNamespace, own: Preprocess, file: Path) -> bool:
    """Whether the input is bit for bit what fewbit gives to the runtime, in a file of floats and one that normalizes."""
    wanted = own(decode(file, file.name, own.size[0]))
    how = Record(own.to_json()).images(own.whole)
    x = predict.model_input(predict.opened(file.read_bytes(), file.name, own.size[0]), how)
    if not own.whole:
        return x.dtype == np.float32 and bool((x == wanted.numpy()).all())
    (pixels,) = feeds_of(own)(wanted[None].numpy())
    return x.dtype == np.uint8 and bool((x == pixels[0]).all())


def feeds_of(own: Preprocess) -> Any:
    """What fewbit gives a file of uint8 for normalized images."""
    from fewbit.core.record import pixels_of

    return lambda x: [pixels_of(x, list(own.mean), list(own.std))]


@pytest.mark.parametrize("resize", ["squash", "center", "border", "letterbox", "corner"])
def test_pixels_are_those_that_fewbit_scores_bit_for_bit(pictures: dict[str, Path], resize: str) -> None:
    predict = names_of(*PREPARE)
    kinds = itertools.product(("nearest", "bilinear", "bicubic", "lanczos"), (True, False), ("rgb", "bgr"), (False, True))
    files = [pictures[name] for name in ("wide RGB", "high RGB", "small RGB", "deep", "bands 3")]
    for size, crop, (interpolation, antialias, order, whole) in itertools.product(
        ((3, 24, 24), (3, 20, 32)), (1.0, 0.875), kinds
    ):
        if antialias or interpolation != "lanczos":
            fill = {"fill": 51.3} if resize in ("letterbox", "corner") else {}
            own = Preprocess(
                size, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), interpolation, resize, crop, antialias,
                channel_order=order, whole=whole, **fill,
            )  # fmt: skip
            for file in files:
                assert same(predict, own, file), (own, file.name)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_becomes_the_same_bands(pictures: dict[str, Path], channels: int) -> None:
    predict = names_of(*PREPARE)
    for name, file in pictures.items():
        if not name.startswith("bands"):
            assert same(predict, Preprocess((channels, 16, 20), resize="center"), file), name
    assert same(names_of(*PREPARE), Preprocess((4, 16, 20)), pictures["wide RGBA"])
    assert same(names_of(*PREPARE), Preprocess((5, 16, 20)), pictures["bands 5"])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_pngs_of_16_bits_keep_them(bands: int, interlaced: bool) -> None:
    """Oracles: the numbers that were written, and fewbit's own reader, which is torchvision's."""
    predict, values = names_of(*PREPARE), RNG.integers(0, 65536, (13, 11, bands)).astype(np.uint16)
    content = deep_png(values, interlaced)
    colours = values[..., :3] if bands >= 3 else values[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(predict.opened(content, "a.png", 3), colours)
    for channels in (1, 3, 4):
        if channels == 4 and bands % 2:
            with pytest.raises(ValueError, match=r"^a\.png has no alpha"):
                predict.opened(content, "a.png", channels)
        else:
            found, wanted = predict.opened(content, "a.png", channels), decode(content, "a.png", channels)
            assert found.dtype == wanted.dtype == np.uint16
            np.testing.assert_array_equal(found, wanted)


def deep_png(values: Any, interlaced: bool) -> bytes:
    """A PNG of 16 bits, as its specification has it: the rows with the filter Up, or in the seven passes of Adam7."""
    high, wide, bands = values.shape
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for y, x, down, right in passes if interlaced else ((0, 0, 1, 1),):
        lines = values[y::down, x::right].astype(">u2").view(np.uint8)
        lines = lines.reshape(len(lines), -1)
        rows += np.insert(np.diff(lines, axis=0, prepend=np.uint8(0)), 0, 2, axis=1).tobytes()
    head = struct.pack(">IIBBBBB", wide, high, 16, (0, 4, 2, 6)[bands - 1], 0, 0, interlaced)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(file: Path, kind: tuple[int, int], colours: int) -> Path:
    """A TIFF of 4 x 4 zeros with so many samples of so many bits, and what its colours mean."""
    samples, bits = kind
    size = 4 * 4 * samples * bits // 8
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: colours, 273: 200, 277: samples, 278: 4, 279: size}
    entries = [struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items()]
    if samples == 3:
        entries[2] = struct.pack("<HHII", 258, 3, 3, 180)
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    file.write_bytes(content.ljust(180, b"\0") + struct.pack("<HHH", bits, bits, bits).ljust(20, b"\0") + bytes(size))
    return file


def saved(picture: Path, file: Path) -> Path:
    """A picture in a file of another kind."""
    Image.open(picture).save(file)
    return file


def test_what_would_not_be_the_same_is_refused(tmp_path: Path, pictures: dict[str, Path]) -> None:
    predict, deep = names_of(*PREPARE), tmp_path / "colour.png"
    Image.fromarray(RNG.integers(0, 256, (4, 4, 3), np.uint8)).save(deep)
    content = bytearray(deep.read_bytes())
    content[24] = 16
    deep.write_bytes(content)
    for file, channels, said in (
        (deep, 3, "is broken, or of none of the kinds AVIF"),
        (tiff(tmp_path / "colour.tif", (3, 16), 2), 3, "is a TIFF of 16 bits in colour, of which Pillow keeps 8"),
        (tiff(tmp_path / "dark.tif", (1, 16), 0), 3, "is a TIFF of 16 bits whose white is 0"),
        (saved(pictures["wide RGB"], tmp_path / "a.ico"), 3, "is broken, or of none of the kinds AVIF"),
        (saved(pictures["wide RGB"], tmp_path / "a.tga"), 3, "is broken, or of none of the kinds AVIF"),
        (pictures["wide RGB"], 4, "has no alpha, and the model has 4 channels"),
        (pictures["wide RGB"], 5, "has mode RGB, and the model has 5 channels"),
        (pictures["bands 5"], 1, r"holds uint8 \(33, 47, 5\); the model has 1 channel:"),
        (pictures["bands 5"], 3, r"holds uint8 \(33, 47, 5\); the model has 3 channels"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(file.name)} {said}"):
            predict.opened(file.read_bytes(), file.name, channels)


@pytest.mark.parametrize("resize", ["squash", "center", "border", "letterbox", "corner"])
@pytest.mark.parametrize("shape", [(480, 640), (500, 300), (3, 4000)])
def test_boxes_are_placed_as_fewbit_places_them(resize: str, shape: tuple[int, int]) -> None:
    own = Preprocess((3, 96, 64), resize=resize, crop_pct=0.9)
    columns, rows = names_of(*PREPARE).placed(*shape, own.to_json())
    found = own.placement(*shape)
    assert ((columns[0], rows[0]), (columns[1], rows[1])) == (found.scale, found.shift)


SIZE = (64, 96)
CELLS = sum((64 // s) * (96 // s) for s in (8, 16, 32))
DETECTORS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "yolox": [("output", (CELLS, 8))], "yolov5": [("output", (200, 8))], "yolov8": [("output", (7, 200))],
    "yolov10": [("output", (30, 6))], "detr": [("logits", (20, 4)), ("pred_boxes", (20, 4))],
    "rtdetr": [("logits", (20, 3)), ("pred_boxes", (20, 4))],
    "torchvision": [("boxes", (30, 4)), ("labels", (30,)), ("scores", (30,))],
}  # fmt: skip


def drawn(kind: str, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Outputs of a detector, with boxes that overlap."""
    y = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    rows = y.transpose(0, 2, 1) if kind == "yolov8" else y
    if kind in ("yolox", "yolov5", "yolov8"):
        rows[..., 4:] **= 9 if kind == "yolov8" else 3
    if kind in ("yolov5", "yolov8"):
        rows[..., :4] = rows[..., :4] * (40, 30, 30, 30)
    if kind == "yolov10" or name == "boxes":
        rows[..., 2:4] = rows[..., :2] + rows[..., 2:4] * 40
    if kind == "yolov10":
        rows[..., 5] = RNG.integers(0, 3, rows.shape[:-1])
    if name == "logits":
        y = 6 * y - 3
    return RNG.integers(0, 3, (1, *shape)) if name == "labels" else y


@pytest.mark.parametrize("kind", DETECTORS)
def test_objects_are_those_of_the_task(kind: str) -> None:
    model = Signature([Output(name, shape, name != "labels") for name, shape in DETECTORS[kind]], SIZE, ("a", "b", "c"))
    task = Detect(kind, DECODERS[kind](model), tuple(model.names))
    arrays = [drawn(kind, name, shape) for name, shape in DETECTORS[kind]]
    answered = piece_of(task)(arrays, {"classes": list(model.names)}, placed=((2.0, 10.0), (0.5, -4.0)))["objects"]
    (found,) = select(task.decoder, [torch.from_numpy(y) for y in arrays])
    sure = found.scores >= SURE
    assert 1 < int(sure.sum()) < 100
    assert [one["name"] for one in answered] == [model.names[i] for i in found.labels[sure].tolist()]
    np.testing.assert_allclose([one["score"] for one in answered], found.scores[sure], atol=6e-5)
    wanted = (found.boxes[sure].numpy() - (10, -4, 10, -4)) / (2, 0.5, 2, 0.5)
    np.testing.assert_allclose([one["box"] for one in answered], wanted, atol=6e-3)


def piece_of(task: Task) -> Any:
    """The answer of a program for a task, given what `task.json` says beside it."""
    pieces, fields = decoded(SimpleNamespace(task=task, tail=None))  # type: ignore[arg-type]
    predict = names_of(*pieces)
    return lambda outputs, more, placed=None: predict.answer(outputs, {**json.loads(json.dumps(fields)), **more}, placed)


@pytest.mark.parametrize("tail", [None, SimpleNamespace(gives=("z",))])
def test_examples_show_classes_where_the_file_gives_them_and_outputs_behind_a_tail(tail: Any) -> None:
    pieces, fields = decoded(SimpleNamespace(task=Classify(0, 5), tail=tail))  # type: ignore[arg-type]
    task = {**fields, "pieces": pieces, "input": "x", "outputs": ["z"], "batch": 1, "classes": None}
    images = {"size": [3, 8, 8], "mean": [0.0] * 3, "std": [1.0] * 3, "normalize": "outside"}
    values = {"name": "net", "task": task, "images": images, "page": True, "around": [0] * 3, "picture": "p.jpg"}
    text = rendered("example.cpp", values)
    assert ("scores[a] > scores[b]" in text, "GetShape" in text) == (tail is None, tail is not None)
    assert '!TASK.pieces.includes("classify")' in rendered("example.mjs", values)


@pytest.mark.parametrize("shape", [(1, 12, 16), (12, 16)])
@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64])
def test_classes_of_pixels_are_the_map(shape: tuple[int, ...], kind: Any) -> None:
    y = RNG.integers(0, 2, (1, *shape)).astype(kind)
    segment = Segment.of(Signature([Output("out", shape, is_real=False)], (12, 16)))
    found = piece_of(segment)([y], {"classes": None})
    np.testing.assert_array_equal(found["map"], y.reshape(12, 16))
    np.testing.assert_array_equal(segment.predict([torch.from_numpy(y)])[0], y.reshape(12, 16))


@pytest.mark.parametrize("shape", [(5, 12, 16), (1, 12, 16), (12, 16)])
def test_maps_are_those_of_the_task(shape: tuple[int, ...]) -> None:
    y = RNG.normal(size=(1, *shape)).astype(np.float32)
    model = Signature([Output("out", shape)], (12, 16))
    segment = Segment.of(model)
    found = piece_of(segment)([y], {"classes": None})
    classes = segment.predict([torch.from_numpy(y)])[0].numpy()
    np.testing.assert_array_equal(found["map"], classes)
    shares = {one["index"]: one["share"] for one in found["classes"]}
    assert shares == {int(c): round(float((classes == c).mean()), 4) for c in np.unique(classes)}
    if len(shape) == 2 or shape[0] == 1:
        depth = Depth.of(model)
        np.testing.assert_allclose(piece_of(depth)([y], {})["map"], depth.values([torch.from_numpy(y)])[0], rtol=1e-6)
        restored = Restore.of(model).drawn(Image.new("RGB", (16, 12)), [torch.from_numpy(y)])
        np.testing.assert_array_equal(piece_of(Restore.of(model))([y], {})["map"], np.asarray(restored))


def made(folder: Path, tmp_path: Path, channels: int = 3, **options: Any) -> tuple[Any, Path]:
    """The deploy folder of a small classifier, its model beside it; and what fewbit loaded."""
    file = net(size=(channels, 8, 8))
    if channels != 3:
        stem = next(one for one in file.graph.initializer if one.name == "stem.weight")
        weight = RNG.normal(size=(6, channels, 3, 3)).astype(np.float32)
        stem.CopyFrom(onnx.numpy_helper.from_array(weight, "stem.weight"))
    model = written(file, tmp_path)
    images = RNG.integers(0, 256, (8, 20, 16, channels), dtype=np.uint8)
    request = Request(model=str(model), images=images, target="ort-x86-vnni", **options)
    inputs = load(request)
    graph = replace(capture(inputs.loaded), task=inputs.task)
    images_of = inputs.record.images(inputs.record.inside)
    write(folder, graph, About('a "net" */', "ort-x86-vnni", "mse", "w8a8", "onnxruntime", (), images_of))
    shutil.copy(model, folder.parent / "model.onnx")
    return inputs, folder


BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "fewbit", "timm", "onnx", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    root = tmp_path_factory.mktemp("run")
    return made(root / "deploy", tmp_path_factory.mktemp("net"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), resize="center")


def test_the_program_answers_as_the_runtime_does_with_neither_torch_nor_fewbit(
    shipped: tuple[Any, Path], pictures: dict[str, Path], tmp_path: Path
) -> None:
    inputs, folder = shipped
    files = [shutil.copy(pictures[name], tmp_path) for name in ("wide RGB", "high L")]
    words = [sys.executable, "-c", BLOCKED, str(folder / "predict.py"), *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"})
    session = onnxruntime.InferenceSession(folder.parent / "model.onnx")
    for line, file in zip(done.stdout.splitlines(), files, strict=True):
        x = inputs.preprocess(Image.open(file))[None].numpy()
        (logits,) = session.run(None, {session.get_inputs()[0].name: x})
        shares = torch.from_numpy(logits[0]).double().softmax(0)
        best = json.loads(line)["classes"]
        assert [one["index"] for one in best] == shares.argsort(descending=True, stable=True)[:5].tolist()
        assert [one["probability"] for one in best] == [round(float(shares[one["index"]]), 4) for one in best]


@pytest.mark.parametrize("task", ["classify", "embed"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_what_stands_in_the_readme_can_be_typed(tmp_path: Path, channels: int, task: str) -> None:
    """Oracle: the program, given a picture of the name and kind that is written, and the pixels that the example reads."""
    _, folder = made(tmp_path / "run" / "deploy", tmp_path, channels, task=task)
    texts = {name: (folder / name).read_text() for name in ("README.md", "example.cpp")}
    commands = [re.search(r"python predict\.py (--pixels )?(picture\.\w+)", text) for text in texts.values()]
    (name,) = {found[2] for found in commands if found}
    file = tmp_path / name
    if name.endswith(".npy"):
        np.save(file, RNG.integers(0, 256, (9, 11, channels), np.uint8))
    else:
        Image.fromarray(RNG.integers(0, 256, (9, 11, 4 if channels == 4 else 3), np.uint8)).save(file)
    for words in ([], ["--pixels"]):
        command = [sys.executable, str(folder / "predict.py"), *words, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.pixels").stat().st_size == 8 * 8 * channels
    assert f"`python predict.py --pixels {name}` writes" in texts["README.md"]
    says = "the first numbers of each output" if task == "embed" else "prints the same classes"
    assert says in texts["README.md"]
    assert ("std::stable_sort" in texts["example.cpp"]) == (task == "classify")
    assert ("EXIF" in texts["README.md"]) == (channels in (1, 3, 4))
    assert ("example.html" in texts["README.md"]) == (folder / "example.html").exists() == (channels in (1, 3))
    assert not texts["README.md"].count("\n\n\n")


def test_the_program_imports_what_it_says_alone(shipped: tuple[Any, Path]) -> None:
    tree = ast.parse((shipped[1] / "predict.py").read_text())
    named = {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    named |= {str(one.module) for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in named} - sys.stdlib_module_names == {"numpy", "PIL", "onnxruntime", "openvino"}
    assert not (shipped[1] / "README.md").read_text().count("\n\n\n")


def test_the_server_of_the_tutorial_answers_as_the_program(
    shipped: tuple[Any, Path], pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
    (server,) = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "Handler" in block]
    monkeypatch.syspath_prepend(shipped[1])
    names: dict[str, Any] = {"__name__": "serve"}
    exec(compile(server, "serve.py", "exec"), names)
    picture = pictures["wide RGB"]
    model = names["Model"](shipped[1])
    wanted = model(model_pixels(picture))
    assert names["answer"](picture.read_bytes()) == wanted
    sys.modules.pop("predict")


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The program of a model whose answer is the picture and what its input `mask` adds to it."""
    folder = tmp_path_factory.mktemp("adder")
    shapes = {"x": [1, 3, 8, 8], "mask": [1, 3, 1, 1], "y": [1, 3, 8, 8]}
    x, mask, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "mask"], ["y"])], "adder", [x, mask], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    task = {"file": "model.onnx", "runtime": "onnxruntime", "input": "x", "outputs": ["y"], "batch": 1, "index": 0}
    (folder / "task.json").write_text(json.dumps(task))
    how = Record(Preprocess((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).to_json()).images(False)
    (folder / "preprocess.json").write_text(json.dumps(how))
    np.savez(folder / "inputs.npz", mask=np.zeros((1, 3, 1, 1), np.float32))
    names: dict[str, Any] = {"__name__": "predict", "__file__": str(folder / "predict.py")}
    exec(compile(program("", (*PREPARE, "session", "restore", "program")), "predict.py", "exec"), names)
    return names["main"]


def plain(path: Path, value: int) -> str:
    """A picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return str(path)


def test_a_file_that_is_there_is_a_picture_whatever_its_name(adder: Any, tmp_path: Path, capsys: Any) -> None:
    pictures = [plain(tmp_path / "class=cat" / "a=b.png", 51), plain(tmp_path / "mask=1.png", 102)]
    np.save(tmp_path / "m=1.npy", np.full((1, 3, 1, 1), 0.2, np.float32))
    assert adder([*pictures, f"mask={tmp_path / 'm=1.npy'}"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in lines] == pictures
    assert [np.unique(Image.open(line["map"])).tolist() for line in lines] == [[102], [153]]  # 0.2 more than each picture


def test_pictures_of_one_stem_have_answers_and_pixels_of_their_own_apart_from_them(
    adder: Any, tmp_path: Path, capsys: Any
) -> None:
    pictures = [plain(tmp_path / "a.png", 51), plain(tmp_path / "a.bmp", 204)]
    assert adder(pictures) == 0
    answers = [Path(json.loads(line)["map"]) for line in capsys.readouterr().out.splitlines()]
    assert answers == [tmp_path / "answers" / f"{name}.png" for name in ("a.png", "a.bmp")]
    assert [np.unique(Image.open(file)).tolist() for file in answers] == [[51], [204]]
    assert adder(["--pixels", *pictures]) == 0
    found = [set((tmp_path / f"{name}.pixels").read_bytes()) for name in ("a.png", "a.bmp")]
    assert found == [{51}, {204}]
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"a.png", "a.bmp", "a.png.pixels", "a.bmp.pixels", "answers"}


def test_what_the_program_cannot_read_or_write_is_said_in_one_line(
    adder: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = plain(tmp_path / "a.png", 51)
    np.save(tmp_path / "wide.npy", np.zeros((1, 3, 1, 2), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((1, 3, 1, 1)))
    np.save(tmp_path / "objects.npy", np.array([None]))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 3), np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:40])
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(picture).read_bytes()[:50])
    empty, wrong = tmp_path / "empty.png", tmp_path / "wrong.png"
    empty.write_bytes(b"")
    content = Path(picture).read_bytes()
    at = content.index(b"IDAT")
    wrong.write_bytes(content[: at - 4] + struct.pack(">I", 4) + b"IDATabcd" + struct.pack(">I", zlib.crc32(b"IDATabcd")))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    said = {
        "mask=nope.npy": "nope.npy is not a file that is there; give one with float32 (1, 3, 1, 1)",
        f"mask={tmp_path / 'wide.npy'}": "holds float32 (1, 3, 1, 2); the model takes float32 (1, 3, 1, 1)",
        f"mask={tmp_path / 'double.npy'}": "holds float64 (1, 3, 1, 1); the model takes float32",
        f"mask={tmp_path / 'objects.npy'}": "cannot be read as a .npy file",
        f"mask={tmp_path / 'cut.npy'}": "cannot be read as a .npy file",
        f"mask={picture}": "cannot be read as a .npy file",
        "class=a.png": "class=a.png is not a file that is there; the program takes pictures and mask=FILE.npy.",
        "--pixel": "--pixel is not an option; there are --pixels and --help. Type python predict.py [--pixels] PICTURE",
        "-n=1": "-n=1 is not an option",
        str(tmp_path): "is not a file that is there",
        str(tmp_path / "cut.npy"): "cannot be read as a .npy file",
        str(tmp_path / "none.npy"): "holds uint8 (0, 4, 3); the model has 3 channels",
        str(cut): "cut.png is damaged (image file is truncated); get the whole file again.",
        str(wrong): "wrong.png is damaged, or of a kind that Pillow does not read (",
        str(empty): "empty.png is empty, of 0 bytes; give a picture.",
        str(text): "is broken, or of none of the kinds",
    }
    for word, sentence in said.items():
        assert adder([word, picture]) == 2, word
        given = capsys.readouterr()
        assert sentence in given.err, (word, given.err)
        assert given.out == ""
    np.save(tmp_path / "m.npy", np.zeros((1, 3, 1, 1), np.float32))
    assert adder([f"mask={tmp_path / 'm.npy'}"]) == 2
    assert "There is no picture" in capsys.readouterr().err
    (tmp_path / "answers").write_text("")
    (tmp_path / "a.png.pixels").mkdir()
    for words in ([picture], ["--pixels", picture]):
        assert adder(words) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))
    for most in (31, 50):  # of which Pillow itself refuses twice as many, and warns of more
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        said = rf"a\.png cannot be decoded as an image: Image size \(64 pixels\) exceeds limit of {most} pixels"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert adder([picture]) == 2
        assert re.search(said, capsys.readouterr().err)
        with pytest.raises(BadImages, match=said):
            decode(Path(picture), "a.png", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert np.array_equal(decode(Path(picture), "a.png", 3), names_of(*PREPARE).opened(Path(picture).read_bytes(), "a.png", 3))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_name_is_printed_in_any_encoding(
    adder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    picture, broken = plain(tmp_path / "飞机 é.png", 51), tmp_path / "ğüş.png"
    broken.write_bytes(b"GIF89a")
    assert adder([picture]) == 0
    assert adder([str(broken)]) == 2
    out, err = (stream.buffer.getvalue() for stream in streams.values())  # type: ignore[attr-defined]
    assert json.loads(out.decode("ascii"))["picture"] == picture
    assert str(broken).encode(encoding, "backslashreplace") in err


def test_help_is_printed_without_an_error_and_a_call_without_words_is_one(adder: Any, tmp_path: Path, capsys: Any) -> None:
    for words in (["-h"], ["--help"], ["--pixels", "-h"], [plain(tmp_path / "a.png", 51), "--help"]):
        assert adder(words) == 0
        given = capsys.readouterr()
        assert given.out.startswith("python predict.py [--pixels] PICTURE ... [INPUT=FILE.npy ...]\n")
        assert given.err == ""
    for words in ([], ["--pixels"]):
        assert adder(words) == 2
        assert capsys.readouterr().err.startswith("python predict.py")


def test_a_program_without_its_model_says_what_is_missing(adder: Any, tmp_path: Path) -> None:
    names = adder.__globals__
    for name in ("task.json", "preprocess.json"):
        shutil.copy(names["HERE"] / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is neither in .* nor beside it"):
        names["Model"](tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"model\.onnx cannot be loaded in onnxruntime: .*; take the file of the run again"):
        names["Model"](tmp_path)
    for name in ("task.json", "preprocess.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name} is damaged, no JSON"):
            names["Model"](tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is not in {tmp_path}; keep predict\.py with its files\."):
            names["Model"](tmp_path)
        shutil.copy(names["HERE"] / name, tmp_path)


@pytest.mark.parametrize("place", ["links", "dossier é"])
def test_a_link_to_the_program_is_the_program_and_no_folder_ends_it_in_a_traceback(
    shipped: tuple[Any, Path], pictures: dict[str, Path], tmp_path: Path, place: str
) -> None:
    """Oracle: the answer where it lies; onnxruntime takes no path that Python cannot write as UTF-8, as in the locale C."""
    folder, picture = tmp_path / place, str(pictures["wide RGB"])
    wanted = subprocess.run([sys.executable, shipped[1] / "predict.py", picture], capture_output=True, check=True).stdout
    if place == "links":
        folder.mkdir()
        (folder / "predict.py").symlink_to(shipped[1] / "predict.py")
        done = subprocess.run([sys.executable, folder / "predict.py", picture], capture_output=True)
        assert (done.returncode, done.stdout) == (0, wanted), done.stderr
        return
    shutil.copytree(shipped[1].parent, folder)
    for env, code in (({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 2), ({"PYTHONUTF8": "1"}, 0)):
        words = [sys.executable, folder / "deploy" / "predict.py", picture]
        done = subprocess.run(words, capture_output=True, env={"PATH": "/usr/bin", **env})
        assert done.returncode == code, done.stderr
        assert done.stdout == (b"" if code else wanted)
        assert (b"set PYTHONUTF8=1" in done.stderr) == bool(code)
        assert done.stderr.count(b"\n") == bool(code)


def model_pixels(picture: Path) -> Any:
    return np.array(Image.open(picture))


def pixels_of(folder: Path, picture: Path, place: Path) -> None:
    """Write what the examples read: the resized pixels of a picture, as predict.py has them, in p.png.pixels."""
    copied = Path(shutil.copy(picture, place / "p.png"))
    subprocess.run([sys.executable, str(folder / "predict.py"), "--pixels", str(copied)], check=True)


def assert_given(inputs: Any, picture: Path, place: Path) -> None:
    """The numbers that the stand-in for the runtime was given are those that fewbit scores."""
    given = np.fromfile(place / "given.bin", np.float32).reshape(1, 3, 8, 8)
    np.testing.assert_array_equal(given, inputs.preprocess(Image.open(picture))[None].numpy())


CXX = Path(__file__).parent / "stub"


SCORES = {"logits": [0.0, 1.0, 2.0], "probabilities": [0.05, 0.05, 0.9]}


def probabilities(scores: list[float]) -> list[tuple[int, float]]:
    """Classes and their probabilities, as predict.py has them."""
    found = names_of("classify").answer([np.array([scores], np.float32)], {"index": 0, "classes": None}, None)
    return [(one["index"], one["probability"]) for one in found["classes"]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the example with")
def test_the_example_in_cxx_gives_the_runtime_the_same_numbers_and_says_the_same_probabilities(
    shipped: tuple[Any, Path], pictures: dict[str, Path], tmp_path: Path
) -> None:
    """Oracles: what a stand-in for the runtime was given, and what predict.py says of its scores, which are made up."""
    inputs, folder = shipped
    pixels_of(folder, pictures["wide RGB"], tmp_path)
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-I", str(CXX), str(folder / "example.cpp"), "-o", "example"]
    subprocess.run(command, check=True, cwd=tmp_path)
    for scores in SCORES.values():
        np.array(scores, np.float32).tofile(tmp_path / "scores.bin")
        words = ["./example", "model.onnx", "p.png.pixels"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert_given(inputs, pictures["wide RGB"], tmp_path)
        rows = [line.split() for line in done.stdout.splitlines()]
        assert [(int(i), round(float(share), 4)) for i, share in rows] == probabilities(scores)


NODE = """
import {{ input, HOW, TASK }} from "{module}";
import {{ readFileSync, writeFileSync }} from "node:fs";
const ort = {{ Tensor: class {{ constructor(type, data, dims) {{ Object.assign(this, {{ type, data, dims }}); }} }} }};
const x = input(ort, new Uint8Array(readFileSync("p.png.pixels")));
writeFileSync("given.bin", Buffer.from(x.data.buffer));
console.log(JSON.stringify([x.type, x.dims, HOW.resize, TASK.input]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the example with")
def test_the_example_in_javascript_gives_the_runtime_the_same_numbers(
    shipped: tuple[Any, Path], pictures: dict[str, Path], tmp_path: Path
) -> None:
    inputs, folder = shipped
    pixels_of(folder, pictures["high RGB"], tmp_path)
    (tmp_path / "try.mjs").write_text(NODE.format(module=folder / "example.mjs"))
    done = subprocess.run(["node", "try.mjs"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == ["float32", [1, 3, 8, 8], "center", "in:put"]
    assert_given(inputs, pictures["high RGB"], tmp_path)


ASKED = """
import {{ answer, HOW, TASK }} from "{module}";
const ort = {{ Tensor: class {{}} }};
for (const scores of {scores}) {{
  const session = {{ run: async () => ({{ [TASK.outputs[0]]: {{ data: Float32Array.from(scores) }} }}) }};
  console.log(JSON.stringify(await answer(ort, session, new Uint8Array(HOW.size[0] * HOW.size[1] * HOW.size[2]))));
}}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the example with")
def test_the_example_in_javascript_says_the_probabilities_of_predict_py(shipped: tuple[Any, Path], tmp_path: Path) -> None:
    module = shipped[1] / "example.mjs"
    (tmp_path / "try.mjs").write_text(ASKED.format(module=module, scores=json.dumps(list(SCORES.values()))))
    done = subprocess.run(["node", "try.mjs"], capture_output=True, text=True, check=True, cwd=tmp_path)
    for line, scores in zip(done.stdout.splitlines(), SCORES.values(), strict=True):
        assert [(one["index"], round(one["probability"], 4)) for one in json.loads(line)] == probabilities(scores)


# A canvas that takes the nearest pixel, and is transparent where nothing was drawn.
DRAW = """
import { readFileSync, writeFileSync } from "node:fs";
globalThis.document = { createElement: () => ({ getContext() {
  const canvas = this;
  return {
    drawImage(picture, left, top, wide, high) {
      canvas.data = new Uint8ClampedArray(canvas.width * canvas.height * 4);
      for (let y = Math.max(0, top); y < Math.min(canvas.height, top + high); ++y)
        for (let x = Math.max(0, left); x < Math.min(canvas.width, left + wide); ++x) {
          const row = Math.floor(((y - top + 0.5) * picture.height) / high);
          const from = 4 * (row * picture.width + Math.floor(((x - left + 0.5) * picture.width) / wide));
          canvas.data.set(picture.data.subarray(from, from + 4), 4 * (y * canvas.width + x));
        }
    },
    getImageData: () => ({ data: canvas.data }),
  };
} }) };
const [pictures, modules] = process.argv.slice(2).map((text) => JSON.parse(text));
for (const module of modules) {
  const { resized } = await import(module);
  for (const [name, width, height] of pictures) {
    const picture = { width, height, data: new Uint8Array(readFileSync(name)) };
    writeFileSync(`${module}.${name}`, resized(picture));
    picture.data[3] = 254;
    try { resized(picture); } catch (error) { console.log(error.message); }
  }
}
"""
DRAWN = {
    "border": {"resize": "border", "channel_order": "bgr", "mean": (0.2, 0.3, 0.7)},
    "grey": {"size": (1, 8, 8), "resize": "border", "mean": (0.3,), "std": (0.5,)},
    "corner": {"resize": "corner", "fill": 51.3},
    "letterbox": {"resize": "letterbox", "size": (3, 7, 12)},
    "center": {"resize": "center", "crop_pct": 0.7, "size": (3, 9, 9)},
    "oblong": {"resize": "center", "crop_pct": 0.6, "size": (3, 7, 12)},
}


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the example with")
def test_the_example_in_javascript_places_and_orders_pixels_as_predict_py(tmp_path: Path) -> None:
    """On a canvas that resizes as Pillow does; a picture with a transparent place is refused."""
    predict, pictures = names_of(*PREPARE), {}
    for name, (high, wide) in {"wide": (11, 28), "high": (29, 13), "small": (5, 5), "long": (3, 41)}.items():
        pictures[name] = RNG.integers(0, 256, (high, wide, 3), np.uint8)
        np.dstack([pictures[name], np.full((high, wide), 255, np.uint8)]).tofile(tmp_path / name)
    modules, wanted = [], []
    task = {"pieces": [], "input": "x", "outputs": ["y"], "batch": 1, "classes": None}
    for name, fields in DRAWN.items():
        own = Preprocess(**{"size": (3, 8, 8), "interpolation": "nearest", **fields})  # type: ignore[arg-type]
        images = Record(own.to_json()).images(False)
        frame = [round(255 * value) for value in predict.around(images)]
        values = {"name": "net", "task": task, "images": images, "page": True, "around": frame, "picture": "p.jpg"}
        modules.append(str(tmp_path / f"{name}.mjs"))
        Path(modules[-1]).write_text(rendered("example.mjs", values))
        for file, pixels in pictures.items():
            given = predict.opened(png(pixels), file, own.size[0])
            x = predict.whole(predict.prepared(given, images), images).astype(np.uint8).transpose(1, 2, 0)
            wanted.append((f"{name}.mjs.{file}", x))
    (tmp_path / "draw.mjs").write_text(DRAW)
    words = [json.dumps([[name, x.shape[1], x.shape[0]] for name, x in pictures.items()]), json.dumps(modules)]
    done = subprocess.run(["node", "draw.mjs", *words], capture_output=True, text=True, check=True, cwd=tmp_path)
    for file, x in wanted:
        np.testing.assert_array_equal(np.fromfile(tmp_path / file, np.uint8).reshape(x.shape), x, err_msg=file)
    assert "the picture has transparent places; give it without alpha, as a JPEG has it" in done.stdout


STORED = """
import { stored } from "./example.mjs";
import { readFileSync, writeFileSync } from "node:fs";
globalThis.createImageBitmap = async (blob, options) => [Buffer.from(await blob.arrayBuffer()), options];
for (const name of ["a.jpg", "a.png", "none.jpg"]) {
  const [bytes, options] = await stored(new Blob([readFileSync(name)]));
  writeFileSync(`of ${name}`, bytes);
  console.log(JSON.stringify(options));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the example with")
def test_the_example_in_javascript_does_not_turn_pictures(shipped: tuple[Any, Path], tmp_path: Path) -> None:
    """Oracle: what Pillow reads of a JPEG that the browser is given; of a PNG the bytes, all but the first of EXIF."""
    shutil.copy(shipped[1] / "example.mjs", tmp_path)
    picture, turned = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "a.jpg", exif=turned)
    picture.save(tmp_path / "a.png", exif=turned)
    picture.save(tmp_path / "none.jpg")
    (tmp_path / "try.mjs").write_text(STORED)
    done = subprocess.run(["node", "try.mjs"], capture_output=True, text=True, check=True, cwd=tmp_path)
    options = {"imageOrientation": "none", "premultiplyAlpha": "none", "colorSpaceConversion": "none"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [options] * 3
    before, after = (Image.open(tmp_path / name) for name in ("a.jpg", "of a.jpg"))
    assert (dict(before.getexif()), dict(after.getexif())) == ({ExifTags.Base.Orientation: 6}, {})
    np.testing.assert_array_equal(np.array(after), np.array(before))
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(b"eXIf") + 4
    assert (tmp_path / "of a.png").read_bytes() == content[:at] + bytes(4) + content[at + 4 :]
    assert (tmp_path / "of none.jpg").read_bytes() == (tmp_path / "none.jpg").read_bytes()


def png(pixels: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def graph_of(channels: int, others: tuple[str, ...] = ()) -> Any:
    """What `write` reads of a graph that takes an image of 8 by 8 and, of each of `others`, a number."""
    image = Input("x", (channels, 8, 8))
    more = [Input(name, (), has_batch=False, value=torch.zeros(())) for name in others]
    task, output = Classify(0, 5), Output("z", (5,))
    return SimpleNamespace(
        task=task, tail=None, outputs=(output,), inputs=(image, *more), input_name="x", in_a_file=lambda n: n, ports=()
    )


@pytest.mark.parametrize(
    ("channels", "fields", "files", "said"),
    [
        (1, {}, {"cpp", "mjs", "html"}, "`example.html` with `example.mjs` does so for a picture in a browser"),
        (3, {"dtype": "uint8"}, {"cpp", "mjs", "html"}, "and takes none with transparent places"),
        (4, {}, {"cpp"}, "no example for browsers: a canvas does not give pictures of 4 channels as they are."),
        (3, {"processor": '{"a": 1}'}, {"cpp"}, "no example for browsers: transformers makes the images of this model."),
        (3, {"dtype": "float16"}, set(), "for a model that takes its image in float16.\n"),
    ],
)
def test_the_readme_says_which_examples_there_are_and_why_no_others(
    tmp_path: Path, channels: int, fields: dict[str, Any], files: set[str], said: str
) -> None:
    images = {**Record(Preprocess((channels, 8, 8)).to_json()).images(False), **fields}
    write(tmp_path, graph_of(channels), About("net", "ort-x86-vnni", "mse", "w8a8", "onnxruntime", (), images))
    assert {path.suffix[1:] for path in tmp_path.glob("example.*")} == files
    text = (tmp_path / "README.md").read_text()
    assert said in text
    assert ("example.html" in text, "example.cpp" in text) == ("html" in files, "cpp" in files)


def test_the_readme_of_a_model_with_another_input_quotes_its_name(tmp_path: Path) -> None:
    images = Record(Preprocess((3, 8, 8)).to_json()).images(False)
    about = About("net", "ort-x86-vnni", "mse", "w8a8", "onnxruntime", (), images)
    write(tmp_path, graph_of(3, ('a`b "c"',)), about)
    text = (tmp_path / "README.md").read_text()
    (shell,) = re.findall("``(python predict.py picture.jpg .*?)``", text)
    assert shlex.split(shell)[2:] == ["picture.jpg", 'a`b "c"=FILE.npy']
    (call,) = re.findall(r"``Model\(\)\(pixels, \*\*(.*?): array}\)``", text)
    assert ast.literal_eval(call + ": 0}") == {'a`b "c"': 0}
    assert "There are no examples in C++ and JavaScript for a model that takes more than its image.\n" in text


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squash": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    "blue first": ("MobileViTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    "crop": ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_of_an_image_processor_are_those_that_fewbit_scores(pictures: dict[str, Path], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from fewbit.load.huggingface import record_of

    name, fields = PROCESSORS[kind]
    record, _ = record_of("hf:x", name, getattr(transformers, name)(**fields))
    own = Preprocess(record["input_size"], record["mean"], record["std"], processor=record["processor"])
    predict = names_of("prepare", "processed", "pictures")
    for file in (pictures["wide RGB"], pictures["high L"], pictures["wide CMYK"]):
        assert same(predict, own, file), file
        assert same(predict, own.replace(whole=True), file), file
    columns, rows = predict.placed(480, 640, Record(own.to_json()).images(False))
    wanted = own.placement(480, 640)
    np.testing.assert_allclose((columns[0], rows[0]), wanted.scale, rtol=2e-3)
    np.testing.assert_allclose((columns[1], rows[1]), wanted.shift, atol=0.2)
