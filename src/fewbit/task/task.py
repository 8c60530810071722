"""Which task a model has: named by `--task`, said by the model itself, or seen from its outputs where these leave no doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fewbit.core.graph import Graph
from fewbit.core.task import Output, Signature, Task
from fewbit.errors import BadModel, UnknownName
from fewbit.task.classify import Classify
from fewbit.task.decode import DECODERS
from fewbit.task.depth import Depth
from fewbit.task.detect import Detect
from fewbit.task.embed import Embed
from fewbit.task.restore import Restore
from fewbit.task.segment import Segment
from fewbit.task.tensors import Tensors

OWN = ".py:"  # what the name of a task of one's own has in it
TASKS: Mapping[str, Callable[[Signature, str], Task]] = {
    "classify": Classify.of,
    "detect": Detect.of,
    "segment": Segment.of,
    "depth": Depth.of,
    "embed": Embed.of,
    "restore": Restore.of,
    "tensors": Tensors.of,
}
VARIANTS: Mapping[str, tuple[str, ...]] = {  # what may stand behind a colon; without it the first is meant
    "detect": ("", *DECODERS),
    "segment": ("logits", "probability"),
    "depth": ("metric", "relative"),
}


def check_name(spec: str) -> None:
    """Raise UnknownName for no task, or for no kind of one; a file is looked at when it is opened."""
    name, _, variant = spec.partition(":")
    if OWN in spec:
        return
    if name not in TASKS:
        raise UnknownName("task", name, TASKS, "Your own is --task file.py:NAME.")
    if variant and variant not in VARIANTS.get(name, ()):
        raise UnknownName(f"kind of task {name}", variant, VARIANTS.get(name) or ("none",))


def task_named(spec: str, model: Signature) -> Task:
    """A task by its name for a model. Raises BadModel where the outputs are not what it needs, or UnknownName."""
    check_name(spec)
    name, _, variant = spec.partition(":")
    try:
        return TASKS[name](model, variant or next(iter(VARIANTS.get(name, ("",)))))
    except BadModel as error:
        found = ", ".join(f"{one.name} (batch, {', '.join(map(str, one.shape))})" for one in model.outputs)
        raise BadModel(f"--task {spec}: {error}; the model gives {found}. Give another task: {', '.join(TASKS)}.") from error


def recognise(outputs: Sequence[Output]) -> Task:
    """The task of a model with these outputs: a class where one output, alone or named `logits`, is a list of real numbers."""
    for i, output in enumerate(outputs):
        if output.is_list and (output.name == "logits" or len(outputs) == 1):
            return Classify(i, output.shape[0])
    return Tensors(tuple(output.is_real for output in outputs))


def task_of(graph: Graph) -> Task:
    """The task that a graph was given, or that its outputs say."""
    return graph.task or recognise(graph.outputs)
