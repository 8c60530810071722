"""A device that is none: tensors that say they lie elsewhere, and compute on the processor with the processor's own kernels.

torch's Python backend for the device type PrivateUse1: no operator takes a tensor of the device and one of the processor (but
for a number, where a GPU takes one), none draws with a generator of the processor or gives an array, and the numbers are the
processor's, bit for bit. Named among the NARROW devices it has no float64, as Apple's GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from fewbit.core import device as room

NAME = "pretend"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default, aten._copy_from.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Backend(_DummyBackendModule):
    """What torch asks of a device beside its tensors."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, Backend())
PRETEND = torch.device(NAME, 0)


class Pretended(Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=PRETEND
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("a tensor of a device gives no array")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operator gives. Raises RuntimeError for what no GPU would do."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor | torch.Generator)]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = any(isinstance(x, Pretended) for x in tensors)
    to = kwargs.get("device")
    there = here if to is None else torch.device(to).type == NAME
    if func not in COPIES:
        for x in leaves:
            mixed = isinstance(x, Tensor) and not isinstance(x, Pretended) and not takes(func, x)
            if mixed or isinstance(x, torch.Generator):
                what = f"one of shape {tuple(x.shape)}" if mixed else "a generator"
                raise RuntimeError(f"{func} has a tensor of {NAME} and {what} of the processor")
    held_args, held_kwargs = tree_map_only(Pretended, lambda x: x.held, (tuple(args), dict(kwargs)))
    if func is aten._copy_from.default:
        held_args[1].copy_(held_args[0])
        return args[1]
    out = func(*held_args, **(held_kwargs if to is None else {**held_kwargs, "device": room.CPU}))
    if not there or (func is aten.copy_.default and not isinstance(args[0], Pretended)):
        return out
    if NAME in room.NARROW and any(x.dtype == torch.float64 for x in tree_leaves(out) if isinstance(x, Tensor)):
        raise RuntimeError(f"{func} makes float64, which the device has not")
    made = tree_map_only(Tensor, Pretended, out)
    return return_and_correct_aliasing(func, tuple(args), kwargs, made) if here else made


def takes(func: Any, x: Tensor) -> bool:
    """Whether a GPU takes a tensor of the processor there: a number in arithmetic, and indices."""
    return func in INDEXED or (x.ndim == 0 and torch.Tag.pointwise in func.tags)


def _of_the_device(func: Any, *args: Any, **kwargs: Any) -> Any:
    return computed(func, args, kwargs)


def _copied(source: Tensor, to: Tensor, non_blocking: bool = False) -> Any:
    return computed(aten._copy_from.default, (source, to), {})


_all = torch.library.Library("_", "IMPL")
_all.fallback(_of_the_device, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("_copy_from", _copied, "PrivateUse1")
