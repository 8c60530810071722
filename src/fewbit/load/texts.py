"""What a model of transformers takes beside the image: which inputs it needs, whether a text is one for all images or each
takes all of them, and which outputs have no row for each image: those of the texts alone, or of layers in front.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.core.inputs import incomplete
from fewbit.errors import BadModel
from fewbit.load.contexts import quiet
from fewbit.load.inputs import Given
from fewbit.load.ports import named_tensors

IMAGE = "pixel_values"  # what transformers calls the image
COUNTS = (2, 3)  # of images that a model is shown, to see which outputs have a row for each


def needed_by(kind: Any) -> list[str]:
    """The inputs without which a class of transformers computes nothing."""
    return [kind.main_input_name] if isinstance(kind.main_input_name, str) else [*kind.main_input_name]


def refuse_missing(ref: str, kind: Any, given: Given) -> None:
    """Raise BadModel where nothing is given for an input that a class needs beside the image, or floats for token ids."""
    for name, value in given.constants.items():
        if name.endswith("_ids") and isinstance(value, Tensor) and value.is_floating_point():
            raise BadModel(
                f"{ref}: {name} are whole numbers, and floats are given; give them as the tokenizer of the model makes them: "
                f"--input {name}=ids.npy, of int64 numbers (texts, tokens)."
            )
    taken = inspect.signature(kind.forward).parameters
    needed = [name for name, one in taken.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    needed = [name for name in dict.fromkeys((*needed, *needed_by(kind))) if name not in ("self", IMAGE) and name in taken]
    if "image" in kind.input_modalities and needed == ["inputs"]:  # Perceiver's name of the image
        return
    missing = [name for name in needed if name not in {*given.constants, *given.each}]
    if missing:
        towers = _towers(kind)
        tower = f" Or take the vision tower alone: {towers}.from_pretrained(...).save_pretrained('tower')." if towers else ""
        raise BadModel(f"{incomplete(ref, dict.fromkeys((IMAGE, *needed)), missing)}{tower}")


def _towers(kind: Any) -> str:
    """The class of transformers that is the image's part of a model for images and text, if there is one."""
    import transformers

    prefix = next((n for n in range(len(kind.__name__), 0, -1) if hasattr(transformers, f"{kind.__name__[:n]}VisionModel")), 0)
    names = (f"{kind.__name__[:prefix]}VisionModel{end}" for end in ("WithProjection", "")) if prefix else ()
    return next((name for name in names if hasattr(transformers, name)), "")


@dataclass(frozen=True)
class Beside:
    """What stands beside the images: names of constants with a batch of 1 that are `shared`, for spread over the images they
    give outputs a column for each; of constants of which each image takes all rows, one image behind the other (`repeated`);
    and of outputs without a row for each image, to be `left` out.
    """

    shared: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def beside_others(net: nn.Module, size: tuple[int, ...], given: Given) -> Beside:
    """What is to be done with constants and outputs, by what the model gives for two and for three images."""
    tensors = {name: value for name, value in given.constants.items() if isinstance(value, Tensor) and value.ndim}
    one = {name: value for name, value in tensors.items() if len(value) == 1}
    rows = {name: value[None] for name, value in given.each.items() if isinstance(value, Tensor) and name != IMAGE}
    several = tuple(name for name in tensors if name not in one)
    tries = [Beside(), *([Beside(repeated=several)] if several else [])]
    for beside in tries:
        try:
            found = [_given_by(net, size, given.constants, {**rows, **one}, beside.repeated, n) for n in COUNTS]
            if one and _differ(found):
                found = [_given_by(net, size, given.constants, rows, beside.repeated, n) for n in COUNTS]
                beside = replace(beside, shared=tuple(one))
        except Exception:  # which is said when it is exported
            continue
        kept = [name for name in found[0] if all(out[name].shape[:1] == (n,) for out, n in zip(found, COUNTS, strict=True))]
        if beside.repeated or not several or not _differ([{name: out[name] for name in kept} for out in found]):
            return replace(beside, left=tuple(name for name in found[0] if kept and name not in kept))
    return Beside()


def _differ(found: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether a row of some output has another shape for another count of images."""
    return any(a.shape[1:] != b.shape[1:] for a, b in zip(*(out.values() for out in found), strict=True))


def _given_by(
    net: nn.Module, size: tuple[int, ...], constants: Mapping[str, Any], rows: Mapping[str, Tensor], repeated: Sequence[str],
    images: int,
) -> dict[str, Tensor]:  # fmt: skip
    """What a model gives for so many grey images, with the same row of other inputs for each."""
    spread = {name: value.expand(images, *value.shape[1:]) for name, value in rows.items()}
    again = {name: _again(constants[name], images) for name in repeated}
    with torch.no_grad(), quiet():
        return named_tensors(net.eval()(**{**constants, **spread, **again, IMAGE: torch.zeros(images, *size)}))


def _again(value: Tensor, images: int) -> Tensor:
    """The rows of a tensor for each image, one image behind the other."""
    return value.repeat(images, *[1] * (value.ndim - 1))


def change_ports(net: nn.Module, beside: Beside) -> None:
    """Let a model repeat constants for each image, and give all of its outputs but some."""
    whole, names = type(net), [*inspect.signature(net.forward).parameters]

    @wraps(whole.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        taken = {**dict(zip(names, args, strict=False)), **kwargs}
        again = {name: _again(taken[name], taken[IMAGE].shape[0]) for name in beside.repeated}
        given = named_tensors(whole.forward(self, **{**taken, **again}))
        return {name: value for name, value in given.items() if name not in beside.left}

    net.__class__ = type(whole.__name__, (whole,), {"forward": forward, "__module__": whole.__module__})
