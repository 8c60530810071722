"""What a case finds in its folder: a small model, pictures; where it needs them a finished run, a program, weights."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from small_net import NET


def build(place: Path, needs: Container[str]) -> None:
    """Write everything but the run, which the caller makes with the command line; a program only where it is needed."""
    place.mkdir(parents=True)
    (place / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    for i in range(12):
        picture(place / "flat" / f"{i}.png", rng)
    for name in "abcd":
        for i in range(3):
            picture(place / "classes" / name / f"{i}.png", rng)
    if "net.pt2" in needs:
        save(net(), place / "net.pt2")
    save_file({name: p.detach().contiguous() for name, p in net().state_dict().items()}, place / "weights.safetensors")


def net() -> torch.nn.Module:
    """The model of net.py."""
    names: dict[str, Any] = {}
    exec(NET, names)
    return names["model"]()


def vit(folder: Path) -> None:
    """A Hugging Face folder with a small vision transformer and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 4,
    }
    ViTForImageClassification(ViTConfig(**sizes, num_labels=4)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def picture(path: Path, rng: np.random.Generator, size: tuple[int, int] = (20, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    low, high = np.sort(rng.integers(0, 256, (2, 3)), axis=0)
    Image.fromarray(rng.integers(low, high + 1, (*size, 3), dtype=np.uint16).astype(np.uint8)).save(path)


def save(net: torch.nn.Module, path: Path, size: tuple[int, ...] = (3, 16, 16)) -> None:
    """Export a net with a dynamic batch and write it."""
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(net, (torch.zeros(2, *size),), dynamic_shapes=({0: batch},)), path)


def lay_out(place: Path, folder: Path, needs: tuple[str, ...]) -> None:
    """A fresh folder for a case."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("net.py", "flat", *needs):
        path = place / name
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / name)
