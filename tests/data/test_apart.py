"""Which images are the same, and what of a folder cannot be read. Oracle: pictures that are known to be copies."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fewbit.data.images import Images, Preprocess, open_images
from fewbit.data.shares import apart, unseen
from fewbit.errors import BadImages
from fewbit.request import Request
from fewbit.stages.sources import open_both, sources_of

TINY = Preprocess((3, 8, 8))


def pixels(seed: int, height: int = 6, width: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def folder(root: Path, *seeds: int, name: str = "{}.png") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        Image.fromarray(pixels(seed)).save(root / name.format(i))
    return root


def opened(source: Any, **options: Any) -> Images:
    return open_images(source, TINY, labels=False, **options)


def both(**options: Any) -> tuple[Images, Images]:
    request = Request(model="demo", target="ort-x86-vnni", labels=False, **options)
    return open_both(request, sources_of(request), TINY, None, labels=False)


# The same images


def other_forms(root: Path) -> dict[str, Any]:
    """The pictures 0 to 3 once more, under other names and in other files."""
    stack = np.stack([pixels(seed) for seed in range(4)])
    forms: dict[str, Any] = {
        "the folder": root / "d",
        "another path": root / "d" / "x" / "..",
        "a text": str(root / "d") + "/./",
        "a link": root / "link",
        "copies": folder(root / "copies", 2, 3, 1, 0, name="copy-{}.png"),
        "another format": folder(root / "bmp", 0, 1, 2, 3, name="{}.bmp"),
        "another format, packed": folder(root / "tif", 0, 1, 2, 3, name="{}.tiff"),
        "class folders": folder(root / "classes" / "a", 0, 1, 2, 3).parent,
        "an array": stack,
        "a tensor": torch.from_numpy(stack),
        "channels first": np.ascontiguousarray(stack.transpose(0, 3, 1, 2)),
        "npy": root / "x.npy",
        "npz": root / "x.npz",
        "parquet": root / "x.parquet",
    }
    (root / "d" / "x").mkdir()
    (root / "link").symlink_to(root / "d")
    np.save(root / "x.npy", stack)
    np.savez(root / "x.npz", images=stack)
    cells = [{"bytes": (root / "d" / f"{i}.png").read_bytes(), "path": ""} for i in range(4)]
    pq.write_table(pa.table({"image": cells}), root / "x.parquet")
    return forms


@pytest.mark.parametrize(("calibration", "scored"), [(128, None), (4, 2), (2, 4), (4, 1)])
def test_images_are_not_calibrated_and_scored_on_under_another_name(
    tmp_path: Path, calibration: int, scored: int | None
) -> None:
    forms = other_forms(folder(tmp_path / "d", 0, 1, 2, 3).parent)
    for name, form in forms.items():
        for images, score in ((forms["the folder"], form), (form, forms["the folder"])):
            with pytest.raises(BadImages, match=r"scored images are calibration images too .*give others with") as refused:
                both(images=images, score=score, calibration=calibration, scored=scored)
            assert refused.value.exit_code == 2, name


def test_the_same_floats_are_the_same_images() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(BadImages, match="4 of 4 scored images"):
        apart(opened(x), opened(x.double().numpy().copy()))
    assert apart(opened(x), opened(x + 1)).names == opened(x).names


def test_images_of_other_pixels_are_others_whatever_their_names(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", 0, 1, 2), folder(tmp_path / "b", 3, 4, 5)
    calibration, scored = both(images=a, score=b)
    assert (len(calibration), len(scored), calibration.notes) == (3, 3, ())
    turned = np.stack([pixels(0, 6, 5), pixels(1, 6, 5)])
    assert len(apart(opened(turned), opened(turned.reshape(2, 5, 6, 3)))) == 2  # the same bytes in another shape


def test_a_few_shared_images_are_left_out_of_the_calibration_with_a_word(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", *range(10)), folder(tmp_path / "b", 20, 3, 21, 22, 23, 7, 24)
    calibration, scored = both(images=a, score=b)
    assert [int(name[0]) for name in calibration.names] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert len(scored) == 7
    assert len(calibration.pixels) == len(calibration) == len(torch.cat(list(calibration.batches(4))))
    assert calibration.notes == (f"Scored images are no calibration images: 2 of folder {a} are left out, such as 3.png.",)


@pytest.mark.parametrize("seed", range(6))
def test_copies_within_one_folder_are_not_on_both_sides(tmp_path: Path, seed: int) -> None:
    """Brute force: 24 files of 8 pictures, three of each; no picture is on both sides, whatever the draw."""
    root = folder(tmp_path / "d", *(i % 8 for i in range(24)))
    calibration, scored = both(images=root, calibration=5, seed=seed)
    shown = [{int(name.split(".")[0]) % 8 for name in images.names} for images in (calibration, scored)]
    assert not shown[0] & shown[1]
    assert len(scored) == 6
    assert 1 <= len(calibration) <= 5
    assert "are left out" in calibration.notes[0]


def test_a_finished_run_is_not_scored_on_what_it_was_calibrated_on(tmp_path: Path) -> None:
    calibrated = {pixels.hex() for pixels in opened(folder(tmp_path / "a", 0, 1, 2, 3)).pixels}
    with pytest.raises(BadImages, match=r"calibrated on 3 of the 5 images of folder .*b, such as b1\.bmp; scores need"):
        unseen(opened(folder(tmp_path / "b", 7, 2, 1, 0, 8, name="b{}.bmp")), calibrated)
    few = unseen(opened(folder(tmp_path / "c", 7, 2, 9, 8)), calibrated)
    assert few.names == ("0.png", "2.png", "3.png")
    assert few.notes == ("The run was calibrated on 1 of the images, which are left out.",)
    assert unseen(opened(folder(tmp_path / "d", 7, 9)), calibrated).notes == ()


def test_a_folder_of_one_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImages, match="2 of 2 scored images are calibration images too"):
        both(images=folder(tmp_path / "d", *[1] * 8))


def test_a_draw_without_copies_is_what_it_was(tmp_path: Path) -> None:
    """The first quarter of the permutation is scored, what follows calibrates, each in the order of the folder."""
    root = folder(tmp_path / "d", *range(12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    calibration, scored = both(images=root, calibration=4, seed=3)
    assert scored.names == tuple(f"{i}.png" for i in sorted(order[:3]))
    assert calibration.names == tuple(f"{i}.png" for i in sorted(order[3:7]))


# What cannot be read


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


ODD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pipe.png": ("is a pipe", os.mkfifo),
    "sub/pipe": ("is a pipe", os.mkfifo),
    "s.png": ("is a pipe, a socket", bind),
    "gone.png": ("is a link to nothing", lambda path: path.symlink_to("nowhere.png")),
    "class": ("is a link to nothing", lambda path: path.symlink_to("no-folder")),
    "self.png": ("is a link to nothing", lambda path: path.symlink_to(path)),
    "sub/up": ("is a link to a folder that it is in", lambda path: path.symlink_to(path.parents[1])),
    "caf\\xe9.png": (
        "has a name that is not UTF-8",
        lambda path: open(os.fsencode(path.parent) + b"/caf\xe9.png", "w").close(),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_file_is_named_and_left_out_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "d", 0, 1)
    (tmp_path / "d" / "sub").mkdir()
    reason, make = ODD[name]
    make(tmp_path / "d" / name)
    with pytest.raises(BadImages, match=r"^in folder d .*\. Fix or remove it, or leave such out with --skip-bad") as refused:
        opened("d")
    assert f"{name} {reason}" in str(refused.value)
    images = opened("d", skip_bad=True)
    assert images.names == ("0.png", "1.png")
    assert images.notes[0].startswith(f"1 of folder d cannot be read and are left out: {name} {reason}")


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who can open any folder."""
    root, scandir = folder(folder(tmp_path / "d" / "a", 0).parent / "b", 1).parent, os.scandir

    def locked(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(BadImages, match=r"b cannot be opened: Permission denied\. .*--skip-bad"):
        opened(root)
    assert opened(root, skip_bad=True).names == ("a/0.png",)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    """As torchvision and timm do."""
    folder(tmp_path / "far", 0, 1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cat").symlink_to(tmp_path / "far")
    folder(tmp_path / "d" / "dog", 2)
    images = open_images(tmp_path / "d", TINY, classes=2)
    assert images.names == ("cat/0.png", "cat/1.png", "dog/0.png")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["x", "x.npy", "x.npz", "x.parquet"])
def test_a_pipe_is_no_source_and_nothing_waits_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadImages, match="neither a file nor a folder"):
        both(images=tmp_path / name)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, "{} of type int were given; give a path"),
        (b"d", "{} of type bytes were given; give a path"),
        ((np.zeros((1, 3, 8, 8)),), r"{}: a tuple of 1 was given; allowed is \(images, labels\)"),
        (object(), "{} of type object were given; give a path"),
        ("x" * 300, r"^x+\.\.\.x+ does not exist\. Give a folder"),
        ("nul\0", "^nul\0 does not exist. Give a folder"),
        ("file.txt", r"^file\.txt is a '\.txt' file\. Give a folder"),
    ],
    ids=["number", "bytes", "tuple", "object", "long", "null", "text"],
)
def test_what_is_no_source_is_refused_before_a_model_is_loaded(
    source: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    folder(tmp_path / "d", 0)
    for options in ({"images": source}, {"images": "d", "score": source}):
        with pytest.raises(BadImages, match=said.format(list(options)[-1])):
            Request(model="nowhere.pt2", target="ort-x86-vnni", **options)


def test_a_demo_has_images_of_its_own_where_a_name_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the request without the option is taken."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "d", 0)
    for options in ({"images": "demo"}, {"score": "demo"}):
        (name,) = options
        with pytest.raises(BadImages, match=rf"^demo does not exist\. .* Or leave --{name} out: demo has its own\.$"):
            Request(model="demo", target="ort-x86-vnni", **options)
    for model, options in (("demo", {"images": "d", "score": "demo"}), ("nowhere.pt2", {"images": "demo"})):
        with pytest.raises(BadImages, match=r"^demo does not exist\. Give .* file\.$"):
            Request(model=model, target="ort-x86-vnni", **options)
    Request(model="demo", target="ort-x86-vnni")
