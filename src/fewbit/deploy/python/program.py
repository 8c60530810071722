"""The program: python predict.py PICTURE ..."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.prepare import placed, prepared, whole
from fewbit.deploy.python.classify import answer
from fewbit.deploy.python.pictures import model_input, opened
from fewbit.deploy.python.session import Run, session

HERE = Path(__file__).parent


class Model:
    """A model with what `preprocess.json` and `task.json` say of it."""

    def __init__(self, folder: Path = HERE, file: str = "") -> None:
        self.how: Mapping[str, Any] = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
        self.task: Mapping[str, Any] = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        name = file or self.task["file"]
        path = folder / name if (folder / name).exists() else folder.parent / name  # in a run it lies beside the folder
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
    """Print an answer in JSON for each picture; maps are written beside it, as PNG or, of real numbers, as .npy. With
    `--pixels` write instead what the example in C++ reads: the resized pixels, uint8 (height, width, channels).
    """
    given = dict(word.split("=", 1) for word in words if "=" in word)
    files = [Path(word) for word in words if "=" not in word and word != "--pixels"]
    if not files or {"-h", "--help"}.intersection(words):
        print("python predict.py [--pixels] PICTURE ... [INPUT=FILE.npy ...]", file=sys.stderr)
        return 2
    model = Model()
    more = {name: np.load(file) for name, file in given.items()}
    for file in files:
        try:
            pixels = opened(file.read_bytes(), str(file), model.how["size"][0])
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        if "--pixels" in words:
            numbers = whole(prepared(pixels, model.how), model.how).astype(np.uint8).transpose(1, 2, 0)
            file.with_suffix(".pixels").write_bytes(numbers.tobytes())
            continue
        found = model(pixels, **more)
        if isinstance(found.get("map"), np.ndarray):  # and no output that is called so
            found["map"] = saved(found["map"], file.with_suffix(""))
        print(json.dumps({"picture": str(file), **found}, ensure_ascii=False))
    return 0


def saved(values: NDArray[Any], stem: Path) -> str:
    """Write a map, and give the name of its file."""
    path = stem.with_name(stem.name + (".answer.npy" if values.dtype.kind == "f" else ".answer.png"))
    if values.dtype.kind == "f":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return str(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
