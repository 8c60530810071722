"""Where values lie and graphs run: the processor, or an accelerator that a request names.

A stage moves its graph with `on`; the executor moves each batch behind it, and whatever is made from a tensor lies where that
does. What a stage hands on or writes to a file comes back with `on(value, CPU)`. Numbers are drawn on the processor, so that
they are the same on any device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.errors import FewbitError

CPU = torch.device("cpu")
KINDS = ("cpu", "cuda", "mps")
NARROW = ("mps",)  # devices without float64
T = TypeVar("T")


def device_named(name: str) -> torch.device:
    """A device by its name. Raises FewbitError where it is none, or not on this machine."""
    here = [*found()]
    typed = f"type --device {here[-1]}, or leave it out for the processor"
    if re.fullmatch(rf"({'|'.join(KINDS)})(:\d+)?", name) is None:
        raise FewbitError(f"--device {name} is not a device; allowed are cpu, cuda, cuda:NUMBER and mps: {typed}.")
    if name not in here and f"{name}:0" not in here:
        raise FewbitError(f"--device {name} is not here, torch {torch.__version__} finds {', '.join(here)}: {typed}.")
    return torch.device(name)


def found() -> Iterator[str]:
    """The names of the devices of this machine that torch can use."""
    yield str(CPU)
    for kind in KINDS[1:]:
        module = torch.get_device_module(kind)
        yield from (f"{kind}:{i}" for i in range(module.device_count() if module.is_available() else 0))


def on(value: T, device: torch.device) -> T:
    """A value with its tensors on a device: a tensor, a dataclass such as a graph or a plan, or a mapping or tuple of them;
    itself where they are there already. What is read batch by batch is left where it lies. float64 becomes float32 on a device
    that has none.
    """
    if isinstance(value, Tensor):
        dtype = widest(device) if value.dtype == torch.float64 else value.dtype
        return cast(T, value.to(device, dtype))
    if isinstance(value, torch.device):
        return cast(T, device)
    if isinstance(value, GraphModule):
        return cast(T, module_on(value, device))
    if isinstance(value, Mapping):
        items = {name: on(one, device) for name, one in value.items()}
        return value if all(items[name] is value[name] for name in items) else cast(T, items)
    if type(value) is tuple:
        old_parts = cast("tuple[Any, ...]", value)
        parts = tuple(on(one, device) for one in old_parts)
        return value if all(a is b for a, b in zip(parts, old_parts, strict=True)) else cast(T, parts)
    if is_dataclass(value) and not isinstance(value, type) and getattr(value, "device", None) != device:
        old = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        new = {name: on(one, device) for name, one in old.items()}
        changed = {name: one for name, one in new.items() if one is not old[name]}
        return replace(value, **changed) if changed else value  # type: ignore[return-value]
    return value


def module_on(module: GraphModule, device: torch.device) -> GraphModule:
    """A graph module with its constants, and what its nodes make, on a device; the first one is left alone."""
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    names = {cast(str, node.target) for node in graph.nodes if node.op == "get_attr"}
    return with_constants(GraphModule(module, graph), {name: on(_constant(module, name), device) for name in names})


def with_constants(module: GraphModule, constants: Mapping[str, Tensor]) -> GraphModule:
    """The module, which no other one is, after some constants were replaced. They are shared: nothing writes to constants."""
    for name, value in constants.items():
        owner, _, leaf = name.rpartition(".")
        holder: nn.Module = module.get_submodule(owner)
        delattr(holder, leaf)
        holder.register_buffer(leaf, value.detach().contiguous())
    module.recompile()
    return module.eval()


def _constant(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), leaf).detach())


def widest(device: torch.device) -> torch.dtype:
    """The floats in which sums are made: float64, or float32 on a device that has no others."""
    return torch.float32 if device.type in NARROW else torch.float64


def wide(x: Tensor) -> Tensor:
    """The same numbers in the widest floats of their device."""
    return x.to(widest(x.device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator makes products of bfloat16 itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 numbers in float32: a GPU's own convolutions are made in 19 bits (TF32) unless told otherwise."""
    if device == CPU:
        yield
        return
    with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
        yield
