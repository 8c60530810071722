"""What a model runs in: eval mode, without what libraries print about their own internals."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

import torch
from torch import Tensor, nn


@contextmanager
def unwarned() -> Iterator[None]:
    """Without warnings of libraries: what a user has to read is a note or an error."""
    with warnings.catch_warnings(), without_advice():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_advice() -> Iterator[None]:
    """Without advice to the writers of torchao, which transformers imports where it is there, in torch's log."""

    def is_for_users(record: logging.LogRecord) -> bool:  # one for each time: a log has a filter once
        return "register_constant() on Enum subclasses" not in record.getMessage()

    log = logging.getLogger("torch.utils._pytree")
    log.addFilter(is_for_users)
    try:
        yield
    finally:
        log.removeFilter(is_for_users)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export prints about its own internals; the MHA fast path is not exportable. Of the process: for one
    thread at a time (core/call.py).
    """
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with unwarned(), redirect_stderr(_OfOthers(sys.stderr)):
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)


class _OfOthers(io.TextIOBase):
    """A stream without what the thread that made it writes: others have their own to say."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._mine = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if self._stream is not None and threading.get_ident() != self._mine:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and threading.get_ident() != self._mine:
            self._stream.flush()


@contextmanager
def tensors_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards each buffer of the module, and each tensor that is a plain attribute of a part, is the tensor that it was,
    with the numbers that it had.
    """
    before = [
        (place, name, value, value.detach().clone())
        for part in module.modules()
        for place in (part._buffers, vars(part))
        for name, value in place.items()
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for place, name, value, numbers in before:
                place[name] = value
                if not torch.allclose(value, numbers, rtol=0, atol=0, equal_nan=True):
                    value.copy_(numbers)


@contextmanager
def outside_inference(module: nn.Module) -> Iterator[None]:
    """Tensors of the module that were made in torch.inference_mode, which cannot be exported, are ordinary ones with the same
    numbers; afterwards the module has its own again.
    """
    own, ordinary = list[tuple[dict[str, Any], str, Tensor]](), dict[int, Tensor]()
    for part in module.modules():
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for place in places:
            for name, value in place.items():
                if isinstance(value, Tensor) and value.is_inference():
                    own.append((place, name, value))
    for place, name, value in own:
        if id(value) not in ordinary:  # tied weights stay one
            numbers = value.detach().clone()
            ordinary[id(value)] = nn.Parameter(numbers, value.requires_grad) if isinstance(value, nn.Parameter) else numbers
        place[name] = ordinary[id(value)]
    try:
        yield
    finally:
        for place, name, value in own:
            place[name] = value


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
