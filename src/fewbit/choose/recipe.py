"""A recipe: passes over a plan, in order, and the stage before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fewbit.choose.context import Context
from fewbit.choose.sensitivity import ModuleMeasure, OutputKL
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.data.synthesize.source import Method
from fewbit.data.synthesize.teacher import Teacher
from fewbit.equalize import Equalize


@runtime_checkable
class Pass(Protocol):
    """One method: from a plan and the context to a better plan. A frozen dataclass, whose fields are its settings."""

    def __call__(self, plan: Plan, context: Context) -> Plan: ...


@runtime_checkable
class Checked(Protocol):
    """A pass that checks target, images and labels, and may refuse, before the first pass runs."""

    def check(self, context: Context) -> None: ...


@runtime_checkable
class Synthesizes(Protocol):
    """A pass that trains on images synthesized from the model beside the real ones: `pool` of them, made as `images` says."""

    @property
    def images(self) -> Method: ...

    @property
    def pool(self) -> int: ...

    def check_model(self, teacher: Teacher) -> None:
        """Raises BadModel for a model from which they cannot be made, before its images are opened."""


@runtime_checkable
class Solves(Protocol):
    """A pass that holds a matrix of the inputs of a layer, each by each, which counts against `--memory`."""

    def widest(self, graph: Graph) -> int:
        """The inputs of the widest layer that it solves."""


@dataclass(frozen=True)
class Recipe:
    """`passes` in order, the first from a plan without choices. `equalize` is the stage before them, which moves ranges between
    tensors of the graph; `sensitivity` is what mixed precision (`--bits mixed:6.0`) adds up. Where it is `judged` one of 8
    calibration images is set aside, for a pass to judge what it has learned.
    """

    about: str
    passes: tuple[Pass, ...]
    equalize: Equalize | None = None
    sensitivity: ModuleMeasure = field(default_factory=OutputKL)
    judged: bool = False
