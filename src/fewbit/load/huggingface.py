"""A Hugging Face model with the head of its own task, and its own image processor.

The processor makes the pixels itself, picture by picture, so that whatever its configuration says is what happens. Mean, std
and size are measured on pictures of one colour.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewbit.core.pixels import input_size
from fewbit.errors import BadModel, reason
from fewbit.load.contexts import quiet, without_advice
from fewbit.load.inputs import Given
from fewbit.load.texts import IMAGE, beside_others, change_ports, needed_by, refuse_missing

SHAPES = ((640, 480), (300, 500))  # width and height of two pictures, which a model of one input size has to get alike
USUAL = 224  # pixels of a side, where nothing is said
LISTED = 4  # names of weights in a message
DECIDE = ("input_size", "resize", "mean", "std")  # fields of the preprocessing that decide it all, without the processor
CLIPS = (
    "5 dimensions (batch, frames, channels, height, width), and fewbit takes images, 4 dimensions (batch, channels, height, "
    "width). Fold the frames into the channels: images (frames * channels, height, width) as .npy files, and a module around "
    "the model, file.py:FUNCTION, whose forward calls self.net(x.unflatten(1, (frames, channels)))."
)
ALL_OF_THEM = "--input-size, --resize, --mean and --std"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Found:
    """A model, its record and what to say about it; `shared` are constants that are one for all images though their first
    dimension is 1, as a text beside which every image is laid.
    """

    net: nn.Module
    record: Mapping[str, Any]
    notes: tuple[str, ...]
    shared: tuple[str, ...]


def hugging_face(ref: str, given: Given, overrides: Mapping[str, Any]) -> Found:
    """The model, its record and what to say about it. Raises BadModel where a weight or an input is missing, where the head has
    no use here, or where its image processor gives no one size and `overrides` do not say the size either.
    """
    config, kind, processor = parts_of(ref)
    _refuse_videos(ref, kind)
    refuse_missing(ref, kind, given)
    _refuse_drawn(ref, kind)
    record, about = _record(ref, config, processor, overrides)
    try:
        with quiet():
            net, loading = kind.from_pretrained(
                ref.removeprefix("hf:"), dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        raise _unloaded(ref, error) from error
    for what, keys in (("lacks", loading["missing_keys"]), ("has no place for", loading["unexpected_keys"])):
        if keys:
            shown = ", ".join(sorted(keys)[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")
            raise BadModel(
                f"{ref} {what} weights of {type(net).__name__}: {shown}. Save it again with save_pretrained, or fix "
                f'"architectures" in its config.json.'
            )
    if other := sorted(loading["mismatched_keys"]):
        listed = [f"{key} {tuple(there)} for {tuple(wanted)}" for key, there, wanted in other[:LISTED]]
        shown = ", ".join(listed) + (f" and {len(other) - LISTED} more" if len(other) > LISTED else "")
        raise BadModel(
            f"{ref} has weights of other shapes than its config.json says: {shown}. Fix config.json, of a head id2label or "
            "num_labels, or save the model again with save_pretrained."
        )
    saved = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    notes = () if saved == "float32" else (f"{ref} was saved in {saved}; it is computed in float32.",)
    beside = beside_others(net, record["input_size"], given)
    if beside.repeated:
        about = (
            *about,
            f"{ref} takes rows of {', '.join(beside.repeated)} for each image; those that are given, for every one.",
        )
    if beside.left:
        left = ", ".join(beside.left)
        about = (*about, f"{ref} gives outputs whose first dimension is not the batch; they are left out: {left}.")
    if beside.repeated or beside.left:
        change_ports(net, beside)
    return Found(net, record, (*notes, *about), beside.shared)


def parts_of(ref: str) -> tuple[Any, Any, Any]:
    """All of a model but its weights: its configuration, its class and its image processor. Raises BadModel."""
    try:
        import transformers
    except ImportError as error:
        raise BadModel("hf: models need the transformers package: pip install 'fewbit[hf]'.") from error
    name = ref.removeprefix("hf:")
    _refuse_no_objects(ref, Path(name))
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            kind = _architecture(ref, getattr(config, "architectures", None))
            return config, kind, transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except BadModel:
        raise
    except Exception as error:
        raise _unloaded(ref, error) from error


def _unloaded(ref: str, error: Exception) -> BadModel:
    return BadModel(
        f"{ref} cannot be loaded: {reason(error)} "
        "Give a folder with config.json, preprocessor_config.json and model.safetensors."
    )


def _refuse_no_objects(ref: str, folder: Path) -> None:
    """Raise BadModel for a file of the configuration that holds anything but an object of JSON; what is no JSON, transformers
    says.
    """
    for path in (folder / "config.json", folder / "preprocessor_config.json"):
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if not isinstance(found, dict):
            raise BadModel(
                f"{ref} cannot be loaded: {path.name} holds a {type(found).__name__}, and an object {{...}} is needed. Save it "
                "again with save_pretrained."
            )


def _architecture(ref: str, names: list[str] | None) -> Any:
    """The class that the folder was saved from; without a name the one for classification."""
    import transformers

    if not names:
        return transformers.AutoModelForImageClassification
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise BadModel(
            f"{ref} is a {names[0]}, which transformers {transformers.__version__} does not have; write the name of one of its "
            "classes into config.json (architectures)."
        )
    if IMAGE not in inspect.signature(kind.forward).parameters:
        main = ", ".join(needed_by(kind))
        raise BadModel(f"{ref} is a {names[0]}, which takes {main} and no {IMAGE}; a model that takes images is needed.")
    return kind


def _refuse_videos(ref: str, kind: Any) -> None:
    """Raise BadModel for a class that takes videos and no images."""
    takes = getattr(kind, "input_modalities", ())
    takes = (takes,) if isinstance(takes, str) else tuple(takes)
    if "video" in takes and "image" not in takes:
        raise BadModel(f"{ref} is a {kind.__name__}, which takes videos, {CLIPS}")


def _refuse_drawn(ref: str, kind: Any) -> None:
    """Raise BadModel for a class that draws at random which patches of an image it reads, as ViLT does."""
    if getattr(kind, "base_model_prefix", "") == "vilt":
        raise BadModel(
            f"{ref} is a {kind.__name__}, which draws the order of an image's patches at random, as no fixed graph does. Give "
            "them in order, images of the size in its config.json: a module around the model, file.py:FUNCTION, whose forward "
            "has e = self.net.vilt.embeddings; y = e.patch_embeddings(x).flatten(2).transpose(1, 2); "
            "y = torch.cat((e.cls_token.expand(y.shape[0], -1, -1), y), 1) + e.position_embeddings, and calls self.net(ids, "
            "image_embeds=y, pixel_mask=torch.ones(y.shape[:2])) with token ids for each image."
        )


def _record(ref: str, config: Any, processor: Any, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The record of a model, by its processor unless the options decide, and what to say of it. Raises BadModel."""
    kind, size = type(processor).__name__, overrides.get("input_size")
    if all(name in overrides for name in DECIDE):
        said = f"the image processor of {ref} ({kind}) is not asked: {ALL_OF_THEM} decide."
        return {"input_size": input_size(size), "crop_pct": 1.0}, (said,)
    try:
        record, about = record_of(ref, kind, processor)
    except BadModel as error:
        if size is None:
            channels = getattr(getattr(config, "backbone_config", None) or config, "num_channels", None) or "CHANNELS"
            raise BadModel(
                f"{error} Or give arrays as the model takes them, which need no processor: --input-size "
                f"{channels},HEIGHT,WIDTH and .npy files ({channels}, height, width)."
            ) from error
        return {"input_size": input_size(size)}, (f"{error} It is not asked: --input-size decides.",)
    if size is not None and tuple(size) != record["input_size"]:
        raise BadModel(
            f"the image processor of {ref} gives {record['input_size']}; change its preprocessor_config.json instead, or give "
            f"all of {ALL_OF_THEM}, which decide then."
        )
    return record, about


def record_of(ref: str, kind: str, processor: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Size, mean and std as the processor applies them, with the processor itself as JSON; and what to say of it. Raises
    BadModel where it takes more than pictures, where it fails, and where it gives pictures of two shapes two sizes.
    """
    taken = inspect.signature(processor.preprocess).parameters.values()
    more = [p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if more:
        raise BadModel(f"the image processor of {ref} ({kind}) takes {' and '.join(more)} beside each picture.")
    fields = {**json.loads(processor.to_json_string()), "image_processor_type": kind}
    text = own = json.dumps(fields, sort_keys=True)
    notes: tuple[str, ...] = ()
    try:
        with quiet():
            shown = _shown(text)
            if fields.get("keep_aspect_ratio") and shown[0].shape != shown[1].shape:
                text = json.dumps({**fields, "keep_aspect_ratio": False}, sort_keys=True)
                shown = _shown(text)
                notes = _about_ratio(ref, kind, own, text, shown[0])
    except Exception as error:
        raise BadModel(
            f"the image processor of {ref} ({kind}) fails: {reason(error)} Fix its preprocessor_config.json."
        ) from error
    black, other, white = shown
    if black.ndim == 4:
        raise BadModel(
            f"the image processor of {ref} ({kind}) makes {tuple(black.shape)} of one picture, as for a model that takes "
            f"videos or a picture in parts, {CLIPS}"
        )
    if black.ndim != 3 or black.shape != other.shape or (text != own and not notes):
        raise BadModel(
            f"the image processor of {ref} ({kind}) gives {tuple(black.shape)} and {tuple(other.shape)} for pictures of two "
            f"shapes; one size is needed{_with_one_size(fields)}."
        )
    low, high = (image.flatten(1)[:, image[0].numel() // 2 + image.shape[2] // 2].double() for image in (black, white))
    record = {
        "input_size": tuple(black.shape),
        "mean": tuple((-low / (high - low)).tolist()),
        "std": tuple((1 / (high - low)).tolist()),
        "interpolation": FILTERS.get(int(getattr(processor, "resample", None) or 0), "bicubic"),
        "resize": "squash",
        "crop_pct": 1.0,
        "processor": text,
    }
    return record, notes


def _with_one_size(fields: Mapping[str, Any]) -> str:
    """What in its configuration makes a processor give one size, in words behind a colon; empty where nothing that is tried
    does.
    """
    size = fields["size"] if isinstance(fields.get("size"), Mapping) else {}
    sides = [size.get("height"), size.get("width")] if "height" in size else [size.get("shortest_edge")] * 2
    square = {"height": sides[0] or USUAL, "width": sides[1] or USUAL}
    for change in (
        {"size": square}, {"do_center_crop": True, "crop_size": square}, {"size": square, "keep_aspect_ratio": False},
    ):  # fmt: skip
        try:
            with quiet():
                shown = _shown(json.dumps({**fields, **change}, sort_keys=True))
        except Exception:  # it takes no such field
            continue
        if shown[0].ndim == 3 and shown[0].shape == shown[1].shape:
            return f": {json.dumps(change)[1:-1]} in preprocessor_config.json"
    return ""


def _shown(text: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a processor makes of black, of black in another shape and of white."""
    black, white = (0,) * 3, (255,) * 3
    shown = ((SHAPES[0], black), (SHAPES[1], black), (SHAPES[0], white))
    first, second, third = (pixels(text, Image.new("RGB", shape, colour)) for shape, colour in shown)
    return first, second, third


def _about_ratio(ref: str, kind: str, own: str, text: str, made: Tensor) -> tuple[str, ...]:
    """What to say where a processor that keeps the ratio of height and width is taken without that; nothing where it gives a
    picture with the ratio of its size other pixels than it does itself.
    """
    high, wide = made.shape[1:]
    slopes = Image.radial_gradient("L").convert("RGB").resize((2 * wide, 2 * high))
    same = pixels(own, slopes)
    if same.shape != made.shape or not torch.equal(same, pixels(text, slopes)):
        return ()
    return (
        f"the image processor of {ref} ({kind}) keeps the ratio of height and width, which gives each picture a size of its "
        f"own; here each is resized to {high} x {wide}. Pictures with that ratio get the processor's pixels, others are "
        "squeezed unless you crop them to it.",
    )


def pixels(processor: str, picture: Image.Image) -> Tensor:
    """What a processor, as JSON, makes of one RGB picture: float32 (channels, height, width)."""
    values = _made(processor)(images=picture, return_tensors="pt")["pixel_values"]
    return values[0].float()


@cache
def _made(text: str) -> Any:
    import transformers

    fields = json.loads(text)
    name = fields.get("image_processor_type")
    with without_advice():
        kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.BaseImageProcessor)):
        raise BadModel(
            f"transformers {transformers.__version__} has no image processor {name!r}, which made this run's images."
        )
    return kind.from_dict(fields)
