"""An ONNX file as onnxruntime runs it, beside what was read in it, before the work begins.

Everything later is compared with the model that was read; what its operators mean is looked at here alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import TensorProto

from fewbit.core.checks import OutputCheck
from fewbit.core.inputs import Batch, arrays_of, example, image_among
from fewbit.core.pages import give_back
from fewbit.data.images import Images
from fewbit.errors import BadFile, BadModel, CannotRun, stopped
from fewbit.load import Loaded
from fewbit.load.trials import noise_of
from fewbit.onnx_file import load_proto
from fewbit.onnx_reader import read_onnx
from fewbit.onnx_reader.file import all_nodes, read_proto
from fewbit.onnx_reader.strip import stripped
from fewbit.runtimes import AS_WRITTEN, OnnxRuntime
from fewbit.said import said
from fewbit.verify.evaluate import LEAVE_OUT
from fewbit.verify.outputs import DISTURBANCES, STEP, UNIT, Outputs, given_by, program_checks

SHORT = {TensorProto.FLOAT16: 2.0**-10, TensorProto.BFLOAT16: 2.0**-7}  # two roundings of a number, of what each op reads
SIZES = 2  # of those that the image may have besides its own, at which the file itself runs as well
LOOKED_AT = 16  # images that are scored on which a file with a tail is run before the work
SEEN = 4  # images that were given, beside noise
TRIES = (0, 1, DISTURBANCES)  # most files are read to the last digits, and nothing has to be explained
CURVED, NEAR = ("Sigmoid", "Tanh", "Erf"), 4 * UNIT  # kernels of these are polynomials, right to the last digits of 1
FAR = 30  # times the share that a rounding moves: such a difference of a value inside is none of rounding alone


def as_it_runs(loaded: Loaded, path: Path, images: Images | None = None, *, requantize: bool = False) -> tuple[str, ...]:
    """Sentences about a file whose model was read, if onnxruntime gives the same for the file itself: for noise, one image
    alone and several, and for some of the `images`, each output up to what rounding explains. Where onnxruntime cannot run it,
    one says so.

    Raises BadModel that names the output and how much it differs, and the first node whose numbers do.
    """
    with _itself(path, requantize) as file:
        written, groups = _Written.of(file), [*_noise(loaded), *_some_of(images, loaded)]
        try:
            found = _given(loaded, file, written, groups)
        except Exception as error:  # of the runtime, which says in many ways that it has no such operator or type
            if halt := stopped(error):
                raise halt from error
            reason = said(error.__cause__ if isinstance(error, BadFile | CannotRun) and error.__cause__ else error)
            why = reason.replace(str(file), str(path)).rstrip(".")
            return (_uncompared(f"{AS_WRITTEN} does not run {path} itself ({why})"),)
        wrong, batch = next((one for one in _checks(loaded, written, groups, found) if one[0].wrong), (None, None))
        if wrong is None or batch is None:
            return ()
        finite = all(bool(value.isfinite().all()) for outputs in found for one in outputs for value in one.values())
        if written.short and not finite:
            kind = written.short[0]
            return (_uncompared(f"{AS_WRITTEN} gives infinite numbers for {path} itself, which computes in {kind}"),)
        if written.unsorted:
            raise BadModel(
                f"node TopK '{written.unsorted}' of {path} has sorted=0, which leaves the order of its values to each runtime, "
                f"and output {wrong.output} of {AS_WRITTEN} is another than that of values in order. Let them be in order: "
                f"import onnx; m = onnx.load({str(path)!r}); [setattr(a, 'i', 1) for n in m.graph.node for a in n.attribute "
                "if n.op_type == 'TopK' and a.name == 'sorted']; onnx.save(m, 'in_order.onnx')."
            )
        first = _first(loaded, path, file, batch, FAR * written.step, requantize)
    raise BadModel(
        f"fewbit reads {path} otherwise than {AS_WRITTEN} runs it: output {wrong.output} {_difference(wrong)}{first}. Quantize "
        "another form of the model, as an export with another opset_version or the torch module, and report this file."
    )


def refuse_images(loaded: Loaded, path: Path, images: Images, *, requantize: bool = False) -> None:
    """Raise CannotRun where onnxruntime cannot run the file that was given, with the nodes that stay as they are, on some of
    the images: it names the node and the first such image. Some of all are looked at.
    """
    size = loaded.batch or 1
    first = range(0, min(LOOKED_AT, len(images)), size)
    chosen = sorted({*first, *(len(images) * i // LOOKED_AT // size * size for i in range(LOOKED_AT))})
    with _itself(path, requantize) as file:
        session, failed, why = OnnxRuntime(file, optimise=False), list[str](), ""
        for i in chosen:
            some = images.subset(range(i, min(i + size, len(images))))
            try:
                session.run(*arrays_of(loaded.inputs, next(iter(some.batches(size)))))
            except CannotRun as error:
                failed, why = [*failed, some.names[0]], why or str(error).partition("on some of the images: ")[2]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise CannotRun(
            f"{path} itself cannot be run by {AS_WRITTEN} on {failed[0]}{more} (of {len(chosen)} that were tried): "
            f"{why} fewbit has changed nothing of it. {LEAVE_OUT}"
        )


def _uncompared(why: str) -> str:
    return f"{why}, so nobody has compared with it what fewbit reads there."


def _difference(wrong: OutputCheck) -> str:
    if not math.isfinite(wrong.difference):
        return "has another shape, or numbers that are not finite"
    return wrong.said


@contextmanager
def _itself(path: Path, requantize: bool) -> Iterator[Path]:
    """The file whose network was read: that of a quantized one without its Q/DQ nodes."""
    if not requantize:
        yield path
        return
    with TemporaryDirectory(prefix="fewbit-") as folder:
        file = Path(folder) / path.name
        model = read_proto(path, stripped)
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.save(model, file, save_as_external_data=True, location=f"{path.name}.data")
        yield file


@dataclass(frozen=True)
class _Written:
    """What counts here of a file: its outputs, the types of fewer than 32 bits in which it computes, by name, how far rounding
    moves what an op reads, as a share, a difference that it explains whatever the outputs are, and the name of the first TopK
    that gives its values in any order, if there is one.
    """

    outputs: frozenset[str]
    short: tuple[str, ...]
    step: float
    least: float
    unsorted: str | None

    @staticmethod
    def of(file: Path) -> _Written:
        graph = load_proto(file, data=False).graph
        types = {one.data_type for one in graph.initializer} | {one.type.tensor_type.elem_type for one in graph.input}
        for node in all_nodes(graph):
            types |= {a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"}
            types |= {a.t.data_type for a in node.attribute if a.type == onnx.AttributeProto.TENSOR}
        loose = [
            n for n in all_nodes(graph) if n.op_type == "TopK" and any(a.name == "sorted" and not a.i for a in n.attribute)
        ]
        short = [kind for kind in SHORT if kind in types]
        return _Written(
            frozenset(one.name for one in graph.output),
            tuple(TensorProto.DataType.Name(kind).lower() for kind in short),
            max((SHORT[kind] for kind in short), default=STEP),
            NEAR * any(node.op_type in CURVED for node in all_nodes(graph)),
            loose[0].name or loose[0].output[0] if loose else None,
        )


def _noise(loaded: Loaded) -> list[list[Batch]]:
    """Batches of noise by size: one image alone and two, or the batch that is written in the model."""
    image = image_among(loaded.inputs)
    counts = [loaded.batch] if loaded.batch else [1, 1] if loaded.tail else [1, 2]
    groups = [(image.shape, counts), *((other, counts[:1]) for other in image.others[:SIZES])]
    noise = {size: noise_of(max(counts), size).half().float() for size, _ in groups}
    return [[example(loaded.inputs, noise[size][-count:]) for count in some] for size, some in groups]


def _some_of(images: Images | None, loaded: Loaded) -> list[list[Batch]]:
    """A batch of images that lie far apart among those that are there: what is alike for noise may differ for them."""
    count = loaded.batch or (1 if loaded.tail else SEEN)
    if images is None or len(images) < (loaded.batch or 1):
        return []
    chosen = sorted({len(images) * i // count for i in range(count)})
    return [list(images.subset(chosen).batches(count))]


def _given(loaded: Loaded, file: Path, written: _Written, groups: Sequence[Sequence[Batch]]) -> list[list[Outputs]]:
    """What onnxruntime gives for the file itself, for each group of batches."""
    names = [output.name for output in loaded.outputs]
    turned = loaded.tail.turned if loaded.tail else {}
    own = [turned[name].name if name in turned else name for name in names]
    session = OnnxRuntime(file, optimise=False, outputs=[name for name in own if name not in written.outputs])
    found = [[given_by(session, loaded.inputs, batch, own) for batch in batches] for batches in groups]
    del session
    give_back()  # it has the weights, which the model has as well
    if not turned:
        return found
    both = [*zip(names, own, strict=True)]
    return [
        [{name: turned[name].by_rows(out[of]) if name in turned else out[of] for name, of in both} for out in some]
        for some in found
    ]


def _checks(
    loaded: Loaded, written: _Written, groups: Sequence[Sequence[Batch]], found: Sequence[Sequence[Outputs]]
) -> Iterator[tuple[OutputCheck, Batch]]:
    """The check of each output in each group, with a batch of the group."""
    for batches, outputs in zip(groups, found, strict=True):
        for check in program_checks(loaded.program, loaded.inputs, outputs, batches, AS_WRITTEN, written.step, TRIES):
            limit, usual_limit = (max(one, written.least) for one in (check.limit, check.usual_limit))
            yield replace(check, limit=limit, usual_limit=usual_limit), batches[-1]


def _first(loaded: Loaded, path: Path, file: Path, batch: Batch, far: float, requantize: bool) -> str:
    """Words about the first node whose numbers for a batch differ, as far as onnxruntime shows them; empty where none is
    found.
    """
    try:
        read = read_onnx(path, {one.name for one in loaded.inputs if not one.is_image}, requantize=requantize)
        graph = load_proto(file, data=False).graph
        names, own = [name for node in graph.node for name in node.output if name], {one.name for one in graph.output}
        session = OnnxRuntime(file, optimise=False, outputs=[name for name in dict.fromkeys(names) if name not in own])
        values = session.run(*(arrays := arrays_of(loaded.inputs, batch)))
        with torch.no_grad():
            for node, written in read.module.each_node(*map(torch.from_numpy, arrays)):
                for name, ours in written.items():
                    if name in values and _differs(ours, torch.from_numpy(values[name].copy()), far):
                        return f", first at node {node}"
    except Exception as error:
        if halt := stopped(error):
            raise halt from error
        return ""  # it is a help and no more
    return ""


def _differs(ours: torch.Tensor, theirs: torch.Tensor, far: float) -> bool:
    if not ours.is_floating_point():
        return False
    return ours.shape != theirs.shape or bool((ours - theirs).abs().max() > far * ours.abs().max())
