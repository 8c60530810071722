"""Realize: a plan as files: a standard Q/DQ graph that runs, and the plan itself with its weights bit-packed.

qdq          plan and graph to the ONNX file, and to its float twin
packed       the plan as plan.json and plan.safetensors, and back
program      a graph as an exported program, without tracing it again
torch_onnx   that program as an ONNX model, the same bytes everywhere
quick        torch.onnx without work in vain
chosen       names for what nodes choose by comparing numbers
unpack       nodes that unpack bit-packed weights
fuse         operators of a runtime, by name, where the target asks for them
quantizers   whether the QuantizeLinear nodes of that model are the plan's
shield       nodes that keep onnxruntime from rewriting what is float beside codes
fixed        what a file of a fixed batch needs
older        in an older opset
ports        inputs and outputs as the file that went in has them
tail         the part of that file which stays as it is
images       what a file says of its images, and the nodes that normalize them inside
beside       large weights in a second file
"""

from fewbit.realize.images import with_metadata
from fewbit.realize.packed import load_plan, save_plan
from fewbit.realize.qdq import float_onnx, realize, rendered, rendered_float, save

__all__ = ["float_onnx", "load_plan", "realize", "rendered", "rendered_float", "save", "save_plan", "with_metadata"]
