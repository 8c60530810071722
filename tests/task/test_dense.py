"""Oracles: torchmetrics, closed forms on maps that were made by hand, and the pictures themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio

from fewbit.core.task import Output, Placement, Signature, told
from fewbit.data.images import Preprocess, open_images
from fewbit.errors import BadImages, BadModel
from fewbit.task import Closeness, task_named
from fewbit.task.depth import Guesses, errors_of_depth
from fewbit.task.embed import recall
from fewbit.task.maps import Map
from fewbit.task.segment import IGNORED, _counts, guess_of_classes

SIZE = (24, 32)


def named(spec, *outputs, names=()):
    return task_named(spec, Signature([Output(*one) for one in outputs], SIZE, names))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Pictures:
    """Pictures of 48 x 64 pixels that are squashed into 24 x 32."""

    names: tuple[str, ...]

    @property
    def paths(self):
        return self.names

    def sizes(self):
        return [(48, 64)] * len(self.names)

    def placed(self, size):
        return Placement((0.5, 0.5), (0.0, 0.0), SIZE)


def masks(folder, count=6, classes=3, size=(48, 64)):
    """Random masks, constant on squares of 2 x 2 pixels, some pixels without a class; and what the input sees of them."""
    small = np.random.default_rng(0).integers(0, classes, (count, size[0] // 2, size[1] // 2)).astype(np.uint8)
    small[:, :3] = IGNORED
    for i, mask in enumerate(small):
        Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(folder / f"{i}.png")
    return Pictures(tuple(f"{i}.jpg" for i in range(count))), torch.from_numpy(small.astype(np.int64))


def test_miou_is_torchmetrics(tmp_path):
    task = named("segment", ("logits", (3, *SIZE)), names=("sky", "road", "tree"))
    pictures, seen = masks(tmp_path)
    right = 2.0 * torch.nn.functional.one_hot(seen.clamp_max(2), 3).permute(0, 3, 1, 2)
    x, y = right + noise(6, 3, *SIZE), right + noise(6, 3, *SIZE, seed=1) * 2
    meter = task.meter(task.read(tmp_path, pictures))
    for a, b in zip(x.split(4), y.split(4), strict=True):
        meter.add([a], [b])
    rating = meter.rating(())
    kept = seen != IGNORED
    expected = [100 * float(multiclass_jaccard_index(t.argmax(1)[kept], seen[kept], 3, average="macro")) for t in (x, y)]
    assert (rating.float_score, rating.score) == pytest.approx(tuple(expected), abs=1e-4)
    assert rating.agreement == pytest.approx(100 * float((x.argmax(1) == y.argmax(1)).double().mean()))
    assert rating.interval[0] < rating.score - rating.float_score < rating.interval[1] < 0
    assert [row["what"] for row in rating.rows] == ["IoU of sky", "IoU of road", "IoU of tree"]


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_classes_of_pixels_may_keep_an_axis_of_channels(tmp_path, kind):
    """Oracle: the same classes without that axis."""
    classes = 2 if kind is torch.bool else 3
    pictures, seen = masks(tmp_path, classes=classes)
    x, y = (torch.where(noise(6, *SIZE, seed=k) > k, seen.clamp_max(classes - 1), 0).to(kind) for k in range(2))
    flat, kept = named("segment", ("y", SIZE, False)), named("segment", ("y", (1, *SIZE), False))
    expected = rated(flat, x, y, flat.read(tmp_path, pictures))
    found = rated(kept, x[:, None], y[:, None], kept.read(tmp_path, pictures))
    assert 0 < expected.score < expected.float_score < 100
    assert (found.measure, found.float_score, found.score, found.rows) == ("mIoU", *(
        getattr(expected, what) for what in ("float_score", "score", "rows")
    ))  # fmt: skip
    assert kept.divergence([x[:, None]], [y[:, None]]) == pytest.approx(float((x != y).double().mean((1, 2)).sum()))
    assert kept.drawn(Image.new("RGB", SIZE[::-1]), [x[:1, None]]).size == SIZE[::-1]


def test_integers_of_several_channels_are_no_map():
    for shape, real in (((3, *SIZE), False), (SIZE[:1], False), ((2, 3, *SIZE), True)):
        with pytest.raises(
            BadModel, match=r"one number or integer for each pixel, \(batch, 1, height, width\) or .* is needed"
        ):
            named("segment", ("y", shape, real))
    for task in ("depth", "restore"):
        with pytest.raises(BadModel, match="is needed"):
            named(task, ("y", (1, *SIZE), False))


def test_masks_of_more_classes_than_are_counted_are_refused(tmp_path):
    pictures, _ = masks(tmp_path)
    Image.fromarray(np.full((48, 64), 300, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(BadImages, match=r"has class 300; of a model that gives classes these may be 0 to 254, and 255 is not"):
        named("segment", ("y", SIZE, False)).read(tmp_path, pictures)


@pytest.mark.parametrize("shape", [(1, *SIZE), (2, *SIZE)])
def test_masks_of_0_and_255_alone_are_those_of_two_classes(tmp_path, shape):
    _, there = masks(tmp_path, classes=2)
    towards = (there == 1)[:, None] * 2.0 - 1
    x = noise(6, *shape) + (towards if shape[0] == 1 else torch.cat([-towards, towards], 1))
    task, ratings = named("segment", ("y", shape)), []
    for written in (1, 255):
        pictures, seen = masks(tmp_path, classes=2)
        seen[seen == IGNORED] = 0
        for i, mask in enumerate(seen.numpy()):
            Image.fromarray((written * mask).astype(np.uint8).repeat(2, 0).repeat(2, 1)).save(tmp_path / f"{i}.png")
        ratings.append(rated(task, x, x.flip(2), task.read(tmp_path, pictures)))
    one, two = ratings
    assert (one.float_score, one.score, one.why) == (two.float_score, two.score, "")
    assert 0 < one.score < 50
    assert "255 is taken for class 1" in two.why
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "0.png")  # where there is a 1, 255 is not a class
    assert task.read(tmp_path, pictures)[1].one is None


def test_masks_that_say_nothing_are_refused(tmp_path):
    pictures, _ = masks(tmp_path)
    for values, outputs, message in (
        ([255], ("y", (3, *SIZE)), "every pixel of the masks of all 6 scored images is 255, which is not a class"),
        ([0, 255], ("y", SIZE, False), r"all 6 scored images have 0 and 255 alone, .* so one class would be compared\."),
        (
            [0, 255],
            ("y", (5, *SIZE)),
            "one class of the 5 of the model .* Write the class's number where 255 is the foreground",
        ),
    ):
        for i in range(6):
            Image.fromarray(np.resize(np.uint8(values), (48, 64))).save(tmp_path / f"{i}.png")
        with pytest.raises(BadImages, match=message):
            named("segment", outputs).read(tmp_path, pictures)
    Image.fromarray(np.full((48, 64), 2, np.uint8)).save(tmp_path / "0.png")  # one among others with classes
    assert len(named("segment", ("y", (5, *SIZE))).read(tmp_path, pictures)) == 6


def test_a_small_map_is_enlarged_before_it_meets_the_mask(tmp_path):
    task = named("segment", ("logits", (2, 6, 8)))
    Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 32)[None].repeat(48, 0)).save(tmp_path / "a.png")
    y = torch.zeros(1, 2, 6, 8)
    y[:, 1, :, 4:], y[:, 0, :, :4] = 1, 1
    meter = task.meter(task.read(tmp_path, Pictures(("a.jpg",))))
    meter.add([y], [y])
    assert meter.rating(()).score == 100


@pytest.mark.parametrize(("spec", "low"), [("segment", -1.0), ("segment:probability", 0.1)])
def test_a_foreground_of_one_channel_begins_at_its_threshold(spec, low):
    task = named(spec, ("y", (1, 2, 2)))
    y = torch.tensor([[[[low, 0.9], [low, low]]]])
    assert task.predict([y]).tolist() == [[[0, 1], [0, 0]]]
    assert task.divergence([y], [y]) == 0
    assert task.divergence([y], [y.flip(3)]) > 0.1


@pytest.mark.parametrize(("names", "painted"), [(("sky", "road"), True), (("background", "road"), False), ((), False)])
def test_classes_are_painted_and_a_background_is_not(names, painted):
    task = named("segment", ("logits", (2, 2, 2)), names=names)
    y = torch.zeros(1, 2, 2, 2)
    y[0, 1, :, 1] = 1  # the right half
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    drawn = np.asarray(task.drawn(grey, [y]))
    assert (drawn[4, 0].tolist() != [90, 90, 90]) == painted
    assert drawn[4, 7].tolist() not in ([90, 90, 90], drawn[4, 0].tolist())


def test_the_divergence_of_segments_is_torchs_kl_by_pixel():
    task, x, y = named("segment", ("logits", (3, 4, 5))), noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    p, q = (t.double().log_softmax(1) for t in (x, y))
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / 20
    assert task.divergence([x], [y]) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda f: Image.fromarray(np.full((48, 64), 7, np.uint8)).save(f / "1.png"),
            "has class 7; the model has classes 0 to 2",
        ),
        (lambda f: Image.new("L", (60, 48)).save(f / "1.png"), r"is 48 x 60 pixels \(height x width\), and 1.jpg is 48 x 64"),
        *(
            (
                lambda f, mode=mode: Image.new(mode, (64, 48)).save(f / "1.png"),
                rf"1\.png has {bands}, and masks have one, .* as grey",
            )
            for mode, bands in (
                ("RGB", r"3 bands \(R, G, B\)"),
                ("LA", r"2 bands \(L, A\)"),
                ("RGBA", r"4 bands \(R, G, B, A\)"),
            )
        ),
        (lambda f: (f / "1.png").unlink(), r"1\.jpg has no file in"),
        (lambda f: (f / "1.png").write_bytes(b"none"), "cannot be read"),
        (lambda f: ((f / "sub").mkdir(), Image.new("L", (64, 48)).save(f / "sub" / "1.png")), None),
    ],
)
def test_a_wrong_mask_is_named(tmp_path, write, message):
    pictures, _ = masks(tmp_path)
    write(tmp_path)
    task = named("segment", ("logits", (3, *SIZE)))
    if message is None:  # the file of the same path, not of the same last part, is the image's
        assert task.read(tmp_path, pictures)[1].path == tmp_path / "1.png"
        return
    with pytest.raises(BadImages, match=message):
        task.read(tmp_path, pictures)


@pytest.mark.parametrize("images", [("a/0.png", "b/0.png"), ("0.jpg", "0.png")])
def test_two_images_do_not_share_a_mask(tmp_path, images):
    (tmp_path / "a").mkdir()
    for name in ("a/0.png", "x.png"):
        Image.new("L", (64, 48)).save(tmp_path / name)
    task = named("segment", ("logits", (3, *SIZE)))
    with pytest.raises(BadImages, match=f"could belong to {images[0]} and to {images[1]}; each image needs its own"):
        task.read(tmp_path, Pictures(images))


def shards(folder, names, paths):
    """The pictures of a folder in two parquet files, where each row has a path; and what is opened of them."""
    for k, part in enumerate(np.array_split(np.arange(len(names)), 2)):
        images = [{"bytes": (folder / names[i]).read_bytes(), "path": paths[i]} for i in part]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()} if any(paths) else {"bytes": pa.binary()})
        (folder / "shards").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": pa.array(images, kind)}), folder / "shards" / f"{k}.parquet")
    return open_images(folder / "shards", Preprocess((3, *SIZE)), labels=False)


@pytest.fixture
def pictures(tmp_path):
    """Five pictures in two folders, and of each a mask, a depth map and a target."""
    rng, names = np.random.default_rng(0), [f"{'ab'[i % 2]}/{i // 2}.png" for i in range(5)]
    for name in names:
        for kind, shape in (("real", (48, 64, 3)), ("masks", (48, 64)), ("targets", (*SIZE, 3))):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, shape).astype(np.uint8)).save(tmp_path / kind / name)
        (tmp_path / "depths" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save((tmp_path / "depths" / name).with_suffix(".npy"), rng.uniform(1, 5, (48, 64)))
    return tmp_path, names


@pytest.mark.parametrize("path", ["{}", "/somewhere/else/{}", "C:\\data\\{}"])
@pytest.mark.parametrize(
    ("spec", "output", "kind"),
    [("segment", (3, *SIZE), "masks"), ("depth", SIZE, "depths"), ("restore", (3, *SIZE), "targets")],
)
def test_a_row_of_parquet_has_the_file_of_its_own_path(pictures, path, spec, output, kind):
    """Oracle: the file that was written under the picture's name, by the bytes of the picture that the row holds."""
    folder, names = pictures
    rows = [(folder / "real" / name).read_bytes() for name in names]
    images = shards(folder / "real", names, [path.format(name.replace("/", "\\" if "C:" in path else "/")) for name in names])
    found = named(spec, ("out", output)).read(folder / kind, images)
    held = [names[rows.index(bytes(item))] for item in images.store.items(images.rows)]
    expected = [(folder / kind / name).with_suffix(".npy" if kind == "depths" else ".png") for name in held]
    assert [getattr(one, "path", one) for one in found] == expected
    assert images.subset([3, 1]).paths == (images.paths[3], images.paths[1])


@pytest.mark.parametrize("known", [0, 4])
def test_a_row_without_a_path_is_told_what_can_be_given(pictures, known):
    folder, names = pictures
    paths = [*names[:known], *[None] * (len(names) - known)]
    images = shards(folder / "real", names, paths)
    assert images.paths == tuple(path or name for path, name in zip(paths, images.names, strict=True))
    first = images.names[known]
    with pytest.raises(BadImages, match=rf"{first} is a row without a path, .*\(--score DIR\), or parquet whose column image"):
        named("segment", ("out", (3, *SIZE))).read(folder / "masks", images)


def test_a_row_of_an_array_is_told_what_can_be_given(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 48, 64, 3), np.uint8))
    images = open_images(tmp_path / "x.npy", Preprocess((3, *SIZE)))
    with pytest.raises(BadImages, match=r"x.npy:0 is a row without a path, and masks are found by the path .* \(--score DIR\)"):
        named("segment", ("out", (3, *SIZE))).read(tmp_path, images)


def test_depths_and_their_errors_have_their_closed_forms():
    true = torch.rand(5, 6, dtype=torch.float64) * 4 + 1
    assert errors_of_depth(true * 1.2, true, relative=False) == pytest.approx((1.0, 0.2))
    assert errors_of_depth(true * 1.3, true, relative=False) == pytest.approx((0.0, 0.3))
    holes = true.clone()
    holes[0] = 0  # unknown
    spoiled = true.clone()
    spoiled[0] = 99
    assert errors_of_depth(spoiled, holes, relative=False) == (1.0, 0.0)
    delta, error = errors_of_depth(7 / true + 3, true, relative=True)  # the inverse, at another scale and shift
    assert (delta, error) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_depth_maps_of_both_kinds_are_read_and_compared(tmp_path):
    task = named("depth", ("predicted_depth", SIZE))
    depth = np.random.default_rng(0).uniform(1, 5, SIZE)
    np.save(tmp_path / "a.npy", depth.repeat(2, 0).repeat(2, 1))
    Image.fromarray((1000 * depth).round().astype(np.uint16).repeat(2, 0).repeat(2, 1)).save(tmp_path / "b.png")
    x = torch.from_numpy(np.stack([depth] * 2)).float()
    meter = task.meter(task.read(tmp_path, Pictures(("a.jpg", "b.jpg"))))
    meter.add([x], [x * torch.tensor([1.2, 1.3])[:, None, None]])
    rating = meter.rating(())
    assert (rating.float_score, rating.score) == (100, 50)
    apart, row = rating.rows
    assert (row["float"], row["quantized"]) == pytest.approx((0, 0.25), abs=1e-3)
    assert (row["what"], row["unit"], row["better"]) == ("AbsRel", "", "less")
    assert apart["error"] == pytest.approx(25, abs=1e-3)  # percent: the mean of 20 and 30
    assert (apart["unit"], apart["better"]) == ("%", "less")


def test_files_whose_numbers_are_no_depths_are_refused(tmp_path):
    picture, eight = Pictures(("a.jpg",)), np.resize(np.arange(1, 9, dtype=np.uint8), (48, 64))
    metres, relative = named("depth", ("y", SIZE)), named("depth:relative", ("y", SIZE))
    Image.fromarray(eight).save(tmp_path / "a.png")
    with pytest.raises(
        BadImages, match=r"a\.png has 8 bits, and PNG is read in thousandths .* above 0\.255\. Save it with 16 bits"
    ):
        metres.read(tmp_path, picture)
    assert len(relative.read(tmp_path, picture)) == 1  # up to a scale
    Image.fromarray(eight > 3).save(tmp_path / "a.png")
    for task in (metres, relative):
        with pytest.raises(BadImages, match=r"a\.png has true and false alone, and no depths"):
            task.read(tmp_path, picture)
    (tmp_path / "a.png").unlink()
    np.save(tmp_path / "a.npy", eight > 3)
    with pytest.raises(BadImages, match=r"a\.npy has true and false alone, and no depths"):
        metres.read(tmp_path, picture)
    np.save(tmp_path / "a.npy", eight)  # in the model's unit
    assert len(metres.read(tmp_path, picture)) == 1


@pytest.mark.parametrize(("spec", "known"), [("depth", 0), ("depth:relative", 2)])
def test_an_image_without_enough_depths_where_the_model_looks_is_left_out_and_counted(tmp_path, spec, known):
    task, true = named(spec, ("y", SIZE)), 1 + 4 * torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0)).double()
    hidden = np.zeros((48, 64))
    hidden[0, 0] = 3  # nearest pixels of the picture are at odd places
    hidden[1, 1 : 2 * known : 2] = 2
    for i, one in enumerate(true):
        np.save(tmp_path / f"{i}.npy", hidden if i == 1 else one.numpy().repeat(2, 0).repeat(2, 1))
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "4.png")
    x = torch.cat([true, true[:1]])
    x, y = (1 / x + 3, 1 / x.flip(1) + 3) if task.relative else (x, x * torch.tensor([1.2, 9, 1.2, 1.3, 9])[:, None, None])
    rating = rated(task, x, y, task.read(tmp_path, Pictures(tuple(f"{i}.jpg" for i in range(5)))))
    kept = [errors_of_depth(y[i], true[i], task.relative) for i in (0, 2, 3)]
    assert (rating.measure, rating.float_score) == ("δ1", 100)
    assert rating.score == pytest.approx(100 * np.mean([delta for delta, _ in kept]))
    (row,) = [row for row in rating.rows if "AbsRel" in row["what"]]
    assert (row["float"], row["quantized"]) == pytest.approx((0, np.mean([error for _, error in kept])), abs=1e-9)
    assert not task.relative or 0 < rating.score < 100
    assert rating.score < 100
    assert "δ1 and AbsRel are of 3 of 5 images: no other depth map has" in rating.why
    alone = rated(task, x[1:2], y[1:2], task.read(tmp_path, Pictures(tuple(f"{i}.jpg" for i in range(5))))[1:2])  # a share
    assert (alone.score, "None of the 1 depth maps has" in alone.why) == (None, True)
    with pytest.raises(BadImages, match=r"none of the 2 depth maps has .* known depths? at the pixels that the model sees"):
        task.read(tmp_path, Pictures(("1.jpg", "4.jpg")))


@pytest.mark.parametrize(
    ("spec", "shape"), [("depth", SIZE), ("depth:relative", SIZE), ("embed", (8,)), ("restore", (3, 16, 16))]
)
def test_outputs_that_are_no_numbers_have_a_score_that_a_report_can_hold(tmp_path, spec, shape):
    task, x, truth = named(spec, ("y", shape)), 3 + noise(4, *shape), None
    y = x.clone()
    y[1], y[2, ..., 0] = torch.nan, torch.inf
    if spec != "embed":
        for i in range(4):
            np.save(tmp_path / f"{i}.npy", 3 + noise(48, 64, seed=i).clamp(-1, 1).numpy())
            Image.new("RGB", (16, 16), (i, 99, 9 * i)).save(tmp_path / f"{i}.bmp")
        truth = task.read(tmp_path, Pictures(tuple(f"{i}.jpg" for i in range(4))))
    meter = task.meter(truth)
    apart = meter.add([x], [y])
    near = Closeness("y", True)
    near.add(x, y)
    rating = meter.rating([near.score()])
    numbers = [value for row in rating.rows for key, value in row.items() if key not in ("what", "unit", "better")]
    assert np.isfinite([*apart.tolist(), rating.agreement, *rating.interval, *numbers]).all()
    assert apart[0] < 1e-6 < 0.1 < min(apart[1:3])
    assert rating.agreement < 100


def test_depths_with_a_palette_are_refused_and_masks_have_its_numbers(tmp_path):
    numbers = np.resize(np.uint8([2, 0, 1]), (48, 64))
    picture = Image.fromarray(numbers)
    picture.putpalette([255, 255, 255, 9, 9, 9, 0, 200, 0])
    picture.save(tmp_path / "a.png")
    (mask,) = named("segment", ("y", (3, *SIZE))).read(tmp_path, Pictures(("a.jpg",)))
    assert mask.placed((48, 64), 9).tolist() == Map(tmp_path / "a.png", mask.placement).placed((48, 64), 9).tolist()
    assert set(mask.placed(SIZE, 9).unique().tolist()) == {0, 1, 2}
    with pytest.raises(BadImages, match=r"a\.png has a palette, whose numbers are colours, and depth maps have none"):
        named("depth", ("y", SIZE)).read(tmp_path, Pictures(("a.jpg",)))
    Image.fromarray(numbers == 1).save(tmp_path / "a.png")  # 1 bit: black and white
    (mask,) = named("segment", ("y", (2, *SIZE))).read(tmp_path, Pictures(("a.jpg",)))
    assert (set(mask.placed(SIZE, 255).unique().tolist()), mask.one) == ({0, 1}, 255)


@pytest.mark.parametrize("bands", [1, 3])
def test_a_target_of_any_form_is_the_picture_that_it_shows(tmp_path, bands):
    shape = (bands, 16, 16)
    dots = noise(16, 16) > 0
    white = dots.float().expand(shape)
    grey = Image.fromarray((255 * dots).byte().numpy())
    small = Image.fromarray((~dots).byte().numpy())
    small.putpalette([255] * 3 + [0] * 3)  # number 0 is white
    forms = {"P": small, "8": grey} if bands == 1 else {"P": small, "8": grey.convert("RGB")}
    forms |= {"1": grey.convert("1"), "LA": grey.convert("LA")} if bands == 1 else {"RGBA": grey.convert("RGBA")}
    forms |= {"16": Image.fromarray((65535 * dots.numpy()).astype(np.uint16))} if bands == 1 else {}
    exact, task = (0.8 * white + 0.1)[None], named("restore", ("y", shape))
    for one in forms.values():
        one.save(tmp_path / "a.png")
        rating = rated(task, exact, exact.flip(2), task.read(tmp_path, Pictures(("a.jpg",))))
        expected = [float(peak_signal_noise_ratio(y, white, data_range=1.0)) for y in (exact[0], exact.flip(2)[0])]
        assert (rating.float_score, rating.score) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("RGB", (15, 16)), "is 16 x 15 pixels .* of 3 channels, and the model gives 16 x 16 pixels .* of 3 channels"),
        (Image.new("L", (16, 16)), "is 16 x 16 pixels .* of 1 channel, and the model gives .* of 3 channels; give such"),
        (Image.new("F", (16, 16)), "has floats .mode F of Pillow., whose white nobody knows; save it with 8 or 16 bits"),
        (None, "cannot be read: .* Write it again"),
    ],
)
def test_a_target_that_is_another_picture_is_refused_when_it_is_read(tmp_path, picture, message):
    if picture is None:
        (tmp_path / "a.tif").write_bytes(b"no picture")
    else:
        picture.save(tmp_path / "a.tif")
    with pytest.raises(BadImages, match=rf"a\.tif {message}"):
        named("restore", ("y", (3, 16, 16))).read(tmp_path, Pictures(("a.jpg",)))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.tif")
    (found,) = named("restore", ("y", (3, -1, -1))).read(tmp_path, Pictures(("a.jpg",)))  # a model of any size
    with pytest.raises(BadImages, match="and the model gives 8 x 16 pixels"):
        named("restore", ("y", (3, -1, -1))).meter([found]).add([torch.rand(1, 3, 8, 16)], [torch.rand(1, 3, 8, 16)])


def test_an_embeddings_neighbours_are_those_of_all_pairs():
    x, y = (torch.nn.functional.normalize(noise(40, 8, seed=s)) for s in (0, 1))
    y = torch.nn.functional.normalize(x + 0.3 * y)
    for k in (1, 10):
        each = []
        for i in range(40):
            near = [
                {j for _, j in sorted(((float(t[i] @ t[j]), j) for j in range(40) if j != i), reverse=True)[:k]} for t in (x, y)
            ]
            each.append(len(near[0] & near[1]) / k)
        assert recall(x, y, k).tolist() == pytest.approx(each)
    task = named("embed", ("y", (8,)))
    meter = task.meter(None)
    assert meter.add([3 * x], [x]).abs().max() < 1e-6
    assert meter.rating(()).agreement == 100


@pytest.mark.parametrize(("images", "k"), [(3, 0), (4, 0), (5, 2), (10, 4), (12, 5), (20, 9), (21, 10), (40, 10)])
def test_a_recall_has_its_own_number_and_could_have_been_lower(images, k):
    x = noise(images, 8, seed=0)
    meter = named("embed", ("y", (8,))).meter(None)
    meter.add([x], [noise(images, 8, seed=1)])
    rows = {row["what"]: row["agreement"] for row in meter.rating(()).rows if row["what"].startswith("recall")}
    x, y = (torch.nn.functional.normalize(noise(images, 8, seed=seed)) for seed in (0, 1))
    assert rows == ({f"recall at {k}": pytest.approx(100 * float(recall(x, y, k).mean()))} if k else {})
    assert all(share < 100 for share in rows.values())


def test_the_psnr_of_a_picture_is_torchmetrics(tmp_path):
    task = named("restore", ("y", (3, 16, 16)))
    x, y = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for i, one in enumerate(x):
        Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    exact, outputs = (x + 0.02).clamp(0, 1), (0.7 * x + 0.3 * y)
    meter = task.meter(task.read(tmp_path, Pictures(("0.jpg", "1.jpg"))))
    meter.add([exact], [outputs])
    rating = meter.rating(())
    stored = (255 * x).round() / 255
    for found, t in ((rating.float_score, exact), (rating.score, outputs)):
        expected = [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(t, stored, strict=True)]
        assert found == pytest.approx(np.mean(expected), abs=1e-3)
    assert rating.unit == "dB"
    assert [told(row)["unit"] for row in rating.rows] == ["dB", "%"]
    assert {told(row)["better"] for row in rating.rows} == {"more"}
    assert rating.agreement < 100


def rated(task, x, y, truth=None):
    """The rating of two models that give x and y, in two batches, with how near the numbers are."""
    meter, near = task.meter(truth), Closeness("y", True)
    for a, b in zip(x.split(4), y.split(4), strict=True):
        meter.add([a], [b])
        near.add(a, b)
    return meter.rating([near.score()])


ALONE = {  # of each task: its output, what makes outputs of noise that say nothing
    "segment": ((3, 16, 16), lambda t: 0 * t + torch.tensor([0.0, 9, 1])[:, None, None]),
    "depth": ((1, 16, 16), lambda t: t * 1e-9 + 3),
    "restore": ((3, 16, 16), lambda t: 0 * t + 0.5),
    "embed": ((8,), lambda t: t * 1e-9 + 1),
}


@pytest.mark.parametrize("spec", ALONE)
def test_a_model_that_gives_the_same_for_every_image_is_not_called_right(spec):
    shape, same = ALONE[spec]
    task, x = named(spec, ("y", shape)), noise(6, *shape)
    assert rated(task, x, x).agreement == pytest.approx(100)
    with pytest.raises(BadImages, match="the same numbers for every scored image"):
        rated(task, same(x), same(x))


def test_one_class_or_one_direction_is_replaced_by_the_correlation_of_the_numbers():
    x, y = noise(6, 3, 16, 16), noise(6, 3, 16, 16, seed=1)
    sky = torch.tensor([90.0, 0, 0])[:, None, None]  # another model, and the same class
    rating = rated(named("segment", ("y", (3, 16, 16))), x + sky, y + sky)
    expected = np.mean([np.corrcoef(x[:, c].flatten(), y[:, c].flatten())[0, 1] for c in range(3)])
    assert rating.agreement == pytest.approx(100 * max(expected, 0), abs=1e-4)
    assert rating.agreement_measure == "correlation of y with the float model's"
    assert "every pixel of all 6 scored images the same class" in rating.why
    lengths = 1 + torch.arange(6.0)[:, None] * torch.ones(8)
    rating = rated(named("embed", ("y", (8,))), lengths, lengths.flip(0))
    assert (rating.agreement, "the same direction" in rating.why) == (0, True)


def test_a_measure_that_is_0_for_the_float_model_is_replaced_by_agreement(tmp_path):
    pictures, seen = masks(tmp_path)
    task = named("segment", ("logits", (3, *SIZE)))
    wrong = 9.0 * torch.nn.functional.one_hot((seen.clamp_max(2) + 1) % 3, 3).permute(0, 3, 1, 2)
    after = wrong.clone()
    after[:, :, 12:] = wrong[:, :, 12:].roll(1, 1)  # the lower half of each picture
    rating = rated(task, wrong, after, task.read(tmp_path, pictures))
    assert (rating.measure, rating.score, rating.agreement) == ("", None, 50)
    assert rating.interval == (50, 50)
    assert "mIoU of the float model is 0.00, which cannot fall" in rating.why
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.ones((48, 64), np.float32))
        (tmp_path / f"{i}.png").unlink()
    task, below = named("depth", ("y", SIZE)), noise(6, *SIZE) - 90
    rating = rated(task, below, below + 90, task.read(tmp_path, pictures))
    assert (rating.score, rating.agreement, "δ1 of the float model is 0.00" in rating.why) == (None, 0, True)


def test_an_miou_no_better_than_a_guess_is_replaced_by_agreement(tmp_path):
    task = named("segment", ("logits", (3, *SIZE)))
    seen = (noise(6, *SIZE) > 0.5).long() + (noise(6, *SIZE, seed=1) > 1).long()
    x = 2.0 * torch.nn.functional.one_hot(seen, 3).permute(0, 3, 1, 2) + noise(6, 3, *SIZE, seed=2)

    def against(masks):
        for i, mask in enumerate(masks.numpy().astype(np.uint8)):
            Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(tmp_path / f"{i}.png")
        return rated(task, x, x.roll(1, 0), task.read(tmp_path, Pictures(tuple(f"{i}.jpg" for i in range(6)))))

    right = against(seen)
    assert (right.measure, right.why) == ("mIoU", "")
    one_class = torch.where(seen == 1, 1, IGNORED)  # a model that always gives this class is right everywhere
    for masks, guess in (((seen + 1) % 3, "a guess: "), (one_class, "one class for every pixel has 100.00 %")):
        wrong = against(masks)
        assert (wrong.measure, wrong.score, wrong.agreement) == ("", None, right.agreement)
        assert guess in wrong.why


def test_the_guesses_of_classes_are_torchmetrics_of_one_class_and_of_shuffled_pixels():
    generator = torch.Generator().manual_seed(0)
    for shares in ([0.5, 0.3, 0.2], [0.96, 0.03, 0.01]):
        true, given = (torch.multinomial(torch.tensor(shares), 200_000, True, generator=generator) for _ in range(2))
        each = [100 * float(multiclass_jaccard_index(y, true, 3, average="macro")) for y in (given, torch.zeros_like(true))]
        guess, what = guess_of_classes(_counts(true, true, 3))
        assert guess == pytest.approx(max(each), abs=0.2)
        assert ("shuffled" in what) == (each[0] > each[1])


@pytest.mark.parametrize("relative", [False, True])
def test_the_guess_of_depths_is_the_best_of_all_constants(tmp_path, relative):
    true = 0.5 + 5 * torch.rand(4, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    true[:, :5] = 0  # unknown
    guesses = Guesses(relative)
    for one in true:
        guesses.add(one)
    constants = [torch.full_like(true[0], c) for c in np.geomspace(0.5, 6, 400)]
    if relative:  # any constant is fitted
        best = np.mean([errors_of_depth(constants[0], one, relative=True)[0] for one in true])
    else:
        best = max(np.mean([errors_of_depth(c, one, relative=False)[0] for one in true]) for c in constants)
    assert guesses.best() == pytest.approx(100 * best, abs=0.7)
    task = named("depth:relative" if relative else "depth", ("y", SIZE))
    for i, one in enumerate(true):
        np.save(tmp_path / f"{i}.npy", one.numpy().repeat(2, 0).repeat(2, 1))
    truth = task.read(tmp_path, Pictures(tuple(f"{i}.jpg" for i in range(4))))
    near = (1 / true.clamp_min(0.5) if relative else true) + 0.01 * noise(4, *SIZE)
    assert rated(task, near, near.roll(1, 0), truth).measure == "δ1"
    other = near.flip(2)
    assert "one depth for every pixel" in rated(task, other, other.roll(1, 0), truth).why


def test_a_measure_near_100_is_clearly_better_than_a_guess_where_it_misses_less_than_half(tmp_path):
    task, true, guesses = named("depth", ("y", SIZE)), torch.full((2, *SIZE), 2.0, dtype=torch.float64), Guesses(False)
    true.view(2, -1)[:, :12] = 5  # 12 of 768 pixels lie apart: one depth has 98.44 %
    for i, one in enumerate(true):
        np.save(tmp_path / f"{i}.npy", one.numpy().repeat(2, 0).repeat(2, 1))
        guesses.add(one)
    assert guesses.best() == pytest.approx(100 * (1 - 12 / 768))
    truth = task.read(tmp_path, Pictures(("0.jpg", "1.jpg")))

    def with_wrong(count):
        y = true + 0.01 * noise(2, *SIZE)
        y.view(2, -1)[:, :count] = 2
        return rated(task, y, y.roll(1, 0), truth)

    assert [with_wrong(count).measure for count in (0, 5, 7, 12)] == ["δ1", "δ1", "", ""]
    flat = true.clamp_max(2)  # where one depth is all there is, a perfect model has no more than the guess
    for i, one in enumerate(flat):
        np.save(tmp_path / f"{i}.npy", one.numpy().repeat(2, 0).repeat(2, 1))
    y = flat + 0.01 * noise(2, *SIZE)
    assert "100.00 %, not clearly better" in rated(task, y, y, task.read(tmp_path, Pictures(("0.jpg", "1.jpg")))).why


def test_the_guess_of_a_picture_is_the_mean_colour_of_the_targets(tmp_path):
    task, x = named("restore", ("y", (3, 16, 16))), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, one in enumerate(x):
        Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    stored = (255 * x).round() / 255
    colour = stored.mean((0, 2, 3))[:, None, None].expand(3, 16, 16)
    guess = np.mean([float(peak_signal_noise_ratio(colour, one, data_range=1.0)) for one in stored])
    rating = rated(task, x.flip(2), x, task.read(tmp_path, Pictures(("0.jpg", "1.jpg"))))
    assert (rating.score, f"the mean colour of all targets has {guess:.2f} dB" in rating.why) == (None, True)


def test_pictures_outside_of_0_to_1_have_no_psnr_that_could_fall(tmp_path):
    task, x = named("restore", ("y", (3, 16, 16))), 2 + noise(2, 3, 16, 16).abs()
    for i in range(2):
        Image.new("RGB", (16, 16), (9, 99, 199)).save(tmp_path / f"{i}.png")
    rating = rated(task, x, x.flip(2), task.read(tmp_path, Pictures(("0.jpg", "1.jpg"))))
    assert rating.score is None
    assert rating.agreement < 50
    assert "so PSNR is not used" in rating.why
    broken = x.clone()
    broken[:, :, 3] = torch.nan
    assert rated(task, x, broken).agreement == 0


def test_an_output_that_fits_no_task_is_said_with_its_shape():
    with pytest.raises(BadModel, match=r"--task segment: a map .* is needed.*gives y \(batch, 10\)"):
        named("segment", ("y", (10,)))
    with pytest.raises(BadModel, match="--task embed: one list"):
        named("embed", ("y", (3, 10)))


@pytest.mark.parametrize("resize", ["squash", "center", "border", "letterbox", "corner"])
@pytest.mark.parametrize("shape", [(90, 60), (50, 120), (37, 41)])
def test_a_point_of_a_picture_is_where_its_placement_says(resize, shape):
    preprocess = Preprocess((3, 48, 64), mean=(0.0,), std=(1.0,), resize=resize, crop_pct=1.0, antialias=True)
    h, w = shape
    ramps = np.zeros((h, w, 3), np.uint8)
    ramps[:, :, 0], ramps[:, :, 1] = np.linspace(20, 230, w)[None], np.linspace(20, 230, h)[:, None]
    x = 255 * preprocess(ramps)
    place = preprocess.placement(h, w)
    row, column = 24, 32
    seen = [(column + 0.5 - place.shift[0]) / place.scale[0], (row + 0.5 - place.shift[1]) / place.scale[1]]
    if not (1 < seen[0] < w - 1 and 1 < seen[1] < h - 1):
        row, column = 5, 5
        seen = [(column + 0.5 - place.shift[0]) / place.scale[0], (row + 0.5 - place.shift[1]) / place.scale[1]]
    expected = [20 + 210 * (seen[0] - 0.5) / (w - 1), 20 + 210 * (seen[1] - 0.5) / (h - 1)]
    assert x[:2, row, column].tolist() == pytest.approx(expected, abs=3.0)


def test_a_processors_placement_is_found_by_slopes():
    transformers = pytest.importorskip("transformers")
    import json

    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 64}, do_normalize=True)
    text = json.dumps({**json.loads(processor.to_json_string()), "image_processor_type": "ViTImageProcessor"})
    preprocess = Preprocess((3, 48, 64), mean=tuple(processor.image_mean), std=tuple(processor.image_std), processor=text)
    place = preprocess.placement(90, 200)
    assert place.scale == pytest.approx((64 / 200, 48 / 90), rel=5e-3)
    assert place.shift == pytest.approx((0, 0), abs=0.3)


def test_a_letterbox_has_its_grey_and_blue_comes_first():
    picture = np.full((40, 80, 3), (200, 100, 50), np.uint8)
    x = 255 * Preprocess((3, 32, 32), mean=(0.0,), std=(1.0,), resize="corner", channel_order="bgr")(picture)
    assert x[:, 0, 0].tolist() == pytest.approx([50, 100, 200])
    assert x[:, 31, 31].tolist() == pytest.approx([114] * 3)
    assert x[:, 15, 31].tolist() == pytest.approx([50, 100, 200])
    assert x[:, 16, 0].tolist() == pytest.approx([114] * 3)
    middle = 255 * Preprocess((3, 32, 32), mean=(0.0,), std=(1.0,), resize="letterbox", fill=7.0)(picture)
    assert (middle[0, 7, 0].item(), middle[0, 8, 0].item()) == pytest.approx((7, 200))


def test_a_map_outside_its_picture_has_no_class(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    one = Map(tmp_path / "a.npy", Placement((2.0, 2.0), (1.0, 0.0), (6, 8)))
    expected = [[255, 0, 0, 1, 1, 2, 2, 255]] * 2 + [[255, 3, 3, 4, 4, 5, 5, 255]] * 2 + [[255] * 8] * 2
    assert one.placed((6, 8), 255.0).tolist() == expected


def test_floats_are_no_pictures_that_annotations_lie_on():
    images = open_images(noise(3, 3, 8, 8).numpy(), Preprocess((3, 8, 8)))
    with pytest.raises(BadImages, match="is an input of the model and no picture"):
        images.sizes()
