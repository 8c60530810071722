"""How a command ends: one message and an exit code for what a user can fix or has stopped, and no traceback.

Exit codes: 0 success, 1 the file is not right, not good enough or does not pay, 2 the request was invalid or the machine
stopped the work (disk, memory), 128 + its number for a signal (130 Ctrl-C).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fewbit.cli.terminal import err, escape_what_is_lacking
from fewbit.errors import FewbitError, FewbitFailed, Signalled, Stopped, stopped, target_of

AGAIN = 2.0  # seconds after which a signal comes again


@contextmanager
def ending() -> Iterator[None]:
    """What ends the block is told in one line, and SystemExit has its exit code; a fault of fewbit's own goes on."""
    escape_what_is_lacking()
    try:
        with _signals():
            yield
    except (Exception, KeyboardInterrupt, Signalled) as error:
        told = _told(error)
        if told is None:
            raise
        message, code = told
        _open_output()
        with suppress(Stopped, BrokenPipeError):
            text = " ".join([message, *getattr(error, "__notes__", ())]).replace("\n", "\\n")  # a name may have one
            err.print(text, style="bold red", soft_wrap=True)
        raise SystemExit(code) from None


def _told(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of what ends a command; None for a fault of fewbit's own, whose traceback is needed."""
    if isinstance(error, BrokenPipeError):
        return "Nothing reads the output any more (broken pipe).", 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 128 + signal.SIGINT
    if isinstance(error, Signalled):
        return f"Ended by {signal.Signals(error.exit_code - 128).name}.", error.exit_code
    halt = stopped(error) if isinstance(error, Exception) else None
    if halt is None and isinstance(error, OSError):
        found = f"{target_of(error) or 'a file'}: {error.strerror or error}"
        halt = Stopped(f"{found}. Fix that (is it there, and may you use it?) and give the same command again.")
    known = halt or error
    if isinstance(known, FewbitError | FewbitFailed):
        return f"{type(known).__name__}: {known}", known.exit_code
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block, each again after `AGAIN` seconds where a library has swallowed it."""

    owner, came = os.getpid(), 0

    def end(number: int, frame: object) -> None:
        nonlocal came
        if os.getpid() != owner:  # a process that a library has forked, and ends in this way
            os._exit(128 + number)
        came = came if number == signal.SIGALRM else number
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise KeyboardInterrupt if came == signal.SIGINT else Signalled(came)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    hook, default = sys.unraisablehook, (signal.SIG_DFL, signal.default_int_handler)

    def told(missed: Any) -> None:  # raised where Python cannot pass it on: it comes again
        if not isinstance(missed.exc_value, KeyboardInterrupt | Signalled):
            hook(missed)

    handled = [number for number, handler in before.items() if handler in default]  # nohup ignores SIGHUP
    for number in handled:
        signal.signal(number, end)
    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in handled:
            signal.signal(number, before[number])


def _open_output() -> None:
    """Where standard output cannot be written, let Python's own flush at the end find a file that takes everything."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
