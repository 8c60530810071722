"""The requests of commands on a finished run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from fewbit.request.checks import check_annotations
from fewbit.request.types import (
    Address,
    Annotations,
    Asked,
    Batches,
    Count,
    Labels,
    Names,
    RunFolder,
    Seconds,
    SkipBad,
    Threads,
    WorkerCount,
)
from fewbit.runtimes import RUNNABLE
from fewbit.workers import check_workers


class OfRun(Asked):
    """Options of a command on a run."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("run",)

    run: RunFolder


class EvaluateRequest(OfRun):
    """Options of `fewbit evaluate`."""

    images: str = Field(description="Images not used for calibration.")
    runtime: str | None = Field(default=None, description=" or ".join(RUNNABLE))
    limit: Count | None = Field(default=None, description="Score on so many images at most.", examples=[1000])
    skip_bad: SkipBad = False
    annotations: Annotations = None
    labels: Labels = True
    threads: Threads = 2
    workers: WorkerCount = None
    ray: Address = None

    @model_validator(mode="after")
    def _is_possible(self) -> EvaluateRequest:
        check_annotations(self.annotations, self.labels)
        check_workers(self.workers, self.ray)
        return self


class VerifyRequest(OfRun):
    """Options of `fewbit verify`."""

    images: str | None = Field(default=None, description="Images other than the run's own.")


class BenchRequest(OfRun):
    """Options of `fewbit bench`."""

    batch: Batches = Field(default=(), description="May be repeated; 1 and 8 by default.")
    runtime: Names = Field(default=(), description="May be repeated.")
    threads: Threads = 2
    seconds: Seconds = 4.0
