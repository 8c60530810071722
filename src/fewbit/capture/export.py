"""Every way to name a model, and torch.export with a dynamic batch.

    demo                 the small vision transformer that fewbit ships
    vit_small_patch16_224    a timm name (pretrained weights from timm's hub, or `weights=` a safetensors file)
    hf:google/vit-base-patch16-224    a Hugging Face name or folder
    path/model.pt2       an exported program (torch.export.save)
    path/file.py:function    a function that returns the module; INPUT_SIZE, MEAN, STD of the file are its preprocessing
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from fewbit.errors import BadFile, BadModel, BadValues, UnknownName


@dataclass(frozen=True)
class Loaded:
    """A model and its record: `ref` is how it was named, `record` has input_size, mean, std and the rest of its data config."""

    ref: str
    program: ExportedProgram
    record: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.record["input_size"])


class FirstTensor(nn.Module):
    """The logits of a model that returns a record or a tuple; the first tensor where nothing is called logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if isinstance(out, Tensor):
            return out
        for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
            value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
            if isinstance(value, Tensor):
                return value
        return next(v for v in (out.values() if isinstance(out, Mapping) else out) if isinstance(v, Tensor))


def load_model(
    ref: str | nn.Module | ExportedProgram,
    *,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """The exported program behind a reference; raises BadModel with the reason, or UnknownName with near names.

    `overrides` replaces fields of the record (input_size, mean, std, interpolation, crop_pct, ...).
    """
    if isinstance(ref, ExportedProgram):
        return _from_program(ref, "exported program", overrides)
    if isinstance(ref, nn.Module):
        return _from_module(ref, type(ref).__name__, overrides)
    if ref == "demo":
        return _from_file(f"{Path(__file__).parents[1] / 'demo' / 'model.py'}:model", overrides, ref="demo")
    if ref.endswith(".pt2"):
        return _from_pt2(Path(ref), overrides)
    if re.search(r"\.py:\w+$", ref):
        return _from_file(ref, overrides, ref=ref)
    if ref.startswith("hf:"):
        return _from_hf(ref, overrides)
    return _from_timm(ref, weights, overrides)


def export(module: nn.Module, input_shape: tuple[int, int, int]) -> ExportedProgram:
    """The exported program of a module that takes (batch, channels, height, width), the batch dynamic.

    Raises BadModel with torch.export's own reason where the model cannot be exported.
    """
    module = module.eval()
    example = torch.zeros(2, *input_shape)
    shapes = ({0: Dim("batch", min=1, max=65536)},)
    try:
        with _quiet(), torch.no_grad():
            if not isinstance(module(example), Tensor):
                module = FirstTensor(module).eval()
            return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:
        raise BadModel(
            f"{type(module).__name__} cannot be exported for input (batch, {', '.join(map(str, input_shape))}): "
            f"{_reason(error)} Check --input-size, or make the model exportable: torch.export.export(model, (x,)) must work."
        ) from error


def graph_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph module of aten calls whose constants are attributes; a fresh copy of the graph."""
    with _quiet():
        module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def fingerprint(program: ExportedProgram) -> str:
    """SHA-256 over the graph's text and every weight."""
    digest = hashlib.sha256(str(program.graph).encode())
    for name, tensor in sorted(program.state_dict.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_module(
    module: nn.Module, ref: str, overrides: Mapping[str, Any] | None, record: Mapping[str, Any] | None = None
) -> Loaded:
    fields = {**(_timm_record(module) if record is None else record), **(overrides or {})}
    if "input_size" not in fields:
        raise BadModel(f"{ref} does not say its input size. Give it: --input-size 3,224,224 (input_size=(3, 224, 224)).")
    for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadValues(f"weight {name} of {ref} holds NaN or infinite values; only finite weights can be quantized.")
    fields["input_size"] = tuple(fields["input_size"])
    classes = tuple(fields.pop("classes", ()))
    return Loaded(ref, export(module, fields["input_size"]), fields, classes)


def _from_program(program: ExportedProgram, ref: str, overrides: Mapping[str, Any] | None) -> Loaded:
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    if len(inputs) != 1 or inputs[0].ndim != 4:
        raise BadModel(f"{ref} takes {[tuple(i.shape) for i in inputs]}; one input (batch, channels, height, width) is allowed.")
    for name, tensor in program.state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadValues(f"weight {name} of {ref} holds NaN or infinite values; only finite weights can be quantized.")
    shape = tuple(int(s) for s in inputs[0].shape[1:])
    if isinstance(inputs[0].shape[0], int):
        raise BadModel(
            f"{ref} was exported with a fixed batch of {inputs[0].shape[0]}. Export it with a dynamic one: "
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))."
        )
    return Loaded(ref, program, {**(overrides or {}), "input_size": shape})


def _from_pt2(path: Path, overrides: Mapping[str, Any] | None) -> Loaded:
    if not path.is_file():
        raise BadFile(f"{path} does not exist. MODEL is demo, a timm name, hf:NAME, path.pt2 or file.py:function.")
    try:
        with _quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise BadFile(f"{path} is not a readable exported program: {_reason(error)} Write it with torch.export.save.") from error
    sidecar = path.with_suffix(".json")
    record: dict[str, Any] = {}
    if sidecar.is_file():
        try:
            record = json.loads(sidecar.read_text())
        except ValueError as error:
            raise BadFile(f"{sidecar} is not JSON ({error}); it may hold mean, std, interpolation, crop_pct.") from error
    return _from_program(program, str(path), {**record, **(overrides or {})})


def _from_file(spec: str, overrides: Mapping[str, Any] | None, *, ref: str) -> Loaded:
    name, _, function = spec.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise BadFile(f"{path} does not exist; MODEL as file.py:function needs a Python file.")
    module_spec = importlib.util.spec_from_file_location(f"_fewbit_user_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    python = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(python)
    except Exception as error:
        raise BadModel(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(python, function):
        found = [k for k, v in vars(python).items() if callable(v) and getattr(v, "__module__", "") == python.__name__]
        raise UnknownName(f"function in {path.name}", function, found)
    try:
        net = getattr(python, function)()
    except Exception as error:
        raise BadModel(f"{function}() of {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise BadModel(f"{function}() of {path} returned {type(net).__name__}; a torch.nn.Module is needed.")
    record: dict[str, Any] = _timm_record(net)
    shared = {"input_size": "INPUT_SIZE", "mean": "MEAN", "std": "STD", "classes": "CLASSES"}
    given = {field: getattr(python, constant) for field, constant in shared.items() if hasattr(python, constant)}
    if "input_size" in given:  # the file's own record: the whole image, bicubic, no crop
        record = {"interpolation": "bicubic", "resize": "squash", "antialias": False, "crop_pct": 1.0}
    return _from_module(net, ref, overrides, {**record, **given})


def _from_hf(ref: str, overrides: Mapping[str, Any] | None) -> Loaded:
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise BadModel("hf: models need the transformers package: pip install 'fewbit[hf]'.") from error
    name = ref.removeprefix("hf:")
    try:
        config = AutoConfig.from_pretrained(name)
        net = AutoModelForImageClassification.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name).to_dict()
    except Exception as error:
        raise BadModel(f"{ref} cannot be loaded: {_reason(error)} Give a folder with config.json and model.safetensors.") from error
    size = processor.get("crop_size") or processor.get("size") or {}
    side = size.get("height", size.get("shortest_edge", getattr(config, "image_size", 224)))
    resized = processor.get("size", {}).get("shortest_edge")
    record = {
        "input_size": (3, side, size.get("width", side)),
        "mean": tuple(processor.get("image_mean", (0.5,) * 3)),
        "std": tuple(processor.get("image_std", (0.5,) * 3)),
        "interpolation": {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(processor.get("resample", 2), "bilinear"),
        "resize": "center" if resized else "squash",
        "crop_pct": side / resized if resized else 1.0,
    }
    return _from_module(net, ref, overrides, record)


def _from_timm(ref: str, weights: Path | None, overrides: Mapping[str, Any] | None) -> Loaded:
    import timm

    base = ref.removeprefix("timm:").removeprefix("hf-hub:")
    if base.split(".")[0] not in timm.list_models():
        raise UnknownName("model", ref, timm.list_models(), "MODEL is demo, a timm name, hf:NAME, path.pt2 or file.py:function.")
    try:
        if weights is None:
            net = timm.create_model(base, pretrained=True)
        else:
            from safetensors.torch import load_file

            net = timm.create_model(base, pretrained=False)
            net.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    except Exception as error:
        hint = "Give the weights as a file: --weights model.safetensors." if weights is None else f"Is {weights} for {base}?"
        raise BadModel(f"timm cannot load {ref}: {_reason(error)} {hint}") from error
    return _from_module(net, ref, overrides)


def _timm_record(module: nn.Module) -> dict[str, Any]:
    """Preprocessing as timm's pretrained config gives it; empty for a module that has none."""
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return {}
    import timm.data

    return dict(timm.data.resolve_data_config({}, model=module))


def _reason(error: BaseException) -> str:
    """The first informative line of an exception of torch.export, without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(".") + "."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch.export prints about its own internals; the MHA fast path is not exportable."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

