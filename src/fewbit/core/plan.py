"""Plan: for each site its grid, scale and codes, and who decided. Choose makes it; realize and verify read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.core.grid import Grid, QParams, values

Json = Any


@dataclass(frozen=True)
class Own:
    """The site has a scale of its own, which a method may search."""


@dataclass(frozen=True)
class SameAs:
    """The tensor holds codes of another site in other places (views, pooling of maxima): the scale is that site's."""

    site: str


@dataclass(frozen=True)
class SharedWith:
    """One scale for several sites that an integer op joins; `sites` are the others."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """The scale is a constant of the target."""


ScaleSource = Own | SameAs | SharedWith | Fixed


@dataclass(frozen=True)
class Choice:
    """What was decided for one weight or activation. Weights carry their codes; `why` is a note for people, never read by code.

    `source` says whose scale it is. `all_readers`: every reader of the tensor reads the codes, not only the integer ops.
    """

    site: str
    role: str
    grid: Grid
    qparams: QParams
    method: str
    codes: Tensor | None = None
    all_readers: bool = False
    why: str = ""
    source: ScaleSource = Own()

    @property
    def is_free(self) -> bool:
        """Whether a search may move the scale."""
        return isinstance(self.source, Own)

    @property
    def real(self) -> Tensor:
        """The real numbers of the codes of a weight or an integer bias."""
        assert self.codes is not None
        return values(self.codes.to(torch.int32), self.qparams, self.grid)


@dataclass(frozen=True)
class Bias:
    """The bias of one op (c_out,), decided once: `real` is the exact value, float32; `integer` its codes if stored as integers.

    The scale of an integer bias is the input's times the weight's.
    """

    real: Tensor
    integer: Choice | None = None

    @property
    def values(self) -> Tensor:
        """The float32 numbers that are added."""
        if self.integer is None or self.integer.codes is None:
            return self.real
        return self.integer.real


FallbackKind = Literal["site", "chosen", "accumulator", "calibration", "kernels", "runtime", "machine"]


@dataclass(frozen=True)
class Fallback:
    """What was requested and what the target got instead; `macs_share` of the multiply-accumulates is touched (0 to 1; None:
    nobody has counted).

    `kind` is its subject: a site or op, one that stays float on request, by --max-drop or because that is faster (chosen:
    nothing was refused), a narrower grid that an accumulator needs, the calibration images, kernels that were not fused, or a
    runtime or a machine that is not here.
    """

    site: str
    requested: str
    actual: str
    why: str
    macs_share: float | None = None
    kind: FallbackKind = "site"


def described(method: object) -> str:
    """A method in a phrase for people: what its `describe` says, or the name of its class in words."""
    if callable(say := getattr(method, "describe", None)):
        return str(say())
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(method).__name__).lower()


@dataclass(frozen=True)
class PassLog:
    """What a pass did, for the plan's file and the report: its settings, a row for each thing it decided, a summary, and what
    it is `about` in a phrase, which the report shows in place of the settings.
    """

    name: str
    settings: str
    rows: tuple[Mapping[str, Json], ...] = ()
    summary: Mapping[str, Json] = field(default_factory=dict)
    about: str = ""

    @staticmethod
    def of(
        name: str, method: object, rows: Iterable[Mapping[str, Json]] = (), summary: Mapping[str, Json] | None = None
    ) -> PassLog:
        """The log of a method, whose fields are its settings."""
        return PassLog(name, repr(method), tuple(rows), summary or {}, described(method))


@dataclass(frozen=True)
class Plan:
    """The product of choose: everything a realizer or a simulation needs beside the graph.

    `integer_ops` are the ops whose operands are all quantized, or the weight alone where the target has that. `choices` are
    those of weights and activations by site; `biases` by op are those that are integers or that a method has corrected, also
    of ops that had none. `recipe` is a name, `settings` the recipe's own record, `log` what its passes did, in order.
    """

    target: str
    recipe: str
    bits: str
    choices: Mapping[str, Choice]
    integer_ops: tuple[str, ...]
    fallbacks: tuple[Fallback, ...] = ()
    exemptions: tuple[str, ...] = ()
    biases: Mapping[str, Bias] = field(default_factory=dict)
    log: tuple[PassLog, ...] = ()
    model: str = ""
    settings: str = ""

    def logs(self, name: str) -> tuple[PassLog, ...]:
        """The records of the passes with a name."""
        return tuple(entry for entry in self.log if entry.name == name)
