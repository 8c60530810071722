"""The most memory that a process has held. `bench` gives the text of `peak` to processes without fewbit."""

from __future__ import annotations


def peak() -> int:
    """The most bytes of resident memory that this process has held, without its children and whoever started it.

    On Linux it is VmHWM, counted since the program began or since it was set back; ru_maxrss is kept from the process before,
    so it stands in only where there is no VmHWM.
    """
    import resource
    import sys

    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
