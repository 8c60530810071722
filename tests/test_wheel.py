"""The wheel in an environment of its own and an empty folder: it has every file, and a run works as from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_run_works_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("pip could not get hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("fewbit-*.whl")
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    here = next((venv / "lib").glob("python*/site-packages"))
    (here / "others.pth").write_text(sysconfig.get_path("purelib"))  # what fewbit needs, but not fewbit itself
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ran(*words: str) -> str:
        done = subprocess.run([python, *words], cwd=empty, env=clean, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(ran("-c", "import fewbit; print(fewbit.__file__)").strip()).is_relative_to(here)
    assert ran("-m", "fewbit", "--version") == "fewbit 0.1.0\n"
    ran("-m", "fewbit", "quantize", "demo", "--scored", "32", "--calibration", "16", "--seconds", "0.01")
    assert {"report.html", "model.onnx", "deploy"} <= {path.name for path in (empty / "run").iterdir()}
    assert "What to do next" in (empty / "run" / "report.html").read_text(encoding="utf-8")
