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
from fewbit.core.task import Placement
from fewbit.data.bands import Array, of_picture, resized, shown, unit
from fewbit.data.decode import Item, decode, is_input
from fewbit.errors import BadFile, BadImages, UnknownName

Json = Any
GREY = 114.0  # of the borders of a letterbox, of 255
LETTERBOXES = ("letterbox", "corner")
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
    colour ("border") or in the grey `fill` of 255 ("letterbox"; "corner" with the picture at the top left). `channel_order`
    "bgr": blue comes first, also in `mean` and `std`. `antialias` resizes the picture with Pillow, as timm does; without it
    torch interpolates floats, and bicubic may overshoot [0, 1]. `processor` is the image processor of a Hugging Face folder as
    JSON; where there is one it makes the input by itself. `whole`: pixels are rounded to 8 bits before they are normalized, as
    a file that normalizes takes them. Raises BadImages or UnknownName.
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
    channel_order: str = "rgb"
    fill: float | None = None

    def __post_init__(self) -> None:
        pixels.interpolation(self.interpolation)
        pixels.resize(self.resize)
        pixels.channel_order(self.channel_order)
        self._check_new()
        if not self.antialias and self.interpolation not in TORCH_MODES:
            raise BadImages(f"{self.interpolation} needs antialias; without it there are: {', '.join(TORCH_MODES)}.")
        for field, checked in (("size", input_size), ("crop_pct", crop_pct)):
            object.__setattr__(self, field, checked(getattr(self, field)))
        for field, numbers in (("mean", means), ("std", stds)):
            given = getattr(self, field)
            unsaid = isinstance(given, tuple) and not given
            values = usual(field, self.size[0]) if unsaid else for_channels(numbers(given), self.size[0], field)
            object.__setattr__(self, field, values)

    def _check_new(self) -> None:
        if self.fill is None and self.resize in LETTERBOXES:
            object.__setattr__(self, "fill", GREY)
        if self.fill is not None:
            pixels.fill(self.fill)
            if self.resize not in LETTERBOXES:
                raise BadImages(
                    f"fill {self.fill:g} is for the borders of --resize letterbox or corner; leave one of them out."
                )
        if self.channel_order == "bgr" and self.size[0] != 3:
            raise BadImages(f"channel_order bgr needs 3 channels, and the input has {self.size[0]}; leave it out.")

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
        """All fields as JSON values; the channel order where it is another than RGB, `fill` where there is one."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {k: v for k, v in fields.items() if (k, v) != ("channel_order", "rgb") and v is not None}

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
        x = self._centre(x, h, w)
        return self._normal(x.flip(0) if self.channel_order == "bgr" else x)

    def placement(self, high: int, wide: int) -> Placement:
        """Where a picture of `high` by `wide` pixels comes to lie in the input, by the sizes of the steps above; of an image
        processor by two slopes that it is shown.
        """
        if self.processor:
            return self._shown_slopes(high, wide)
        cut = self._middle(np.empty((high, wide, 0), np.uint8)).shape[:2]
        to = self._resized(*cut)
        scale, shift = [], []
        for side, whole, kept, new in zip(self.size[1:], (high, wide), cut, to, strict=True):
            frame = max(side, new)
            start = 0 if self.resize == "corner" else (frame - new) // 2
            begin = 0 if self.resize == "corner" else round((frame - side) / 2)
            scale.append(new / kept)
            shift.append(start - begin - (whole - kept) // 2 * new / kept)
        return Placement((scale[1], scale[0]), (shift[1], shift[0]), self.size[1:])

    def _shown_slopes(self, high: int, wide: int) -> Placement:
        """By what becomes of a picture whose red rises from left to right, its green from top to bottom."""
        columns, rows = ((np.arange(n) + 0.5) / n * 255 for n in (wide, high))
        slopes = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None], np.zeros((1, 1))), -1).round().astype(np.uint8)
        x = 255 * self._unit(self._input(slopes))
        x = x.flip(0) if json.loads(self.processor).get("do_flip_channel_order") else x
        scale, shift = [], []
        for line, n in ((x[0].median(0).values, wide), (x[1].median(1).values, high)):
            inside = ((line > 2) & (line < 253)).nonzero().flatten()
            places = line[inside].double().numpy() / 255 * n
            slope, start = np.polyfit(places, inside.double().numpy() + 0.5, 1)
            scale.append(float(slope))
            shift.append(float(start))
        return Placement((scale[0], scale[1]), (shift[0], shift[1]), self.size[1:])

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
        if self.channel_order == "bgr" or (self.processor and json.loads(self.processor).get("do_flip_channel_order")):
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
        if self.resize == "corner":  # as YOLOX has it
            return max(1, int(high / max(ratios) + 1e-6)), max(1, int(wide / max(ratios) + 1e-6))
        ratio = min(ratios) if self.resize == "center" else max(ratios)
        return max(1, round(high / ratio)), max(1, round(wide / ratio))

    def _centre(self, x: Tensor, h: int, w: int) -> Tensor:
        """The middle h x w of `x`, bordered where it is smaller: mean colour for "border", `fill` for a letterbox, else black,
        as in timm.
        """
        high, wide = max(h, x.shape[1]), max(w, x.shape[2])
        top, left = (high - x.shape[1]) // 2, (wide - x.shape[2]) // 2
        fill = [(self.fill or 0.0) / 255] * len(self.mean)
        if self.resize == "border":
            fill = [round(255 * m) / 255 for m in (self.mean[::-1] if self.channel_order == "bgr" else self.mean)]
        if self.resize == "corner":
            top = left = 0
        frame = self._column(fill).repeat(1, high, wide)
        frame[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        top, left = (0, 0) if self.resize == "corner" else (round((high - h) / 2), round((wide - w) / 2))
        return frame[:, top : top + h, left : left + w]

    @staticmethod
    def _column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def as_input(item: Item, name: str, preprocess: Preprocess) -> Tensor:
    if isinstance(item, np.ndarray) and is_input(item):
        return torch.from_numpy(item)
    return preprocess(decode(item, name, preprocess.size[0]))
