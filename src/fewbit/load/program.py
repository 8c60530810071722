"""An exported program as a graph module, and its fingerprint."""

from __future__ import annotations

import hashlib
import operator
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from fewbit.core.fx import DROPOUTS, is_call, is_write
from fewbit.load.contexts import quiet
from fewbit.load.regions import open_regions

EXPLICIT = WeakKeyDictionary[ExportedProgram, ExportedProgram]()  # programs whose writes through views were made explicit


def graph_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph module of aten calls whose constants are attributes; the tensors of `input_values` in, those of
    `outputs_of` out.

    A fresh copy of the graph; the tensors are the program's.
    """
    with quiet():
        if writes_through_views(program.graph):
            program = _with_explicit_writes(program)
        module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    open_regions(module)
    for node in module.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):  # an argument that is None, or a number
            module.graph.erase_node(node)
    output = module.graph.output_node()
    results = [r for r in pytree.tree_leaves(output.args[0]) if isinstance(r, Node) and isinstance(r.meta.get("val"), Tensor)]
    output.args = (results[0] if len(results) == 1 else tuple(results),)
    module.graph.set_codegen(CodeGen())  # plain arguments, however the model takes its images
    return GraphModule(module, module.graph)  # without the program's hooks, which check the old arguments


def _with_explicit_writes(program: ExportedProgram) -> ExportedProgram:
    """The program without writes into memory that has other names, with the tensors that it has now; it is traced anew for
    that, which takes long, so it is kept for as long as the program is.
    """
    found = EXPLICIT.get(program)
    if found is None:
        found = EXPLICIT[program] = program.run_decompositions({})  # nothing is decomposed, writes are made explicit
    for own, kept in ((program.state_dict, found.state_dict), (program.constants, found.constants)):
        kept.update({name: own[name] for name in kept if name in own})
    return found


def fingerprint(program: ExportedProgram) -> str:
    """SHA-256 over the graphs' text, what they read and give, and every weight, buffer and constant."""
    graphs = [str(part.graph) for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    digest = hashlib.sha256("\n".join([*graphs, str(program.graph_signature), str(program.call_spec)]).encode())
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        digest.update(f"{name} {getattr(value, 'dtype', type(value))} {tuple(getattr(value, 'shape', ()))}".encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def writes_through_views(graph: Graph) -> bool:
    """Whether an op writes into memory that is read later under another name: y[:, 0] = 0, then y."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in filter(is_write, graph.nodes):
        names, pending = set[Node](), [cast(Node, node.args[0])]
        while pending:  # every name of the memory up to here: what it is a view of, and the views of it
            name = pending.pop()
            if name not in names and name is not node:
                names.add(name)
                pending += [n for n in name.all_input_nodes[:1] if _is_alias(name)]
                pending += [u for u in name.users if _is_alias(u) and position[u] < position[node] and u.args[0] is name]
        if any(position[user] > position[node] for name in names - {node.args[0]} for user in name.users):
            return True
    return False


def _is_alias(node: Node) -> bool:
    """A call whose result may be the memory of its first argument."""
    schema = getattr(node.target, "_schema", None)
    result = schema is not None and schema.returns and schema.returns[0].alias_info is not None
    return bool(result) or is_call(node, operator.getitem, *DROPOUTS)
