"""Every way to name a model: `FORMS`, of which one is taken, and the help made of them. Imports no torch.

demo                 the small vision transformer that fewbit ships
demo:resnet20        a small convolutional network for the same images
demo:mobilenet       one with depthwise convolutions
demo:detr            a small DETR for scenes of such images
vit_small_patch16_224    a timm name (pretrained weights from timm's hub, or `weights=` a file)
torchvision:resnet50     a torchvision name (its default weights, or `weights=` a file)
hf:google/vit-base-patch16-224    a Hugging Face name or folder
path/model.onnx      a float ONNX file
path/model.pt2       an exported program (torch.export.save)
path/model.pt        TorchScript (torch.jit.save)
path/file.py:function    a function that returns the module; INPUT_SIZE, MEAN, STD, ... of the file are its preprocessing

How each is read and looked up is in load/load.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fewbit.demo import DEMOS

WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # of files with weights, of which some are TorchScript
PYTHON = re.compile(r"\.py(:[^:]*)?$")


@dataclass(frozen=True)
class Form:
    """A way to name a model: what is typed, and whether a name is of this form. `takes_weights`: from a file, `--weights`."""

    text: str
    is_one: Callable[[str], bool]
    takes_weights: bool = False


DEMO = Form(", ".join(DEMOS), lambda ref: ref in DEMOS)
TIMM = Form("a timm name", lambda ref: not any(form.is_one(ref) for form in NAMED), takes_weights=True)
TORCHVISION = Form("torchvision:NAME", lambda ref: ref.startswith("torchvision:"), takes_weights=True)
HUGGING_FACE = Form("hf:NAME", lambda ref: ref.startswith("hf:"))
ONNX = Form("path.onnx", lambda ref: ref.endswith(".onnx"))
PROGRAM = Form("path.pt2", lambda ref: ref.endswith(".pt2"))
TORCHSCRIPT = Form("TorchScript (path.pt)", lambda ref: ref.endswith(WEIGHTS))
FUNCTION = Form("file.py:function", lambda ref: PYTHON.search(ref) is not None)
NAMED: tuple[Form, ...] = (DEMO, TORCHVISION, HUGGING_FACE, ONNX, PROGRAM, TORCHSCRIPT, FUNCTION)  # the first that is one
FORMS = (DEMO, TIMM, *NAMED[1:])
NAMES = f"{', '.join(form.text for form in FORMS[:-1])} or {FORMS[-1].text}"
MODEL = f"MODEL is {NAMES}."
OTHERS = (*DEMOS, *(form.text for form in FORMS if form not in (DEMO, TIMM)))  # what names other than timm's look like


def form_of(ref: str) -> Form:
    """The form of a name; what is of no other is a name of timm."""
    return next(form for form in FORMS if form.is_one(ref))
