"""The requests of quantize, sensitivity, search and sweep: what each has beside the options of all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fewbit.errors import FewbitError
from fewbit.request.options import Options, Planned
from fewbit.request.recipe_options import LOSSES, default_bits, refuse_curve, refuse_times
from fewbit.request.types import (
    Address,
    Asked,
    Count,
    Duration,
    Names,
    Out,
    Points,
    Seconds,
    WorkerCount,
    as_file,
    check_memory,
)
from fewbit.workers import check_workers

if TYPE_CHECKING:
    from fewbit.choose import Bits, Recipe


class Request(Planned):
    """Options of `fewbit quantize`."""

    APART: ClassVar[frozenset[str]] = Options.APART | {"must_pay", "quick", "memory"}

    normalize_inside: bool = Field(
        default=False,
        description="The file takes pixels, uint8 (batch, height, width, channels), and normalizes them itself.",
    )
    curve: bool = Field(default=False, description="Also score calibration on 1, 2, 4, ... 256 images.")
    seconds: Seconds = 4.0
    max_drop: Points | None = Field(
        default=None,
        description="Find the fastest file that loses no more points of accuracy (PSNR: dB; without labels: agreement): other "
        "recipes, then modules in float. Exit code 1 where none does; --time limits how long it looks.",
        examples=[1.0],
    )
    memory: Annotated[str | None, AfterValidator(check_memory)] = Field(
        default=None,
        description="What this process may hold, 4GB or 1500MB. Refused where that is likely to be too little; a run that "
        "holds more is stopped behind the stage that did.",
        examples=["4GB"],
    )
    quick: bool = Field(
        default=False,
        description="Only the files, their proof and their score; no times, sensitivity, outliers, attention or pictures.",
    )
    must_pay: bool = Field(
        default=False, description="Exit code 1 where the file is not 2 % faster than the fastest float model of its runtime."
    )

    @model_validator(mode="after")
    def _is_answered(self) -> Request:
        if self.curve:
            refuse_curve(self.method, self.recipe_name)
        for flag, asked in (("--must-pay", self.must_pay), ("--only-what-pays", self.only_what_pays)):
            if asked and self.quick:
                raise FewbitError(f"{flag} needs times, and --quick measures none; leave one of them out.")
        if self.must_pay:
            refuse_times(self.hardware, "--must-pay")
        return self

    def key(self) -> dict[str, Any]:
        return {name: value for name, value in super().key().items() if self.drops or name != "max_drop"}

    def changed(self, changes: Mapping[str, Any]) -> Request:
        """The request of a file that is tried for `max_drop`: with changes, and without that limit and the one of time. What
        it keeps in float beyond this one is by `max_drop`.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set - {"max_drop", "time"}}
        request = Request(**{**given, **changes})
        request._float_by_limit = tuple(name for name in request.keep_float if name not in self.keep_float)
        return request


class SensitivityRequest(Planned):
    """Options of `fewbit sensitivity`."""

    APART: ClassVar[frozenset[str]] = Options.APART - {"threads"}
    OWN: ClassVar[tuple[str, ...]] = ("scored",)

    out: Out = Path("sensitivity")
    scored: Count = Field(default=32, description="Measure the loss on so many images at most, which do not calibrate.")
    command: str = Field(default="fewbit sensitivity", repr=False)


class SearchRequest(Options):
    """Options of `fewbit search`."""

    APART: ClassVar[frozenset[str]] = (Options.APART | {"time"}) - {"threads"}  # losses do not depend on the time limit
    OWN: ClassVar[tuple[str, ...]] = ("time", "loss")

    out: Out = Path("search")
    recipe: Any = Field(default="mse", description="Range method: minmax, percentile, mse or kl.")
    calibration: Count = Field(default=64, description="Search on so many images at most.")
    time: Duration = Field(
        default=None, description="Time limit, 90s, 10min, 1h: of everything, with measuring the points at the end."
    )
    loss: str | None = Field(default="kl", description="kl (from the float model) or labels, on the calibration images.")
    budget: Names = Field(default=(), description="6bit, 3MB or 20ms; may be repeated, all must hold.")
    strategy: str = Field(default="greedy", description="greedy, random, annealing or tpe.")
    evaluations: Count = Field(default=300, description="Number of candidates to evaluate.")
    edges: str = Field(default="weights", description="Tensors to search widths for: weights (activations keep 8 bits) or all.")
    least: int = Field(default=4, ge=2, le=16, description="The narrowest width.")
    points: Count = Field(default=8, description="Largest number of points to export.")
    command: str = Field(default="fewbit search", repr=False)
    everything: ClassVar[bool] = False

    @property
    def widths(self) -> Bits:
        """Those that the search begins with."""
        from fewbit.choose import Bits

        return Bits(default_bits(self.hardware), default_bits(self.hardware))

    @cached_property
    def method(self) -> Recipe:
        """The recipe by its name, of ranges alone; time and loss are those of the search itself."""
        from fewbit.recipes import plain_ranges, recipe_named

        if self.loss not in LOSSES:
            raise FewbitError(f"--loss {self.loss} is not understood; allowed are kl and labels, as in --loss kl.")
        recipe = recipe_named(self.recipe)
        plain_ranges(recipe, self.recipe)
        return recipe


class SweepRequest(Asked):
    """Options of `fewbit sweep`."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("file",)

    file: Annotated[Path, BeforeValidator(as_file)] = Field(
        description="TOML file: lists of models, targets, recipes and bits, and a table of options for all of them."
    )
    out: Out = Path("sweep")
    workers: WorkerCount = None
    ray: Address = None
    force: bool = Field(default=False, description="Replace an existing folder.")
    command: str = Field(default="fewbit sweep", repr=False)

    @model_validator(mode="after")
    def _is_possible(self) -> SweepRequest:
        check_workers(self.workers, self.ray)
        return self
