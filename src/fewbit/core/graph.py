"""Graph: the exported program, opened, with its ops and sites; capture makes it, every stage behind reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.fx import GraphModule

from fewbit.core.device import CPU
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
    they stand, the function in words, and the multiply-accumulates for one image.
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
class Turned:
    """An output of a file whose batch is not in front: its `name`, and which of its dimensions are those of the graph's output,
    which has the batch in front; none where the graph gives the one image of a file a dimension of its own.
    """

    name: str
    order: tuple[int, ...] = ()

    def by_rows(self, value: torch.Tensor) -> torch.Tensor:
        """What the file gives as the graph gives it."""
        return value.permute(self.order) if self.order else value[None]


@dataclass(frozen=True)
class Tail:
    """What stands behind the layers of an ONNX file and torch cannot express: it stays as it is, in float.

    `model` is an ONNX file of its own. It `reads` outputs of the layers and inputs of the file, and `gives` every output of
    the file, in order, those of the layers among them. `nodes` are the carried ones, as rows for people; `products` are their
    sums of products, where shapes say how many: in float, as all of the tail. `turned` are outputs of the layers, by name, that
    it gives with their batch elsewhere, and nothing else done to them.
    """

    model: bytes
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    nodes: tuple[Mapping[str, Json], ...]
    products: tuple[FloatProduct, ...] = ()
    turned: Mapping[str, Turned] = field(default_factory=dict)


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
    def turned(self) -> Mapping[str, Turned]:
        """Those of the outputs that its file gives with the batch elsewhere."""
        return self.tail.turned if self.tail else {}

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

    def share(self, macs: int) -> float:
        """What part of the whole work so many multiply-accumulates are, 0 to 1."""
        return macs / max(self.macs, 1)


def _received(parts: Mapping[str, Any]) -> Graph:
    """A graph that was sent by another process."""
    return Graph(**{**parts, "module": parts["module"].module()})
