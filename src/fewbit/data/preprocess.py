"""How a picture becomes the input of a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewbit.core import pixels
from fewbit.core.pixels import crop_pct, for_channels, input_size, means, stds, usual
from fewbit.core.task import Placement
from fewbit.data import prepare
from fewbit.data.bands import Array, of_picture, shown
from fewbit.data.decode import Item, decode, is_input
from fewbit.errors import BadFile, BadImages, UnknownName

Json = Any
GREY = 114.0  # of the borders of a letterbox, of 255
LETTERBOXES = ("letterbox", "corner")
SHARP = ("nearest", "bilinear", "bicubic")  # without antialias


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model input: resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    `size` is (channels, h, w) in pixels; `mean` and `std` are per channel, or one number for all, in units of [0, 1] (empty:
    ImageNet's for three channels, else 0.5); core/pixels.py has the limits. The picture is resized to floor(size / crop_pct):
    both sides ("squash"), the side that fills the frame ("center"), or the side that fits in it, with borders in the mean
    colour ("border") or in the grey `fill` of 255 ("letterbox"; "corner" with the picture at the top left). `channel_order`
    "bgr": blue comes first, also in `mean` and `std`. `antialias` resizes the picture with Pillow, as timm does; without it
    floats are interpolated as torch does, and bicubic may overshoot [0, 1] (data/prepare.py). `processor` is the image
    processor of a Hugging Face folder as JSON; where there is one it makes the input by itself. `whole`: pixels are rounded to
    8 bits before they are normalized, as a file that normalizes takes them. Raises BadImages or UnknownName.
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
        if not self.antialias and self.interpolation not in SHARP:
            raise BadImages(f"{self.interpolation} needs antialias; without it there are: {', '.join(SHARP)}.")
        for field, checked in (("size", input_size), ("crop_pct", crop_pct)):
            object.__setattr__(self, field, checked(getattr(self, field)))
        pixels.order_for_channels(self.channel_order, self.size[0])
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
        picture = of_picture(image, self.size[0]) if isinstance(image, Image.Image) else image
        if not self.processor:
            return torch.from_numpy(prepare.prepared(picture, self.to_json()))
        x = self._processed(picture)
        return self._normal((255 * self._unit(x)).round().clamp(0, 255) / 255) if self.whole else x

    def _processed(self, picture: Array) -> Tensor:
        """What the image processor makes of it."""
        from fewbit.load.huggingface import pixels as processed

        cropped = json.loads(self.processor).get("do_center_crop")
        return processed(self.processor, shown(prepare.middle(picture, self.to_json()) if cropped else picture))

    def placement(self, high: int, wide: int) -> Placement:
        """Where a picture of `high` by `wide` pixels comes to lie in the input, by the sizes of the steps; of an image
        processor by two slopes that it is shown.
        """
        if self.processor:
            return self._shown_slopes(high, wide)
        columns, rows = prepare.placed(high, wide, self.to_json())
        return Placement((columns[0], rows[0]), (columns[1], rows[1]), self.size[1:])

    def _shown_slopes(self, high: int, wide: int) -> Placement:
        """By what becomes of a picture whose red rises from left to right, its green from top to bottom."""
        columns, rows = ((np.arange(n) + 0.5) / n * 255 for n in (wide, high))
        slopes = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None], np.zeros((1, 1))), -1).round().astype(np.uint8)
        x = 255 * self._unit(self._processed(slopes))
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

    def undo(self, x: Float[Tensor, "c h w"]) -> Image.Image:
        """The picture that a normalized input shows, rounded to 8 bits: its first three channels, or its first as grey."""
        unit = self._unit(x).clamp(0, 1)
        if self.channel_order == "bgr" or (self.processor and json.loads(self.processor).get("do_flip_channel_order")):
            unit = unit.flip(0)
        return shown((unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    @staticmethod
    def _column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def as_input(item: Item, name: str, preprocess: Preprocess) -> Tensor:
    if isinstance(item, np.ndarray) and is_input(item):
        return torch.from_numpy(item)
    return preprocess(decode(item, name, preprocess.size[0]))
