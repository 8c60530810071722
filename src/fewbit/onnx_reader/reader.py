"""From an ONNX file to a module that torch.export takes, with what the file says of its image and its outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto

from fewbit.core.graph import Port, Tail
from fewbit.core.inputs import FEW, LOUD, Input, advice_on_channels, example, fed, image_among, the_image
from fewbit.errors import BadModel, stopped
from fewbit.onnx_reader.cut import cut
from fewbit.onnx_reader.file import constants_of, lifted, nodes_of, opsets, read_proto, split_constants
from fewbit.onnx_reader.module import OnnxModule
from fewbit.onnx_reader.sequences import without_sequences
from fewbit.onnx_reader.strip import stripped
from fewbit.onnx_reader.whole import FLOATS, refuse_whole_images


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read: its network, the ports that it takes, also as inputs without values, which of them is the image,
    and its outputs; with a `tail` those of the network in front of it.
    """

    path: Path
    module: OnnxModule
    takes: tuple[Port, ...]
    inputs: tuple[Input, ...]
    image: Port
    outputs: tuple[Port, ...]
    opset: int
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    tail: Tail | None = None

    @property
    def ports(self) -> tuple[Port, ...]:
        """The inputs and the outputs."""
        return (*self.takes, *self.outputs)

    @property
    def batch(self) -> int | None:
        """The batch that is written in the file, None where it is free."""
        return self.image.dims[0] if isinstance(self.image.dims[0], int) else None

    @property
    def free(self) -> tuple[int, ...]:
        """The places of (channels, height, width) that the file leaves free, the channels apart."""
        return tuple(i for i, d in enumerate(self.image.dims[1:]) if i and not isinstance(d, int))

    def look(self, inputs: Sequence[Input]) -> bool:
        """Run the network once on noise and the values of its other inputs, and where the file fixes a batch, again with
        another one. Returns whether any will do: each image has its own outputs, whatever the batch. A file whose batch is free
        may run with one image alone. Raises BadModel with the node that cannot be run.
        """
        noise = torch.randn(max(self.batch or 2, 2), *image_among(inputs).shape, generator=torch.Generator().manual_seed(0))
        own = noise[-(self.batch or 2) :]
        with torch.no_grad():
            try:
                first = self.module.forget_unread(*fed(inputs, example(inputs, own)))
            except BadModel:
                if self.batch is not None:
                    raise
                self.module.forget_unread(*fed(inputs, example(inputs, noise[-1:])))
                return False
            if self.batch is None:
                return True
            try:
                other = self.module(*fed(inputs, example(inputs, noise[-2:] if len(own) != 2 else noise[-1:])))
                beside = self.module(*fed(inputs, example(inputs, torch.cat([LOUD * own[:-1], own[-1:]]))))
                alone = all(_near(v[-1], beside[n][-1], 1e-5) for n, v in first.items())
                return alone and all(v.shape[1:] == other[n].shape[1:] and _near(v[-1], other[n][-1]) for n, v in first.items())
            except (BadModel, IndexError) as error:
                if halt := stopped(error):
                    raise halt from error
                return False

    def input_size(self, wanted: Sequence[int] | None) -> tuple[int, int, int]:
        """(channels, height, width): what the file fixes, and what is wanted for the rest."""
        dims = self.image.dims[1:]
        free, advice = not all(isinstance(d, int) for d in dims), advice_on_channels(dims)
        if wanted is None and self._has_batch_last():
            raise BadModel(
                f"input {self.image} of {self.path} seems to have its batch last; here it is first. Export the model with a "
                "forward that takes (batch, channels, height, width) and turns it: x.permute(1, 2, 3, 0). Or, where the last "
                f"is a size, give it: --input-size {dims[0]},{dims[1]},224."
            )
        if wanted is None and free:
            ask = "224,224,3" if advice else "3,224,224"
            raise BadModel(f"input {self.image} of {self.path} has no fixed size. Give it: --input-size {ask}.{advice}")
        size = tuple(d if isinstance(d, int) else n for d, n in zip(dims, wanted or dims, strict=True))
        if wanted is not None and size != tuple(wanted):
            fits = ",".join(map(str, (*wanted[1:], dims[-1]) if advice else size))
            do = f"give one that fits: --input-size {fits}" if free else "leave --input-size out"
            raise BadModel(f"input {self.image} of {self.path} has a fixed size, not {tuple(wanted)}; {do}.{advice}")
        return size  # type: ignore[return-value]

    def _has_batch_last(self) -> bool:
        """Whether an image like (3, 16, 16, N), where the last size alone is free, may have its batch there."""
        first, *between, last = self.image.dims
        return first in FEW and between[0] not in FEW and not isinstance(last, int) and all(isinstance(d, int) for d in between)


def read_onnx(path: Path, given: Collection[str] = (), *, each: Collection[str] = (), requantize: bool = False) -> OnnxFile:
    """The network of a file, that of a quantized one without its Q/DQ nodes; its image is an input that is not `given`
    anything, or where all are, one that `each` item of the images brings. Raises BadFile or BadModel that name the file, the
    node or the tensor.
    """
    whole = without_sequences(lifted(read_proto(path, stripped) if requantize else read_proto(path), path))
    refuse_whole_images(whole, path)
    model, tail = cut(whole, path)
    ports = _ports(model)
    inputs = _inputs(ports, given, path)
    image = ports[inputs.index(the_image(inputs, given, str(path), each))]
    batch = image.dims[0] if isinstance(image.dims[0], int) else None
    nodes, constants = split_constants(nodes_of(model.graph, opsets(model), path.parent, batch))
    outputs = tuple(map(_port, model.graph.output))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    other = {one.data_type for one in model.graph.initializer} & {*FLOATS[1:]}
    kinds = " and ".join(sorted(TensorProto.DataType.Name(kind).lower() for kind in other))
    notes = (f"{path} has weights in {kinds}; it is computed in float32.",) if other else ()
    constants |= constants_of(model.graph, path.parent)
    names = [port.name for port in ports]
    _check_names(nodes, {*constants, *names}, outputs, path)
    with torch.no_grad():
        module = OnnxModule(nodes, constants, names, [o.name for o in outputs], names.index(image.name)).eval()
    return OnnxFile(path, module, ports, inputs, image, outputs, opsets(model).get("", 0), metadata, notes, tail)


def _near(a: torch.Tensor, b: torch.Tensor, share: float = 1e-3) -> bool:
    """Equal up to the order of float sums, which change a `share` of the largest."""
    if not a.dtype.is_floating_point:
        return bool((a == b).float().mean() > 0.99)
    return bool((a - b).abs().max() <= share * b.abs().max().clamp(min=1e-6))


def _port(info: ValueInfoProto) -> Port:
    kind = info.type.tensor_type
    dims = (d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in kind.shape.dim)
    return Port(info.name, kind.elem_type, tuple(dims))


def _ports(model: ModelProto) -> tuple[Port, ...]:
    stored = {one.name for one in model.graph.initializer}
    return tuple(_port(info) for info in model.graph.input if info.name not in stored)


def _inputs(ports: Sequence[Port], given: Collection[str], path: Path) -> tuple[Input, ...]:
    """The inputs of a file without values; -1 stands for a free size. What the batch is called says the first map in floats
    that is not `given` anything, and may so be the image; where there is none, the first one.
    """
    maps = [port for port in ports if len(port.dims) == 4 and port.type in FLOATS]
    batch = next((port.dims[0] for port in sorted(maps, key=lambda port: port.name in given)), 0)
    return tuple(_input(port, batch, path) for port in ports)


def _input(port: Port, batch: int | str | None, path: Path) -> Input:
    has_batch = len(port.dims) > 0 and port.dims[0] == batch
    sizes = tuple(d if isinstance(d, int) else -1 for d in port.dims[has_batch:])
    try:
        kind = np.float32 if port.type in FLOATS else onnx.helper.tensor_dtype_to_np_dtype(port.type)
        dtype = torch.from_numpy(np.empty(0, kind)).dtype
    except (KeyError, TypeError) as error:
        raise BadModel(
            f"input {port} of {path} holds no numbers but text or a sequence; tensors of numbers are taken."
        ) from error
    return Input(port.name, sizes, dtype, has_batch)


def _check_names(nodes: list, known: set[str], outputs: tuple[Port, ...], path: Path) -> None:  # type: ignore[type-arg]
    for node in nodes:
        for name in node.inputs:
            if name and name not in known:
                raise BadModel(f"node {node} of {path} reads '{name}', which nothing before it writes; the file is damaged.")
        known |= set(node.outputs)
    for output in outputs:
        if output.name not in known:
            raise BadModel(f"output '{output.name}' of {path} is written by no node; the file is damaged.")
