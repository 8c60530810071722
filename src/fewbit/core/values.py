"""The values that stages hand to each other. Frozen, no I/O, no arithmetic beyond sums.

Graph    capture  -> the exported program, opened, with its ops and sites
Stats    observe  -> one accumulator per site (fewbit.observe.stats)
Plan     choose   -> per site: grid, scale, codes, and who decided; fallbacks
Checks   verify   -> per site: codes that differ between simulation and runtime
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.core.device import CPU
from fewbit.core.grid import Grid, QParams, values
from fewbit.core.inputs import Input, image_among
from fewbit.core.sent import Rows
from fewbit.core.task import Output, Task

Json = Any


@dataclass(frozen=True)
class Site:
    """A place that can be quantized: one tensor, and the operands that would read its codes.

    `name` is `<module path>:<role>`; `tensor` is the graph node whose value is quantized; `readers` are (op name, operand)
    pairs; `shape` has the batch as 0; `axis` is the channel axis of a weight.
    """

    name: str
    role: str
    tensor: str
    shape: tuple[int, ...]
    readers: tuple[tuple[str, str], ...]
    axis: int | None = None


def flat_name(name: str) -> str:
    """What an op or a site is called in a module and in a file: a buffer's name has no dots, and so no colons here either."""
    return name.replace(".", "_").replace(":", "__")


@dataclass(frozen=True)
class Op:
    """A node that can run in integers: its kind, its operands (operand name -> site name) and its cost.

    `macs` are multiply-accumulates for one image, `reduction_size` the products that one output sums (None: no product).
    """

    name: str
    node: str
    kind: str
    operands: Mapping[str, str]
    macs: int = 0
    reduction_size: int | None = None


@dataclass(frozen=True)
class FloatProduct:
    """Sums of products that no kind of op describes (a transposed or deformable convolution, an LSTM behind the layers): where
    they stand, the name of the function, and the multiply-accumulates for one image.
    """

    name: str
    function: str
    macs: int


@dataclass(frozen=True)
class Port:
    """An input or output of an ONNX file: its name, its type in ONNX's numbers, and its dimensions: sizes, names or None."""

    name: str
    type: int
    dims: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"'{self.name}' ({', '.join('?' if d is None else str(d) for d in self.dims)})"


@dataclass(frozen=True)
class Tail:
    """What stands behind the layers of an ONNX file and torch cannot express: it stays as it is, in float.

    `model` is an ONNX file of its own. It `reads` outputs of the layers and inputs of the file, and `gives` every output of
    the file, in order, those of the layers among them. `nodes` are the carried ones, as rows for people; `products` are their
    sums of products, where shapes say how many: in float, as all of the tail.
    """

    model: bytes
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    nodes: tuple[Mapping[str, Json], ...]
    products: tuple[FloatProduct, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A captured model: an fx graph module with attention opened and batch norm folded, its ops and sites, and the products
    that are no ops. `macs` counts the whole work. `module` takes the tensors of `inputs` and returns those of `outputs`: one
    alone, several as a tuple; `batch` is written in the model or in its file (None: any number of images), and `ports` are the
    inputs and outputs of the ONNX file that it was read from, with a `tail` those of the part in front of it; `task` is what
    the outputs mean (None: what they say themselves); its constants lie on `device`, where it runs.
    """

    module: GraphModule
    ops: tuple[Op, ...]
    sites: tuple[Site, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    float_products: tuple[FloatProduct, ...] = ()
    batch: int | None = None
    ports: tuple[Port, ...] = ()
    task: Task | None = None
    tail: Tail | None = None
    device: torch.device = CPU

    def __reduce__(self) -> Any:
        """For another process, which runs it: nodes as rows, without what capture recorded of them."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return _received, ({**parts, "module": Rows.of(self.module)},)

    def at_a_time(self, most: int) -> int:
        """How many images run together: so many, or the batch that is written in the model."""
        return self.batch or most

    def in_a_file(self, most: int) -> int:
        """The same for a file in a runtime: a tail chooses boxes of one image."""
        return self.at_a_time(1 if self.tail else most)

    @property
    def behind(self) -> tuple[str, ...]:
        """The outputs of a file that a tail computes."""
        own = {output.name for output in self.outputs}
        return tuple(name for name in self.tail.gives if name not in own) if self.tail else ()

    @property
    def inside(self) -> tuple[str, ...]:
        """The outputs of the graph that are none of its file, as a tail alone reads them."""
        return tuple(output.name for output in self.outputs if self.tail and output.name not in self.tail.gives)

    def op(self, name: str) -> Op:
        return next(op for op in self.ops if op.name == name)

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    @property
    def input_name(self) -> str:
        """What files call the images."""
        return image_among(self.inputs).name

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return image_among(self.inputs).shape

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops) + sum(other.macs for other in self.float_products)


def _received(parts: Mapping[str, Any]) -> Graph:
    """A graph that was sent by another process."""
    return Graph(**{**parts, "module": parts["module"].module()})


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
        return values(self.integer.codes.to(torch.int32), self.integer.qparams, self.integer.grid)


FallbackKind = Literal["site", "chosen", "accumulator", "calibration", "kernels", "runtime", "machine"]


@dataclass(frozen=True)
class Fallback:
    """What was requested and what the target got instead; `macs_share` of the multiply-accumulates is touched (0 to 1).

    `kind` is its subject: a site or op, one that stays float on request or because that is faster (chosen: nothing was
    refused), a narrower grid that an accumulator needs, the calibration images, kernels that were not fused, or a
    runtime or a machine that is not here.
    """

    site: str
    requested: str
    actual: str
    why: str
    macs_share: float = 0.0
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


@dataclass(frozen=True)
class SiteCheck:
    """Codes of one site, simulation against runtime, the same upstream codes in both.

    `ties` are off-by-one differences where the simulation stands at a rounding boundary (verify/ties.py); `wrong` is the rest.
    """

    site: str
    compared: int
    differing: int
    ties: int
    wrong: int
    max_difference: int


@dataclass(frozen=True)
class SelectionCheck:
    """What a node that selects (top-k, sorting, the place of the largest) chose in a runtime, by the simulation's own scores.

    Of `compared` rows `near` are chosen otherwise than by the simulation, among scores that float32 rounding may order either
    way (verify/selections.py); `wrong` are those that it does not explain. There a score misses its place by `difference`,
    where `limit` is explained; 0 where a place is chosen twice.
    """

    node: str
    compared: int
    near: int
    wrong: int
    difference: float
    limit: float


@dataclass(frozen=True)
class OutputCheck:
    """One output of a file in a runtime (`place` says which and where), against what it should be.

    `limit` is the largest difference that rounding explains; agreement is that of the largest entry, in percent.
    """

    place: str
    output: str
    difference: float
    limit: float
    cosine: float
    agreement: float

    @property
    def wrong(self) -> bool:
        return not self.difference <= self.limit  # a NaN is wrong, too


@dataclass(frozen=True)
class Deviation:
    """A tensor or a node of a file that is not what the plan gives, and what is different about it."""

    file: str
    name: str
    what: str


@dataclass(frozen=True)
class Checks:
    """Verify's tables: the file's own codes of weights and biases, codes of activations as written (off) and optimised as
    the file ships (on), and outputs. `file` is what differs from the same plan realized again; None: not looked at.
    `selections` are what the runtime chose by comparing scores, off and on.
    """

    off: tuple[SiteCheck, ...]
    on: tuple[SiteCheck, ...]
    outputs: tuple[OutputCheck, ...]
    kernels: Mapping[str, Json] = field(default_factory=dict)
    weights: tuple[SiteCheck, ...] = ()
    file: tuple[Deviation, ...] | None = None
    selections: tuple[tuple[SelectionCheck, ...], tuple[SelectionCheck, ...]] = ((), ())

    @property
    def codes(self) -> tuple[SiteCheck, ...]:
        """Every table of codes; sites in the order in which the graph computes them."""
        return self.weights + self.off + self.on

    @property
    def wrong(self) -> tuple[SiteCheck, ...]:
        return tuple(check for check in self.codes if check.wrong)

    @property
    def wrong_outputs(self) -> tuple[OutputCheck, ...]:
        return tuple(check for check in self.outputs if check.wrong)
