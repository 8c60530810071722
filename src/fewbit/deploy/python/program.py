"""The program: python predict.py PICTURE ..."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.prepare import placed, prepared, whole
from fewbit.deploy.python.classify import answer
from fewbit.deploy.python.pictures import model_input, opened
from fewbit.deploy.python.session import Run, session

HERE = Path(__file__).resolve().parent  # of the program itself, where it is called by a link
USAGE = "python predict.py [--pixels] PICTURE ... [INPUT=FILE.npy ...]"
HELP = f"""{USAGE}

Prints an answer in JSON for each picture. Maps are written to the folder answers beside it.
INPUT=FILE.npy gives another input of the model what is in the file, for all pictures.

--pixels    write PICTURE.pixels instead, which the example in C++ reads: resized, uint8 (height, width, channels)
-h, --help  print this"""


class Model:
    """A model with what `preprocess.json` and `task.json` say of it."""

    def __init__(self, folder: Path = HERE, file: str = "") -> None:
        """Raises FileNotFoundError where a file of the folder or the model is not there, ValueError where one is broken."""
        self.how: Mapping[str, Any] = fields_of(folder / "preprocess.json")
        self.task: Mapping[str, Any] = fields_of(folder / "task.json")
        name = file or self.task["file"]
        path = folder / name if (folder / name).exists() else folder.parent / name  # in a run it lies beside the folder
        if not path.is_file():
            raise FileNotFoundError(f"{name} is neither in {folder} nor beside it; keep predict.py with its files.")
        self.run: Run = session(path, self.task["outputs"], self.task["runtime"])
        others = folder / "inputs.npz"
        self.others: Mapping[str, NDArray[Any]] = dict(np.load(others)) if others.exists() else {}

    def __call__(self, pixels: NDArray[Any], **more: NDArray[Any]) -> dict[str, Any]:
        """The answer for one picture (h, w, channels); `more` takes the place of what else the model takes."""
        return self.answer(self.run(self.feeds(pixels, **more)), pixels.shape[0], pixels.shape[1])

    def feeds(self, pixels: NDArray[Any], **more: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the file takes for one picture; a file with a batch written in it takes the picture so often."""
        x = model_input(pixels, self.how)
        return {self.task["input"]: np.repeat(x[None], self.task["batch"], axis=0), **self.others, **more}

    def answer(self, outputs: list[NDArray[Any]], high: int, wide: int) -> dict[str, Any]:
        """What the outputs of the file say of a picture of a size."""
        first = [y[:1] if self.task["batch"] > 1 else y for y in outputs]
        return answer(first, self.task, placed(high, wide, self.how))


def main(words: list[str]) -> int:
    """Print an answer in JSON, of ASCII alone, for each picture; maps are written to the folder `answers` beside it, as PNG or,
    of real numbers, as .npy. With `--pixels` write instead what the example in C++ reads: the resized pixels, uint8 (height,
    width, channels).
    Gives the exit code: 2 where something cannot be read, written or understood.
    """
    given = [word for word in words if word != "--pixels"]
    if {"-h", "--help"}.intersection(words):
        print(HELP)
        return 0
    if not given:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        model = Model()
        files, more = told_apart(given, model.others)
        for file in files:
            pixels = opened(file.read_bytes(), str(file), model.how["size"][0])
            if len(given) < len(words):
                numbers = whole(prepared(pixels, model.how), model.how).astype(np.uint8).transpose(1, 2, 0)
                written(file.with_name(f"{file.name}.pixels"), numbers.tobytes())
                continue
            found = model(pixels, **more)
            if "map" in found:
                found["map"] = written(*map_file(found["map"], file))
            print(json.dumps({"picture": str(file), **found}))
    except (OSError, ValueError) as error:
        known = sys.stderr.encoding or "ascii"  # characters that it lacks become escapes
        print(str(error).encode(known, "backslashreplace").decode(known), file=sys.stderr)
        return 2
    return 0


def fields_of(path: Path) -> dict[str, Any]:
    """What a file of JSON says. Raises FileNotFoundError or ValueError with its name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}; keep predict.py with its files.")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON: {error}; take that of the run again.") from error
    return found


def told_apart(words: list[str], others: Mapping[str, NDArray[Any]]) -> tuple[list[Path], dict[str, NDArray[Any]]]:
    """The pictures, and by name the arrays of INPUT=FILE.npy: a file that is there is a picture, whatever its name. Raises
    ValueError for what is neither.
    """
    files: list[Path] = []
    more: dict[str, NDArray[Any]] = {}
    for word in words:
        name = next((one for one in others if word.startswith(f"{one}=")), None)
        if Path(word).is_file():
            files.append(Path(word))
        elif name is None and word.startswith("-"):
            raise ValueError(f"{word} is not an option; there are --pixels and --help. Type {USAGE}")
        elif name is None:
            kinds = " and ".join(["pictures", *(f"{one}=FILE.npy" for one in others)])
            raise ValueError(f"{word} is not a file that is there; the program takes {kinds}.")
        elif name in more:
            raise ValueError(f"{name}= is given twice; give one file for all pictures.")
        else:
            more[name] = array_of(word[len(name) + 1 :], name, others[name])
    if not files:
        raise ValueError(f"There is no picture; give one: {USAGE}")
    return files, more


def array_of(file: str, name: str, tried: NDArray[Any]) -> NDArray[Any]:
    """What an input of the model is given. Raises ValueError where that is not of the type and shape that it was tried with."""
    wanted = f"{tried.dtype} {tried.shape}, written with numpy.save"
    if not Path(file).is_file():
        raise ValueError(f"{name}={file}: {file} is not a file that is there; give one with {wanted}.")
    try:
        values = np.load(file)
    except Exception as error:  # of any other kind of file
        raise ValueError(f"{name}={file} cannot be read as a .npy file: {error}; give one with {wanted}.") from error
    if not isinstance(values, np.ndarray) or (values.dtype, values.shape) != (tried.dtype, tried.shape):
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
        raise ValueError(f"{name}={file} holds {found}; the model takes {wanted}.")
    return values


def map_file(values: NDArray[Any], picture: Path) -> tuple[Path, bytes]:
    """The path and the bytes of the file of a map: apart from the pictures, under the whole name of its own."""
    content, real = io.BytesIO(), values.dtype.kind == "f"
    if real:
        np.save(content, values)
    else:
        Image.fromarray(values).save(content, "PNG")
    return picture.parent / "answers" / f"{picture.name}.{'npy' if real else 'png'}", content.getvalue()


def written(path: Path, content: bytes) -> str:
    """Write a file, whole or not at all, and give its path. Raises OSError where that is not possible."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(f"{path} cannot be written: {error.strerror}; give pictures in a folder where you may write.") from error
    return str(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
