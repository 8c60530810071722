"""onnx_reader: from an ONNX file to a module whose nodes are torch calls, ready for torch.export.

reader     the door: read_onnx, and what a file says of its image and its outputs
file       the file on disk: what it must be, its nodes, its weights
functions  the local functions of a file, in place of the nodes that call them
sequences  sequences and optionals whose members are known, resolved
whole      a file whose image comes in whole numbers: where to cut it
cut        the tail of a file: the nodes behind its layers that torch cannot express
known_shapes  what is known of sizes without running the file
turned     outputs of a file whose batch is not in front
strip      a file of another tool without its Q/DQ nodes
module     the nodes as modules, run in order; what needs no image is computed once
work       the products that nodes sum for one image
values     what flows between nodes: tensors, and arrays whose numbers are known; host: operators on these, with numpy
attributes what of a node nobody read: refused
operators  the table of those that are taken, from arithmetic, shape, indexing, reduction, layers, norms, resize, attention,
           recurrent, microsoft
"""

from fewbit.onnx_reader.reader import OnnxFile, read_onnx

__all__ = ["OnnxFile", "read_onnx"]
