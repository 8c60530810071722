"""How images become the input of a model, as ONNX files say it: one entry of JSON in their metadata.

A file takes normalized floats (batch, channels, height, width); one that normalizes inside takes pixels, uint8 (batch, height,
width, channels).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.core.pixels import FIELDS

Json = Any
ENTRY, MADE = "fewbit.preprocess", "fewbit.made"
KINDS: Mapping[str, type | tuple[type, ...]] = {  # of what is read back
    "size": FIELDS["input_size"].json,
    **{name: field.json for name, field in FIELDS.items() if name not in ("input_size", "channel_order")},
    "antialias": bool,
    "processor": str,
    "assumed": list,
}


@dataclass(frozen=True)
class Record:
    """What the files of a run say of their images: the fields of a Preprocess, which of them nobody gave, and the metadata of
    the ONNX file that went in.
    """

    preprocess: Mapping[str, Json]
    assumed: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Json]:
        """As it stands in run.json."""
        return {
            "preprocess": dict(self.preprocess),
            "assumed": list(self.assumed),
            "metadata": dict(self.metadata or {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Json]) -> Record:
        """The inverse. Raises KeyError for a record that lacks a part."""
        return cls(record["preprocess"], tuple(record["assumed"]), record["metadata"])

    @property
    def inside(self) -> bool:
        """Whether the integer file normalizes."""
        return bool(self.preprocess.get("whole"))

    def images(self, inside: bool, dtype: str = "float32") -> dict[str, Json]:
        """What a file takes, in `dtype`, and how it is made from a picture; `inside`: it takes pixels and normalizes them."""
        fields = {name: value for name, value in self.preprocess.items() if value != "" and name != "whole"}
        flipped = json.loads(fields.get("processor", "{}")).get("do_flip_channel_order")
        colours = "BGR" if flipped or fields.pop("channel_order", "rgb") == "bgr" else "RGB"
        fields.pop("channel_order", None)
        order = {1: "grey", 3: colours}.get(fields["size"][0], "as trained")
        ports = {"layout": "NHWC", "dtype": "uint8"} if inside else {"layout": "NCHW", "dtype": dtype}
        ports |= {"channel_order": order, "normalize": "inside" if inside else "outside"}
        return {"size": fields.pop("size"), **ports, **fields, "assumed": list(self.assumed)}

    def entries(self, inside: bool = False, dtype: str = "float32") -> dict[str, str]:
        """The metadata of a file: what was in the one that went in, but for how that was made, and `ENTRY`."""
        kept = {key: value for key, value in (self.metadata or {}).items() if key != MADE}
        return {**kept, ENTRY: json.dumps(self.images(inside, dtype))}


def read_entry(metadata: Mapping[str, str]) -> dict[str, Json]:
    """The fields of `ENTRY` that say how images are made, none where it is missing. Raises ValueError for another thing."""
    fields = json.loads(metadata.get(ENTRY, "{}"))
    if not isinstance(fields, dict):
        raise ValueError(f"it is a {type(fields).__name__}")
    found = {name: fields[name] for name in KINDS if name in fields}
    for name, value in found.items():
        if not isinstance(value, KINDS[name]):
            raise ValueError(f"{name} is {value!r:.40}")
    if fields.get("channel_order") == "BGR" and "processor" not in found:
        found["channel_order"] = "bgr"
    return found


def normalized_inside(metadata: Mapping[str, str]) -> tuple[list[float], list[float]] | None:
    """Mean and std of a file that normalizes pixels itself; None for one that takes floats."""
    images = json.loads(metadata.get(ENTRY, "{}"))
    return (images["mean"], images["std"]) if images.get("normalize") == "inside" else None


def pixels_of(images: NDArray[np.float32], mean: list[float], std: list[float]) -> NDArray[np.uint8]:
    """The pixels (b, h, w, c) that normalized images (b, c, h, w) were made of."""
    unit = images.transpose(0, 2, 3, 1).astype(np.float64) * std + mean
    return np.rint(255 * unit).clip(0, 255).astype(np.uint8)
