"""A call of fewbit: one at a time in a process, in the state of torch that its numbers need, which is put back afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fewbit.progress import Lines, Progress

WAITS = "Another call of fewbit is at work in this process; this one waits for it. In processes of their own both run at once."
AUTOCAST = ("cpu", "cuda", "mps")  # devices that have it

_turn = threading.RLock()  # a sweep calls runs, a run its stages


def _after_fork() -> None:
    """In a forked process nobody is at work."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def one_call(progress: Progress | None = None) -> Iterator[None]:
    """While no other thread is in a call: torch.export, the filters of warnings and of logging, and torch's own settings are of
    the process, not of a thread. A thread that has to wait says so once; calls inside of a call do not wait.
    """
    turn = _turn
    if not turn.acquire(blocking=False):
        began = time.monotonic()
        (progress or Lines()).say(WAITS)
        turn.acquire()
        if progress is not None:
            progress.waited(time.monotonic() - began)
    try:
        with usual_torch():
            yield
    finally:
        turn.release()


@contextmanager
def usual_torch() -> Iterator[None]:
    """torch as it is where nobody has set anything: gradients, float32, the processor; no autocast and no inference mode.

    Whoever calls fewbit may have set each of these for work of their own, and has it again afterwards.
    """
    import torch

    kind, device = torch.get_default_dtype(), torch.get_default_device()
    autocast = [name for name in AUTOCAST if torch.is_autocast_enabled(name)]
    with ExitStack() as after:
        after.enter_context(torch.inference_mode(False))
        after.enter_context(torch.enable_grad())
        if device.type != "cpu":
            after.enter_context(torch.device("cpu"))
        if kind != torch.float32:
            after.callback(torch.set_default_dtype, kind)
            torch.set_default_dtype(torch.float32)
        for name in autocast:
            after.callback(torch.set_autocast_enabled, name, True)
            torch.set_autocast_enabled(name, False)
        yield
