"""Pictures of the kind that a file of the zoo is made for: drawn text, heads out of photographs, a fourth band. Seeded.

    python bench/pictures.py pages --count 4 --out look     # PNG files, to look at them

Each kind is a function of a folder of photographs (with `instances.json` of COCO beside it for `heads`), how many, and a seed;
it gives pixels (n, height, width, bands), uint8. The text is that of LICENSE in Pillow's own font.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORDS = tuple(Path(__file__).parents[1].joinpath("LICENSE").read_text(encoding="utf-8").split())
Pixels = np.ndarray


def photographs(folder: Path, count: int, size: int) -> list[Image.Image]:
    """The first pictures of a folder, squashed, again from the first where there are fewer."""
    files = sorted(folder.iterdir())
    return [Image.open(files[i % len(files)]).convert("RGB").resize((size, size)) for i in range(count)]


def bands(folder: Path, count: int, seed: int) -> Pixels:
    """Photographs as blue, green, red, and in place of near infrared the brightest of the three (n, 256, 256, 4)."""
    rgb = np.stack([np.asarray(picture) for picture in photographs(folder, count, 256)])
    return np.concatenate([rgb[..., ::-1], rgb.max(3, keepdims=True)], 3)


def pages(folder: Path, count: int, seed: int) -> Pixels:
    """Lines of text on paper and, every second one, on a photograph (n, 480, 480, 3)."""
    drawn = []
    for i, photograph in enumerate(photographs(folder, count, 480)):
        random = np.random.default_rng((seed, i))
        page = photograph if i % 2 else Image.new("RGB", (480, 480), colour(random, 200, 256))
        drawn.append(np.asarray(grained(_written(page, random), random)))
    return np.stack(drawn)


def turned(folder: Path, count: int, seed: int) -> Pixels:
    """Pages, every fourth upright, the others turned by quarters (n, 480, 480, 3)."""
    return np.stack([np.rot90(page, i // 2 % 4) for i, page in enumerate(pages(folder, count, seed))])


def lines(folder: Path, count: int, seed: int) -> Pixels:
    """One line of text each, 48 high, on grey of the middle where it ends before the right (n, 48, 320, 3)."""
    drawn = []
    for i in range(count):
        random = np.random.default_rng((seed, i))
        text, font = _text(random, int(random.integers(2, 5))), ImageFont.load_default(int(random.integers(22, 36)))
        dark, light = colour(random, 0, 100), colour(random, 150, 256)
        ink, paper = (dark, light) if random.random() < 0.7 else (light, dark)
        line = Image.new("RGB", (min(int(font.getlength(text)) + 16, 320), 48), paper)
        ImageDraw.Draw(line).text((8, 24 + random.integers(-3, 4)), text, ink, font, anchor="lm")
        line = grained(line.rotate(random.uniform(-1.5, 1.5), fillcolor=paper), random)
        whole = Image.new("RGB", (320, 48), (128, 128, 128))
        whole.paste(line)
        drawn.append(np.asarray(whole))
    return np.stack(drawn)


def riddles(folder: Path, count: int, seed: int) -> Pixels:
    """Three to six large characters, turned and coloured, on a photograph, as a captcha has them (n, 416, 416, 3)."""
    drawn = []
    for i, photograph in enumerate(photographs(folder, count, 416)):
        random = np.random.default_rng((seed, i))
        for place in random.permutation(9)[: random.integers(3, 7)]:
            size = int(random.integers(60, 110))
            tile = Image.new("RGBA", (size, size))
            letter, font = random.choice(list("ABCDEFGHKLMNPQRSTUVWXYZ2345789")), ImageFont.load_default(int(size * 0.8))
            ImageDraw.Draw(tile).text(
                (size / 2, size / 2), str(letter), colour(random, 0, 256), font, anchor="mm",
                stroke_width=2, stroke_fill=colour(random, 0, 256),
            )  # fmt: skip
            tile = tile.rotate(random.uniform(-60, 60))
            corner = [int(138 * at + random.integers(0, 138 - size)) for at in divmod(int(place), 3)]
            photograph.paste(tile, (corner[1], corner[0]), tile)
        drawn.append(np.asarray(photograph))
    return np.stack(drawn)


def heads(folder: Path, count: int, seed: int) -> Pixels:
    """Squares around the upper part of the persons of COCO, the largest first, as far as they reach (n, 320, 320, 3)."""
    known = json.loads((folder.parent / "instances.json").read_text(encoding="utf-8"))
    person = next(one["id"] for one in known["categories"] if one["name"] == "person")
    names = {one["id"]: one["file_name"] for one in known["images"]}
    boxes = [(one["bbox"], names[one["image_id"]]) for one in known["annotations"] if one["category_id"] == person]
    upright = sorted((one for one in boxes if one[0][3] > 1.2 * one[0][2]), key=lambda one: -one[0][3])[:count]
    drawn = []
    for (x, y, w, h), name in upright:
        side = min(max(w, h / 2) * 1.2, h * 1.2)
        box = (x + w / 2 - side / 2, y - 0.15 * side, x + w / 2 + side / 2, y + 0.85 * side)
        drawn.append(np.asarray(Image.open(folder / name).convert("RGB").transform((320, 320), Image.Transform.EXTENT, box)))
    return np.stack(drawn)


def colour(random: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(random.integers(low, high, 3).tolist())


def grained(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """A little out of focus, with noise."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.8))), np.float64)
    return Image.fromarray((soft + random.normal(0, random.uniform(0, 6), soft.shape)).round().clip(0, 255).astype(np.uint8))


def _text(random: np.random.Generator, count: int) -> str:
    start = int(random.integers(0, len(WORDS) - count))
    return " ".join(WORDS[start : start + count])


def _written(page: Image.Image, random: np.random.Generator) -> Image.Image:
    """A page with 4 to 12 lines of text of one to three sizes."""
    draw, y = ImageDraw.Draw(page), int(random.integers(8, 40))
    for _ in range(random.integers(4, 13)):
        size = int(random.integers(14, 40))
        if y + size > 472:
            break
        text, font = _text(random, int(random.integers(2, 9))), ImageFont.load_default(size)
        place = (int(random.integers(6, 60)), y)
        light = np.asarray(page.crop((0, y, 480, y + size))).mean() > 127
        draw.text(place, text, colour(random, 0, 90) if light else colour(random, 180, 256), font)
        y += int(size * random.uniform(1.2, 2.0))
    return page


KINDS: Mapping[str, Callable[[Path, int, int], Pixels]] = {
    one.__name__: one for one in (bands, pages, turned, lines, riddles, heads)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--photographs", type=Path, default=Path("../shared/data/coco128/train/images"))
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(KINDS[args.kind](args.photographs, args.count, args.seed)):
        Image.fromarray(pixels[..., 2::-1] if args.kind == "bands" else pixels).save(args.out / f"{args.kind}-{i}.png")


if __name__ == "__main__":
    main()
