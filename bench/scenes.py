"""Scenes for a small detector: up to six CIFAR-10 images pasted on a background, with their boxes and masks.

    python -m bench.scenes --data DIR --split test --count 2000 --seed 0 --out scenes

    python -m bench.scenes --data DIR --ship        # the scenes that the package has for demo:detr

DIR holds `train.parquet` and `test.parquet` of CIFAR-10 (bench/train_demo.py). Scenes of the one split share no image with
scenes of the other. OUT gets `images/000000.png, ...` and `instances.json` in the format of COCO: boxes and masks of what is
seen, so an object that another one covers in part has the box of its rest. A scene depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench.train_demo import pixels
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from fewbit.demo import DETR
from fewbit.demo.model import CLASSES

SIDE, OBJECTS = 96, 6
SMALLEST, LARGEST = 24, 52  # sides of an object, in pixels
VISIBLE = 0.75  # least share of an object that is seen
TRIES = 12  # places that are tried for one object
SHIPPED = 20  # seed of the scenes in the package

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """A picture (SIDE, SIDE, 3); of its n objects what is seen (n, SIDE, SIDE) and boxes, left, top, right, bottom (n, 4)."""

    image: Pixels
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    masks: NDArray[np.bool_]


@dataclass(frozen=True)
class Scenes:
    """Scenes from images (n, 32, 32, 3) and their classes (n,)."""

    images: Pixels
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, data: Path, split: str) -> Scenes:
        images, labels = pixels(pq.read_table(data / f"{split}.parquet"))
        return cls(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy())

    def scene(self, rng: Generator) -> Scene:
        """One scene; objects come one over the other, and one that would hide too much of another is left out."""
        image, labels = self._background(rng), []
        masks = np.zeros((OBJECTS, SIDE, SIDE), bool)
        spare = np.zeros(OBJECTS, np.int64)  # pixels of each object that may still be hidden
        for _ in range(rng.integers(1, OBJECTS + 1)):
            index = int(rng.integers(len(self.images)))
            patch, shape = self._object(self.images[index], rng)
            h, w = shape.shape
            for _ in range(TRIES):
                top, left = int(rng.integers(SIDE - h + 1)), int(rng.integers(SIDE - w + 1))
                window = slice(top, top + h), slice(left, left + w)
                hidden = np.array([np.count_nonzero(mask[window] & shape) for mask in masks])
                if (hidden <= spare).all():
                    break
            else:
                continue
            image[window][shape] = patch[shape]
            masks[:, window[0], window[1]] &= ~shape
            masks[len(labels)][window] = shape
            spare -= hidden
            spare[len(labels)] = (1 - VISIBLE) * np.count_nonzero(shape)
            labels.append(int(self.labels[index]))
        masks = masks[: len(labels)]
        return Scene(image, np.array(labels), bounds(masks), masks)

    def _object(self, image: Pixels, rng: Generator) -> tuple[Pixels, NDArray[np.bool_]]:
        """A part of an image, mirrored or not, at a random size, and its shape: a rectangle, or one with round corners."""
        side = int(rng.integers(27, 33))
        top, left = rng.integers(33 - side, size=2)
        part = image[top : top + side, left : left + side][:, :: 1 if rng.random() < 0.5 else -1]
        size, narrow = math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST))), math.exp(rng.uniform(-0.2, 0.2))
        h, w = (int(np.clip(round(v), SMALLEST, LARGEST)) for v in (size * narrow, size / narrow))
        patch = resized(part, h, w)
        if rng.random() < 0.7:
            return patch, np.ones((h, w), bool)
        y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (h, w))
        return patch, y[:, None] ** 4 + x[None] ** 4 <= 1

    def _background(self, rng: Generator) -> Pixels:
        """A gradient, smooth noise, noise of pixels, tiles of an image's corner, or a small part of an image, enlarged."""
        kind = int(rng.integers(5))
        if kind == 0:
            angle, colours = rng.uniform(0, 2 * math.pi), rng.uniform(0, 255, (2, 3))
            line = np.linspace(-1, 1, SIDE)
            place = 0.5 + 0.35 * (math.cos(angle) * line[:, None, None] + math.sin(angle) * line[None, :, None])
            return (colours[0] + (colours[1] - colours[0]) * place).astype(np.uint8)
        if kind == 1:
            cells = int(rng.integers(2, 9))
            return resized(rng.integers(0, 256, (cells, cells, 3), np.uint8), SIDE, SIDE)
        if kind == 2:
            colour, spread = rng.integers(0, 256, 3), int(rng.integers(10, 80))
            return np.clip(colour + rng.integers(-spread, spread + 1, (SIDE, SIDE, 3), np.int16), 0, 255).astype(np.uint8)
        side = int(rng.integers(6, 13))
        top, left = rng.integers(33 - side, size=2)
        part = self.images[rng.integers(len(self.images))][top : top + side, left : left + side]
        if kind == 3:
            return np.tile(part, (-(-SIDE // side), -(-SIDE // side), 1))[:SIDE, :SIDE].copy()
        return resized(part, SIDE, SIDE)


def resized(image: Pixels, h: int, w: int) -> Pixels:
    """An image at another size, bicubic; a copy that may be painted on."""
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((w, h), Image.Resampling.BICUBIC))


def bounds(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The smallest boxes around masks (n, h, w): (n, 4), left, top, right, bottom."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """A mask as COCO's uncompressed run lengths: column by column, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    return [int(n) for n in np.diff(np.concatenate([[0], edges, [flat.size]]))]


def coco(scenes: list[Scene]) -> dict[str, Any]:
    """The objects of scenes in the format of COCO; the scene of number 7 is the image of id 7, `000007.png`."""
    annotations = [
        {
            "image_id": number,
            "category_id": int(label),
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": int(mask.sum()),
            "segmentation": {"size": [SIDE, SIDE], "counts": runs(mask)},
            "iscrowd": 0,
        }
        for number, scene in enumerate(scenes)
        for label, (x0, y0, x1, y1), mask in zip(scene.labels, scene.boxes, scene.masks, strict=True)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i:06}.png", "width": SIDE, "height": SIDE} for i in range(len(scenes))],
        "annotations": [{"id": i, **one} for i, one in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }


def numbered(source: Scenes, seed: int, count: int) -> list[Scene]:
    """The first scenes of a seed."""
    return [source.scene(np.random.default_rng((seed, number))) for number in range(count)]


def ship(data: Path) -> None:
    """Write scenes of the train split to calibrate on and of the test split to score on, as JPEG with boxes and classes.

    `objects` has `bbox` (left, top, width, height) and `category` for each scene, as Hugging Face's copies of COCO have it.
    """
    for split, path, count in (("train", DETR.calibration, 64), ("test", DETR.test, 100)):
        rows = []
        for scene in numbered(Scenes.of(data, split), SHIPPED, count):
            file = io.BytesIO()
            Image.fromarray(scene.image).save(file, "JPEG", quality=90)
            sides = np.concatenate([scene.boxes[:, :2], scene.boxes[:, 2:] - scene.boxes[:, :2]], 1)
            objects = {"bbox": sides.tolist(), "category": scene.labels.tolist()}
            rows.append({"image": {"bytes": file.getvalue(), "path": f"{len(rows):06}.jpg"}, "objects": objects})
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path)
    target.add_argument("--ship", action="store_true")
    args = parser.parse_args()
    if args.ship:
        ship(args.data)
        return
    scenes = numbered(Scenes.of(args.data, args.split), args.seed, args.count)
    (args.out / "images").mkdir(parents=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(args.out / "images" / f"{number:06}.png")
    (args.out / "instances.json").write_text(json.dumps(coco(scenes)))


if __name__ == "__main__":
    main()
