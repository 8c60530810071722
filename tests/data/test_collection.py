"""Images as Python programs have them. Oracle: the same pictures as a folder or an array give the same batches and labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fewbit.data.collection import Data
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.errors import BadImages
from fewbit.request import Request
from fewbit.stages.sources import open_both, sources_of

TINY = Preprocess((3, 8, 8))
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(x) for x in PIXELS]
INPUTS = torch.stack([TINY(x) for x in PICTURES])
LABELS = [3, 1, 0, 2, 1]


class Rows(Dataset[Any]):
    """A map-style dataset of these items."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def unstacked(rows: list[Any]) -> list[Any]:
    """A batch as torch's own collate makes it of paths: a tuple of these, and a tensor of labels."""
    return [tuple(row[0] for row in rows), torch.tensor([row[1] for row in rows])]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PICTURES)


def everything(images: Images) -> torch.Tensor:
    return torch.cat(list(images.batches(2)))


PAIRS = list(zip(PICTURES, LABELS, strict=True))
TRIPLES = Rows([(x, y, i) for i, (x, y) in enumerate(zip(INPUTS, LABELS, strict=True))])
UNLABELLED: dict[str, Any] = {
    "pictures": PICTURES,
    "a tuple": tuple(PICTURES),
    "arrays": list(PIXELS),
    "channels first": [torch.from_numpy(x).permute(2, 0, 1) for x in PIXELS],
    "a generator": lambda: (x for x in PICTURES),
    "an iterable dataset": Stream(),
    "inputs": list(INPUTS),
    "float64": list(INPUTS.double().numpy()),
    "a loader of inputs": DataLoader(TensorDataset(INPUTS), batch_size=2),
    "a loader of lists": DataLoader(Rows(PICTURES), batch_size=2, collate_fn=list),
    "pixel_values": [{"pixel_values": x} for x in INPUTS],
    "a transform": Data(PICTURES, transform=TINY),
    "a processor": Data(PICTURES, transform=lambda x: {"pixel_values": TINY(x)[None]}),
}  # fmt: skip
LABELLED: dict[str, Any] = {
    "pairs": Rows(PAIRS),
    "lists": [list(pair) for pair in PAIRS],
    "rows": [{"image": x, "label": y} for x, y in PAIRS],
    "a batch": {"image": PICTURES, "label": LABELS},
    "a loader of pairs": DataLoader(TensorDataset(INPUTS, torch.tensor(LABELS)), batch_size=2),
    "a loader of dicts": DataLoader(Rows([{"pixel_values": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]), 3),
    "a loader of zipped pairs": DataLoader(Rows(PAIRS), 2, collate_fn=lambda rows: tuple(zip(*rows, strict=True))),
    "a transform": Data(Rows(PAIRS), transform=TINY),
    "triples": Rows([(*pair, f"{i}.txt") for i, pair in enumerate(PAIRS)]),
    "a loader of triples": DataLoader(TRIPLES, 2),
    "a loader of triples, of two": DataLoader(TRIPLES, 2, collate_fn=list),
    "a loader of what cannot be stacked": DataLoader(TRIPLES, 2, collate_fn=unstacked),
    "a loader without batches": DataLoader(TensorDataset(INPUTS, torch.tensor(LABELS)), batch_size=None),
    "a loader of triples without batches": DataLoader(TRIPLES, batch_size=None),
    "lists with tensors": [[x, torch.tensor(y)] for x, y in PAIRS],
    "lists with arrays": [[x, np.array([y])] for x, y in PAIRS],
    "two lists": (PICTURES, LABELS),
    "two lists of arrays": (list(PIXELS), list(np.array(LABELS))),
    "a list and an array": (PICTURES, np.array(LABELS)),
    "two lists with a transform": Data((PICTURES, LABELS), transform=TINY),
    "target": [{"image": x, "target": y} for x, y in PAIRS],
    "y": DataLoader(Rows([{"image": x, "y": y} for x, y in zip(INPUTS, LABELS, strict=True)]), 2),
    "class": [{"image": x, "class": y} for x, y in PAIRS],
    "label and target": [{"image": x, "label": y, "target": 0} for x, y in PAIRS],
    "whole floats": [(x, float(y)) for x, y in PAIRS],
    "shape (1,)": DataLoader(TensorDataset(INPUTS, torch.tensor(LABELS)[:, None]), 2),
    "rows with a 1": [(x, torch.eye(4)[y]) for x, y in PAIRS],
    "a loader of rows with a 1": DataLoader(TensorDataset(INPUTS, torch.eye(4)[LABELS]), 2),
    "an array and rows with a 1": (PIXELS, np.eye(4, dtype=np.int64)[LABELS]),
    "an array and floats": (PIXELS, np.array(LABELS, np.float32)),
    "an array and a column": (PIXELS, torch.tensor(LABELS)[:, None]),
}  # fmt: skip
NAMES = ["cat", "St. Bernard", "hen", "cow"]
WORDS: dict[str, Any] = {
    "pairs": [(x, NAMES[y]) for x, y in PAIRS],
    "two lists": (PICTURES, [NAMES[y] for y in LABELS]),
    "an array": (PIXELS, np.array([NAMES[y] for y in LABELS])),
    "a loader without batches": DataLoader(Rows([(x, NAMES[y]) for x, y in zip(INPUTS, LABELS, strict=True)]), batch_size=None),
    "a loader": DataLoader(Rows([{"image": x, "class": NAMES[y]} for x, y in zip(INPUTS, LABELS, strict=True)]), 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNLABELLED)
def test_images_of_any_kind_are_those_of_an_array(kind: str) -> None:
    source = UNLABELLED[kind]
    images = open_images(source() if kind == "a generator" else source, TINY)
    wanted = open_images(PIXELS, TINY)
    assert images.labels is None
    assert torch.equal(everything(images), everything(wanted))
    assert torch.equal(everything(images), everything(images))


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_travel(kind: str) -> None:
    images = open_images(LABELLED[kind], TINY, classes=4)
    assert images.labels is not None
    assert images.labels.tolist() == LABELS
    assert torch.equal(everything(images), INPUTS)
    assert open_images(LABELLED[kind], TINY, labels=False).labels is None


@pytest.mark.parametrize("kind", WORDS)
def test_labels_in_words_are_classes_where_names_are_known(kind: str) -> None:
    images = open_images(WORDS[kind], TINY, classes=NAMES)
    assert images.labels is not None
    assert images.labels.tolist() == LABELS
    assert torch.equal(everything(images), INPUTS)
    with pytest.raises(BadImages, match=r":0(:0)?: its label is the text 'cow'; .* with --classes FILE one of its names\. Fix"):
        open_images(WORDS[kind], TINY, classes=4)
    with pytest.raises(
        BadImages, match=r"label 'cow' is none of the names of the 3 classes \(cat, St\. Bernard, hen\); .*--classes"
    ):
        open_images(WORDS[kind], TINY, classes=NAMES[:3])


@pytest.mark.parametrize("kind", ["triples", "a loader of triples", "a loader of triples, of two"])
def test_what_follows_image_and_label_is_ignored_in_so_many_words(kind: str) -> None:
    note = r"Items of .*: the first is taken as the image, the second as its label, and what follows is ignored \(\w+\)\."
    images = open_images(LABELLED[kind], TINY, classes=4)
    assert [bool(re.fullmatch(note, one)) for one in images.notes] == [True]
    assert not open_images(LABELLED["pairs"], TINY, classes=4).notes


class Failing(Rows):
    """A dataset of which one item raises."""

    def __getitem__(self, i: int) -> Any:
        if i == 3:
            raise RuntimeError("disk gone")
        return super().__getitem__(i)


def rises() -> Iterator[Any]:
    yield INPUTS[0]
    raise RuntimeError("disk gone")


class FailingStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        return rises()


class OfWorkers(DataLoader[Any]):
    """A DataLoader that passes on what its worker raised, by torch's own means; no process is started in that of the tests."""

    def __iter__(self) -> Any:
        try:
            yield from DataLoader(self.dataset, self.batch_size)
        except RuntimeError as error:
            ExceptionWrapper((type(error), error, error.__traceback__), "in DataLoader worker process 0").reraise()


FAILS = Failing(INPUTS)
NOT_SKIPPED = r" --skip-bad cannot leave out items of a DataLoader: "


@pytest.mark.parametrize(
    ("source", "says", "skipping"),
    [
        (
            OfWorkers(FAILS, 2, num_workers=1),
            r"OfWorkers failed at batch 1: RuntimeError: disk gone\. Fix it; with num_workers=0 .* the error shows where\.",
            NOT_SKIPPED + r"give its Dataset \(loader\.dataset\) in its place, of which it can\.",
        ),
        (
            DataLoader(FAILS, 2),
            r"DataLoader failed at batch 1: RuntimeError: disk gone\. Fix it\.",
            NOT_SKIPPED + r"give its Dataset .*",
        ),
        (
            DataLoader(FAILS, batch_size=None),
            r"DataLoader failed at item 3: RuntimeError: disk gone\. Fix it\.",
            NOT_SKIPPED + ".*",
        ),
        (
            DataLoader(FailingStream(), batch_size=None),
            r"DataLoader failed at item 1: RuntimeError: disk gone\. Fix it\.",
            NOT_SKIPPED + r"its Dataset has to leave it out itself\.",
        ),
        (
            FailingStream(),
            r"FailingStream failed at item 1: RuntimeError: disk gone\. Fix it\.",
            r" --skip-bad cannot leave it out, as nothing comes after it: give a list or a Dataset\.",
        ),
    ],
)
def test_an_item_that_raises_is_named_in_one_sentence_and_skip_bad_says_what_it_cannot(
    source: Any, says: str, skipping: str
) -> None:
    for skip_bad, words in ((False, says), (True, says + skipping)):
        with pytest.raises(BadImages, match=rf"^{words}$"):
            open_images(source, TINY, skip_bad=skip_bad)


def test_the_dataset_in_the_place_of_its_loader_can_be_skipped_in() -> None:
    assert torch.equal(everything(open_images(DataLoader(FAILS, 2).dataset, TINY, skip_bad=True)), INPUTS[[0, 1, 2, 4]])


def test_two_lists_of_other_lengths_are_refused_before_any_work() -> None:
    with pytest.raises(BadImages, match=r"^images: 5 images and 4 labels were given; give a label for each image, or the list"):
        Request(model="demo", images=(PICTURES, LABELS[:4]))


PIXEL_VALUES = TINY.replace(mean=(0.0,), std=(1 / 255,))
FLOATS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float()[:, :, :6, :6].repeat(1, 1, 2, 2)[:, :, :8, :8]


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize(
    ("values", "preprocess", "told"),
    [
        (FLOATS, TINY, "subtract the mean"),
        (FLOATS, TINY.replace(mean=(0.0,), std=(1.0,)), "subtract the mean"),
        (FLOATS * 257, TINY, "subtract the mean"),
        (FLOATS / 255, TINY, "subtract the mean"),
        (FLOATS / 255, PIXEL_VALUES, "scale them to 0 to 255"),
        (INPUTS, PIXEL_VALUES, "scale them to 0 to 255"),
        (INPUTS, TINY, ""),
        (FLOATS, PIXEL_VALUES, ""),
        (FLOATS / 255, TINY.replace(mean=(0.0,), std=(1.0,)), ""),
        (INPUTS, TINY.replace(mean=(0.5,), std=(0.5,)), ""),
        ((FLOATS - 127.5) / 127.5, TINY, ""),
        (3 * INPUTS, TINY, ""),
        (8 * FLOATS - 1000, TINY, ""),
    ],
)
def test_floats_that_mean_and_std_have_not_made_are_told(
    values: torch.Tensor, preprocess: Preprocess, told: str, as_array: bool
) -> None:
    notes = open_images(values if as_array else list(values), preprocess).notes
    assert len(notes) == bool(told)
    assert not told or (told in notes[0] and "--mean 0 --std" in notes[0])


def test_paths_are_the_folder(tmp_path: Path) -> None:
    for i, x in enumerate(PICTURES):
        x.save(tmp_path / f"{i}.png")
    images, wanted = open_images([str(p) for p in sorted(tmp_path.iterdir())], TINY), open_images(tmp_path, TINY)
    assert torch.equal(everything(images), everything(wanted))
    assert images.pixels == wanted.pixels == open_images(PICTURES, TINY).pixels


def test_a_generator_is_not_exhausted_and_a_dataset_is_drawn_from_as_an_array() -> None:
    stream = itertools.count()
    images = open_images((PICTURES[i % 5] for i in stream), TINY, limit=3)
    assert (len(images), next(stream)) == (3, 3)
    drawn, wanted = open_images(Rows(PICTURES), TINY, limit=2, seed=4), open_images(PIXELS, TINY, limit=2, seed=4)
    assert torch.equal(everything(drawn), everything(wanted))


def test_a_random_source_is_read_once_and_the_same_with_the_same_seed() -> None:
    source = Data(PICTURES, transform=lambda x: TINY(x) + torch.rand(1))
    first, again, other = (open_images(source, TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(everything(first), everything(first))
    assert first.fingerprint() == first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_part_of_one_source_is_held_out(tmp_path: Path) -> None:
    seen = itertools.count()
    request = Request(model="demo", target="ort-x86-vnni", images=(torch.randn(3, 8, 8) for _ in seen), calibration=6)
    calibration, scored = open_both(request, sources_of(request), TINY, None, labels=False)
    assert (len(calibration), len(scored), next(seen)) == (6, 2, 8)
    assert not set(calibration.pixels) & set(scored.pixels)
    with pytest.raises(BadImages, match="scored images are calibration images too"):
        open_both(request, (PICTURES, PIXELS), TINY, None, labels=False)


def test_three_images_are_held_out_where_there_are_nine_or_more() -> None:
    pictures = list(np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), np.uint8))
    for count, sizes in ((24, [8, 3]), (9, [6, 3]), (6, [4, 2]), (4, [3, 1])):
        request = Request(model="demo", images=pictures[:count], calibration=8)
        assert [len(x) for x in open_both(request, sources_of(request), TINY, None, labels=False)] == sizes


@pytest.mark.parametrize("scored", [2, 30, 32, 1000])
def test_as_many_are_scored_as_are_asked_for_whatever_holds_the_images(scored: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)
    wanted = [8, min(scored, 40 - 8)]
    for images in (pictures, list(pictures), iter(pictures), DataLoader(TensorDataset(torch.from_numpy(pictures)), 3)):
        request = Request(model="demo", images=images, calibration=8, scored=scored)
        assert [len(x) for x in open_both(request, sources_of(request), TINY, None, labels=False)] == wanted


def test_a_path_with_a_transform_is_refused_with_the_list_to_give(tmp_path: Path) -> None:
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(
            BadImages, match=r"^images: fewbit\.Data\('.*', \.\.\.\) has a path.* fewbit\.Data\(sorted\(pathlib\.Path"
        ) as error:
            Request(model="demo", images=Data(path, transform=TINY))
        assert f"the path: '{tmp_path}'." in str(error.value)


def test_a_loader_of_a_file(tmp_path: Path) -> None:
    text = "import torch\ndef images():\n    return [torch.full((3, 8, 8), float(i)) for i in range(4)]\n"
    (tmp_path / "own.py").write_text(text + "three = 3\ndef nothing(): pass\ndef fails(): raise OSError('no net')\n")
    options: dict[str, Any] = {"model": "demo", "target": "ort-x86-vnni"}
    request = Request(loader=f"{tmp_path}/own.py:images", **options)
    assert sorted(len(x) for x in open_both(request, sources_of(request), TINY, None, labels=False)) == [1, 3]
    for name, says in (
        ("three", r"^--loader .*own\.py:three: images of type int were given; give a path"),
        ("nothing", r"^--loader .*own\.py:nothing: images of type NoneType"),
        ("fails", r"fails\(\) of .*own.py failed: .*no net"),
    ):
        with pytest.raises(BadImages, match=says):
            sources_of(Request(loader=f"{tmp_path}/own.py:{name}", **options))
    for wrong in ("nowhere.py:f", str(tmp_path / "own.py"), "x"):
        with pytest.raises(BadImages, match=r"type --loader file\.py:function"):
            Request(loader=wrong, **options)
    with pytest.raises(BadImages, match="takes the place"):
        Request(loader=f"{tmp_path}/own.py:images", images=PIXELS, **options)


RELABEL = r"Fix the labels, or use --no-labels\.$"


def broken() -> Iterator[Any]:
    yield PICTURES[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "list gives no images"),
        (broken(), "generator failed at item 1: OSError: the disk is gone"),
        ([1], "list:0: it is of type int"),
        ({}, r"dict:0: it is an empty dict; one of the keys .* is needed, with the image\. "),
        ([{"foo": 1}], "list:0: it is a dict with the keys foo; one of"),
        ([*PICTURES, "nowhere.png"], "list:5 cannot be decoded .*nowhere.png"),
        ([PICTURES[0], INPUTS[0]], "list:1: it is an input of the model, and list:0 is a picture"),
        ([INPUTS[0], torch.zeros(3, 9, 9)], r"list:1: it has type float32 and shape \(3, 9, 9\), and list:0 shape \(3, 8, 8\)"),
        ([INPUTS[:2], torch.full((2, 3, 8, 8), torch.nan)], "list:1:0 has 192 NaN"),
        ([PIXELS[0].astype(np.int64)], "list:0: it has type int64"),
        ([(PICTURES[0], 1), (PICTURES[1],)], rf"list:1: it has no label, unlike list:0\. {RELABEL}"),
        ([(PICTURES[0], "cat")], rf"list:0: its label is the text 'cat'; a class is an integer.*\. {RELABEL}"),
        ([(PICTURES[0], 1.5)], rf"list:0: its label is 1.5; a class is an integer, or a row of 4 .*\. {RELABEL}"),
        ([(PICTURES[0], float("nan"))], rf"list:0: its label is nan; a class is .*\. {RELABEL}"),
        ([(PICTURES[0], True)], rf"list:0: its label is of type bool; a class is .*\. {RELABEL}"),
        ([{"image": PICTURES[0], "y": 1, "target": 2}], rf"keys target and y may each be its label; .*'label'\. {RELABEL}"),
        ([(PICTURES[0], torch.eye(5)[1])], rf"its label is of type torch.float32 and shape \(5,\); .*\. {RELABEL}"),
        (
            [(PICTURES[0], torch.eye(4)[:2].sum(0))],
            rf"its label is of type torch.float32 and shape \(4,\); a class is an integer.*\. {RELABEL}",
        ),
        ([(PICTURES[0], 7)], "list:0 has label 7; allowed is 0 to 3"),
        ([{"photo": PICTURES[0]}], "keys photo"),
        ([(INPUTS, [1, 2])], rf"5 images and 2 labels\. {RELABEL}"),
        (Data(PICTURES, transform=lambda x: x.nothing), "list:0: AttributeError"),
    ],
)
def test_what_is_no_image_is_named_with_its_index(source: Any, says: str) -> None:
    with pytest.raises(BadImages, match=says):
        open_images(source, TINY, classes=4)


def test_bad_items_are_left_out_and_floats_that_look_like_pixels_are_told() -> None:
    images = open_images([PICTURES[0], 5, "nowhere.png", PICTURES[3]], TINY, skip_bad=True)
    assert torch.equal(everything(images), INPUTS[[0, 3]])
    assert "2 of list cannot be read" in images.notes[0]
    assert "taken as they are" in open_images([torch.rand(3, 8, 8)], TINY).notes[0]
    assert not open_images(list(INPUTS), TINY).notes


def test_files_of_a_list_that_are_not_there_are_refused_before_a_model_is_loaded(tmp_path):
    here, gone = tmp_path / "a.png", tmp_path / "gone.png"
    Image.new("RGB", (8, 8)).save(here)
    for source, says in (
        (
            [str(here), str(gone)],
            rf"^images: {gone} does not exist\. Give .*, or leave out what is not there with --skip-bad\.$",
        ),
        ([{"image": here}, {"image": gone}], rf"^images: {gone} does not exist"),
        ([(here, 0), (gone, 1)], rf"^images: {gone} does not exist"),
        (([here, gone], [0, 1]), rf"^images: {gone} does not exist"),
        ([gone, gone, here], rf"^images: {gone} does not exist; of 3 images 2 are not there\."),
        ([tmp_path], rf"^images: {tmp_path} is a folder, and a list is of files; give one folder by itself"),
    ):
        with pytest.raises(BadImages, match=says):
            Request(model="demo", images=source)
    assert Request(model="demo", images=[here, gone], skip_bad=True).skip_bad
    with pytest.raises(BadImages, match=r"of 2 images 2 are not there\. Give files of images, or a folder\.$"):
        Request(model="demo", images=[gone, gone], skip_bad=True)
    with pytest.raises(BadImages, match=r"^score: .*gone"):
        Request(model="demo", images=[here], score=[gone])
    for other in (
        iter([gone]),
        Data([str(gone)], transform=Image.open),
        [np.zeros((8, 8, 3), np.uint8)],
    ):  # whose items may be names
        assert Request(model="demo", images=other).images is other
