"""The ViT-S with other heads: classes of pixels (a linear layer on its patches), and embeddings of images.

    python -m bench.heads train --model vit_s14_tiny200.py --data coco128 --out build/heads     # a linear layer, on masks
    python -m bench.heads segment --data coco128 --out build/heads                              # rows: mIoU
    python -m bench.heads embed --model vit_s14_tiny200.py --images train --score val --out build/heads    # rows: recall

DATA has `train` and `val`, each with `images`, and `masks` (PNG of class numbers) for some of them; `mask_classes.json` names
the classes. Few images make a small segmenter: it knows the classes that stand in at least `LEAST` of the training masks, all
other pixels count neither in training nor in scores. The backbone is as it was; the head is trained at 224 px on its patches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fewbit
from fewbit.data.images import Preprocess, open_images
from fewbit.files import read_json, write_json

sys.path.append(str(Path(__file__).parents[1]))

SIDE, LEAST, IGNORED = 224, 8, 255
SETTINGS = (("mse", "8"), ("fast", "8"), ("fast", "6"), ("fast", "w4a8"))
STEPS, BATCH, PEAK = 1500, 16, 3e-3
TOKENS = 16  # along a side


class Segmenter(nn.Module):
    """A ViT with a linear layer on its patches: (batch, 3, SIDE, SIDE) to logits (batch, classes, 16, 16)."""

    def __init__(self, vit: nn.Module, classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(384, classes)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)  # type: ignore[operator]
        return tokens[:, -TOKENS * TOKENS :]

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.features(x)).transpose(1, 2)
        return y.reshape(-1, y.shape[1], TOKENS, TOKENS)


def backbone(path: Path, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a Python file for images of another size, without its classifier, and its mean and std."""
    from timm.layers import resample_abs_pos_embed

    spec = importlib.util.spec_from_file_location("backbone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.model()
    grid = side // 14
    if net.patch_embed.img_size != (side, side):
        with torch.no_grad():
            net.pos_embed = nn.Parameter(
                resample_abs_pos_embed(net.pos_embed, (grid, grid), num_prefix_tokens=0 if net.no_embed_class else 1)
            )
        net.patch_embed.set_input_size((side, side))
    net.head = nn.Identity()
    return net.eval(), {"mean": list(module.MEAN), "std": list(module.STD), "input_size": [3, side, side]}


def masks(data: Path, out: Path) -> list[str]:
    """Masks of the classes that are common, as class numbers from 0, and links to their images; gives the names."""
    names = json.loads((data / "mask_classes.json").read_text())
    files = {split: sorted((data / split / "masks").glob("*.png")) for split in ("train", "val")}
    seen: dict[int, int] = {}
    for path in files["train"]:
        for value in np.unique(np.asarray(Image.open(path))):
            seen[int(value)] = seen.get(int(value), 0) + 1
    kept = sorted(value for value, count in seen.items() if count >= LEAST and value != 0)
    table = np.full(256, IGNORED, np.uint8)
    table[kept] = np.arange(len(kept))
    for split, paths in files.items():
        for folder in ("masks", "images"):
            (out / split / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            Image.fromarray(table[np.asarray(Image.open(path))]).save(out / split / "masks" / path.name)
            link = out / split / "images" / f"{path.stem}.jpg"
            if not link.exists():
                link.symlink_to((data / split / "images" / link.name).resolve())
    return [names[str(value)] for value in kept]


def train(model: Path, data: Path, out: Path) -> None:
    """Train the head on patches of the training images, mirrored or not, and export the model."""
    torch.manual_seed(0)
    names = masks(data, out)
    vit, record = backbone(model, SIDE)
    net = Segmenter(vit, len(names)).eval()
    preprocess = Preprocess((3, SIDE, SIDE), tuple(record["mean"]), tuple(record["std"]), antialias=False)
    images = torch.cat(list(open_images(out / "train" / "images", preprocess, labels=False).batches(16)))
    seen = [
        torch.from_numpy(np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.NEAREST), np.int64)).clone()
        for path in sorted((out / "train" / "masks").glob("*.png"))
    ]
    with torch.no_grad():
        both = [torch.cat([net.features(x) for x in t.split(16)]) for t in (images, images.flip(3))]
    features, pixels = torch.cat(both), torch.cat([torch.stack(seen), torch.stack(seen).flip(2)])
    labels = in_patches(pixels, len(names))
    spread = features.std((0, 1))
    optimizer = torch.optim.AdamW(net.head.parameters(), PEAK, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(len(features), (BATCH,), generator=generator)
        noise = 0.1 * spread * torch.randn(features[rows].shape, generator=generator)
        log_p, share = net.head(features[rows] + noise).log_softmax(2), labels[rows]
        loss = -(share * log_p).sum() / share.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 3, SIDE, SIDE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, out / "segmenter.pt2")
    whole = {**record, "classes": names, "task": "segment", "interpolation": "bicubic", "resize": "squash", "crop_pct": 1.0}
    (out / "segmenter.json").write_text(json.dumps(whole))


def in_patches(pixels: Tensor, classes: int) -> Tensor:
    """The share of each class in each patch of masks (n, SIDE, SIDE): (n, patches, classes); no class counts nothing."""
    step = SIDE // TOKENS
    patches = pixels.view(-1, TOKENS, step, TOKENS, step).transpose(2, 3).reshape(len(pixels), TOKENS * TOKENS, -1)
    counted = F.one_hot(patches.clamp_max(classes), classes + 1)
    return counted[..., :classes].float().mean(2)


def rows(out: Path, kind: str, model: Any, settings: Iterable[tuple[str, str]], **options: Any) -> None:
    """A row for each recipe and width, made once, and the table of all of them."""
    for recipe, bits in settings:
        path = out / f"{kind}-{recipe}-{bits}.json"
        if path.exists():
            continue
        report = fewbit.quantize(
            model, recipe=recipe, bits=bits, target="ort-x86-vnni", seconds=0.2, calibration=64, **options
        ).report
        write_json(
            path, {key: report[key] for key in ("accuracy", "verify", "images", "recipe", "bits", "size", "integer_share")}
        )
        print(f"{recipe} {bits} done", flush=True)
    print(table([read_json(path) for path in sorted(out.glob(f"{kind}-*.json"))]))


def table(reports: Sequence[Any]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| recipe | bits | float | integer | change, 95 % interval | agreement | more | codes wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        score, check = report["accuracy"], report["verify"]
        numbers = ["", ""] if score["quantized"] is None else [f"{score[key]:.2f}" for key in ("float", "quantized")]
        low, high = score["interval"]
        more = ", ".join(f"{row['what']} {row['agreement']:.2f}" for row in score["rows"] if "agreement" in row)
        cells = [report["recipe"], report["bits"], *numbers, f"{low:+.2f} to {high:+.2f}", f"{score['agreement']:.2f}", more]
        lines.append(f"| {' | '.join(cells)} | {check['codes_wrong']} of {check['codes_compared']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("train", "segment", "embed"))
    for name in ("--model", "--data", "--images", "--score"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/heads"))
    parser.add_argument("--scored", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        train(args.model, args.data, args.out)
    elif args.what == "segment":
        val, images = args.out / "val", args.out / "train" / "images"
        options = {"score": val / "images", "annotations": val / "masks", "labels": False}
        rows(args.out, "segment", str(args.out / "segmenter.pt2"), SETTINGS, images=images, **options)
    else:
        net, record = backbone(args.model, 112)
        options = {"input_size": (3, 112, 112), "mean": tuple(record["mean"]), "std": tuple(record["std"]), "labels": False}
        options |= {"resize": "squash", "interpolation": "bicubic", "crop_pct": 1.0, "scored": args.scored, "task": "embed"}
        rows(args.out, "embed", net, SETTINGS, images=args.images, score=args.score, **options)


if __name__ == "__main__":
    main()
