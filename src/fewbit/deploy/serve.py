"""A small page and a JSON endpoint for a run: a picture in, the float and the integer answer with their times out."""

from __future__ import annotations

import math
import statistics
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.images import data_uri
from fewbit.deploy.compared import compared
from fewbit.deploy.folder import FOLDER, picture_name, rendered
from fewbit.deploy.program import loaded
from fewbit.errors import BadFile
from fewbit.files import read_json
from fewbit.folder import MODEL, REPORT, TWIN, checked
from fewbit.task.paint import colour
from fewbit.verify.bench import paired

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Json = Any
LARGEST = 64 << 20  # bytes of a picture
WRAPPED = ("multipart/", "application/json")  # bodies that are no picture, as the Content-Type says


class Pair:
    """The integer and the float model of a run, asked one after the other, so that neither takes the other's time."""

    def __init__(self, run: Path) -> None:
        checked(run)
        folder = run / FOLDER
        self.task, self.report = read_json(folder / "task.json"), read_json(run / REPORT)
        self.predict = loaded(self.task["pieces"])
        try:
            self.integer, self.float = (self.predict.Model(folder, name) for name in (MODEL, TWIN))
        except ValueError as error:  # no such runtime here, or one that is older than the file
            raise BadFile(f"{run} cannot be served: {error}") from error
        how = self.integer.how
        if how["normalize"] == "inside":  # the float file takes what the integer one computes from its pixels
            self.float.how = {**how, "normalize": "outside", "dtype": "float32", "whole": True}
        self._lock = threading.Lock()

    def picture(self, content: bytes) -> dict[str, Json]:
        """The answers for an encoded picture. Raises ValueError for one that the model cannot take."""
        pixels = self.predict.opened(content, "the picture", self.integer.how["size"][0])
        found = {"size": [pixels.shape[1], pixels.shape[0]], **self.answers(pixels)}
        return {name: as_json(value) for name, value in found.items()}

    def answers(self, pixels: NDArray[Any]) -> dict[str, Json]:
        """Of both models, and how far they are apart in words; `ms` are those of the runtime alone, the median of a few
        rounds.
        """
        models = {"float": self.float, "integer": self.integer}
        feeds = [model.feeds(pixels) for model in models.values()]
        with self._lock:
            rounds = paired([partial(model.run, one) for model, one in zip(models.values(), feeds, strict=True)], 0.0)
            outputs = [model.run(one) for model, one in zip(models.values(), feeds, strict=True)]
        answers = [
            model.answer(given, pixels.shape[0], pixels.shape[1]) for model, given in zip(models.values(), outputs, strict=True)
        ]
        found: dict[str, Json] = {"compared": compared(self.task, answers, [self._first(given) for given in outputs])}
        for name, answer, seconds in zip(models, answers, zip(*rounds, strict=True), strict=True):
            if "map" in answer:
                answer["map"] = data_uri(coloured(answer["map"], are_classes="classes" in answer))
            found[name] = {"ms": round(1e3 * statistics.median(seconds), 3), **answer}
        return found

    def _first(self, outputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Those of one picture, where a file with a batch written in it took it several times."""
        return [y[:1] if self.task["batch"] > 1 else y for y in outputs]


def as_json(value: Json) -> Json:
    """A value with each number that JSON does not have as a word: nan, inf, -inf."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [as_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def coloured(values: NDArray[Any], *, are_classes: bool) -> Image.Image:
    """A map as a picture: a colour for each class, grey from the smallest number to the largest, or the picture that it is."""
    if are_classes:
        return Image.fromarray(np.array([colour(i) for i in range(int(values.max()) + 1)], np.uint8)[values])
    if values.dtype.kind == "f":
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        values = np.nan_to_num((values - low) / (high - low or 1.0) * 255).astype(np.uint8)
    return Image.fromarray(values)


def application(run: Path) -> Starlette:
    """The page at /, the answers of both models for the bytes of a picture at POST /predict."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    pair = Pair(run)
    picture = picture_name(pair.integer.how["size"][0])
    page = rendered("serve.html", {"report": pair.report, "task": pair.task, "picture": picture})

    async def index(request: Request) -> Response:
        return HTMLResponse(page)

    async def predict(request: Request) -> Response:
        content, kind = bytearray(), request.headers.get("content-type", "")
        advice = f"send the bytes of the picture themselves, as in {sent(request.url)}"
        try:
            async for piece in request.stream():
                content += piece
                if len(content) > LARGEST:
                    return JSONResponse({"error": f"the picture has more than {LARGEST >> 20} MB; send a smaller one."}, 413)
        except ClientDisconnect:
            return JSONResponse({"error": "the client went away before the picture was there."}, 400)  # which nobody reads
        if kind.lower().startswith(WRAPPED):
            return JSONResponse({"error": f"the body is {kind.partition(';')[0]} and no picture; {advice}."}, 415)
        if not content:
            return JSONResponse({"error": f"the body is empty; {advice}."}, 400)
        try:
            return JSONResponse(await run_in_threadpool(pair.picture, bytes(content)))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)

    async def otherwise(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # no such place, or no such method there
        there = f"the page is at {request.base_url}, and answers come of {sent(f'{request.base_url}predict')}"
        said = f"{request.method} {request.url.path}: {error.detail.lower()}; {there}."
        return JSONResponse({"error": said}, error.status_code, error.headers)

    def sent(url: object) -> str:
        """What sends a picture."""
        return f"curl --data-binary @{picture} {url}"

    routes = [Route("/", index), Route("/predict", predict, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: otherwise})
