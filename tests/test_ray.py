"""Tasks of Ray: workers, machines and commands that are killed. Oracle: `map` of Python; a sweep that was made without Ray."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tasks
from fewbit.errors import FewbitError, Stopped, UnknownName
from fewbit.files import read_json
from fewbit.request import Request, SearchRequest, SensitivityRequest
from fewbit.run import execute, sensitivity
from fewbit.search import execute as search
from fewbit.workers import Workers, opened
from fewbit.workers import cluster as module

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "fewbit[scale]"')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parent.parent
NET = """
import torch
from torch import nn
INPUT_SIZE = (3, 16, 16)
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()
"""
SWEEP = """
models = ["net.py:small"]
bits = [8, 6, 4]
targets = ["ort-x86-vnni"]
[options]
images = "images.npy"
calibration = 16
seconds = 0.01
threads = 1
"""


TASK = """
import os, signal, time
from pathlib import Path
from fewbit.task import Tensors

class Fatal(Tensors):
    def __init__(self):
        super().__init__((True,))

    def divergence(self, exact, outputs):
        if os.getpid() != int(Path("driver").read_text()):
            tries = len(list(Path("tries").iterdir()))
            Path("tries", f"{os.getpid()}-{tries}").touch()
            if tries == 3 and not Path("wait").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            while Path("wait").exists():
                time.sleep(0.05)
        return super().divergence(exact, outputs)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a model, images, and a task of which the fourth loss in a worker ends it, or all wait."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("task.py").write_text(TASK)
    Path("tries").mkdir()
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    Path("driver").write_text(f"{os.getpid()}")
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """Workers find the functions of tasks.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in ("tests", "src")))
        yield


def until(found: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What is looked for, once it is there."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.05)
    return value


class TestHere:
    """`--workers 2`."""

    @pytest.fixture(scope="class")
    def workers(self) -> Iterator[Workers]:
        before = signal.getsignal(signal.SIGTERM)
        with opened(2, None) as workers:
            assert signal.getsignal(signal.SIGTERM) == before
            yield workers
        assert not ray.is_initialized()

    def test_results_are_those_of_map_and_come_once(self, workers: Workers) -> None:
        found = list(workers.map(tasks.square, range(50)))
        assert len(found) == 50
        assert dict(found) == dict(enumerate(map(tasks.square, range(50))))
        assert list(workers.map(tasks.square, [])) == []

    def test_tasks_run_in_the_folder_of_the_command(self, workers: Workers, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert list(workers.map(tasks.where, [0])) == [(0, str(tmp_path))]
        assert list(workers.everywhere(tasks.where, 0).values()) == [str(tmp_path)]

    def test_what_comes_early_waits_for_its_turn(self, workers: Workers) -> None:
        assert list(workers.each(tasks.later_ones_sooner, 7, 2)) == [0, -1, 4, -9, 16, -25, 36]

    def test_what_a_task_raises_is_raised_here(self, workers: Workers) -> None:
        with pytest.raises(UnknownName, match=r"unknown recipe 'fats'\. Did you mean fast"):
            list(workers.map(tasks.fails, [1, 2]))

    def test_a_worker_that_lacks_a_package_is_told_in_words(self, workers: Workers, monkeypatch) -> None:
        nowhere = types.ModuleType("nowhere")
        monkeypatch.setitem(sys.modules, "nowhere", nowhere)
        exec("def square(x): return x * x", nowhere.__dict__)
        with pytest.raises(FewbitError, match=r"a worker could not begin .*No module named 'nowhere'.*every machine needs"):
            list(workers.map(nowhere.square, [1]))

    def test_a_task_whose_worker_was_killed_is_done_again_and_counted_once(self, workers: Workers, tmp_path) -> None:
        found = list(workers.map(tasks.dies_once, [(k, str(tmp_path)) for k in range(6)]))
        assert sorted(found) == [(k, k * k) for k in range(6)]
        assert [len(list(tmp_path.glob(f"{k}-*"))) for k in range(6)] == [1, 2] * 3

    def test_a_task_that_ends_each_worker_is_lost_alone(self, workers: Workers, tmp_path) -> None:
        items = [(k, str(tmp_path)) for k in (2, 3, 4)]
        found = dict(workers.map(tasks.dies, items, lambda item, why: -item[0]))
        assert found == {0: 4, 1: -3, 2: 16}
        assert len(list(tmp_path.glob("3-*"))) == module.RETRIES + 1
        with pytest.raises(Stopped, match=r"could not be done: its worker ended each of 4 times"):
            list(workers.map(tasks.dies, items[1:2]))


class TestCluster:
    """`--ray ADDRESS`, with two machines that are processes here, and a head without processors."""

    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[Any]:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.fewbit_nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        yield cluster
        cluster.shutdown()

    def test_an_address_at_which_nobody_answers_is_refused_in_time(self, monkeypatch) -> None:
        monkeypatch.setattr(module, "LIMIT", 3.0)
        start = time.monotonic()
        with (
            pytest.raises(FewbitError, match=r"--ray 127.0.0.1:9: no cluster of Ray answers there within 3 seconds"),
            opened(None, "127.0.0.1:9"),
        ):
            pass
        assert time.monotonic() - start < 15

    def test_another_version_than_the_cluster_s_is_refused(self, cluster: Any, monkeypatch) -> None:
        monkeypatch.setattr(ray, "__version__", "2.0.0")
        says = rf"--ray {cluster.address}: Version mismatch.*Give both the same versions; here is Ray .*pip install ray=="
        with pytest.raises(FewbitError, match=says), opened(None, cluster.address):
            pass

    def test_no_machine_with_so_many_processors_is_refused(self, cluster: Any) -> None:
        with opened(None, cluster.address, 64) as workers, pytest.raises(FewbitError, match=r"no machine .* has 64 processors"):
            workers.everywhere(tasks.square, 2)

    def test_tasks_of_a_machine_that_is_lost_are_done_on_another(self, cluster: Any, tmp_path) -> None:
        with opened(None, cluster.address) as workers:
            assert list(workers.everywhere(tasks.square, 2).values()) == [4, 4]
            found = workers.map(tasks.waits_once, [(k, str(tmp_path)) for k in range(6)])
            begun = iter(lambda: next(found), None)
            results = []
            thread = threading.Thread(target=lambda: results.extend(begun), daemon=True)
            thread.start()
            until(lambda: len(list(tmp_path.glob("*-1"))) >= 2)  # one on each machine
            cluster.remove_node(cluster.fewbit_nodes.pop(), allow_graceful=False)
            (tmp_path / "go").touch()
            thread.join(300)
            assert sorted(results) == [(k, k * k) for k in range(6)]
            assert sorted(len(list(tmp_path.glob(f"{k}-*"))) for k in range(6)) == [1, 1, 1, 1, 1, 2]

    def test_losses_of_a_machine_that_is_lost_are_computed_on_another(self, cluster: Any, place: Path) -> None:
        """Two tasks wait, one on each machine, until one machine is gone."""
        while len(cluster.fewbit_nodes) < 2:
            cluster.fewbit_nodes.append(cluster.add_node(num_cpus=1))
        sensitivity(SensitivityRequest(**SENSITIVITY, out=place / "one"))
        Path("wait").touch()

        def lose() -> None:
            until(lambda: len(list(Path("tries").iterdir())) >= 2)
            cluster.remove_node(cluster.fewbit_nodes.pop(), allow_graceful=False)
            Path("tries", "lost").touch()
            Path("wait").unlink()

        thread = threading.Thread(target=lose, daemon=True)
        thread.start()
        sensitivity(SensitivityRequest(**SENSITIVITY, out=place / "two", ray=cluster.address))
        thread.join(60)
        Path("tries", "lost").unlink()
        assert len(list(Path("tries").iterdir())) == 5 + 1  # a module alone or all but it, and the plan; one again
        assert Path("one/sensitivity.json").read_bytes() == Path("two/sensitivity.json").read_bytes()


SENSITIVITY = {
    "model": "net.py:small", "images": "images.npy", "task": "task.py:Fatal", "recipe": "minmax", "target": "ort-arm64",
    "labels": False, "threads": 1,
}  # fmt: skip


def test_a_sensitivity_whose_worker_is_killed_is_that_of_one_process(place: Path) -> None:
    sensitivity(SensitivityRequest(**SENSITIVITY, out=place / "one"))
    assert not list(Path("tries").iterdir())
    sensitivity(SensitivityRequest(**SENSITIVITY, out=place / "two", workers=2))
    assert len({path.name.split("-")[0] for path in Path("tries").iterdir()}) >= 2  # the killed one, and who took its place
    assert Path("one/sensitivity.json").read_bytes() == Path("two/sensitivity.json").read_bytes()


def test_a_run_with_workers_is_that_of_one_process(place: Path, monkeypatch) -> None:
    """Its plan, whose ridges of GPTQ are tasks, the score of its file, and what its modules lose."""
    asked = {
        "model": "net.py:small", "images": "images.npy", "task": "task.py:Fatal", "target": "ort-x86-vnni", "labels": False,
        "recipe": "fast", "bits": "4", "threads": 1, "seconds": 0.01,
    }  # fmt: skip
    monkeypatch.setattr("fewbit.choose.gptq.LONG", 1)
    one = execute(Request(**asked, out=place / "one"))
    assert not list(Path("tries").iterdir())
    two = execute(Request(**asked, out=place / "two", workers=2))
    for name in ("plan.json", "plan.safetensors", "model.onnx"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert [log.rows for log in one.plan.logs("gptq")] == [log.rows for log in two.plan.logs("gptq")]
    assert one.plan.logs("gptq")
    assert one.report["accuracy"] == two.report["accuracy"]
    assert len(list(Path("tries").iterdir())) == 2  # one loss for each module
    lost = [read_json(Path(name, "tables.json"))["sensitivity"] for name in ("one", "two")]
    assert lost[0] == lost[1]
    assert len(lost[0]) == 2


@pytest.mark.parametrize("strategy", ["random", "greedy"])
def test_a_search_whose_worker_is_killed_is_that_of_one_process(place: Path, monkeypatch, strategy: str) -> None:
    """Times are made up: each measurement of them is another one, and the search goes by them."""
    monkeypatch.setattr(importlib.import_module("fewbit.search.judge"), "SECONDS", 0.01)
    monkeypatch.setattr(importlib.import_module("fewbit.search.search"), "whole_of", lambda *_: 100.0)
    monkeypatch.setattr("fewbit.verify.latency.measured", lambda *_: (2.0, 1.0))
    asked = {
        "model": "net.py:small", "images": "images.npy", "task": "task.py:Fatal", "target": "ort-x86-vnni", "labels": False,
        "strategy": strategy, "evaluations": 12, "budget": "6bit", "points": 1, "threads": 1,
    }  # fmt: skip
    one = search(SearchRequest(**asked, out=place / "one"))
    assert not list(Path("tries").iterdir())
    two = search(SearchRequest(**asked, out=place / "two", workers=2))
    assert len({path.name.split("-")[0] for path in Path("tries").iterdir()}) >= 2
    assert one["trials"] == two["trials"]
    assert one["evaluated"] == 12


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run decided: the plan and the integer file's tensors, by row."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("rows/*/plan.*"))}


def test_a_sweep_whose_worker_and_then_whose_command_is_killed_is_that_of_one_process(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("a.toml").write_text(SWEEP)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    command = [sys.executable, "-m", "fewbit", "sweep", "a.toml", "--out"]
    assert subprocess.run([*command, "one"], check=False, capture_output=True).returncode == 0

    driver = subprocess.Popen([*command, "two", "--workers", "2"], stderr=subprocess.DEVNULL)
    rows = Path("two.part/rows")
    lock = until(lambda: next((p for p in rows.glob("*.part/lock") if "process" in p.read_text()), None))
    worker = int(lock.read_text().split()[1])
    os.kill(worker, signal.SIGKILL)
    until(lambda: any((folder / "plan.json").exists() for folder in rows.iterdir()))
    driver.kill()
    driver.wait()
    done = [folder.name for folder in rows.iterdir() if (folder / "run.json").exists() and folder.suffix != ".part"]
    times = {name: (rows / name / "run.json").stat().st_mtime_ns for name in done}

    assert subprocess.run([*command, "two", "--workers", "2"], check=False).returncode == 0
    assert {name: Path("two/rows", name, "run.json").stat().st_mtime_ns for name in done} == times
    assert files_of(Path("one")) == files_of(Path("two"))
    kept = ("row", "end", "why", "float", "quantized", "agreement", "interval", "codes_wrong", "codes_compared", "bytes")
    one, two = ([{k: r.get(k) for k in kept} for r in read_json(Path(n, "report.json"))["rows"]] for n in ("one", "two"))
    assert one == two
    assert len(files_of(Path("one"))) == 6
