"""Every bench can be started, and a row of a table is what `fewbit.quantize` ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

import fewbit
from fewbit.core.record import MADE
from fewbit.files import read_json
from fewbit.recipes import RECIPES

BENCH = Path(__file__).parents[2] / "bench"
LIBRARIES = {"ablations", "answers", "apart", "families", "packages", "integer_arithmetic", "module_search"}  # nothing to start
NAMES = sorted(file.stem for file in BENCH.glob("*.py"))
TINY = ["--calibration", "8", "--scored", "8", "--seeds", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from rows import ...` finds bench/rows.py, as it does for `python bench/best.py`."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LIBRARIES])
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_library(name: str) -> None:
    import_module(f"bench.{name}")


def test_readme_names_benches_that_are_there() -> None:
    text = "\n".join(file.read_text() for file in (BENCH / "README.md", *(BENCH / "notes").glob("*.md")))
    named = set(re.findall(r"python bench/(\w+)\.py", text)) | set(re.findall(r"python -m bench\.(\w+)", text))
    assert named
    assert named <= set(NAMES) - LIBRARIES


def small(root: Path) -> dict[str, str]:
    """A small net and labelled images: torch exports it to ONNX in a fraction of the time that a demo takes."""
    (root / "net.py").write_text(
        "import torch\nfrom torch import nn\nINPUT_SIZE, MEAN, STD = (3, 16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()\n"
    )
    draw = np.random.default_rng(0)
    for name in ("calibration", "scored"):
        images, labels = draw.integers(0, 255, (16, 16, 16, 3), dtype=np.uint8), draw.integers(0, 4, 16)
        np.savez(root / f"{name}.npz", images=images, labels=labels)
    return {"model": f"{root}/net.py:model", "images": f"{root}/calibration.npz", "score": f"{root}/scored.npz"}


@pytest.mark.parametrize("of_demo", [pytest.param(of_demo, marks=pytest.mark.slow) for of_demo in (False, True)])
def test_a_row_is_what_quantize_ships(of_demo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timed", "runtimes_for"):
        monkeypatch.setattr(f"fewbit.verify.{name}", lambda path: ())  # a row has no timings
    rows = import_module("bench.rows")
    given = {"model": "demo:resnet20"} if of_demo else small(tmp_path)
    args = rows.options(None, **given).parse_args([*TINY, "--out", str(tmp_path / "rows"), "--time", "7"])
    bench = rows.Bench(args)
    bench.rows([("a row", "fast", "w4a8")])
    result = fewbit.quantize(
        **given, recipe="fast", bits="w4a8", target="ort-x86-vnni", calibration=8, scored=8, everything=True, threads=1,
        out=tmp_path / "run",
    )  # fmt: skip
    made, shipped = (onnx.load(folder / "model.onnx") for folder in (tmp_path / "rows" / "row", result.folder))
    shipped.metadata_props.remove(next(entry for entry in shipped.metadata_props if entry.key == MADE))  # a row has no report
    assert made == shipped
    row = read_json(tmp_path / "rows" / "a_row_w4a8_n8_seed0.json")  # the number of images is in the name
    assert row["log"] == read_json(result.folder / "plan.json")["log"]
    rating = result.score.rating
    hits = int((rating.answers == bench.scored.labels).sum())
    assert (row["top1"], row["agreement"]) == (100 * hits / 8, rating.agreement)
    request = bench.quantized(RECIPES["best"], "8", 0)["request"]
    assert [getattr(one, "seconds", None) for one in request.method.passes] == [None, None, None, 7.0]
    assert bench.quantized(RECIPES["mse"], "8", 0)["request"].time is None


def test_the_cost_of_a_command_is_that_of_its_process() -> None:
    said = [f"time.sleep(0.3); print('{stage}: 0.3 s', file=sys.stderr, flush=True)" for stage in ("realize", "verify")]
    program = "; ".join(["import sys, time; x = bytearray(b'1') * 300_000_000", *said, "time.sleep(0.3)"])
    command = f"[sys.executable, '-c', {program!r}]"
    measures = f"import json, sys; from cost import measured; print(json.dumps(vars(measured('row', {command}, 1))))"
    small = [sys.executable, "-c", measures]  # a process starts with the peak of the one that started it
    cost = json.loads(subprocess.run(small, cwd=BENCH, capture_output=True, check=True).stdout)
    assert 0.3 < cost["written"] < cost["verified"] - 0.25 < cost["whole"] - 0.5
    assert 300e6 < cost["memory"] < 400e6
    assert cost["processor"] < cost["whole"]


def test_a_command_that_fails_is_no_row() -> None:
    from bench.cost import measured

    with pytest.raises(SystemExit, match="row ended with 3: no"):
        measured("row", [sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"], 1)
