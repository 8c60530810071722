"""What a model runs in: eval mode, without what libraries print about their own internals."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn


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
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards each of its parts is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
