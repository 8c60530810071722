"""Which task a model has: named by `--task`, said by the model itself, or seen from its outputs where these leave no doubt."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence

from fewbit.core.graph import Graph
from fewbit.core.task import Output, Signature, Task
from fewbit.errors import BadModel, UnknownName
from fewbit.task.classify import Classify
from fewbit.task.tensors import Tensors
from fewbit.tasks import OWN, TASKS


def check_name(spec: str) -> None:
    """Raise UnknownName for no task, or for no kind of one; a file is looked at when it is opened."""
    name, _, variant = spec.partition(":")
    if OWN in spec:
        return
    if name not in TASKS:
        raise UnknownName("task", name, TASKS, "Your own is --task file.py:NAME.")
    if variant and variant not in (variants := TASKS[name].variants):
        raise UnknownName(f"kind of task {name}", variant, variants if any(variants) else ("none",))


def task_named(spec: str, model: Signature) -> Task:
    """A task by its name for a model. Raises BadModel where the outputs are not what it needs, or UnknownName."""
    check_name(spec)
    name, _, variant = spec.partition(":")
    try:
        made: Task = pkgutil.resolve_name(TASKS[name].where).of(model, variant or TASKS[name].variants[0])
        return made
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
