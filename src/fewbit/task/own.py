"""A task of a user's own, in code that nobody has tested: what its methods raise and give is looked at when they are called.

`watched` is called once, where the task is named; whoever has the task need not know. What is wrong is BadModel, which names
the file, the method, and what it raised or gave. The tasks of fewbit are not looked at: their faults are fewbit's.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewbit.core.task import Meter, Output, Outputs, OutputScore, Rating, Scored, Task, told
from fewbit.errors import BadModel, FewbitError, shortened, stopped

ROUNDING = 1e-3  # how far below 0 the distance of an image may be: sums of many numbers in float32


def watched(task: Task) -> Task:
    """A user's task, each of whose own methods is looked at whenever it is called, its meters as well; one of fewbit as it is.

    Raises BadModel where it has no name, a number of classes that is none, or logits that are no number of an output.
    """
    kind = type(task)
    if kind.__module__.startswith("fewbit."):
        return task
    named = ("spec", "classes", "logits")
    spec, classes, logits = (_asked(task, task, name, partial(getattr, task, name)) for name in named)
    if not isinstance(spec, str) or not spec:
        raise _wrong(task, task, "name", spec, "a text")
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 2):
        raise _wrong(task, task, "classes", classes, "None, or a whole number of 2 or more")
    if logits is not None and (not isinstance(logits, int) or isinstance(logits, bool) or logits < 0):
        raise _wrong(task, task, "logits", logits, "None, or the number of an output, from 0")
    own = {
        name: _looked(getattr(kind, name), look)
        for name, look in LOOKS.items()
        if getattr(kind, name) is not getattr(Task, name)
    }
    found = copy.copy(task)
    object.__setattr__(
        found, "__class__", type(kind.__name__, (kind,), {"__module__": kind.__module__, "__slots__": (), **own})
    )
    return found


def fitting(task: Task, outputs: Sequence[Output], answers: Callable[[Sequence[str]], bool]) -> Task:
    """The same for a model with these outputs; `answers` says whether pieces of `predict.py` make an answer.

    Raises BadModel where its logits are no list of its classes, or its pieces make no answer.
    """
    found = watched(task)
    if found is task:
        return task
    if (index := found.logits) is not None:
        count = outputs[index].shape[0] if index < len(outputs) and outputs[index].is_list else 0
        if not count or found.classes not in (None, count):
            many = "classes" if found.classes is None else f"{found.classes} classes"
            raise _wrong(task, task, "logits", index, f"the number of an output (batch, {many})")
    pieces, _ = found.program()
    if not answers(pieces):
        raise _wrong(task, task, "program", pieces, 'pieces of predict.py that make an answer, as in ("numbers",),')
    return found


def _looked(method: Callable[..., Any], look: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a user's task, and then a look at what it gave."""

    @wraps(method)
    def asked(task: Task, *given: Any) -> Any:
        return look(task, _asked(task, task, method.__name__, partial(method, task, *given)), *given)

    return asked


def _divergence(task: Task, found: Any, exact: Outputs, outputs: Outputs) -> Tensor | float:
    single = isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex()
    if not single and (not isinstance(found, Real) or isinstance(found, bool)):
        raise _wrong(task, task, "divergence", found, "a number, or a tensor of shape ()")
    value = found.detach() if isinstance(found, Tensor) else torch.tensor(float(found))
    if not _is_distance(value / len(exact[0]), exact, outputs):
        raise _wrong(task, task, "divergence", float(value), "a finite number of 0 or more")
    return found  # type: ignore[no-any-return]


def _is_distance(values: Tensor, exact: Outputs, outputs: Outputs) -> bool:
    """Whether values, by image, are finite and 0 or more, up to rounding. Of outputs that are not finite they may be what they
    like: that is no fault of the task, and whoever asked sees to it.
    """
    finite = all(bool(one.isfinite().all()) for one in (*exact, *outputs))
    return not finite or bool((values.isfinite() & (values >= -ROUNDING)).all())


def _softened(task: Task, found: Any, outputs: Outputs, temperature: float) -> Outputs:
    right = isinstance(found, Sequence) and len(found) == len(outputs) and all(isinstance(one, Tensor) for one in found)
    if not right:
        raise _wrong(task, task, "softened", found, f"a list of {len(outputs)} tensors, one for each output,")
    return found  # type: ignore[no-any-return]


def _read(task: Task, found: Any, path: Path, images: Scored) -> list[Any]:
    if not isinstance(found, Sequence) or len(found) != len(images.names):
        raise _wrong(task, task, "read", found, f"a list of what is known of each of the {len(images.names)} images")
    return list(found)


def _drawn(task: Task, found: Any, picture: Image.Image, outputs: Outputs) -> Image.Image | None:
    if found is not None and not isinstance(found, Image.Image):
        raise _wrong(task, task, "drawn", found, "a picture of PIL, or None")
    return found


def _program(task: Task, found: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], tuple) and isinstance(found[1], dict)
    if not pair or not all(isinstance(name, str) for name in (*found[0], *found[1])):
        raise _wrong(task, task, "program", found, "a tuple of the names of pieces, and a dictionary of what they need,")
    try:
        json.dumps(found[1])
    except (TypeError, ValueError, RecursionError):
        raise _wrong(task, task, "program", found[1], "what JSON can hold") from None
    return found  # type: ignore[no-any-return]


def _meter(task: Task, found: Any, truth: Any) -> Meter:
    if not all(callable(getattr(found, name, None)) for name in ("add", "rating")):
        raise _wrong(task, task, "meter", found, "an object with the methods add and rating")
    return _Watched(task, found)


LOOKS: Mapping[str, Callable[..., Any]] = {  # method -> what looks at what it gave
    "meter": _meter,
    "divergence": _divergence,
    "softened": _softened,
    "read": _read,
    "drawn": _drawn,
    "program": _program,
}


ROW = "a tuple of dictionaries that have a `what`, maybe a `unit` and what is `better`, more or less, and else finite numbers"


@dataclass
class _Watched:
    """A meter of a user's task."""

    task: Task
    meter: Meter

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor | None:
        found, count = _asked(self.task, self.meter, "add", partial(self.meter.add, exact, outputs)), len(exact[0])
        if found is not None and (not isinstance(found, Tensor) or tuple(found.shape) != (count,) or found.is_complex()):
            raise _wrong(self.task, self.meter, "add", found, f"None, or a tensor of shape ({count},), a number for each image")
        if found is not None and not _is_distance(found, exact, outputs):
            bad = found[~(found.isfinite() & (found >= -ROUNDING))][0].item()
            raise _wrong(
                self.task, self.meter, "add", bad, "None, or a finite number of 0 or more for each image", " for an image"
            )
        return found

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        found = _asked(self.task, self.meter, "rating", partial(self.meter.rating, outputs))
        if not isinstance(found, Rating):
            raise _wrong(self.task, self.meter, "rating", found, "a fewbit.Rating")
        for name, value, right, allowed in _parts(found):
            if not right:
                raise _wrong(self.task, self.meter, "rating", value, allowed, f" as {name}")
        return found


def _parts(rating: Rating) -> list[tuple[str, Any, bool, str]]:
    """The fields of a rating: name, value, whether it may be, and what may."""
    scores, percent = (rating.float_score, rating.score), "a number of percent, 0 to 100"
    both = scores == (None, None) or all(map(_is_finite, scores))
    pair = isinstance(rating.interval, tuple | list) and len(rating.interval) == 2
    texts = [(name, getattr(rating, name)) for name in ("measure", "agreement_measure", "why", "unit")]
    rows = isinstance(rating.rows, tuple | list) and all(map(_is_row, rating.rows))
    return [
        *((name, text, isinstance(text, str), "a text") for name, text in texts),
        ("agreement", rating.agreement, _is_finite(rating.agreement) and -1e-6 <= rating.agreement <= 100 + 1e-6, percent),
        ("interval", rating.interval, pair and all(map(_is_finite, rating.interval)), "two finite numbers"),
        ("float_score and score", scores, both, "two finite numbers, or twice None"),
        ("rows", rating.rows, rows, ROW),
    ]  # fmt: skip


def _is_row(row: Any) -> bool:
    if not isinstance(row, Mapping) or not isinstance(row.get("what"), str) or not all(isinstance(key, str) for key in row):
        return False
    said = told(row)
    texts = isinstance(said["unit"], str) and said["better"] in ("more", "less")
    return texts and all(_is_finite(row[key]) for key in row if key not in ("what", "unit", "better"))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _asked(task: Task, of: object, name: str, ask: Callable[[], Any]) -> Any:
    """What `ask` gives, which is a method or an attribute of a user's object."""
    try:
        return ask()
    except FewbitError:
        raise
    except (Exception, SystemExit) as error:
        if stopped(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{type(error).__name__}: {shortened(lines[0], 300) if lines else 'no message'}".rstrip(". ")
        file = _file(task)
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f", at line {numbers[-1]}" if numbers else ""
        raise BadModel(f"{_called(task, of, name)} raised {what}{where}. Fix it.") from error


def _wrong(task: Task, of: object, name: str, found: Any, allowed: str, part: str = "") -> BadModel:
    shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.80}"
    return BadModel(f"{_called(task, of, name)} gave {shown}{part}; {allowed} is needed. Fix it.")


def _called(task: Task, of: object, name: str) -> str:
    return f"--task {_file(task)}:{type(task).__name__}: {type(of).__name__}.{name}"


def _file(task: Task) -> str:
    """The file of a task's class, or its module where there is none, as in a notebook."""
    try:
        return inspect.getsourcefile(type(task)) or type(task).__module__
    except (TypeError, OSError):
        return type(task).__module__
