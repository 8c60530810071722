"""torch.export, with a dynamic batch where there can be one, and the exported program as a graph module: tensors in and out by
name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fewbit.capture.canonicalize import writes_through_views
from fewbit.capture.inputs import IMAGES, Arguments
from fewbit.capture.repeats import open_regions
from fewbit.core.inputs import LOUD, Input, example, fed, image_among
from fewbit.core.values import Output
from fewbit.errors import BadModel

WRAPPER = "_fewbit_model"  # where NamedPorts keeps the module; sites.path_of takes it out of the names again
ADVICE = "Check --input-size, or make the model exportable: torch.export.export(model, (x,)) must work."
CHOOSES = (
    "It chooses boxes, masks or parts by their values, which no fixed graph does. Give what stands before that, such as the "
    "backbone with its heads, as a module of its own: file.py:function."
)
ROUNDING = 2.0**-20  # of an image, as sums of 256 terms in float32 round
TIES = 4.0  # times as many numbers as rounding moves to another side may change with the size of the batch
PASSES = 8  # of a program that draws random numbers, to see whether they change its answer


class NamedPorts(nn.Module):
    """A model that takes its tensors by name, in a dict, and returns those of a record, a tuple or anything nested by name."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.add_module(WRAPPER, module)
        self.arguments = arguments

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return named_tensors(self.result(tensors))

    def result(self, tensors: dict[str, Tensor]) -> Any:
        """What the model itself gives."""
        given = self.arguments.args, dict(self.arguments.kwargs)
        args, kwargs = pytree.tree_map(lambda name: tensors[key_of(name)], given)
        return self.get_submodule(WRAPPER)(*args, **kwargs)


def key_of(name: str) -> str:
    """Any text as an identifier."""
    return f"_{name.encode().hex()}"


def named_tensors(out: Any) -> dict[str, Tensor]:
    """The tensors of a model's result, by name and in order: keys and fields joined by dots, places in tuples counted.

    What is no tensor (None, numbers, text) is left out. A single tensor without a name is `logits` where it may be a list of
    classes (batch, n), else `output`. Raises BadModel where there is no tensor.
    """
    leaves = {path: leaf for path, leaf in _leaves(out) if isinstance(leaf, Tensor)}
    if not leaves:
        raise BadModel(f"the model returns {type(out).__name__} without a tensor; at least one is needed.")
    if list(leaves) == [()]:
        (tensor,) = leaves.values()
        return {"logits" if tensor.ndim == 2 else "output": tensor}
    counted = isinstance(out, tuple | list) and not hasattr(out, "_fields")
    names = (".".join(("output", *path) if counted else path) for path in leaves)
    return dict(zip(names, leaves.values(), strict=True))


def _leaves(out: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested mappings, records, named tuples, tuples and lists."""
    if isinstance(out, Mapping):
        items: Iterable[tuple[Any, Any]] = out.items()
    elif dataclasses.is_dataclass(out):
        items = ((field.name, getattr(out, field.name)) for field in dataclasses.fields(out))
    elif isinstance(out, tuple | list):
        items = zip(getattr(out, "_fields", range(len(out))), out, strict=True)
    else:
        yield path, out
        return
    for name, value in items:
        yield from _leaves(value, (*path, str(name)))


def export(
    module: nn.Module,
    inputs: Sequence[Input],
    arguments: Arguments | None = None,
    batches: Sequence[int | None] = (None, 1),
    free: Sequence[int] = (),
) -> ExportedProgram:
    """The exported program of a module with these inputs, and with the first of `batches` that it can be exported with; None is
    a dynamic one. `arguments` say how it is called (None: with the image alone); `free` are places of (channels, height, width)
    that stay dynamic where the module allows it.

    Raises BadModel with torch.export's own reason where the model cannot be exported.
    """
    for batch in batches:
        try:
            return _exported(module, inputs, arguments, batch, free)
        except BadModel:
            raise
        except (Exception, SystemExit) as error:
            failed = error
    takes = f"input (batch, {', '.join(map(str, inputs[0].shape))})" if len(inputs) == 1 else ", ".join(map(str, inputs))
    advice = CHOOSES if "data-dependent" in str(failed) else ADVICE
    raise BadModel(f"{type(module).__name__} cannot be exported for {takes}: {reason(failed)} {advice}") from failed


def _exported(
    module: nn.Module, inputs: Sequence[Input], arguments: Arguments | None, batch: int | None, free: Sequence[int]
) -> ExportedProgram:  # fmt: skip
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    rows = {} if batch else {0: Dim("batch", min=1, max=65536)}
    with quiet(), evaluating(called), torch.no_grad():
        noise = noise_of(batch, image_among(inputs).shape)
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        try:
            out = _same_again(lambda: called.result(tensors_of(inputs, noise)), type(module).__name__)
        except BadModel as error:
            if better := _about_state(module, buffers):
                raise better from error
            raise
        values = tensors_of(inputs, torch.zeros_like(noise))
        sizes = {1 + place: Dim.AUTO for place in free}  # type: ignore[attr-defined]
        shapes = {key_of(one.name): {**(rows if one.has_batch else {}), **(sizes if one.is_image else {})} for one in inputs}
        if arguments is None and inputs[0].name == IMAGES and isinstance(out, Tensor):
            program = torch.export.export(module, tuple(values.values()), dynamic_shapes=tuple(shapes.values()))
        else:
            program = torch.export.export(called, (values,), dynamic_shapes=(shapes,))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # folders of this machine
    return program


def _about_state(module: nn.Module, before: Mapping[str, Tensor]) -> BadModel | None:
    """The error about buffers that a module changes when it is called; None where it changes none."""
    changed = [name for name, value in module.named_buffers() if name in before and not torch.equal(value, before[name])]
    if not changed:
        return None
    return BadModel(
        f"{type(module).__name__} gives two answers for one image: it changes {' and '.join(changed)} when it is called, and a "
        "file keeps nothing from one image to the next. Leave that out in eval mode: if self.training: ..."
    )


def noise_of(batch: int | None, input_shape: Sequence[int]) -> Tensor:
    return torch.rand(batch or 2, *input_shape, generator=torch.Generator().manual_seed(0))


def tensors_of(inputs: Sequence[Input], images: Tensor) -> dict[str, Tensor]:
    """Images and examples of the other inputs, as NamedPorts takes them; copies: a model may write into them."""
    values = fed(inputs, example(inputs, images))
    return {key_of(one.name): value.clone() for one, value in zip(inputs, values, strict=True)}


def _same_again(function: Callable[[], Any], ref: str, passes: int = 2) -> Any:
    """What a model gives. Raises BadModel where another pass gives something else."""
    first, *others = (function() for _ in range(passes))
    for other in others:
        for one, two in zip(pytree.tree_leaves(first), pytree.tree_leaves(other), strict=True):
            if isinstance(one, Tensor) and (one.shape != two.shape or not alike(one.double(), two.double())):
                raise BadModel(
                    f"{ref} gives two answers for one image: something in it is random (dropout left on, random masks). "
                    "Make it deterministic in eval mode; a random model cannot be compared with its integers."
                )
    return first


def alike(one: Tensor, two: Tensor) -> bool:
    """Equal up to what the order of a sum changes."""
    largest = float(one.nan_to_num().abs().max()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=1e-4 * largest, equal_nan=True)


def all_alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """As many tensors, each of the shape and, up to what the order of a sum changes, with the numbers of its partner."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(a.shape == b.shape and alike(a.double(), b.double()) for a, b in pairs)


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of what a model gives, in order, however they are nested."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def refuse_random(program: ExportedProgram, inputs: Sequence[Input], ref: str) -> bool:
    """Whether one image alone has the outputs that it has in a batch of two; True where a batch is written in the program.

    Raises BadModel where a program gives two answers for one image: its operators are random, or the images of a batch depend
    on each other, so that one has other outputs in another place, or where other images stand beside it.
    """
    graphs = (part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule))
    draws = any(_draws(node) for graph in graphs for node in graph.nodes)
    batch = batch_of(program, inputs)
    if batch == 1 and not draws:
        return True
    run, noise = graph_module(program), noise_of(batch, image_among(inputs).shape)
    values = fed(inputs, example(inputs, noise))
    if draws:
        with torch.no_grad():
            _same_again(lambda: run(*_copies(values)), ref, PASSES)
    if batch == 1:
        return True
    beside = torch.cat([noise[-1:], LOUD * noise[:-1]])
    turned = fed(inputs, example(inputs, beside))
    with torch.no_grad():
        here, there = (pytree.tree_leaves(run(*_copies(given))) for given in (values, turned))
    if not all(alike(a[-1].double(), b[0].double()) for a, b in zip(here, there, strict=True) if a.ndim):
        written = "" if batch is None else f"has a batch of {batch} written in it, and "
        raise BadModel(
            f"{ref} {written}gives one image other outputs in another place of the batch, or beside other images: its images "
            "depend on each other, as by a mean over the batch. Mend that, or export it for one image."
        )
    return batch is not None or _is_alone(run, inputs, noise[-1:], [value[-1:] for value in here])


def as_alone(module: nn.Module, program: ExportedProgram, inputs: Sequence[Input], arguments: Arguments | None) -> bool:
    """Whether a program gives for one image alone what the module gives, which may do something of its own with a batch of
    one: torch.export takes a free batch for two or more.
    """
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    image = noise_of(1, image_among(inputs).shape)
    with evaluating(called), torch.no_grad():
        try:
            with quiet():
                want = tensors_in(called.result(tensors_of(inputs, image)))
            got = pytree.tree_leaves(graph_module(program)(*_copies(fed(inputs, example(inputs, image)))))
        except Exception:
            return False  # why is said where it is exported for one image
    return all_alike(want, got)


def _is_alone(run: GraphModule, inputs: Sequence[Input], image: Tensor, row: Sequence[Tensor]) -> bool:
    """Whether an image alone has the outputs of `row`, but for numbers that change as much where rounding moves the image."""
    with torch.no_grad():
        alone = pytree.tree_leaves(run(*_copies(fed(inputs, example(inputs, image)))))
        if any(a.shape != b.shape for a, b in zip(alone, row, strict=True)):
            return False
        if all_alike(alone, row):
            return True
        moved = pytree.tree_leaves(run(*_copies(fed(inputs, example(inputs, image * (1 + ROUNDING))))))
    return all(c.shape != a.shape or _unlike(a, b) <= TIES * _unlike(a, c) for a, b, c in zip(alone, row, moved, strict=True))


def _unlike(one: Tensor, two: Tensor) -> float:
    """The share of numbers that differ by more than the order of a sum changes."""
    a, b = one.double().nan_to_num(), two.double().nan_to_num()
    return float(((a - b).abs() > 1e-4 * a.abs().max()).double().mean()) if a.numel() else 0.0


def _copies(values: Iterable[Tensor]) -> Iterator[Tensor]:
    return (value.clone() for value in values)


def _draws(node: Node) -> bool:
    """Whether an operator draws random numbers; dropout that is off and attention without dropout do not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if "dropout" in str(node.target) and len(node.args) == 3:
        return bool(node.args[1] and node.args[2])
    if "attention" in str(node.target):
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return True


def input_values(program: ExportedProgram) -> dict[str, Any]:
    """The fake tensors that stand for a program's inputs, by name and in order: the keys of NamedPorts, torch.export's names
    for those of any other program, and `images` for one alone.
    """
    taken = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in taken}
    spec = program.call_spec.in_spec
    ports = spec.child(0).children() if spec is not None and spec.num_children else []
    keys = [str(key) for key in ports[0].context] if len(ports) == 1 and ports[0].type is dict else []
    if keys and all(re.fullmatch(r"_([0-9a-f]{2})+", key) for key in keys):
        names = [bytes.fromhex(key[1:]).decode("utf-8", "replace") for key in keys]
    else:
        names = [IMAGES] if len(values) == 1 else list(values)
    return dict(zip(names, values.values(), strict=True))


def batch_of(program: ExportedProgram, inputs: Sequence[Input]) -> int | None:
    """The batch that is written in a program with these inputs; None where it is dynamic."""
    batch = image_of(program, inputs).shape[0]
    return batch if isinstance(batch, int) else None


def image_of(program: ExportedProgram, inputs: Sequence[Input]) -> Tensor:
    """The fake tensor that stands for the image, which is the one of the inputs without a value."""
    image: Tensor = input_values(program)[image_among(inputs).name]
    return image


def output_values(program: ExportedProgram) -> dict[str, Tensor]:
    """The fake tensors that stand for a program's outputs, by name and in order; `renamed` ones under their new names."""
    others = renamed(program)
    return {others.get(name, name): value for name, value in _results(program).items()}


def renamed(program: ExportedProgram) -> dict[str, str]:
    """Outputs that are called as an input is, which no ONNX file may have, and the names that they get."""
    inputs, outputs = input_values(program), _results(program)
    others: dict[str, str] = {}
    for name in outputs:
        if name in inputs:
            other = f"{name}_output"
            while other in {*inputs, *outputs, *others.values()}:
                other += "_"
            others[name] = other
    return others


def _results(program: ExportedProgram) -> dict[str, Tensor]:
    results = pytree.tree_leaves(program.graph.output_node().args[0])[-len(program.graph_signature.user_outputs) :]
    values = [r.meta.get("val") if isinstance(r, Node) else r for r in results]
    spec = program.call_spec.out_spec
    return named_tensors(values[0] if spec is None else pytree.tree_unflatten(values, spec))


def graph_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph module of aten calls whose constants are attributes; the tensors of `input_values` in, those of
    `outputs_of` out.

    A fresh copy of the graph; the tensors are the program's.
    """
    with quiet():
        if writes_through_views(program.graph):
            program = program.run_decompositions({})  # nothing is decomposed, writes are made explicit
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


def outputs_of(program: ExportedProgram) -> tuple[Output, ...]:
    """The tensors that a program returns, in order."""
    return tuple(
        Output(name, tuple(n if isinstance(n, int) else -1 for n in value.shape[1:]), value.is_floating_point())
        for name, value in output_values(program).items()
    )


def fingerprint(program: ExportedProgram) -> str:
    """SHA-256 over the graphs' text, what they read and give, and every weight, buffer and constant."""
    graphs = [str(part.graph) for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    digest = hashlib.sha256("\n".join([*graphs, str(program.graph_signature), str(program.call_spec)]).encode())
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        digest.update(f"{name} {getattr(value, 'dtype', type(value))} {tuple(getattr(value, 'shape', ()))}".encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """The first informative line of an exception and, where it says so, the line of the model; without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(". ")
    places = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', str(error))
    if places:
        file, line, source = places[-1]
        reason += f", at {Path(file).name}:{line}: {source.strip()}"
    return reason + "."


@contextmanager
def unwarned() -> Iterator[None]:
    """Without warnings of libraries: what a user has to read is a note or an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export prints about its own internals; the MHA fast path is not exportable."""
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with unwarned(), redirect_stderr(io.StringIO()):
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards each of its parts is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
