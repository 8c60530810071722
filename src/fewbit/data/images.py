"""Images from folders, parquet, NumPy files or memory, as normalized batches with labels in the model's class order.

Pixels are decoded by Pillow and converted to RGB as timm does (grey is repeated, alpha is dropped, CMYK is converted).
EXIF orientation is NOT applied, which is timm's behaviour too. Nothing is decoded before a batch asks for it, except
that `open_images` decodes every chosen image once, JPEG at an eighth of its size, so that a broken one is found early.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewbit.errors import BadFile, BadImages, UnknownName

Json = Any
Array = np.ndarray[Any, Any]
Item = Path | bytes | Array | None  # an encoded file, encoded bytes, pixels (uint8 h w 3) or a normalized input (3 h w)

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
RESIZES = ("squash", "center", "border")
PIL_FILTERS: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TORCH_MODES: Mapping[str, str] = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model input: resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    `size` is (3, h, w) in pixels; `mean` and `std` are per channel in units of [0, 1]. The picture is resized to
    floor(size / crop_pct): both sides ("squash"), the side that fills the frame ("center"), or the side that fits in
    it, with borders in the mean colour ("border"). `antialias` resizes the 8-bit picture with Pillow, as timm does;
    without it torch interpolates floats, and bicubic may overshoot [0, 1]. Raises BadImages or UnknownName.
    """

    size: tuple[int, int, int]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    resize: str = "squash"
    crop_pct: float = 1.0
    antialias: bool = True

    def __post_init__(self) -> None:
        if self.interpolation not in PIL_FILTERS:
            raise UnknownName("interpolation", self.interpolation, PIL_FILTERS)
        if self.resize not in RESIZES:
            raise UnknownName("resize", self.resize, RESIZES)
        if not self.antialias and self.interpolation not in TORCH_MODES:
            raise BadImages(f"{self.interpolation} needs antialias; without it there are: {', '.join(TORCH_MODES)}.")
        if len(self.size) != 3 or self.size[0] != 3 or min(self.size) < 1:
            raise BadImages(f"the input size is {self.size}; allowed is (3, height, width), e.g. (3, 224, 224).")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise BadImages(f"mean {self.mean} and std {self.std} must be three numbers each, with std > 0.")
        if not self.crop_pct > 0:
            raise BadImages(f"crop_pct is {self.crop_pct}; allowed is a number > 0; 1.0 is no crop.")

    @classmethod
    def from_timm(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """The evaluation transform of a timm `pretrained_cfg` or data config; what it lacks is timm's default."""

        def field(name: str, default: Any) -> Any:
            return default if cfg.get(name) is None else cfg[name]

        return cls(
            size=tuple(field("input_size", (3, 224, 224))),
            mean=tuple(field("mean", cls.mean)),
            std=tuple(field("std", cls.std)),
            interpolation=field("interpolation", "bicubic"),
            resize=field("crop_mode", "center"),
            crop_pct=field("crop_pct", 0.875),
        )

    def replace(self, **overrides: Any) -> Preprocess:
        """The same with some fields changed; lists become tuples. Raises UnknownName for another field."""
        allowed = [f.name for f in dataclasses.fields(self)]
        for name in overrides:
            if name not in allowed:
                raise UnknownName("preprocess field", name, allowed)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        return dataclasses.replace(self, **values)

    def to_json(self) -> dict[str, Json]:
        """All fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Json]) -> Preprocess:
        """The inverse of `to_json`; absent fields have defaults. Raises UnknownName, or BadFile without a size."""
        if "size" not in fields:
            raise BadFile('the preprocessing has no size; it needs at least "size": [3, height, width].')
        return cls(size=tuple(fields["size"])).replace(**fields)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The normalized float32 input for one picture. Raises BadImages for more than 8 bits per channel."""
        picture, (_, h, w) = _rgb(image), self.size
        high, wide = self._resized(picture.height, picture.width)
        if self.antialias:
            x = _unit(picture.resize((wide, high), PIL_FILTERS[self.interpolation]))
        else:
            corners = None if self.interpolation == "nearest" else False
            mode = TORCH_MODES[self.interpolation]
            x = F.interpolate(_unit(picture)[None], (high, wide), mode=mode, align_corners=corners, antialias=False)[0]
        return (self._centre(x, h, w) - self._column(self.mean)) / self._column(self.std)

    def undo(self, x: Float[Tensor, "3 h w"]) -> Image.Image:
        """The picture that a normalized input shows, rounded to 8 bits."""
        unit = (x * self._column(self.std) + self._column(self.mean)).clamp(0, 1)
        return Image.fromarray((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def _resized(self, high: int, wide: int) -> tuple[int, int]:
        """(height, width) in pixels after the resize; timm rounds differently for square frames and for others."""
        to_h, to_w = (math.floor(side / self.crop_pct) for side in self.size[1:])
        if self.resize == "squash":
            return to_h, to_w
        if self.resize == "center" and to_h == to_w:
            return (to_h, int(to_h * wide / high)) if high <= wide else (int(to_w * high / wide), to_w)
        ratios = high / to_h, wide / to_w
        ratio = min(ratios) if self.resize == "center" else max(ratios)
        return max(1, round(high / ratio)), max(1, round(wide / ratio))

    def _centre(self, x: Tensor, h: int, w: int) -> Tensor:
        """The middle h x w of `x`, bordered where it is smaller: mean colour for "border", else black, as in timm."""
        high, wide = max(h, x.shape[1]), max(w, x.shape[2])
        top, left = (high - x.shape[1]) // 2, (wide - x.shape[2]) // 2
        fill = [round(255 * m) / 255 for m in self.mean] if self.resize == "border" else [0.0, 0.0, 0.0]
        frame = self._column(fill).repeat(1, high, wide)
        frame[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        top, left = round((high - h) / 2), round((wide - w) / 2)
        return frame[:, top : top + h, left : left + w]

    @staticmethod
    def _column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


class Store(Protocol):
    """Where images lie: `items` gives those at `rows`, in that order, one at a time."""

    def items(self, rows: Sequence[int]) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Files:
    """One image file per row."""

    paths: tuple[Path, ...]

    def items(self, rows: Sequence[int]) -> Iterator[Item]:
        return (self.paths[row] for row in rows)


@dataclass(frozen=True, eq=False)
class InMemory:
    """An array, perhaps mapped from disk: uint8 (n, h, w, 3), or with `chw` (n, 3, h, w), or floats (n, 3, h, w)."""

    values: Array
    chw: bool

    def items(self, rows: Sequence[int]) -> Iterator[Item]:
        for row in rows:
            value = np.array(self.values[row])
            if value.dtype == np.uint8:
                yield np.ascontiguousarray(value.transpose(1, 2, 0)) if self.chw else value
            else:
                yield value.astype(np.float32)


@dataclass(frozen=True)
class Parquet:
    """Encoded images in a column of parquet files, read 64 rows at a time; `starts` are the files' first rows.

    Rows in rising order are streamed; in any other order their encoded bytes are held while they are handed out.
    """

    paths: tuple[Path, ...]
    starts: tuple[int, ...]
    column: str

    def items(self, rows: Sequence[int]) -> Iterator[Item]:
        if all(a < b for a, b in itertools.pairwise(rows)):
            yield from self._stream(rows)
        else:
            once = sorted(set(rows))
            held = dict(zip(once, self._stream(once), strict=True))
            yield from (held[row] for row in rows)

    def _stream(self, rows: Sequence[int]) -> Iterator[Item]:
        for path, start in zip(self.paths, self.starts, strict=True):
            try:
                with pq.ParquetFile(path, pre_buffer=False) as file:
                    for group in range(file.num_row_groups):
                        stop = start + file.metadata.row_group(group).num_rows
                        wanted = rows[bisect.bisect_left(rows, start) : bisect.bisect_left(rows, stop)]
                        yield from self._group(file, group, [row - start for row in wanted])
                        start = stop
            except (OSError, pa.ArrowException) as error:
                raise BadImages(f"{path} is broken: {error}. Download or write it again.") from error

    def _group(self, file: Any, group: int, wanted: Sequence[int]) -> Iterator[Item]:
        seen = done = 0
        batches = file.iter_batches(batch_size=64, row_groups=[group], columns=[self.column]) if wanted else ()
        for batch in batches:
            while done < len(wanted) and wanted[done] < seen + batch.num_rows:
                cell = batch.column(0)[wanted[done] - seen].as_py()
                yield cell.get("bytes") if isinstance(cell, dict) else cell
                done += 1
            seen += batch.num_rows
            if done == len(wanted):
                return


@dataclass(frozen=True, eq=False)
class Images:
    """Images that can be read again and again: `labels` are int64 class indices (n,), or None where nobody knows.

    `names` say where each image came from, `skipped` which were left out as broken, `source` all of it in a phrase.
    """

    names: tuple[str, ...]
    labels: Tensor | None
    preprocess: Preprocess
    source: str
    store: Store
    rows: tuple[int, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """Normalized float32 inputs, `size` at a time and then the rest. Raises BadImages that names a broken image."""
        if size < 1:
            raise BadImages(f"the batch size is {size}; allowed is 1 or more.")
        batch: list[Tensor] = []
        for name, item in zip(self.names, self.store.items(self.rows), strict=True):
            batch.append(_input(item, name, self.preprocess))
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order. Raises IndexError for an index outside."""
        chosen = [range(len(self))[i] for i in indices]
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            rows=tuple(self.rows[i] for i in chosen),
        )

    def thumbnail(self, i: int, pixels: int) -> Image.Image:
        """The whole picture `i` in RGB with no side over `pixels`; a normalized array is shown as the model sees it."""
        item = next(iter(self.store.items((self.rows[i],))))
        if isinstance(item, np.ndarray) and item.dtype != np.uint8:
            picture = self.preprocess.undo(torch.from_numpy(item))
        else:
            picture = _decode(item, self.names[i])
        picture.thumbnail((pixels, pixels))
        return picture

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every image's name, size in bytes and bytes as stored, in order; labels are not in it."""
        digest = hashlib.sha256()
        for name, item in zip(self.names, self.store.items(self.rows), strict=True):
            if isinstance(item, np.ndarray):
                data = str((item.dtype.str, item.shape)).encode() + item.tobytes()
            else:
                data = _bytes(item, name)
            digest.update(f"{len(name.encode())} {name} {len(data)} ".encode())
            digest.update(data)
        return digest.hexdigest()


def open_images(
    source: str | Path | Array | Tensor | tuple[Any, Any],
    preprocess: Preprocess,
    *,
    classes: int | Sequence[str] | None = None,
    labels: bool = True,
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Images:
    """The images of a folder, a parquet, .npy or .npz file, an array, or an (array, labels) pair.

    `classes` is the model's class count, or its class names in output order; `labels=False` ignores all labels. At most
    `limit` images are drawn with `seed`, spread evenly over the classes, and stay in natural order; a smaller limit
    draws a subset of a larger one. With `skip_bad` broken images are left out after the draw. Raises BadImages.
    """
    names, numbers, store, where = _found(source, preprocess, classes, labels)
    if limit is not None and limit < 1:
        raise BadImages(f"the limit is {limit} images; allowed is 1 or more.")
    rows = list(range(len(names)))
    if limit is not None and limit < len(names):
        rows = spread(len(names) if numbers is None else numbers, limit, seed)
        where += f", {limit} of {len(names)} at random (seed {seed})"
    good: list[int] = []
    skipped: list[str] = []
    for row, item in zip(rows, store.items(rows), strict=True):
        try:
            _check(item, names[row])
            good.append(row)
        except BadImages as error:
            if not skip_bad:
                raise BadImages(f"{error} Mend or remove it, or leave such images out with --skip-bad.") from error
            skipped.append(names[row])
    if not good:
        raise BadImages(f"{where}: none of its {len(rows)} images can be read, e.g. {skipped[0]}. Give other images.")
    return Images(
        names=tuple(names[row] for row in good),
        labels=None if numbers is None else torch.from_numpy(numbers[good]),
        preprocess=preprocess,
        source=where,
        store=store,
        rows=tuple(good),
        skipped=tuple(skipped),
    )


def spread(labels: int | Array, limit: int, seed: int) -> list[int]:
    """`limit` rows in rising order, as many of each label as of any other while they last; an int is just n."""
    numbers = np.zeros(labels, np.int64) if isinstance(labels, int) else labels
    generator = np.random.default_rng(seed)
    taken: dict[int, int] = {}
    turn = dict(zip(np.unique(numbers).tolist(), generator.permutation(len(np.unique(numbers))).tolist(), strict=True))
    order = []
    for row in generator.permutation(len(numbers)).tolist():
        label = int(numbers[row])
        taken[label] = taken.get(label, 0) + 1
        order.append((taken[label], turn[label], row))
    return sorted(row for _, _, row in sorted(order)[:limit])


def read_classes(path: str | Path) -> list[str]:
    """Class names in output order from a file: lines, or a JSON list or object. Raises BadFile.

    Lines that all start with a wnid give the wnid (synset_words.txt). A JSON object maps names to indices, indices to
    names (or to [name, ...]), or wnids to words; the last is taken in sorted wnid order, as ImageNet models answer.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text) if path.suffix == ".json" else lines
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} is no readable list of classes: {error}. Give one name per line, or JSON.") from error
    if isinstance(found, dict):
        found = _ordered(found, path)
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise BadFile(f"{path} holds no list of class names. Give one class name per line, or a JSON list or object.")
    if all(WNID.fullmatch(name.split(maxsplit=1)[0] if name.strip() else "") for name in found):
        found = [name.split(maxsplit=1)[0] for name in found]
    if twice := [name for name, times in Counter(found).items() if times > 1]:
        raise BadFile(f"{path} names the class '{twice[0]}' twice; each output has one name. Remove one of them.")
    return list(found)


def _ordered(found: dict[str, Any], path: Path) -> list[Any]:
    """The classes of a JSON object in output order, empty if it is none of the three kinds."""
    if found and all(isinstance(v, int) for v in found.values()):
        pairs = sorted((v, k) for k, v in found.items())
    elif found and all(k.isdecimal() for k in found):
        pairs = sorted((int(k), v[0] if isinstance(v, list) and v else v) for k, v in found.items())
    elif found and all(WNID.fullmatch(k) for k in found):
        return sorted(found)
    else:
        return []
    if [i for i, _ in pairs] != list(range(len(pairs))):
        raise BadFile(f"{path} numbers {len(pairs)} classes, but not 0 to {len(pairs) - 1}. Give each output one name.")
    return [name for _, name in pairs]


Found = tuple[tuple[str, ...], Array | None, Store, str]  # names, int64 labels or None, where the pixels are, in words


def _found(source: Any, preprocess: Preprocess, classes: int | Sequence[str] | None, labels: bool) -> Found:
    """What a source holds, before anything is drawn or decoded."""
    if isinstance(source, tuple):
        if len(source) != 2:
            raise BadImages(f"a tuple of {len(source)} was given; allowed is (images, labels). Give those two.")
        return _array(source[0], source[1] if labels else None, "array", preprocess, classes)
    if isinstance(source, (np.ndarray, Tensor)):
        return _array(source, None, "array", preprocess, classes)
    path = Path(source)
    if not path.exists():
        raise BadImages(f"{path} does not exist. Give a folder of images, or a .parquet, .npy or .npz file.")
    if path.is_dir():
        return _folder(path, classes, labels)
    if path.suffix == ".parquet":
        return _parquet(path, (path,), classes, labels)
    if path.suffix in (".npy", ".npz"):
        values, numbers = _numpy_file(path)
        return _array(values, numbers if labels else None, str(path), preprocess, classes)
    raise BadImages(f"{path} is a '{path.suffix}' file. Give a folder of images, or a .parquet, .npy or .npz file.")


def _natural(path: Path | str) -> list[Any]:
    """A sort key by which 2 comes before 10, the one that timm uses."""
    text = path if isinstance(path, str) else path.as_posix()
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _folder(path: Path, classes: int | Sequence[str] | None, labels: bool) -> Found:
    files = [f.relative_to(path) for f in path.rglob("*") if f.is_file()]
    files = sorted((f for f in files if not any(part.startswith(".") for part in f.parts)), key=_natural)
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if tables := [f for f in files if f.suffix == ".parquet"]:
        if images:
            raise BadImages(f"{path} holds images ({images[0]}) and parquet ({tables[0]}). Give a folder of one kind.")
        splits = sorted({split for f in tables if (split := re.split(r"[-_.]", f.stem)[0].lower()) in SPLITS})
        if len(splits) > 1:
            found = " and ".join(splits)
            raise BadImages(f"{path} holds the splits {found}. Give the file or folder of one, e.g. {path / tables[0]}.")
        return _parquet(path, tuple(path / f for f in tables), classes, labels)
    if not images:
        found = f"{len(files)} other files ({_some([str(f) for f in files])})" if files else "no files"
        allowed = ", ".join(SUFFIXES)
        raise BadImages(f"{path} holds no images but {found}. Give a folder with images ({allowed}) or .parquet files.")
    store, names = Files(tuple(path / f for f in images)), tuple(f.as_posix() for f in images)
    loose = [f.name for f in images if len(f.parts) == 1]
    if not labels or len(loose) == len(images):
        return names, None, store, f"folder {path}"
    if loose:
        deep = [f.as_posix() for f in images if len(f.parts) > 1]
        raise BadImages(
            f"{path} holds images ({_some(loose)}) beside folders of images ({_some(deep)}). "
            "Move them into class folders, or ignore the classes with --no-labels."
        )
    folders = sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    index = _class_index(path, folders, classes)
    return names, np.array([index[f.parts[0]] for f in images], np.int64), store, f"folder {path}"


def _class_index(path: Path, folders: list[str], classes: int | Sequence[str] | None) -> dict[str, int]:
    """Folder name to class index: by the given names, by a wnid list beside the folder, or by sorted folder names."""
    advice = "Give the order with --classes FILE (one folder name per line), or ignore the classes with --no-labels."
    if classes is not None and not isinstance(classes, int):
        if strange := [name for name in folders if name not in set(classes)]:
            allowed = f"the {len(classes)} class names ({_some(classes)})"
            raise BadImages(f"{path} has class folders ({_some(strange)}) that are not among {allowed}. {advice}")
        return {name: i for i, name in enumerate(classes)}
    if all(WNID.fullmatch(name) for name in folders):
        for file in (path.resolve().parent / name for name in ("synset_words.txt", "classes.json")):
            wnids = sorted(read_classes(file)) if file.exists() else []
            if set(folders) <= set(wnids) and classes in (None, len(wnids)):
                return {name: i for i, name in enumerate(wnids)}
    if classes is not None and len(folders) != classes:
        found = f"{len(folders)} class folders ({_some(folders)})"
        raise BadImages(f"{path} has {found}, and the model has {classes} classes. {advice}")
    if (natural := sorted(folders, key=_natural)) != folders:
        first, other = next((a, b) for a, b in zip(folders, natural, strict=True) if a != b)
        orders = f"torchvision puts {first} before {other}, timm the reverse"
        raise BadImages(f"{path} has class folders whose order is not plain: {orders}. {advice}")
    return {name: i for i, name in enumerate(folders)}


def _numbers(values: Any, names: Sequence[str], classes: int | Sequence[str] | None, where: str) -> Array:
    """Integer labels (n,) as int64. Raises BadImages for another kind or count, and for an index that is no class."""
    numbers = np.asarray(values)
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(names),):
        raise BadImages(
            f"{where} has labels of type {numbers.dtype} and shape {numbers.shape}; "
            f"allowed are integers of shape ({len(names)},), one for each image. Mend them, or use --no-labels."
        )
    count = classes if classes is None or isinstance(classes, int) else len(classes)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= (np.inf if count is None else count)))
    if len(wrong):
        allowed = "0 or more" if count is None else f"0 to {count - 1}, the model's classes"
        found = f"{names[wrong[0]]} has label {numbers[wrong[0]]}"
        raise BadImages(f"{found}; allowed is {allowed}. Mend it, or use --no-labels.")
    return numbers.astype(np.int64)


def _parquet(path: Path, files: tuple[Path, ...], classes: int | Sequence[str] | None, labels: bool) -> Found:
    names: list[str] = []
    starts: list[int] = []
    numbers: list[Any] = []
    labelled = set()
    for file in files:
        where = file.relative_to(path).as_posix() if file != path else file.name
        try:
            schema = pq.read_schema(file)
            rows = pq.read_metadata(file).num_rows
        except (OSError, pa.ArrowException) as error:
            raise BadImages(f"{file} is not a readable parquet file: {error}. Download or write it again.") from error
        kind = schema.field("image").type if "image" in schema.names else None
        if kind is None or not (_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            found = ", ".join(f"{f.name}: {f.type}" for f in schema)
            raise BadImages(f"{file} has the columns {found}; it needs image: struct<bytes, path> or binary.")
        starts.append(len(names))
        names += [f"{where}:{row}" for row in range(rows)]
        labelled.add("label" in schema.names)
        if labels and "label" in schema.names:
            numbers += pq.read_table(file, columns=["label"])["label"].to_pylist()
    if not names:
        raise BadImages(f"{path} has no rows. Give a parquet file with images in it.")
    if labels and len(labelled) > 1:
        raise BadImages(f"{path} has files with and without a label column. Give one kind, or use --no-labels.")
    store = Parquet(files, tuple(starts), "image.bytes" if pa.types.is_struct(kind) else "image")
    return tuple(names), _numbers(numbers, names, classes, str(path)) if numbers else None, store, f"parquet {path}"


def _binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _numpy_file(path: Path) -> tuple[Array, Array | None]:
    """Images and labels of a file; .npy stays on disk, .npz has `images` (or a single array) and perhaps `labels`."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy raises whatever zip, pickle and the header parser raise
        raise BadImages(f"{path} is no readable NumPy file: {error}. Write it with numpy.save or savez.") from error
    numbers = held.pop("labels", None)
    if "images" not in held and len(held) != 1:
        raise BadImages(f"{path} has the arrays {', '.join(held)}; needed is 'images', and 'labels' if there are any.")
    return held["images"] if "images" in held else next(iter(held.values())), numbers


def _array(source: Any, labels: Any, where: str, preprocess: Preprocess, classes: int | Sequence[str] | None) -> Found:
    if isinstance(source, Tensor):
        source = (source.float() if source.dtype == torch.bfloat16 else source).detach().cpu()
    values = np.asarray(source)
    size, shape = preprocess.size, values.shape
    found = f"{where} has type {values.dtype} and shape {shape}"
    floats = f"normalized floats (n, {size[0]}, {size[1]}, {size[2]})"
    if len(shape) != 4 or not (values.dtype.kind == "f" or values.dtype == np.uint8):
        raise BadImages(f"{found}; allowed is uint8 (n, h, w, 3) or (n, 3, h, w), or {floats}. Give one of these.")
    if not shape[0]:
        raise BadImages(f"{found}: it holds no images. Give one with n of 1 or more.")
    if values.dtype != np.uint8 and shape[1:] != size:
        raise BadImages(f"{found}; allowed is {floats}. Resize them, or give uint8 pixels.")
    first, last = shape[1] == 3, shape[3] == 3
    if values.dtype == np.uint8 and first == last:
        which = "both ends could be the channels" if first else "neither end has 3 channels"
        raise BadImages(f"{found}: {which}; allowed is uint8 (n, h, w, 3) or (n, 3, h, w). Transpose it.")
    names = tuple(f"{Path(where).name}:{row}" for row in range(shape[0]))
    labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    numbers = None if labels is None else _numbers(labels, names, classes, where)
    return names, numbers, InMemory(values, chw=first), where


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB. Raises BadImages for more than 8 bits per channel, which Pillow would saturate."""
    if image.mode.startswith(("I", "F")):
        raise BadImages(f"mode {image.mode} has more than 8 bits per channel; allowed is 8, save it with 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _unit(picture: Image.Image) -> Tensor:
    """RGB pixels as float32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


def _decode(item: Item, name: str, *, small: bool = False) -> Image.Image:
    """The picture in RGB; `small` lets JPEG come out at an eighth of its size. Raises BadImages with the name."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        if item is None:
            raise ValueError("its bytes are missing")
        with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as picture:
            if small:
                picture.draft("RGB", (1, 1))
            picture.load()
            return _rgb(picture)
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise BadImages(f"{name} cannot be decoded as an image: {error}.") from error


def _bytes(item: Path | bytes | None, name: str) -> bytes:
    try:
        return item.read_bytes() if isinstance(item, Path) else item or b""
    except OSError as error:
        raise BadImages(f"{name} cannot be read: {error}.") from error


def _check(item: Item, name: str) -> None:
    """Raises BadImages for an image that does not decode, or floats with NaN or infinity."""
    if not isinstance(item, np.ndarray):
        _decode(item, name, small=True)
    elif item.dtype != np.uint8 and not np.isfinite(item).all():
        raise BadImages(f"{name} has {np.sum(~np.isfinite(item))} NaN or infinite values; all must be finite.")


def _input(item: Item, name: str, preprocess: Preprocess) -> Tensor:
    if isinstance(item, np.ndarray) and item.dtype != np.uint8:
        return torch.from_numpy(item)
    return preprocess(_decode(item, name))
