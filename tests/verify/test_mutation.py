"""`fewbit verify` after each kind of number in each file of a run was changed. The oracle is what was changed.

As it is, the hashes in run.json catch every change of every file. Somebody who makes the hashes fit again is caught where a
number ships or decides what ships: model.onnx, float.onnx, plan, exported program, what run.json and report.json say of
them. Not caught then, since nothing in the folder could say so: the images and statistics that went in (images.safetensors,
stats.safetensors, calibration.json), measured figures but accuracy and the verdict, which model.onnx has too (report.json,
tables.json, report.html), the words of a method, and a key of run.json that nothing reads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.folder import seal
from fewbit.run import quantize
from mutations import Mutation, flips, mutations

SHIPS = ("model.onnx", "float.onnx", "plan.safetensors", "exported.pt2")


def verified(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def changed(mutation: Mutation, run: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    mutation.change(copy / mutation.file)
    assert (copy / mutation.file).read_bytes() != (run / mutation.file).read_bytes(), f"{mutation} changes nothing"


@pytest.mark.slow
def test_whatever_is_changed_in_a_run_is_caught_and_what_ships_also_under_new_hashes(conv_net, ort_target, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    own = {"keep_float": "head", "seconds": 0.01}  # constants of each kind
    quantize(conv_net.module, conv_net.images, target=ort_target, out=run, input_size=(3, 8, 8), **own)
    assert verified(run)[0] == 0
    missed = []
    for mutation in (*mutations(run), *flips(run, 16)):
        changed(mutation, run, copy)
        code, said = verified(copy)
        if code != 2 or mutation.file not in said:
            missed.append(f"{mutation}: {code} {said[-200:]}")
    for mutation in (*(one for one in mutations(run) if one.named), *flips(run, 4, SHIPS)):
        changed(mutation, run, copy)
        seal(copy)
        code, said = verified(copy)
        if code not in (1, 2) or mutation.named not in said:
            missed.append(f"{mutation}, sealed: {code} {said[-200:]}")
    assert missed == []
