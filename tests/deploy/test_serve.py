"""`fewbit serve`. Oracles: the program that ships, and what a browser shows."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from deploy.test_predict import made, names_of
from fewbit.cli import app
from fewbit.deploy.serve import Pair, coloured
from fewbit.errors import BadFile
from fewbit.files import read_json, write_json
from fewbit.folder import seal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `serve` reads of a run, its two models the same."""
    folder = tmp_path_factory.mktemp("run")
    made(folder / "deploy", tmp_path_factory.mktemp("net"), mean=0.5, std=0.25)
    shutil.copy(folder / "model.onnx", folder / "float.onnx")
    task = read_json(folder / "deploy" / "task.json")
    write_json(folder / "deploy" / "task.json", {**task, "classes": ["<b>cat</b>", "dog", "bird", "ship"]})
    write_json(folder / "report.json", {"model": "<i>net</i>", "target": "ort-x86-vnni", "recipe": "mse", "bits": "w8a8"})
    write_json(folder / "run.json", {})
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)).save(path)
    return path


def test_both_answers_are_those_of_the_program_that_ships(run: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(run)
    monkeypatch.setattr("fewbit.deploy.serve.paired", lambda calls, seconds: [(1e-3, 4e-3), (9e-3, 5e-3), (2e-3, 6.0625e-3)])
    found = pair.picture(picture.read_bytes())
    program = names_of(*read_json(run / "deploy" / "task.json")["pieces"])
    wanted = program.Model(run / "deploy")(np.array(Image.open(picture)))
    assert found["size"] == [44, 30]
    for side, ms in (("float", 2.0), ("integer", 5.0)):  # medians
        assert found[side].pop("ms") == ms
        assert found[side] == wanted
    with pytest.raises(ValueError, match="none that Pillow reads"):
        pair.picture(b"abc")


def test_a_float_file_beside_one_of_pixels_gets_what_that_computes(tmp_path: Path, picture: Path) -> None:
    inputs, _ = made(tmp_path / "run" / "deploy", tmp_path, mean=0.5, std=0.25, normalize_inside=True)
    shutil.copy(tmp_path / "run" / "model.onnx", tmp_path / "run" / "float.onnx")
    write_json(tmp_path / "run" / "report.json", {})
    write_json(tmp_path / "run" / "run.json", {})
    seal(tmp_path / "run")
    pair, pixels = Pair(tmp_path / "run"), np.array(Image.open(picture))
    (x,), (whole,) = pair.float.feeds(pixels).values(), pair.integer.feeds(pixels).values()
    np.testing.assert_array_equal(x[0], inputs.preprocess(pixels).numpy())
    assert (whole.dtype, whole.shape) == (np.uint8, (1, 8, 8, 3))


def test_pieces_that_fewbit_does_not_have_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    task = read_json(tmp_path / "run" / "deploy" / "task.json")
    write_json(tmp_path / "run" / "deploy" / "task.json", {**task, "pieces": ["prepare", "../../evil"]})
    seal(tmp_path / "run")
    with pytest.raises(BadFile, match="evil"):
        Pair(tmp_path / "run")


def test_maps_are_pictures() -> None:
    classes = np.array([[0, 1], [1, 2]], np.uint8)
    shown = np.array(coloured(classes, are_classes=True))
    assert (shown[0, 1] == shown[1, 0]).all()
    assert len({tuple(c) for row in shown for c in row}) == 3
    depths = np.array([[2.0, 4.0], [3.0, 4.0]], np.float32)
    assert np.array(coloured(depths, are_classes=False)).tolist() == [[0, 255], [127, 255]]


def test_a_port_that_is_taken_is_refused_in_words(run: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(run), "--port", str(port)])
    assert result.exit_code == 2
    assert f"port {port}" in result.output


DROP = """<script type="module">
const content = await (await fetch("p.png")).blob(), bag = new DataTransfer();
bag.items.add(new File([content], "p.png", { type: "image/png" }));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: bag, bubbles: true }));
</script></body>"""


@pytest.fixture
def address(run: Path, picture: Path) -> Any:
    """A server with a page more, on which a picture is dropped by itself."""
    uvicorn, routing = pytest.importorskip("uvicorn"), pytest.importorskip("starlette.routing")
    from starlette.responses import FileResponse, HTMLResponse

    from fewbit.deploy.serve import application

    served = application(run)
    page = next(route for route in served.routes if route.path == "/")

    async def dropped(request: Any) -> Any:
        content = (await page.endpoint(request)).body.decode()
        return HTMLResponse(content.replace("</body>", DROP))

    async def png(request: Any) -> Any:
        return FileResponse(picture)

    served.router.routes += [routing.Route("/dropped", dropped), routing.Route("/p.png", png)]
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    place.listen()
    server = uvicorn.Server(uvicorn.Config(served, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    place.close()


def refused(address: str, body: bytes, kind: str = "application/x-www-form-urlencoded") -> tuple[int, str]:
    """The status and the sentence with which a body is refused; the kind is that of curl --data-binary."""
    request = urllib.request.Request(f"{address}/predict", body, {"Content-Type": kind})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    return error.value.code, json.load(error.value)["error"]


def test_the_endpoint_answers_and_refuses(address: str, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with urllib.request.urlopen(f"{address}/predict", picture.read_bytes()) as response:
        assert set(json.load(response)) == {"size", "float", "integer"}
    code, said = refused(address, b"abc")
    assert (code, "none that Pillow reads" in said) == (400, True)
    raw = f"send the bytes of the picture themselves, as in curl --data-binary @picture.jpg {address}/predict."
    assert refused(address, b"") == (400, f"the body is empty; {raw}")
    form = b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" + picture.read_bytes() + b"\r\n--x--"
    assert refused(address, form, "multipart/form-data; boundary=x") == (
        415, f"the body is multipart/form-data and no picture; {raw}"
    )  # fmt: skip
    assert refused(address, b'{"picture": ""}', "Application/JSON")[0] == 415
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 44 // 2 - 1)  # twice as many are refused
    code, said = refused(address, picture.read_bytes())
    assert code == 400
    assert said.startswith("the picture cannot be decoded as an image: Image size (1320 pixels) exceeds limit")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_picture_dropped_in_a_browser_is_answered_twice(address: str, tmp_path: Path, width: int) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    place = [f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--dump-dom", f"{address}/dropped"]
    done = subprocess.run([str(CHROMIUM), *options, *place], capture_output=True, text=True, check=True, timeout=120)
    page = done.stdout
    for side in ("float", "integer"):
        part = page.partition(f'<div id="{side}">')[2].partition("</section>")[0]
        assert part.count("<th ") == 4
        assert part.count("<canvas") == 1
    assert len(re.findall(r'<span class="ms">\d+\.\d\d ms</span>', page)) == 2
    assert "Both say the same: " in page
    assert "<i>net</i>" not in page
    assert "<b>cat</b>" not in page
    assert "CONSOLE" not in done.stderr, done.stderr
