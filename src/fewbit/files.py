"""Atomic file writes, JSON, bit-packing of codes, and the journal of a resumable run."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fewbit.core.pages import mapped
from fewbit.errors import AGAIN, FULL, BadFile, Stopped, shortened

if TYPE_CHECKING:
    from torch import Tensor


def beside(path: Path) -> Path:
    """The file that `write_atomic` fills before it is moved to `path`."""
    return path.with_name(f".{path.name}.part{path.suffix}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place. Raises Stopped where it cannot be written."""
    if not path.name:
        raise BadFile(f"{path} has no name of its own; give the name of a file, as in {path / 'x.json'}.")
    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # as for any new file; safetensors gives its own to nobody else
        write(part)
        part.chmod(mode)
        os.replace(part, path)
    except Exception as error:
        number = _os_error(error)
        if number is None:
            raise
        what = FULL.get(number) or os.strerror(number)
        raise Stopped(f"{path} cannot be written: {what}. Free some space or give another folder: --out DIR.") from error
    finally:
        with suppress(OSError):  # a folder that is a file has no neighbour either
            part.unlink()


def write_stream(path: Path, write: Callable[[Any], object]) -> None:
    """The same for a `write` that fills an open file. torch's writers end the process where the file refuses a byte, so the
    file takes them all, and what was refused is raised afterwards.
    """

    def fill(part: Path) -> None:
        with part.open("wb") as file:
            stream = _Stream(file)
            write(stream)
        if stream.error is not None:
            raise stream.error

    write_atomic(path, fill)


class _Stream(io.RawIOBase):
    """An open file whose `write` never fails; `error` is what did."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *_: int) -> int:
        """torch.export rewinds what it has written, for readers."""
        return 0


def _os_error(error: Exception) -> int | None:
    """The number of the operating system's error; libraries in Rust have it in their message alone."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    match = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))
    return int(match[1] or match[2]) if match else None


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with keys in insertion order. Raises ValueError for NaN."""
    text = json_text(value)
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def json_text(value: object) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises BadFile where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # as an editor may have saved it
    except FileNotFoundError as error:
        raise BadFile(f"{path} does not exist; is {path.parent} a folder that `fewbit quantize` wrote?") from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is not readable JSON ({error}); {AGAIN}") from error


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its own text. Raises ValueError for NaN."""
    write_json(path, {**record, "digest": text_digest(record)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest. Raises BadFile where it is missing or has changed since."""
    record = read_json(path)
    rest = {name: value for name, value in record.items() if name != "digest"} if isinstance(record, dict) else {}
    if not rest or json_text({**rest, "digest": text_digest(rest)}) != path.read_text(encoding="utf-8"):
        raise BadFile(f"{path} is not as fewbit wrote it.")
    return rest


def text_digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of the text of a JSON object."""
    return hashlib.sha256(json_text(record).encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises BadFile where it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"{path} is not readable ({error}); {AGAIN}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whatever layout the tensors have in memory and whatever memory they share. Raises Stopped where
    it cannot be written.
    """
    from safetensors.torch import save_file

    alone: dict[str, Tensor] = {}
    taken = set[int]()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        place = own.untyped_storage().data_ptr()
        alone[name] = own.clone() if place in taken else own
        taken.add(place)
    write_atomic(path, lambda part: save_file(alone, part, None if about is None else dict(about)))


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The same, each tensor in the file's own pages. Nobody may write to the tensors, or to the file."""
    import torch

    own = read_tensors(path)  # which looks at the file, and has its types
    pages = mapped(path)
    size = int.from_bytes(pages[:8], "little")
    rows = json.loads(pages[8 : 8 + size])
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        start = 8 + size + rows[name]["data_offsets"][0]
        full = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start) if tensor.numel() else tensor
        found[name] = full.view(tensor.shape)
    return found


def write_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write unfinished work, with the SHA-256 that `read_state` compares."""
    text = json.dumps(about)
    write_tensors(path, tensors, {"about": text, "sha256": _state_digest(tensors, text)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of unfinished work. Raises BadFile where anything of it has changed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _state_digest(tensors, said["about"]) != said["sha256"]:
            raise ValueError("its SHA-256 is wrong")
        return tensors, json.loads(said["about"])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def _state_digest(tensors: Mapping[str, Tensor], about: str) -> str:
    import torch

    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> BadFile:
    why = shortened(str(error).partition("\n")[0], 100)
    return BadFile(f"{path} is damaged ({why}), so nothing can go on from it; the same command again starts anew.")


@contextmanager
def going_on_from(path: Path) -> Iterator[Any]:
    """What `torch.save` has left in a file. Raises BadFile where a byte of it has changed, or where the block cannot use it."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:  # torch does not look at checksums
                raise ValueError(f"the checksum of {member} is wrong")
        yield torch.load(path, weights_only=True)
    except (
        OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise _damaged(path, error) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def pack(codes: Tensor, bits: int, low: int) -> Tensor:
    """Codes of `bits` each, packed back to back, lowest bit first, as uint8 (ceil(n * bits / 8),).

    code - low is stored, so signed codes need no sign bit.
    """
    import torch

    offset = (codes.flatten().to(torch.int64) - low).numpy()
    if offset.size and not (offset.min() >= 0 and offset.max() < 2**bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits from {low}")
    spread = (offset[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, low: int, shape: tuple[int, ...]) -> Tensor:
    """The int32 codes that `pack` packed. Raises ValueError where the number of bytes does not match the shape."""
    import torch

    count = int(np.prod(shape, dtype=np.int64))
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f"{packed.numel()} bytes for {count} codes of {bits} bits")
    spread = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.int64)
    return torch.from_numpy((spread @ weights + low).astype(np.int32)).reshape(shape)


class Journal:
    """Slow results in a file, one line each, in the order of the calls.

    A resumed run does not compute them again: the same keys in the same order return the values of the file; at the first
    other key, and at a line that was cut off or does not match its checksum, the rest of the file is dropped. Without a path
    nothing is stored. `clock` returns seconds, `spent` are those of the work before the journal began.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic, spent: float = 0.0) -> None:
        self._path, self._clock = path, clock
        self._known: list[dict[str, Any]] = []
        self._place = 0  # bytes of the lines that were used
        if path is not None and path.exists():
            with suppress(ValueError, KeyError, UnicodeDecodeError):  # a line that was cut off, or changed, ends the file
                for line in path.read_bytes().splitlines(keepends=True):
                    row = json.loads(line)
                    if row.pop("check") != _check(row):
                        break
                    self._known.append({k: row[k] for k in ("key", "value", "seconds")} | {"bytes": len(line)})
        self._known.reverse()
        self._before, self._began = spent, clock()

    @property
    def replaying(self) -> bool:
        """Whether results of an earlier run are left."""
        return bool(self._known)

    @property
    def seconds(self) -> float:
        """Seconds of work since the first run began, without the time between runs."""
        return self._before if self._known else self._before + self._clock() - self._began

    def value(self, key: str, compute: Callable[[], float]) -> float:
        """The result for a key: the next line of the file if it has this key, else computed and written."""
        if self._known and self._known[-1]["key"] == key:
            row = self._known.pop()
            self._place += row["bytes"]
            self._before, self._began = row["seconds"], self._clock()
            return float("inf") if row["value"] is None else float(row["value"])
        self._known.clear()
        number = compute()
        if self._path is not None:
            row = {"key": key, "value": number if math.isfinite(number) else None, "seconds": self.seconds}
            line = (json.dumps({**row, "check": _check(row)}) + "\n").encode()
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                file.seek(self._place)
                file.truncate()
                file.write(line)
            self._place += len(line)
        return number


def _check(row: Mapping[str, Any]) -> int:
    """The checksum of a line."""
    return zlib.crc32(json.dumps(row).encode())


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, whole as far as its end says; one of several disks is not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False
