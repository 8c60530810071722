"""Folders as `hf:` takes them: files that lack, values that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, either, quantize, refused
from doors.place import vit


def cases() -> Iterator[Case]:
    yield Case(
        "hf: without weights",
        quantize(model="hf:d"),
        refused("hf:d"),
        before=changed(lambda d: (d / "model.safetensors").unlink()),
    )
    yield Case(
        "hf: without config", quantize(model="hf:d"), refused("hf:d"), before=changed(lambda d: (d / "config.json").unlink())
    )
    yield Case(
        "hf: without processor",
        quantize(model="hf:d"),
        either("hf:d"),
        before=changed(lambda d: (d / "preprocessor_config.json").unlink()),
    )
    for name, (file, field, value) in {
        "architectures of text": ("config.json", "architectures", "x"),
        "a type that does not exist": ("config.json", "model_type", "nope"),
        "a segmenter": ("config.json", "architectures", ["SegformerForSemanticSegmentation"]),
        "a masked model": ("config.json", "architectures", ["ViTForMaskedImageModeling"]),
        "another width": ("config.json", "hidden_size", 48), "no heads": ("config.json", "num_attention_heads", 0),
        "heads that do not divide": ("config.json", "num_attention_heads", 7),
        "negative layers": ("config.json", "num_hidden_layers", -1),
        "more layers than weights": ("config.json", "num_hidden_layers", 5), "labels of text": ("config.json", "id2label", "x"),
        "a mean of text": ("preprocessor_config.json", "image_mean", "x"),
        "a mean of NaN": ("preprocessor_config.json", "image_mean", [float("nan")] * 3),
        "a std of zero": ("preprocessor_config.json", "image_std", [0, 0, 0]),
        "a size of text": ("preprocessor_config.json", "size", "x"),
        "a size of zero": ("preprocessor_config.json", "size", {"height": 0, "width": 0}),
        "a negative size": ("preprocessor_config.json", "size", {"height": -4, "width": 16}),
        "a resample that does not exist": ("preprocessor_config.json", "resample", 99),
        "another processor": ("preprocessor_config.json", "image_processor_type", "Nope"),
        "a rescale of zero": ("preprocessor_config.json", "rescale_factor", 0),
        "a rescale of NaN": ("preprocessor_config.json", "rescale_factor", float("nan")),
    }.items():  # fmt: skip
        yield Case(
            f"hf: {name}",
            quantize(model="hf:d"),
            refused(("hf:d", "d/", *(("mean", "std") if "mean" in name or "std" in name else ()))),
            before=changed(edited(file, field, value)),
        )


def edited(file: str, field: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return edit


def changed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A folder `d` with a small ViT and its processor, changed."""

    def put(folder: Path) -> None:
        vit(folder / "d")
        change(folder / "d")

    return put
