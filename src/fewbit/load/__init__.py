"""Load: from whatever a user names as a model to an exported program with its record.

load       a reader for each way to name a model (models.py), most in modules of their own: archive (.pt2), checkpoint (weights
           in .pt and .safetensors), huggingface, named (timm, torchvision), python_file, torchscript; ONNX files: `onnx_reader`
texts      what models of transformers take beside the image
record     the preprocessing that stands beside a model; purpose: the task that a class of Hugging Face or torchvision has
loaded     a module or a program becomes `Loaded`, or is refused (refused)
inputs     which input is the image and what the others are given; ports: tensors in and out by name; sizes: images of any size
export     torch.export with a dynamic batch; trials: does the program give what the module gives, twice, alone and in a batch
program    a program as a graph module, and its fingerprint; regions: parts under no_grad or autocast are opened
advice     what to type where inputs are missing or without a batch
contexts   eval mode, without what libraries print
"""

from fewbit.load.export import export
from fewbit.load.load import load_model
from fewbit.load.loaded import Loaded

__all__ = ["Loaded", "export", "load_model"]
