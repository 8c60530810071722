"""A Hugging Face model with the head of its own task, and its own image processor.

The processor makes the pixels itself, picture by picture, so that whatever its configuration says is what happens. Mean, std
and size are measured on pictures of one colour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewbit.errors import BadModel, reason
from fewbit.load.contexts import quiet

SHAPES = ((640, 480), (300, 500))  # width and height of two pictures, which a model of one input size has to get alike
LISTED = 4  # names of weights in a message
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def hugging_face(ref: str) -> tuple[nn.Module, Mapping[str, Any], tuple[str, ...]]:
    """The model, its record and what to say about it. Raises BadModel where a weight is missing or the head has no use here."""
    config, kind, processor = parts_of(ref)
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
    return net, record_of(ref, type(processor).__name__, processor), notes


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
    if kind.main_input_name != "pixel_values":
        raise BadModel(f"{ref} is a {names[0]}, which takes {kind.main_input_name}; a model that takes images alone is needed.")
    return kind


def record_of(ref: str, kind: str, processor: Any) -> dict[str, Any]:
    """Size, mean and std as the processor applies them, with the processor itself as JSON."""
    text = json.dumps({**json.loads(processor.to_json_string()), "image_processor_type": kind}, sort_keys=True)
    try:
        with quiet():
            black, other, white = (
                pixels(text, Image.new("RGB", shape, colour))
                for shape, colour in ((SHAPES[0], (0,) * 3), (SHAPES[1], (0,) * 3), (SHAPES[0], (255,) * 3))
            )
    except Exception as error:
        raise BadModel(
            f"the image processor of {ref} ({kind}) fails: {reason(error)} Fix its preprocessor_config.json."
        ) from error
    if black.ndim != 3 or black.shape != other.shape:
        raise BadModel(
            f"the image processor of {ref} ({kind}) gives {tuple(black.shape)} and {tuple(other.shape)} for pictures of two "
            'shapes; one size is needed: "size": {"height": 224, "width": 224} or a center crop in preprocessor_config.json.'
        )
    low, high = (image.flatten(1)[:, image[0].numel() // 2 + image.shape[2] // 2].double() for image in (black, white))
    return {
        "input_size": tuple(black.shape),
        "mean": tuple((-low / (high - low)).tolist()),
        "std": tuple((1 / (high - low)).tolist()),
        "interpolation": FILTERS.get(int(getattr(processor, "resample", None) or 0), "bicubic"),
        "resize": "squash",
        "crop_pct": 1.0,
        "processor": text,
    }


def pixels(processor: str, picture: Image.Image) -> Tensor:
    """What a processor, as JSON, makes of one RGB picture: float32 (channels, height, width)."""
    values = _made(processor)(images=picture, return_tensors="pt")["pixel_values"]
    return values[0].float()


@cache
def _made(text: str) -> Any:
    import transformers

    fields = json.loads(text)
    name = fields.get("image_processor_type")
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.BaseImageProcessor)):
        raise BadModel(
            f"transformers {transformers.__version__} has no image processor {name!r}, which made this run's images."
        )
    return kind.from_dict(fields)
