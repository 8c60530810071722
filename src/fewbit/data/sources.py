"""The names, labels and storage of the images in a folder, parquet file, NumPy file or array, before any is decoded."""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from fewbit.core.walk import below, natural
from fewbit.data.arrays import numpy_file, placed
from fewbit.data.bands import Array
from fewbit.data.classes import WNID, read_classes
from fewbit.data.decode import KNOWN, Item, formats
from fewbit.data.labels import checked_labels
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadImages

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})


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
    """An array, perhaps mapped from disk: uint8 or uint16 (n, h, w, c), or with `chw` (n, c, h, w), or floats (n, c, h, w)."""

    values: Array
    chw: bool

    def items(self, rows: Sequence[int]) -> Iterator[Item]:
        for row in rows:
            value = np.array(self.values[row])
            if value.dtype.kind == "u":
                native = value.astype(value.dtype.newbyteorder("="))
                yield np.ascontiguousarray(native.transpose(1, 2, 0)) if self.chw else native
            else:
                with np.errstate(over="ignore"):  # what becomes infinite is refused
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
            ordered = sorted(set(rows))
            by_row = dict(zip(ordered, self._stream(ordered), strict=True))
            yield from (by_row[row] for row in rows)

    def own_paths(self, rows: Sequence[int]) -> list[str]:
        """The path that each row has for its image (`image.path`); empty where it has none."""
        found: list[Any] = []
        for path in self.paths:
            try:
                with pq.ParquetFile(path) as file:
                    kind = file.schema_arrow.field("image").type
                    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                        found += [(cell or {}).get("path") for cell in file.read(columns=["image.path"]).column(0).to_pylist()]
                    else:
                        found += [None] * file.metadata.num_rows
            except Exception as error:
                raise BadImages(f"{path} is broken: {error}. Download or write it again.") from error
        return [text if isinstance(text := found[row], str) else "" for row in rows]

    def _stream(self, rows: Sequence[int]) -> Iterator[Item]:
        for path, start in zip(self.paths, self.starts, strict=True):
            try:
                with pq.ParquetFile(path, pre_buffer=False) as file:
                    for group in range(file.num_row_groups):
                        stop = start + file.metadata.row_group(group).num_rows
                        group_rows = rows[bisect.bisect_left(rows, start) : bisect.bisect_left(rows, stop)]
                        yield from self._group(file, group, [row - start for row in group_rows])
                        start = stop
            except Exception as error:
                raise BadImages(f"{path} is broken: {error}. Download or write it again.") from error

    def _group(self, file: Any, group: int, rows: Sequence[int]) -> Iterator[Item]:
        start = done = 0
        batches = file.iter_batches(batch_size=64, row_groups=[group], columns=[self.column]) if rows else ()
        for batch in batches:
            while done < len(rows) and rows[done] < start + batch.num_rows:
                cell = batch.column(0)[rows[done] - start].as_py()
                yield cell.get("bytes") if isinstance(cell, dict) else cell
                done += 1
            start += batch.num_rows
            if done == len(rows):
                return


@dataclass(frozen=True, eq=False)
class Found:
    """The names, int64 labels (or None), pixels and description of the images of a source, what of it cannot be read, and by
    name what comes with each image.
    """

    names: tuple[str, ...]
    labels: Array | None
    store: Store
    description: str
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)


def find(source: Any, preprocess: Preprocess, classes: int | Sequence[str] | None, labels: bool, image: str = "") -> Found:
    """All images of a source; nothing is decoded. `image` is the name of the model's input. Raises BadImages."""
    if isinstance(source, tuple):
        return _array(source[0], source[1] if labels else None, "array", preprocess, classes)
    if isinstance(source, (np.ndarray, Tensor)):
        return _array(source, None, "array", preprocess, classes)
    path = Path(source)
    if os.path.isdir(path):
        return _folder(path, classes, labels)
    if path.suffix == ".parquet":
        return _parquet(path, (path,), classes, labels)
    values, stored_labels, beside = numpy_file(path, image)
    found = _array(values, stored_labels if labels else None, str(path), preprocess, classes)
    return replace(found, beside=beside)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _folder(path: Path, classes: int | Sequence[str] | None, labels: bool) -> Found:
    files, unreadable = below(path)
    pictures, arrays = [f for f in files if f.suffix.lower() in KNOWN], [f for f in files if f.suffix == ".npy"]
    images, notes = pictures or arrays, tuple[str, ...]()
    if pictures and arrays:
        notes = (
            f"{path} holds .npy files ({len(arrays)}: {some([f.as_posix() for f in arrays])}) beside pictures "
            f"({len(pictures)}), and the pictures alone are taken. If the others are images too, give a folder of one kind.",
        )
    if tables := [f for f in files if f.suffix == ".parquet"]:
        if images:
            raise BadImages(f"{path} holds images ({images[0]}) and parquet ({tables[0]}). Give a folder of one kind.")
        splits = sorted({split for f in tables if (split := re.split(r"[-_.]", f.stem)[0].lower()) in SPLITS})
        if len(splits) > 1:
            content = " and ".join(splits)
            raise BadImages(f"{path} holds the splits {content}. Give the file or folder of one, e.g. {path / tables[0]}.")
        return replace(_parquet(path, tuple(path / f for f in tables), classes, labels), unreadable=tuple(unreadable))
    if not images:
        content = f"{len(files)} other files ({some([str(f) for f in files])})" if files else some(unreadable)
        allowed = ", ".join(formats())
        kinds = f"images ({allowed}), a .npy file of pixels each, or .parquet files"
        found = f"holds no images but {content}" if content else "is empty"
        raise BadImages(f"{path} {found}. Give a folder with {kinds}.")
    store, names = Files(tuple(path / f for f in images)), tuple(f.as_posix() for f in images)
    unsorted = [f.name for f in images if len(f.parts) == 1]
    if not labels or len(unsorted) == len(images):
        return Found(names, None, store, f"folder {path}", tuple(unreadable), notes)
    if unsorted:
        sorted_images = [f.as_posix() for f in images if len(f.parts) > 1]
        raise BadImages(
            f"{path} holds images ({some(unsorted)}) beside folders of images ({some(sorted_images)}). "
            "Move them into class folders, or ignore the classes with --no-labels."
        )
    folders = sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    index = _class_index(path, folders, classes)
    indices = np.array([index[f.parts[0]] for f in images], np.int64)
    return Found(names, indices, store, f"folder {path}", tuple(unreadable), notes)


def _class_index(path: Path, folders: list[str], classes: int | Sequence[str] | None) -> dict[str, int]:
    """Folder name to class index: by `classes`, by a wnid list beside the folder, or by sorted folder names."""
    advice = "Give the order with --classes FILE (one folder name per line), or ignore the classes with --no-labels."
    by_wnid = all(WNID.fullmatch(name) for name in folders)
    if by_wnid and not isinstance(classes, int | None) and not any(WNID.match(name) for name in classes):
        classes = len(classes)  # a model's names in words say nothing about such folders
    if classes is not None and not isinstance(classes, int):
        if unknown := [name for name in folders if name not in set(classes)]:
            allowed = f"the {len(classes)} class names ({some(classes)})"
            raise BadImages(f"{path} has class folders ({some(unknown)}) that are not among {allowed}. {advice}")
        return {name: i for i, name in enumerate(classes)}
    if by_wnid:
        for file in (path.resolve().parent / name for name in ("synset_words.txt", "classes.json")):
            wnids = sorted(read_classes(file)) if file.is_file() else []
            if set(folders) <= set(wnids) and classes in (None, len(wnids)):
                return {name: i for i, name in enumerate(wnids)}
    if classes is not None and len(folders) != classes:
        content = f"{len(folders)} class folders ({some(folders)})"
        raise BadImages(f"{path} has {content}, and the model has {classes} classes. {advice}")
    if (by_number := sorted(folders, key=natural)) != folders:
        first, other = next((a, b) for a, b in zip(folders, by_number, strict=True) if a != b)
        orders = f"torchvision puts {first} before {other}, timm the reverse"
        raise BadImages(f"{path} has class folders whose order is not plain: {orders}. {advice}")
    return {name: i for i, name in enumerate(folders)}


def _parquet(path: Path, files: tuple[Path, ...], classes: int | Sequence[str] | None, labels: bool) -> Found:
    names: list[str] = []
    starts: list[int] = []
    values: list[Any] = []
    has_labels = set()
    for file in files:
        where = file.relative_to(path).as_posix() if file != path else file.name
        try:
            schema = pq.read_schema(file)
            rows = pq.read_metadata(file).num_rows
        except Exception as error:  # a broken footer raises whatever its parts raise
            raise BadImages(f"{file} is not a readable parquet file: {error}. Download or write it again.") from error
        kind = schema.field("image").type if schema.names.count("image") == 1 else None
        inner = kind.get_field_index("bytes") if kind is not None and pa.types.is_struct(kind) else -1
        if kind is None or not _binary(kind.field(inner).type if inner >= 0 else kind):
            columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
            raise BadImages(f"{file} has the columns {columns}; it needs image: struct<bytes, path> or binary.")
        starts.append(len(names))
        names += [f"{where}:{row}" for row in range(rows)]
        has_labels.add("label" in schema.names)
        if labels and "label" in schema.names:
            values += _column(file, "label")
    if not names:
        raise BadImages(f"{path} has no rows. Give a parquet file with images in it.")
    if labels and len(has_labels) > 1:
        raise BadImages(f"{path} has files with and without a label column. Give one kind, or use --no-labels.")
    store = Parquet(files, tuple(starts), "image.bytes" if pa.types.is_struct(kind) else "image")
    indices = checked_labels(values, names, classes, str(path)) if values else None
    return Found(tuple(names), indices, store, f"parquet {path}")


def _column(file: Path, name: str) -> list[Any]:
    try:
        return list(pq.read_table(file, columns=[name])[name].to_pylist())
    except Exception as error:
        raise BadImages(f"{file}: its column {name} cannot be read: {error}. Write it again, or use --no-labels.") from error


def _binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _array(source: Any, labels: Any, where: str, preprocess: Preprocess, classes: int | Sequence[str] | None) -> Found:
    values, first = placed(source, where, preprocess.size)
    names = tuple(f"{Path(where).name}:{row}" for row in range(len(values)))
    class_indices = None if labels is None else checked_labels(labels, names, classes, where)
    return Found(names, class_indices, InMemory(values, chw=first), where)


def spread(labels: int | Array, limit: int, seed: int) -> list[int]:
    """`limit` rows in rising order, as many of each label as of any other while they last; an int is just n."""
    indices = np.zeros(labels, np.int64) if isinstance(labels, int) else labels
    generator = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    turn = dict(zip(np.unique(indices).tolist(), generator.permutation(len(np.unique(indices))).tolist(), strict=True))
    order = []
    for row in generator.permutation(len(indices)).tolist():
        label = int(indices[row])
        counts[label] = counts.get(label, 0) + 1
        order.append((counts[label], turn[label], row))
    return sorted(row for _, _, row in sorted(order)[:limit])
