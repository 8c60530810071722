"""How a picture becomes the input of a model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewbit.core import pixels
from fewbit.core.pixels import crop_pct, for_channels, input_size, means, stds, usual
from fewbit.data.bands import Array, of_picture, resized, shown, unit
from fewbit.data.decode import Item, decode, is_input
from fewbit.errors import BadFile, BadImages, UnknownName

Json = Any
LONGEST = 16  # times as long as the frame: what of a picture a centre crop is taken from
PIL_FILTERS: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TORCH_MODES: Mapping[str, str] = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model input: resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    `size` is (channels, h, w) in pixels; `mean` and `std` are per channel, or one number for all, in units of [0, 1] (empty:
    ImageNet's for three channels, else 0.5); core/pixels.py has the limits. The picture is resized to floor(size / crop_pct):
    both sides ("squash"), the side that fills the frame ("center"), or the side that fits in it, with borders in the mean
    colour ("border"). `antialias` resizes the picture with Pillow, as timm does; without it torch interpolates floats, and
    bicubic may overshoot [0, 1]. `processor` is the image processor of a Hugging Face folder as JSON; where there is one it
    makes the input by itself. `whole`: pixels are rounded to 8 bits before they are normalized, as a file that normalizes takes
    them. Raises BadImages or UnknownName.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    resize: str = "squash"
    crop_pct: float = 1.0
    antialias: bool = True
    processor: str = ""
    whole: bool = False

    def __post_init__(self) -> None:
        pixels.interpolation(self.interpolation)
        pixels.resize(self.resize)
        if not self.antialias and self.interpolation not in TORCH_MODES:
            raise BadImages(f"{self.interpolation} needs antialias; without it there are: {', '.join(TORCH_MODES)}.")
        for field, checked in (("size", input_size), ("crop_pct", crop_pct)):
            object.__setattr__(self, field, checked(getattr(self, field)))
        for field, numbers in (("mean", means), ("std", stds)):
            given = getattr(self, field)
            unsaid = isinstance(given, tuple) and not given
            values = usual(field, self.size[0]) if unsaid else for_channels(numbers(given), self.size[0], field)
            object.__setattr__(self, field, values)

    @classmethod
    def from_timm(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """The evaluation transform of a timm `pretrained_cfg` or data config; what it lacks is timm's default."""

        def field(name: str, default: Any) -> Any:
            return default if cfg.get(name) is None else cfg[name]

        return cls(
            size=field("input_size", (3, 224, 224)),
            mean=field("mean", ()),
            std=field("std", ()),
            interpolation=field("interpolation", "bicubic"),
            resize=field("crop_mode", "center"),
            crop_pct=field("crop_pct", 0.875),
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        """What black and white become, (channels, 1, 1) each."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return -mean / std, (1 - mean) / std

    def replace(self, **overrides: Any) -> Preprocess:
        """The same with some fields changed. Raises UnknownName for another field."""
        allowed = [f.name for f in dataclasses.fields(self)]
        for name in overrides:
            if name not in allowed:
                raise UnknownName("preprocess field", name, allowed)
        return dataclasses.replace(self, **overrides)

    def to_json(self) -> dict[str, Json]:
        """All fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Json]) -> Preprocess:
        """The inverse of `to_json`; absent fields have defaults. Raises UnknownName, or BadFile without a size."""
        if "size" not in fields:
            raise BadFile('the preprocessing has no size; it needs at least "size": [channels, height, width].')
        return cls(size=fields["size"]).replace(**fields)

    def __call__(self, image: Image.Image | Array) -> Float[Tensor, "c h w"]:
        """The normalized float32 input for one picture, or for pixels (h, w, channels) of 8 or 16 bits. Raises BadImages."""
        x = self._input(image)
        return self._normal((255 * self._unit(x)).round().clamp(0, 255) / 255) if self.whole else x

    def _input(self, image: Image.Image | Array) -> Tensor:
        channels, h, w = self.size
        picture = self._middle(of_picture(image, channels) if isinstance(image, Image.Image) else image)
        if self.processor:
            from fewbit.capture.huggingface import pixels as processed

            return processed(self.processor, shown(picture))
        high, wide = self._resized(*picture.shape[:2])
        if self.antialias:
            x = resized(picture, (wide, high), PIL_FILTERS[self.interpolation])
        else:
            corners = None if self.interpolation == "nearest" else False
            mode = TORCH_MODES[self.interpolation]
            x = F.interpolate(unit(picture)[None], (high, wide), mode=mode, align_corners=corners, antialias=False)[0]
        return self._normal(self._centre(x, h, w))

    def _normal(self, unit: Tensor) -> Tensor:
        return (unit - self._column(self.mean)) / self._column(self.std)

    def _unit(self, x: Tensor) -> Tensor:
        return x * self._column(self.std) + self._column(self.mean)

    def _middle(self, picture: Array) -> Array:
        """A picture far longer than the frame without the ends that a centre crop never shows, which bounds the memory."""
        if self.resize != "center" and not (self.processor and json.loads(self.processor).get("do_center_crop")):
            return picture
        (_, h, w), (high, wide) = self.size, picture.shape[:2]
        cut_w = max(0, wide - math.ceil(LONGEST * high * w / h)) // 2
        cut_h = max(0, high - math.ceil(LONGEST * wide * h / w)) // 2
        return picture[cut_h : high - cut_h, cut_w : wide - cut_w]

    def undo(self, x: Float[Tensor, "c h w"]) -> Image.Image:
        """The picture that a normalized input shows, rounded to 8 bits: its first three channels, or its first as grey."""
        unit = self._unit(x).clamp(0, 1)
        if self.processor and json.loads(self.processor).get("do_flip_channel_order"):
            unit = unit.flip(0)
        return shown((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def _resized(self, high: int, wide: int) -> tuple[int, int]:
        """(height, width) in pixels after the resize; timm rounds differently for square frames and for others."""
        to_h, to_w = (max(1, math.floor(side / self.crop_pct)) for side in self.size[1:])
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
        fill = [round(255 * m) / 255 for m in self.mean] if self.resize == "border" else [0.0] * len(self.mean)
        frame = self._column(fill).repeat(1, high, wide)
        frame[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        top, left = round((high - h) / 2), round((wide - w) / 2)
        return frame[:, top : top + h, left : left + w]

    @staticmethod
    def _column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def as_input(item: Item, name: str, preprocess: Preprocess) -> Tensor:
    if isinstance(item, np.ndarray) and is_input(item):
        return torch.from_numpy(item)
    return preprocess(decode(item, name, preprocess.size[0]))
