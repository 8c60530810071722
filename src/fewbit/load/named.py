"""Models by their name in timm or torchvision: pretrained, or with the weights of a file."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fewbit.errors import BadModel, FewbitError, UnknownName, reason
from fewbit.load.checkpoint import Checkpoint, read_checkpoint, with_weights
from fewbit.load.contexts import quiet

GIVE = "Give the weights as a file: --weights FILE (.safetensors or .pth)."
DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # names in torchvision's own files of DenseNet
Made = tuple[nn.Module, Mapping[str, Any], tuple[str, ...]]  # the model, its record, what to say


def timm_name(ref: str, others: tuple[str, ...], hint: str) -> str:
    """The name that timm has. `others` and `hint` tell what names there are beside timm's. Raises UnknownName."""
    import timm

    base, names = ref.removeprefix("timm:").removeprefix("hf-hub:").removeprefix("timm/"), timm.list_models()
    if (plain := base.split(".")[0]) not in names:
        near = difflib.get_close_matches(plain, [*others, *names], n=3, cutoff=0.6)  # among so many, 0.5 is noise
        if near:
            raise UnknownName("model", plain, near, hint)
        raise UnknownName("model", ref, (*others, f"{len(names)} names of timm (timm.list_models())"))
    return base


def timm_model(ref: str, weights: Path | None, others: tuple[str, ...], hint: str) -> Made:
    """A model of timm. Raises UnknownName or BadModel."""
    import timm

    base = timm_name(ref, others, hint)
    checkpoint = None if weights is None else read_checkpoint(weights)
    options = {} if checkpoint is None else _timm_options(checkpoint)

    def build(classes: int | None) -> nn.Module:
        count = {} if classes is None else {"num_classes": classes}
        made: nn.Module = timm.create_model(base, pretrained=checkpoint is None, **{**options, **count})
        return made

    net, notes = _made(ref, "timm", build, checkpoint, lambda net: getattr(net, "num_classes", None))
    try:
        return net, timm_record(net, checkpoint.args if checkpoint else {}), notes
    except Exception as error:
        raise BadModel(f"{weights} has options of a training that timm cannot read: {reason(error)}") from error


def _timm_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a training of timm changed in a model and its weights do not show, from the options that were saved with them."""
    import timm

    args, own = checkpoint.args, inspect.signature(timm.create_model).parameters
    extra = args.get("model_kwargs")
    options = dict(extra) if isinstance(extra, Mapping) else {}
    options |= {"global_pool": args.get("gp"), "bn_eps": args.get("bn_eps"), "in_chans": args.get("in_chans")}
    return {name: value for name, value in options.items() if value is not None and name not in own}


def timm_record(module: nn.Module, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Preprocessing as timm's pretrained config and the options of a training give it; empty for a module that has none.

    Where it was made with other `in_chans` than the record is for, mean and std are left out: nobody recorded those.
    """
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return {}
    import timm.data

    record = dict(timm.data.resolve_data_config(dict(args or {}), model=module))
    channels = getattr(module, "in_chans", record["input_size"][0])
    record["input_size"] = (channels, *record["input_size"][1:])
    return {k: v for k, v in record.items() if k not in ("mean", "std") or len(v) == channels}  # else those of other images


def torchvision_name(ref: str) -> str:
    """The name that torchvision has. Raises UnknownName, or BadModel for a model that is quantized."""
    from torchvision import models

    name, names = ref.removeprefix("torchvision:"), models.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UnknownName("torchvision model", name, near or (f"{len(names)} names (torchvision.models.list_models())",))
    if name.startswith("quantized_"):
        raise BadModel(f"{ref} is quantized already; give the float model: torchvision:{name.removeprefix('quantized_')}.")
    return name


def torchvision_model(ref: str, weights: Path | None, size: tuple[int, int, int] | None) -> Made:
    """A model of torchvision, with the preprocessing of its weights. Raises UnknownName or BadModel."""
    from torchvision import models

    name = torchvision_name(ref)
    own = models.get_model_weights(name).DEFAULT
    record, classes = _preset(ref, own.transforms()), tuple(own.meta["categories"])
    try:
        checkpoint = (
            read_checkpoint(weights)
            if weights is not None
            else Checkpoint(Path(own.url).name, own.get_state_dict(progress=False, check_hash=True, weights_only=True))
        )
    except FewbitError:
        raise
    except Exception as error:
        raise BadModel(f"torchvision cannot load {ref}: {reason(error)} {GIVE}") from error
    checkpoint = replace(checkpoint, state={DENSE.sub(r"\1\2", key): tensor for key, tensor in checkpoint.state.items()})

    def build(count: int | None) -> nn.Module:
        options = _torchvision_options(name, (size or record["input_size"])[1], checkpoint.state)
        made: nn.Module = models.get_model(name, num_classes=count or len(classes), **options)
        return made

    net, notes = _made(ref, "torchvision", build, checkpoint, lambda _: len(classes))
    return net, record if weights is not None else {**record, "classes": classes}, notes


def _preset(ref: str, transforms: Any) -> dict[str, Any]:
    """The record of what torchvision does to the images of a model."""
    from torchvision.transforms import _presets

    if not isinstance(transforms, _presets.ImageClassification | _presets.SemanticSegmentation):
        raise BadModel(
            f"{ref} is for {type(transforms).__name__}, and takes no batch of images of one size or cannot be exported; "
            "write a function that returns the part to quantize, and give file.py:function."
        )
    resized = transforms.resize_size[0]
    crop = getattr(transforms, "crop_size", [resized])[0]
    share = crop / resized
    if math.floor(crop / share) < resized:
        share = math.nextafter(share, 0)
    record = {
        "input_size": (3, crop, crop),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "interpolation": transforms.interpolation.value,
        "resize": "center",
        "crop_pct": share,
    }
    whole = {"resize": "squash", "assumed": ("resize",)}  # torchvision leaves pictures that are segmented in their shape
    return record if hasattr(transforms, "crop_size") else {**record, **whole}


def _torchvision_options(name: str, side: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """What torchvision does for its own weights beside loading them; parts that only train are there where the weights are."""
    from torchvision import models

    builder = models.get_model_builder(name)
    known, extra = inspect.signature(builder).parameters, any(key.lower().startswith("aux") for key in state)
    options: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in known}
    if "aux_loss" in known:
        options["aux_loss"] = extra
    if name in ("inception_v3", "googlenet"):
        options |= {"aux_logits": extra, "transform_input": True, "init_weights": False}
    if builder.__module__.endswith("vision_transformer"):
        options["image_size"] = side
    return options


def _made(
    ref: str,
    library: str,
    build: Callable[[int | None], nn.Module],
    checkpoint: Checkpoint | None,
    classes: Callable[[nn.Module], int | None],
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, with the weights of a checkpoint or its own, and what to say. Raises BadModel with the library's reason."""
    try:
        with quiet():
            return (build(None), ()) if checkpoint is None else with_weights(checkpoint, build, classes, ref)
    except FewbitError:
        raise
    except Exception as error:
        hint = GIVE if checkpoint is None else f"Is {checkpoint.path} for {ref}?"
        raise BadModel(f"{library} cannot load {ref}: {reason(error)} {hint}") from error
