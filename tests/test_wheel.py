"""The wheel in an environment of its own and an empty folder: runs work as from a checkout, docs/tutorial.md can be typed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel of this checkout; what it needs is that of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("pip could not get hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("fewbit-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (packages(folder / "venv") / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


def packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python*/site-packages"))


def typed(venv: Path, folder: Path, *words: str) -> str:
    """What a command prints in a folder where the environment is active, without a network for models. It has to succeed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_run_works_from_a_wheel_in_an_empty_folder(venv: Path, tmp_path: Path) -> None:
    where = typed(venv, tmp_path, "python", "-c", "import fewbit; print(fewbit.__file__)").strip()
    assert Path(where).is_relative_to(packages(venv))
    assert typed(venv, tmp_path, "fewbit", "--version") == "fewbit 0.1.0\n"
    typed(venv, tmp_path, "fewbit", "quantize", "demo", "--scored", "32", "--calibration", "16", "--seconds", "0.01")
    assert {"report.html", "model.onnx", "deploy"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "What to do next" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial_can_be_typed_in_an_empty_folder(venv: Path, tmp_path: Path) -> None:
    """Every block, in the order of the page: all succeed, and each word of an output that is shown is printed."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").replace("8000", str(free_port()))
    blocks, printed = BLOCK.findall(page), ""
    assert len(blocks) == page.count("\n```") / 2
    for language, block in blocks:
        named = re.match(r"# ([\w/.]+\.py)\n", block)
        if named:
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
            if f"run it, `python {named[1]}`" in page:
                typed(venv, tmp_path, "python", named[1])
        elif language == "python":
            typed(venv, tmp_path, "python", "-c", block)
        elif language == "sh" and not block.startswith("pip install"):
            printed = typed(venv, tmp_path, "bash", "-e", "-u", "-c", block)
        elif language != "sh":
            assert language == "text", f"a block says what it is: sh, python or text\n{block}"
            shown = set(re.findall(r"[^\W\d_]{2,}", block))
            assert shown <= set(re.findall(r"[^\W\d_]{2,}", printed)), f"{block}\nis shown, and this is printed:\n{printed}"
    written = set(re.findall(r"`((?:photos|run|served)/[\w/.]*)`", page))
    written |= {f"served/{name}" for name in re.findall(r"`(\w+\.(?:py|json|cpp|html))`", page.partition("## 6.")[2])}
    assert len(written) >= 8
    assert not [name for name in sorted(written) if not (tmp_path / name).exists()]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
