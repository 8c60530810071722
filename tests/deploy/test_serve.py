"""`fewbit serve`. Oracles: the program that ships, and what a browser shows."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import ExifTags, Image
from scipy.optimize import linear_sum_assignment
from typer.testing import CliRunner

from deploy.test_predict import made, names_of
from fewbit.cli import app
from fewbit.deploy.compared import compared
from fewbit.deploy.serve import Pair, as_json, coloured
from fewbit.errors import BadFile
from fewbit.files import read_json, write_json
from fewbit.folder import seal
from fewbit.task import Embed

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
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # which fewbit does not look at, and browsers do
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)).save(path, exif=turned)
    return path


def test_both_answers_are_those_of_the_program_that_ships(run: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(run)
    monkeypatch.setattr("fewbit.deploy.serve.paired", lambda calls, seconds: [(1e-3, 4e-3), (9e-3, 5e-3), (2e-3, 6.0625e-3)])
    found = pair.picture(picture.read_bytes())
    program = names_of(*read_json(run / "deploy" / "task.json")["pieces"])
    wanted = program.Model(run / "deploy")(np.array(Image.open(picture)))
    assert found["size"] == [44, 30]
    best = wanted["classes"][0]
    assert found["compared"] == f"Both say {best['name']}: " + " and ".join([f"{100 * best['probability']:.2f} %"] * 2) + "."
    for side, ms in (("float", 2.0), ("integer", 5.0)):  # medians
        assert found[side].pop("ms") == ms
        assert found[side] == wanted
    with pytest.raises(ValueError, match="broken, or of none of the kinds"):
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


NAMES = ("map", "ms", "size", "picture", "classes")


def test_outputs_may_be_called_as_a_field_of_the_answer(tmp_path: Path, picture: Path) -> None:
    """Oracle: the outputs are the sum of the normalized input by columns, in which the integer model has 1 more."""
    made(tmp_path / "run" / "deploy", tmp_path, mean=0.5, std=0.25)
    how = names_of("prepare", "pictures")
    fields = read_json(tmp_path / "run" / "deploy" / "preprocess.json")
    x = how.model_input(np.array(Image.open(picture)), fields)
    task = read_json(tmp_path / "run" / "deploy" / "task.json")
    pieces = [piece if piece != "classify" else "numbers" for piece in task["pieces"]]
    task |= {"task": "tensors", "pieces": pieces, "input": "x", "outputs": list(NAMES)}
    write_json(tmp_path / "run" / "deploy" / "task.json", task)
    for file, more in (("float.onnx", 0.0), ("model.onnx", 1.0)):
        make, kind = onnx.helper, onnx.TensorProto.FLOAT
        nodes = [make.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0)]
        nodes += [make.make_node("Add", ["sum", "more"], [name]) for name in NAMES]
        shapes = [make.make_tensor_value_info(name, kind, [1, 8]) for name in NAMES]
        constants = [make.make_tensor("more", kind, [], [more]), make.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2])]
        graph = make.make_graph(
            nodes, "g", [make.make_tensor_value_info("x", kind, [1, 3, 8, 8])], shapes, initializer=constants
        )
        onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / "run" / file)
    for file in ("report.json", "run.json"):
        write_json(tmp_path / "run" / file, {})
    seal(tmp_path / "run")
    found = Pair(tmp_path / "run").picture(picture.read_bytes())
    json.dumps(found, allow_nan=False)
    wanted = x.sum((0, 1))
    for side, more in (("float", 0.0), ("integer", 1.0)):
        assert found[side]["ms"] > 0
        for name in NAMES:
            np.testing.assert_allclose(found[side]["outputs"][name], [wanted + more], rtol=1e-5, atol=1e-5)
    share = f"{100 / np.abs(wanted).max():.2g}"
    said = f"The largest difference is {share} % of the float model's largest number, in output"
    assert found["compared"].startswith(said)


def said(kind: str, *answers: Any, **task: Any) -> str:
    """What is said of two answers, of a model whose one output is 0."""
    outputs = ([np.zeros((1, 1), np.float32)],) * 2
    return compared({"pieces": ["prepare", kind, "program"], "outputs": ["y"], **task}, answers, outputs)


def test_classes_are_compared_by_the_likeliest() -> None:
    both = [{"classes": [{"name": "cat", "index": i, "probability": p}]} for i, p in ((0, 0.91), (0, 0.834), (1, 0.5))]
    assert said("classify", *both[:2]) == "Both say cat: 91.00 % and 83.40 %."
    assert said("classify", *both[1:]) == "They differ. Float: cat, 83.40 %. Integer: cat, 50.00 %."


def objects(*found: tuple[str, float, list[float]]) -> dict[str, Any]:
    return {"objects": [{"name": name, "score": score, "box": box} for name, score, box in found]}


def test_objects_are_compared_box_by_box() -> None:
    cat, low, away = [0.0, 0, 10, 10], [0.0, 2, 10, 10], [90.0, 90, 99, 99]  # an IoU of 0.8, and of 0
    one = objects(("cat", 0.9, cat))
    assert said("detect", objects(), objects()) == "Both find nothing of score 0.3 or more."
    near = said("detect", one, objects(("cat", 0.85, low)))
    assert near == "Both find 1 × cat (IoU 0.80 or more, scores at most 0.05 apart)."
    apart = "They differ. Float alone: 1 × cat. Integer alone: 1 × "
    assert said("detect", one, objects(("cat", 0.9, away))) == f"{apart}cat."
    assert said("detect", one, objects(("dog", 0.9, cat))) == f"{apart}dog."
    twice = said("detect", one, objects(("cat", 0.9, low), ("cat", 0.8, cat)))
    assert twice == "They differ. Both: 1 × cat (IoU 1.00 or more, scores at most 0.10 apart). Integer alone: 1 × cat."


def test_as_many_objects_are_both_as_can_be_paired() -> None:
    """Oracle: SciPy's assignment, on boxes that overlap little within a model, as a detector leaves them."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        corners = np.stack(np.meshgrid(np.arange(3), np.arange(3)), -1).reshape(-1, 2) * 10.0
        rows = [np.concatenate([c, c + 10], 1) for c in (corners + rng.normal(0, 1.5, corners.shape) for _ in range(2))]
        labels = [rng.integers(0, 2, len(corners)) for _ in range(2)]
        both = zip(labels, rows, strict=True)
        found = [objects(*((f"c{c}", 0.5, box) for c, box in zip(n, r.tolist(), strict=True))) for n, r in both]
        low, high = (f(rows[0][:, None], rows[1][None]) for f in (np.maximum, np.minimum))
        common = (high[..., 2:] - low[..., :2]).clip(0).prod(-1)
        could = (common / (200 - common) >= 0.5) & (labels[0][:, None] == labels[1][None])
        pairs = int(could[linear_sum_assignment(could, maximize=True)].sum())
        sentence = said("detect", *found)
        paired = re.match(r"They differ\. Both: (.*?) \(", sentence)
        assert sum(map(int, re.findall(r"(\d+) ×", paired[1] if paired else ""))) == pairs, sentence


def test_maps_are_compared_in_every_pixel() -> None:
    classes = np.zeros((10, 100), np.uint8)
    other = classes.copy()
    other[0, 0] = 1
    few = [{"name": "cat", "index": 0, "share": 0.999}]
    assert said("segment", {"classes": few, "map": classes}, {"classes": few, "map": other}) == (
        "99.9 % of the pixels have the same class in both."
    )
    assert said("segment", *[{"classes": few, "map": classes}] * 2) == "Both give every pixel the same class."
    depths = [{"map": np.full((4, 4), v, np.float32), "relative": False} for v in (2.0, 2.5)]
    assert said("depth", *depths) == "The depths differ by 25 % of the float model's, in the mean over pixels."
    assert said("depth", depths[0], depths[0]) == "Both give the same depths in every pixel."
    pictures = [{"map": np.full((4, 4, 3), v, np.uint8)} for v in (100, 101)]
    assert said("restore", *pictures) == (
        f"PSNR of the integer model's picture against the float model's: {20 * np.log10(255):.1f} dB."
    )
    assert said("restore", pictures[0], pictures[0]) == "Both pictures are the same in every pixel (8 bits)."


def test_numbers_are_compared_output_by_output_and_embeddings_by_their_cosine() -> None:
    task = {"pieces": ["numbers"], "outputs": ["y", "labels"]}
    x, labels = np.array([[4.0, -8.0, np.inf]], np.float32), np.array([1, 2, 3, 4])
    y, others = np.array([[4.0, -7.0, np.inf]], np.float32), np.array([1, 2, 3, 5])
    largest = "The largest difference is 12 % of the float model's largest number, in output y."
    assert compared(task, ({}, {}), ([x, labels], [y, labels])) == largest
    assert compared(task, ({}, {}), ([x, labels], [y, others])) == "25.0 % of the numbers of output labels differ."
    assert compared(task, ({}, {}), ([x, labels], [x, labels])) == "Both give the same numbers in every output."
    nan = [np.array([[np.nan]], np.float32), labels]
    assert compared(task, ({}, {}), ([x, labels], nan)) == "Not compared: the integer model gives NaN for output y."
    fewer = "They differ: output labels is [4] of the float model and [3] of the integer model."
    assert compared(task, ({}, {}), ([x, labels], [x, labels[:3]])) == fewer
    embed = {"task": "embed", "pieces": ["numbers"], "outputs": ["y"], **Embed(0).program()[1]}
    turned = [[np.array([row], np.float32)] for row in ([3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 0.0])]
    cosine = "The cosine similarity of both embeddings is"
    assert compared(embed, ({}, {}), turned[:2]) == f"{cosine} 0.9600."
    assert compared(embed, ({}, {}), (turned[0], turned[2])) == f"{cosine} -1.0000."
    assert compared(embed, ({}, {}), (turned[0], turned[0])) == "Both embeddings are the same in every number."
    assert compared(embed, ({}, {}), (turned[0], turned[3])) == "They differ: one of the embeddings has no direction."


def test_numbers_that_json_lacks_are_words() -> None:
    given = {"y": [1.0, float("nan"), [float("inf"), -float("inf")]], "n": 3, "is": True}
    assert as_json(given) == {"y": [1.0, "nan", ["inf", "-inf"]], "n": 3, "is": True}


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
    assert "--port 0." in result.output
    assert "--host" not in result.output


@pytest.mark.parametrize("host", ["nope.invalid", "8.8.8.8", "2001:db8::1", "a..b", "x" * 70])
def test_a_host_that_is_not_of_this_machine_is_refused_as_such(run: Path, host: str) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    result = CliRunner().invoke(app, ["serve", str(run), "--host", host, "--port", "0"])
    assert result.exit_code == 2
    assert f"cannot listen at {host}, port 0: " in result.output
    assert "give another host: --host 127.0.0.1" in result.output
    assert "--port" not in result.output


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
        assert set(json.load(response)) == {"size", "compared", "float", "integer"}
    code, said = refused(address, b"abc")
    assert (code, "broken, or of none of the kinds" in said) == (400, True)
    raw = f"send the bytes of the picture themselves, as in curl --data-binary @picture.jpg {address}/predict."
    assert refused(address, b"") == (400, f"the body is empty; {raw}")
    form = b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" + picture.read_bytes() + b"\r\n--x--"
    assert refused(address, form, "multipart/form-data; boundary=x") == (
        415, f"the body is multipart/form-data and no picture; {raw}"
    )  # fmt: skip
    assert refused(address, b'{"picture": ""}', "Application/JSON")[0] == 415
    sends = f"the page is at {address}/, and answers come of curl --data-binary @picture.jpg {address}/predict."
    for place, method, code, what in (
        ("/predict", "GET", 405, "method not allowed"),
        ("/", "POST", 405, "method not allowed"),
        ("/x", "GET", 404, "not found"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(f"{address}{place}", method=method))
        said = json.load(error.value)["error"]
        assert (error.value.code, said) == (code, f"{method} {place}: {what}; {sends}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 44 // 2 - 1)  # twice as many are refused
    code, said = refused(address, picture.read_bytes())
    assert code == 400
    assert said.startswith("the picture cannot be decoded as an image: Image size (1320 pixels) exceeds limit")


def test_a_client_that_goes_away_is_no_error_and_the_next_is_answered(
    address: str, picture: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """While it sends its picture, and while it waits for the answer."""
    host, port = address.removeprefix("http://").split(":")
    content = picture.read_bytes()
    for length, sent in ((100_000, b"abc"), (len(content), content)):
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + sent)
            time.sleep(0.05)
    time.sleep(0.2)
    with urllib.request.urlopen(f"{address}/predict", content) as response:
        assert set(json.load(response)) == {"size", "compared", "float", "integer"}
    assert not caplog.records
    assert not capfd.readouterr().err


# the page's script beside a document of plain objects; the answers come when they are told to
ASKED = """
const made = () => ({ textContent: "", children: [], addEventListener() {}, append(...more) { this.children.push(...more); },
  replaceChildren() { this.children = []; } });
const parts = {}, document = { getElementById: (id) => (parts[id] ??= made()), querySelector: (id) => (parts[id] ??= made()),
  createElement: made };
const location = { href: "" }, coming = [];
const fetch = () => new Promise((done, failed) => coming.push({
  done: (found) => done({ status: 200, json: async () => found }), failed }));
%s
const shown = () => [said.textContent, ...["float", "integer"].map((side) =>
  parts[`#of-${side} .ms`].textContent + (document.getElementById(side).children[0]?.textContent ?? ""))];
const answer = (n) => ({ compared: `picture ${n}`, float: { ms: n, outputs: { n } }, integer: { ms: n, outputs: { n } } });
const later = () => new Promise((done) => setTimeout(done, 5)), seen = [];
const first = ask(null), second = ask(null);
coming[1].done(answer(2)); await later(); seen.push(shown());
coming[0].done(answer(1)); await later(); seen.push(shown());
const third = ask(null); seen.push(shown());
coming[2].done({ error: "no picture" }); await later(); seen.push(shown());
const fourth = ask(null); coming[3].failed(new Error("down")); await fourth.catch(() => 0); seen.push(shown());
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script with")
def test_the_page_shows_the_answer_to_the_last_picture_alone(address: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(address) as response:
        script = response.read().decode().partition("<script>")[2].partition("</script>")[0]
    (tmp_path / "page.mjs").write_text(ASKED % script)
    done = subprocess.run(["node", "page.mjs"], capture_output=True, text=True, check=True, cwd=tmp_path)
    both = ["picture 2", *['2.00 ms{\n "n": 2\n}'] * 2]
    asking, refused, down = (
        [words, "", ""] for words in ("Asking both.", "Not answered: no picture", "Not answered: the server does not answer")
    )
    assert json.loads(done.stdout) == [both, both, asking, refused, down]


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
        assert re.findall(r'<canvas width="(\d+)" height="(\d+)"', part) == [("320", "218")]  # 44 by 30, as it is stored
    assert len(re.findall(r'<span class="ms">\d+\.\d\d ms</span>', page)) == 2
    assert re.search(r'id="said" role="status">Both say [^:]+: (&gt; )?[0-9.]+ % and (&gt; )?[0-9.]+ %\.<', page)
    assert "<i>net</i>" not in page
    assert "<b>cat</b>" not in page
    assert "CONSOLE" not in done.stderr, done.stderr
