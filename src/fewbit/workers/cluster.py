"""Tasks of Ray, on this machine or on a cluster: how it is started or joined, and what is sent to a task and comes back."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from fewbit.errors import FewbitError, Stopped, shortened
from fewbit.workers.local import LOCAL, Item, Result, Workers

INSTALL = 'pip install "fewbit[scale]"'
LIMIT = 20.0  # seconds in which a cluster answers
RETRIES = 3  # of a task whose worker or node was lost
USERS = "_fewbit_user_"  # what the name of a module begins with that is a file that the user named

LACKING = "a worker could not begin ({}); every machine needs this fewbit and its packages."

_KEPT: dict[str, Any] = {}  # in a worker: the function of its last task, by the name of its parcel


@dataclass(frozen=True)
class Cluster:
    """Tasks of Ray that take `cpus` processors each, and run in the folder of this process."""

    cpus: int = 1
    retries: int = RETRIES

    @property
    def count(self) -> int:
        import ray

        return max(int(ray.cluster_resources().get("CPU", 0)) // self.cpus, 1)

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], lost: Callable[[Item, str], Result] | None = None
    ) -> Iterator[tuple[int, Result]]:
        import ray

        task: Any = ray.remote(num_cpus=self.cpus, max_retries=self.retries)(_kept)
        shared = ray.put(_parcel(function))
        waiting = {task.remote(os.getcwd(), shared, item): index for index, item in enumerate(items)}
        try:
            while waiting:
                for done in ray.wait(list(waiting), num_returns=1)[0]:
                    index = waiting.pop(done)
                    yield index, _result(done, items[index], lost)
        finally:
            for unasked in waiting:  # where the caller wants no more, or an item has failed
                ray.cancel(unasked)

    def each(self, function: Callable[[range], Iterable[Result]], count: int, size: int) -> Iterator[Result]:
        early: dict[int, list[Result]] = {}
        parts, turn = [range(start, min(start + size, count)) for start in range(0, count, size)], 0
        for index, found in self.map(partial(_listed, function), parts):
            early[index] = found
            while turn in early:
                yield from early.pop(turn)
                turn += 1

    def everywhere(self, function: Callable[[Item], Result], item: Item) -> dict[str, Result]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= self.cpus]
        if not nodes:
            raise FewbitError(
                f"no machine of the cluster has {self.cpus} processors for a task; give fewer: --threads 1 and "
                "OMP_NUM_THREADS=1."
            )
        task: Any = ray.remote(num_cpus=0)(_there)
        sent = {}
        for node in nodes:
            there = task.options(scheduling_strategy=On(node["NodeID"], soft=False))
            sent[f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"] = there.remote(os.getcwd(), function, item)
        return {name: _result(reference, item, None) for name, reference in sent.items()}


def check_workers(workers: int | None, address: str | None, device: str = "cpu") -> None:
    """Raise FewbitError for options that cannot be, where that is known without starting anything."""
    if workers is None and address is None:
        return
    flag = f"--ray {address}" if workers is None else f"--workers {workers}"
    if workers is not None and address is not None:
        raise FewbitError(f"--workers starts workers here and --ray joins others; leave --workers {workers} or --ray out.")
    if address is not None and address != "auto":
        host, _, port = address.rpartition(":")
        if "/" in address or not host or not (port.isdecimal() and 0 < int(port) < 2**16):
            raise FewbitError(
                f"--ray {address} is no address; give HOST:PORT of the cluster's head, as in --ray 10.0.0.1:6379, or auto on "
                "a machine of the cluster."
            )
    if device != "cpu":
        raise FewbitError(f"{flag} gives tasks processors and no GPU; leave it or --device {device} out.")
    if importlib.util.find_spec("ray") is None:
        raise FewbitError(f"{flag} needs Ray, which is not installed: {INSTALL}.")


@contextmanager
def opened(workers: int | None, address: str | None, cpus: int = 1) -> Iterator[Workers]:
    """The workers that the options ask for, until the end of the block. Raises FewbitError where a cluster cannot be joined."""
    check_workers(workers, address)
    if workers is None and address is None:
        yield LOCAL
        return
    import ray

    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks whose results nobody asks for any more
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    before = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
    try:
        if address is None:
            _start((workers or 1) * cpus, quiet)
        else:
            _join(address, quiet)
        signal.signal(signal.SIGTERM, before)
        yield Cluster(cpus)
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _start(cpus: int, options: dict[str, Any]) -> None:
    """Start Ray on this machine, for tasks that take so many processors together."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False, **options)
    except Exception as error:
        why = shortened(str(error), 200)
        raise Stopped(f"Ray cannot be started here: {why} Give the command again, or do without: no --workers.") from error


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster that answers in time and has the versions of this machine."""
    import ray

    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    try:  # in a process of its own: Ray waits minutes for an address that answers not
        asked = [*command, *([] if address == "auto" else ["--address", address])]
        answers = subprocess.run(asked, capture_output=True, timeout=LIMIT, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        answers = False
    if not answers:
        raise FewbitError(
            f"--ray {address}: no cluster of Ray answers there within {LIMIT:g} seconds. `ray status` on its head says whether "
            "it runs; without --ray the work is done here."
        )
    try:
        ray.init(address, **options)
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        found = shortened(str(error), 300)
        raise FewbitError(
            f"--ray {address}: {found} Give both the same versions; here is Ray {version('ray')}: pip install ray==VERSION."
        ) from error
    except ConnectionError as error:
        raise FewbitError(f"--ray {address}: {error} Give this command on a machine of the cluster.") from error


@dataclass(frozen=True)
class _Parcel:
    """A function as bytes, and the bytes of its arrays: a task that has opened it needs nothing of them."""

    name: str
    function: pickle.PickleBuffer
    arrays: list[pickle.PickleBuffer]


def _parcel(function: Callable[[Item], Result]) -> _Parcel:
    """A function for all tasks. The workers of a machine read its tensors in Ray's store and write to none; the classes of a
    file that the user named travel as they are, since no worker can import them.
    """
    from ray import cloudpickle

    for name in [name for name in sys.modules if name.startswith(USERS)]:
        cloudpickle.register_pickle_by_value(sys.modules[name])
    text, arrays = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler: Any = cloudpickle.CloudPickler(text, protocol=5, buffer_callback=arrays.append)
    if (torch := sys.modules.get("torch")) is not None:
        pickler.dispatch_table[torch.Tensor] = _by_number
    pickler.dump(function)
    return _Parcel(uuid.uuid4().hex, pickle.PickleBuffer(text.getbuffer()), arrays)


def _by_number(tensor: Any) -> tuple[Any, ...]:
    """A tensor as bytes from its first number to its last, and how they lie: kernels add up in the order of the strides."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = tensor.detach().as_strided((span,), (1,)).cpu()
    raw = flat.view(sys.modules["torch"].uint8).numpy()
    return _tensor, (raw, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _tensor(raw: Any, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], device: Any) -> Any:
    """The tensor, in the memory of the bytes."""
    import torch

    if not raw.size:
        return torch.empty(shape, dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that is read-only
        flat = torch.from_numpy(raw)
    return flat.view(dtype).as_strided(shape, strides).to(device)


def _there(folder: str, function: Callable[[Item], Result], item: Item) -> Result:
    """A task: the function, in the folder of the process that asked."""
    try:
        os.chdir(folder)
    except OSError as error:
        machine = f"{socket.gethostname()} cannot work in {folder}: {error.strerror}"
        raise FewbitError(f"{machine}. Give the command in a folder that every machine has, as on a shared disk.") from error
    return function(item)


def _kept(folder: str, parcel: _Parcel, item: Item) -> Any:
    """A task: the same with the function in a parcel, which this process keeps for the next task, with what it has opened."""
    if parcel.name not in _KEPT:
        _KEPT.clear()
        try:
            _KEPT[parcel.name] = pickle.loads(parcel.function, buffers=parcel.arrays)
        except Exception as error:
            raise FewbitError(LACKING.format(error)) from error
    return _there(folder, _KEPT[parcel.name], item)


def _listed(function: Callable[[range], Iterable[Result]], indices: range) -> list[Result]:
    return list(function(indices))


def _result(reference: Any, item: Item, lost: Callable[[Item, str], Result] | None) -> Result:
    """The result of a task; what its function raised is raised here."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except RayTaskError as error:
        if isinstance(error.cause, RayError):
            why = str(error.cause).splitlines()[0]
            raise FewbitError(LACKING.format(why)) from error
        raise error.cause from None
    except RayError as error:
        memory = isinstance(error, OutOfMemoryError)
        why = "its machine had no memory left" if memory else f"its worker ended each of {RETRIES + 1} times it was tried"
        if lost is None:
            raise Stopped(f"{item!r:.80} could not be done: {why}.") from error
        return lost(item, why)
