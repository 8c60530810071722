"""A model's weights from a file: safetensors, or what torch.save wrote. Nothing that stands in the file is run.

Training programs wrap their weights: beside an optimizer, as an average (EMA), in DataParallel or a larger module. The weights
are taken out, compared with the model name by name and shape by shape, and the number of classes is the head's.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.errors import BadFile, BadModel, reason
from fewbit.files import is_archive
from fewbit.load.contexts import quiet
from fewbit.load.torchscript import is_torchscript

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # better than what they are averages of
WRAPS = (*AVERAGES, "state_dict", "model_state_dict", "model_state", "model", "net", "weights")
LISTED = 4  # weights in a message
HEAD, GIT_LFS = 24, b"version https://git-lfs"  # bytes that say what a file is


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by name; `args` are the options of the training that timm saves with them."""

    path: Path | str
    state: Mapping[str, Tensor]
    args: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights of a file. Raises BadFile where it is broken or holds anything but data."""
    if no_weights := _without_weights(path):
        raise BadFile(f"{path} {no_weights}")
    if is_torchscript(path):
        raise BadFile(f"{path} is TorchScript, a model and not weights alone; give it as the model: fewbit quantize {path}.")
    try:
        with quiet():
            found = _loaded(path)
    except Exception as error:
        if not is_archive(path) and _begin(path).startswith(b"PK\3\4"):
            raise BadFile(f"{path} is cut off: its end is missing. Copy or download it again.") from error
        if _is_safetensors(path):
            raise BadFile(f"{path} is cut off or damaged: {reason(error)} Copy or download it again.") from error
        raise BadFile(
            f"{path} holds no weights that can be read without running code: {_why(error, path)} "
            "Write them with safetensors, or with torch.save(model.state_dict(), FILE)."
        ) from error
    args = found.get("args") if isinstance(found, Mapping) else None
    state, notes = _state_of(path, found)
    half = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()} - {"float32"}
    if half:
        notes = (*notes, f"{path} holds {' and '.join(sorted(half))}; it is computed in float32.")
    return Checkpoint(path, state, vars(args) if isinstance(args, argparse.Namespace) else {}, notes)


def _begin(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _without_weights(path: Path) -> str:
    """What is to be said of a file that nothing was written into; empty of any other."""
    begin = _begin(path)
    if not begin:
        return "is empty, of 0 bytes. Copy or download it again."
    return "is the place of a file in Git LFS, and not that file. Get it: git lfs pull." if begin.startswith(GIT_LFS) else ""


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name is: the length of a JSON object, and that object."""
    begin = _begin(path)
    return begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size


def _why(error: Exception, path: Path) -> str:
    """What a file holds that is no data, without torch's advice to run it all the same."""
    if is_archive(path) and not isinstance(error, pickle.UnpicklingError):
        return reason(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"it holds {found[1]}, which is not a tensor." if found else "neither safetensors nor torch.save has written it whole."
    )


def _loaded(path: Path) -> Any:
    if _is_safetensors(path):
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:  # a record of options, no code
        misnamed = path.suffix == ".safetensors"  # torch.load goes by the name, of a path
        mapped = not misnamed and is_archive(path)
        return torch.load(file if misnamed else path, map_location="cpu", weights_only=True, mmap=mapped)


def _state_of(path: Path, found: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors inside of what training programs wrap around them, and a sentence where one of several was taken."""
    notes: tuple[str, ...] = ()
    while isinstance(found, Mapping):
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        inner = [name for name in WRAPS if isinstance(found.get(name), Mapping) and found[name]]
        if not inner:
            return {n.replace("_orig_mod.", ""): t for n, t in tensors.items() if n != "n_averaged"}, notes
        if len(inner) > 1:
            notes = (*notes, f"{path} holds {' and '.join(inner)}; {inner[0]} is taken.")
        found = found[inner[0]]
    raise BadFile(f"{path} holds a {type(found).__name__}; weights by name are needed: torch.save(model.state_dict(), FILE).")


def with_weights(
    checkpoint: Checkpoint, build: Callable[[int | None], nn.Module], classes: Callable[[nn.Module], int | None], ref: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that `build` makes, with the weights of a file and as many classes as its head has; and what to say.

    `build` takes a number of classes, or None for its own, which `classes` tells. Raises BadModel that names what does not fit.
    """
    net = build(None)
    state, notes = _rooted(checkpoint, net.state_dict().keys())
    if count := _head(net.state_dict(), state, classes(net)):
        net = build(count)
    _refuse_misfits(checkpoint, net.state_dict(), state, ref)
    net.load_state_dict(state, strict=False)  # copied into float32; what may lack was looked at
    return net, (*checkpoint.notes, *notes)


def _rooted(checkpoint: Checkpoint, names: Collection[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights without the path of the module that the model was in: `module.`, `model.`, `backbone.`, and so on."""
    state = dict(checkpoint.state)
    while not all(name in state for name in _needed(names)):
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            parts.setdefault(head, {})[rest] = tensor
        whole = [head for head, part in parts.items() if all(name in part for name in _needed(names))]
        if len(whole) > 1:
            raise BadModel(
                f"{checkpoint.path} holds the model more than once, under {' and '.join(whole)}; save the one that is meant: "
                f"torch.save(model.{whole[0]}.state_dict(), FILE)."
            )
        if len(whole) == 1 and len(parts) > 1:
            others = some([n for n in state if not n.startswith(f"{whole[0]}.")])
            return parts[whole[0]], (f"{checkpoint.path} holds more than the model, which is left out: {others}.",)
        if len(parts) != 1 or names & state.keys() or not all("." in name for name in state):
            break
        (state,) = parts.values()
    return state, ()


def _needed(names: Collection[str]) -> list[str]:
    """Counters of batch norm decide nothing, and old files lack them."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _head(own: Mapping[str, Tensor], state: Mapping[str, Tensor], classes: int | None) -> int | None:
    """The number of classes of a file where it is another than the model's: what its head differs in."""
    counts = {
        state[name].shape[0]
        for name, tensor in own.items()
        if name in state
        and tensor.shape[:1] == (classes,)
        and state[name].shape[1:] == tensor.shape[1:]
        and state[name].shape[:1] not in ((classes,), ())
    }
    return counts.pop() if len(counts) == 1 else None


def _refuse_misfits(checkpoint: Checkpoint, own: Mapping[str, Tensor], state: Mapping[str, Tensor], ref: str) -> None:
    lacking = [f"{name} {_shape(own[name])}" for name in _needed(own.keys()) if name not in state]
    foreign = [f"{name} {_shape(tensor)}" for name, tensor in state.items() if name not in own]
    other = [
        f"{name} {_shape(tensor)} for {_shape(own[name])}"
        for name, tensor in state.items()
        if name in own and (tensor.shape != own[name].shape or not _is_like(tensor, own[name]))
    ]
    found = [
        f"{what} {some(names)}"
        for what, names in (("it lacks", lacking), ("it has another", other), ("the model has no", foreign))
        if names
    ]
    if found:
        saved = checkpoint.args.get("model") or checkpoint.args.get("arch")
        hint = f" It was saved by a training of {saved}." if isinstance(saved, str) else ""
        raise BadModel(
            f"the weights of {checkpoint.path} are not those of {ref}: {'; '.join(found)}.{hint} "
            "Give the name of the model that they were trained for."
        )


def _is_like(tensor: Tensor, own: Tensor) -> bool:
    """Plain numbers of the same kind: no codes of integers where a float is, nothing sparse, nothing that lies elsewhere."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.is_floating_point() == own.is_floating_point() and not tensor.is_complex()


def _shape(tensor: Tensor) -> str:
    kind = "" if tensor.dtype == torch.float32 and tensor.layout == torch.strided else f"{tensor.dtype} ".removeprefix("torch.")
    return f"{kind}({', '.join(map(str, tensor.shape))})"


def some(names: list[str]) -> str:
    """The first of a list of names, and how many there are more."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of DataParallel, of an average of weights and of torch.compile. Raises BadModel for TorchScript."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise BadModel(
            f"{type(module).__name__} is TorchScript, or has a part that is; give the module that it was made from, or where "
            "all of it is TorchScript the file: torch.jit.save(module, 'model.pt')."
        )
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        else:
            return module


def refuse_file(path: Path) -> None:
    """Raise BadFile or BadModel for a file of weights that was given in the place of a model."""
    if not path.is_file():
        raise BadFile(f"{path} does not exist; a file of weights goes with a name: MODEL --weights FILE.")
    saved = read_checkpoint(path).args.get("model")
    name = saved if isinstance(saved, str) and re.fullmatch(r"[\w./:-]+", saved) else "NAME"
    raise BadModel(
        f"{path} holds weights and not the model that they are of; give its name, of timm or torchvision: "
        f"fewbit quantize {name} --weights {path}."
    )
