"""Every task that `--task` names: its class in `task/`, what may stand behind a colon, and the help. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OWN = ".py:"  # what the name of a task of one's own has in it
BOXES = (  # how detectors write boxes: the decoders of task/decode.py
    "yolox", "yolov5", "yolov7", "yolov8", "yolo11", "yolov10", "detr", "rtdetr", "torchvision", "ssd",
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A task: its name, its class as module:name, what may stand behind a colon (without it the first is meant; where that is
    empty, the class says what to do), and what it is where the name does not say it.
    """

    name: str
    where: str
    variants: tuple[str, ...] = ("",)
    about: str = ""

    @property
    def help(self) -> str:
        """As `--task` takes it."""
        if (named := [one for one in self.variants if one]) == list(self.variants):
            return f"{self.name} (:{' or :'.join(named)})"
        return f"{self.name}:FORM ({', '.join(named)})" if named else f"{self.name}{f' ({self.about})' if self.about else ''}"


TASKS: Mapping[str, Known] = {
    task.name: task
    for task in (
        Known("classify", "fewbit.task.classify:Classify"),
        Known("detect", "fewbit.task.detect:Detect", ("", *BOXES)),
        Known("segment", "fewbit.task.segment:Segment", ("logits", "probability")),
        Known("depth", "fewbit.task.depth:Depth", ("metric", "relative")),
        Known("embed", "fewbit.task.embed:Embed"),
        Known("restore", "fewbit.task.restore:Restore"),
        Known("tensors", "fewbit.task.tensors:Tensors", about="numbers"),
    )
}
HELP = ", ".join(task.help for task in TASKS.values())
