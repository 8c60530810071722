"""The options of all that begins with a model, and of what makes a plan. No torch before a value is checked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from fewbit.core.pixels import FIELDS
from fewbit.errors import FewbitError
from fewbit.models import NAMES
from fewbit.request.checks import check_request
from fewbit.request.recipe_options import DEFAULT, check_bits, configured, default_bits, recipe_for, refuse_times
from fewbit.request.types import (
    TARGET,
    Address,
    Annotations,
    Asked,
    Channels,
    Count,
    Duration,
    Labels,
    Names,
    Out,
    SkipBad,
    Threads,
    WorkerCount,
    as_constants,
    as_file,
    as_pixels,
    as_text,
    check_time,
    option,
    path_as_text,
)
from fewbit.tasks import HELP as TASKS
from fewbit.workers import check_workers

if TYPE_CHECKING:
    import torch

    from fewbit.choose import Bits, Mixed, Recipe
    from fewbit.target import Target


class Options(Asked):
    """Options of quantize and search. Raises FewbitError for an invalid value, name or combination."""

    APART: ClassVar[frozenset[str]] = frozenset((  # options that do not decide the result, or are identified by content
        "model", "images", "inputs", "loader", "score", "annotations", "weights", "out", "force", "threads", "seconds",
        "workers", "ray", "command",
    ))  # fmt: skip
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("model",)
    OWN: ClassVar[tuple[str, ...]] = ()  # options that mean something else here than in quantize

    model: Annotated[Any, BeforeValidator(path_as_text)] = Field(description=NAMES)
    images: Any = Field(
        default=None,
        description="Folder (class sub-folders or flat), parquet, .npy or .npz; synthetic (made from the model) or "
        "synthetic:DIR (made from the model and a few real ones).",
    )
    loader: str | None = Field(
        default=None,
        description="file.py:function that returns a DataLoader, Dataset, list or generator of images.",
    )
    score: Any = Field(default=None, description="Images to score on; without it a part of --images is held out.")
    task: Any = Field(
        default=None,
        description=f"What the outputs mean: {TASKS}, or file.py:NAME of your own. Many models say it themselves; of "
        "others one list of numbers is a class.",
        examples=["segment"],
    )
    annotations: Annotations = None
    inputs: Annotated[dict[str, Any], BeforeValidator(as_constants)] = Field(
        default={},
        description="NAME=VALUE of an input that is not an image: a number, a list of numbers or a .npy file; may be repeated.",
        examples=["size=640,480"],
    )
    target: Annotated[str | None, BeforeValidator(as_text)] = Field(default=None, description=TARGET)
    recipe: Any = Field(
        default=None,
        description="See `fewbit recipes`; the default is fast, and fast-rotated where activations have fewer than 6 bits.",
        examples=["mse"],
    )
    opset: Annotated[int, Ge(13), Le(23)] | None = Field(
        default=None, description="Of the files, for an older runtime or a newer one; the target's unless said.", examples=[17]
    )
    ir_version: Annotated[int, Ge(7), Le(13)] | None = Field(
        default=None, description="IR version of the files; that of the opset unless said.", examples=[8]
    )
    out: Out = None
    calibration: Count = Field(default=128, description="Calibrate on so many images at most.")
    scored: Count | None = Field(default=None, description="Score on so many images at most.", examples=[1000])
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Random seed.")
    keep_float: Names = Field(default=(), description="Pattern of ops or sites that stay float; may be repeated.")
    skip_bad: SkipBad = False
    labels: Labels = True
    time: Duration = Field(
        default=None,
        description="Limit of lapq, best and --max-drop: 90s, 10min, 1h; of all work but the measuring at the end.",
    )
    loss: str | None = Field(
        default=None, description="Loss of that search: kl (default) or labels, on the calibration images.", examples=["kl"]
    )
    steps: Count | None = Field(
        default=None, description="Iterations of image synthesis and of recipes that train (best, fdda).", examples=[100]
    )
    classes: Annotated[Path | tuple[str, ...] | None, BeforeValidator(as_file)] = Field(
        default=None, description="File with the model's class names in output order."
    )
    weights: Annotated[Path | None, BeforeValidator(as_file)] = Field(
        default=None, description="Weights of a timm or torchvision model: .safetensors, .pth or .pt."
    )
    requantize: bool = Field(
        default=False, description="Take the Q/DQ nodes out of an ONNX file that another tool quantized, and begin again."
    )
    input_size: Annotated[tuple[int, int, int] | None, BeforeValidator(as_pixels)] = Field(
        default=None, description="channels,height,width", examples=["3,224,224"]
    )
    dynamic_size: bool = Field(
        default=False, description="The files take any height and width; calibrated is --input-size. ONNX files keep theirs."
    )
    mean: Annotated[Channels | None, BeforeValidator(as_pixels)] = Field(
        default=None, description="Of each channel (r,g,b), or one of all, of pixels between 0 and 1."
    )
    std: Annotated[Channels | None, BeforeValidator(as_pixels)] = Field(
        default=None, description="Of each channel (r,g,b), or one of all, of pixels between 0 and 1."
    )
    interpolation: str | None = Field(default=None, description="bicubic, bilinear, nearest or lanczos", examples=["bicubic"])
    resize: str | None = Field(default=None, description="squash, center, border, letterbox or corner", examples=["center"])
    crop_pct: Annotated[float | None, BeforeValidator(as_pixels)] = Field(
        default=None, description="Share of the resized image that the crop keeps.", examples=[0.9]
    )
    channel_order: str | None = Field(
        default=None, description="rgb, or bgr where blue comes first (in --mean and --std, too).", examples=["bgr"]
    )
    fill: Annotated[float | None, BeforeValidator(as_pixels)] = Field(
        default=None,
        description="Grey of the borders of --resize letterbox and corner, 0 to 255; 114 unless said.",
        examples=[114],
    )
    threads: Threads = 2
    device: str = Field(
        default="cpu",
        description="Where torch works: cpu, cuda, cuda:1 or mps; the files are run on the processor.",
        examples=["cuda"],
    )
    workers: WorkerCount = None
    ray: Address = None
    force: bool = Field(default=False, description="Replace an existing folder.")
    command: str = Field(default="fewbit.quantize(...)", repr=False)

    @model_validator(mode="after")
    def _is_possible(self) -> Options:
        """Check what other modules define: names of targets, recipes and tasks, files of images."""
        if self.recipe is None:
            self.__dict__["recipe"] = self._usual_recipe()  # the options stay frozen for everybody else
        _ = self.hardware, self.method
        check_time(self.time)
        check_request(self)
        check_workers(self.workers, self.ray, self.device)
        return self

    def _usual_recipe(self) -> str:
        """Where none was asked for."""
        return DEFAULT

    @property
    def ref(self) -> str:
        """The model's name, or its class where it is an object."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    @property
    def synthetic(self) -> tuple[bool, str | None]:
        """Whether calibration images are synthesized from the model, and the real ones to combine them with."""
        from fewbit.data.synthesize.source import asked_for

        return asked_for(self.images)

    @property
    def recipe_name(self) -> str:
        return self.recipe if isinstance(self.recipe, str) else "custom"

    @cached_property
    def hardware(self) -> Target:
        """The target by its name, or the one that fits this machine."""
        from fewbit.target import detect, load_target
        from fewbit.target.contradictions import contradictions

        target = load_target(self.target or detect()).written(self.opset, self.ir_version)
        for (where, *_), message in contradictions(target):
            raise FewbitError(
                f"{option(str(where))} {getattr(self, str(where))}: {message}; give another one, or leave it out."
            )
        return target

    @cached_property
    def method(self) -> Recipe:
        """The recipe with the time, loss and iterations of this request."""
        from fewbit.choose import Recipe
        from fewbit.recipes import recipe_named

        if not isinstance(self.recipe, str | Recipe):
            raise FewbitError(f"--recipe {self.recipe!r} is not a name; give one of `fewbit recipes`, as in --recipe mse.")
        return configured(recipe_named(self.recipe) if isinstance(self.recipe, str) else self.recipe, self)

    @cached_property
    def place(self) -> torch.device:
        """The device by its name. Raises FewbitError where it is none, or not here."""
        from fewbit.core.device import device_named

        return device_named(self.device)

    @property
    def drops(self) -> bool:
        """Whether a file is looked for that loses no more than a limit."""
        return getattr(self, "max_drop", None) is not None

    @property
    def overrides(self) -> dict[str, Any]:
        """Preprocessing fields that replace the model's own."""
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON, except what is hashed: model, images and preprocessing."""
        recipe = self.recipe if isinstance(self.recipe, str) else repr(self.recipe)
        names = {"model": self.ref, "target": self.hardware.name, "recipe": recipe}
        if self.task is not None:
            names["task"] = self.task if isinstance(self.task, str) else repr(self.task)
        apart = self.APART | {*names, "classes", "task", *FIELDS}
        return {**names, **self.model_dump(mode="json", exclude=set(apart))}


class Planned(Options):
    """Options of what makes a plan."""

    bits: Annotated[str | None, BeforeValidator(as_text)] = Field(
        default=None,
        description="8 (the default, or the most that the target has); w4a8; 4,first=8,last=8 (exceptions by op); mixed:6.0 (a "
        "width for each module).",
    )
    everything: bool = Field(default=False, description="Also quantize ops that run faster in float on the target.")
    only_what_pays: bool = Field(
        default=False,
        description="Leave float what loses time in integers by the measured milliseconds of its ops on this machine.",
    )

    _float_by_limit: tuple[str, ...] = PrivateAttr(default=())

    @property
    def float_by_limit(self) -> tuple[str, ...]:
        """Those of `keep_float` that nobody asked for: the search for `max_drop` put them there."""
        return self._float_by_limit

    @cached_property
    def widths(self) -> Bits | Mixed:
        """The bits, parsed; by default 8, or the widest that the target has."""
        from fewbit.choose import parse_bits

        return parse_bits(default_bits(self.hardware) if self.bits is None else self.bits)

    def _usual_recipe(self) -> str:
        return recipe_for(self.widths)

    @model_validator(mode="after")
    def _fits(self) -> Planned:
        check_bits(self.hardware, self.widths)
        if self.only_what_pays:
            refuse_times(self.hardware, "--only-what-pays")
        return self

    def key(self) -> dict[str, Any]:
        return {**super().key(), "bits": str(default_bits(self.hardware) if self.bits is None else self.bits)}
