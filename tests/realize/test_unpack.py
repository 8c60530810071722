"""Oracles: the plan's codes, numpy's bits of the stored bytes, and the same plan written as int8."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Bits
from fewbit.errors import FewbitFailed
from fewbit.realize import realize
from fewbit.runtimes import OnnxRuntime, OpenVino, runtime_names
from fewbit.target import load_target
from fewbit.verify.compare import compare, kernels

needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")
qdq = importlib.import_module("fewbit.realize.qdq")

# width -> (width of a plane, the bit of the code that its lowest bit is)
PLANES = {
    2: [(2, 0)],
    3: [(2, 1), (1, 0)],
    4: [(4, 0)],
    5: [(4, 1), (1, 0)],
    6: [(4, 2), (2, 0)],
    7: [(4, 3), (2, 1), (1, 0)],
}


class Odd(nn.Module):
    """Two convolutions and two linears; one of each has a number of weights that 8 does not divide (135 and 35)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 8, 1)
        self.fc, self.head = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = self.wide(F.relu(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(F.gelu(self.fc(x)))


@pytest.fixture(scope="module")
def odd(capture_net):
    torch.manual_seed(0)
    return capture_net(Odd())


def mixed(net, target, widths):
    """A plan whose ops have the widths given, by op name; the others have 8 bits."""
    plans = {bits: net.plan(target, bits=Bits(bits, 8)) for bits in {8, *widths.values()}}
    pick = {name: plans[widths.get(name.split(":")[0], 8)].choices[name] for name in plans[8].choices}
    biases = {name: plans[widths.get(name, 8)].biases[name] for name in plans[8].biases}
    return dataclasses.replace(plans[8], choices=pick, biases=biases)


def plan_of(net, target, bits):
    if isinstance(bits, dict):
        return mixed(net, target, bits)
    return net.plan(target, bits=Bits(bits, 8), everything=True)


MIXED = {"conv": 7, "wide": 2, "fc": 5}  # and 8 bits for the head


NARROW = [*(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 4, 5, 7)), 6, pytest.param(MIXED, id="mixed")]


@pytest.fixture(scope="module", params=NARROW)
def case(request, odd, ort_target, tmp_path_factory):
    plan = plan_of(odd, ort_target, request.param)
    path = tmp_path_factory.mktemp("run") / "model.onnx"
    realize(odd.graph, plan, path, opset=load_target(ort_target).opset)
    return odd, plan, path


@pytest.fixture
def as_int8(monkeypatch, tmp_path):
    """Writes a plan with int8 weights whatever their width."""

    def write(net, plan):
        path = tmp_path / "int8.onnx"
        with monkeypatch.context() as patch:
            patch.setattr(qdq, "pack_weights", lambda model, plan: None)
            realize(net.graph, plan, path, opset=load_target(plan.target).opset)
        return path

    return write


def weights(plan):
    """Name in the file, width, and codes as they are stored: those of a linear transposed."""
    for choice in plan.choices.values():
        if choice.role == "weight":
            codes = choice.codes.numpy()
            yield choice.site.replace(":", "__"), choice.grid.bits, codes.T if codes.ndim == 2 else codes


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_the_unpacked_values_are_the_codes_of_the_plan(case):
    net, plan, path = case
    narrow = {name: codes for name, bits, codes in weights(plan) if bits < 8}
    assert len(narrow) >= 3
    found = OnnxRuntime(path, optimise=False, outputs=list(narrow)).run(net.images[:1].numpy())
    for name, codes in narrow.items():
        assert found[name].dtype == np.int8
        np.testing.assert_array_equal(found[name], codes)


def test_the_stored_bits_are_those_of_the_codes_and_take_their_true_size(case):
    _, plan, path = case
    stored = initializers(path)
    for name, bits, codes in weights(plan):
        planes = {n.removeprefix(f"{name}.bits"): t for n, t in stored.items() if n.startswith(f"{name}.bits")}
        assert (name in stored) == (bits == 8)
        assert set(planes) == ({str(width) for width, _ in PLANES[bits]} if bits < 8 else set())
        if bits == 8:
            np.testing.assert_array_equal(stored[name], codes)
            continue
        padded = -(-codes.size // 8) * 8
        assert sum(t.nbytes for t in planes.values()) == padded * bits // 8
        offset = codes.flatten() + 2 ** (bits - 1)
        for width, above in PLANES[bits]:
            plane = planes[str(width)]
            assert plane.dtype == np.uint8
            fields = np.unpackbits(plane.flatten(), bitorder="little").reshape(padded, width) @ (1 << np.arange(width))
            np.testing.assert_array_equal(fields[: codes.size], offset // 2**above % 2**width)
            assert not fields[codes.size :].any()


def test_onnxruntime_runs_the_graph_that_it_runs_for_int8_and_no_code_is_wrong(case, as_int8):
    net, plan, path = case
    checks = compare(net.graph, plan, path, net.images.split(8))
    assert checks.wrong == ()
    assert checks.kernels["found"] == checks.kernels["expected"] > 0
    assert checks.kernels["ops"] == kernels(plan, as_int8(net, plan))["ops"]
    eight = net.plan(plan.target, everything=True)
    assert checks.kernels["found"] == kernels(eight, as_int8(net, eight))["found"]


@needs_openvino
@pytest.mark.parametrize(
    "bits",
    [*(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 4, 5, 6, 7)), pytest.param(MIXED, id="mixed")],
)
def test_openvino_runs_the_graph_that_it_runs_for_int8(odd, tmp_path, as_int8, bits):
    plan, path = plan_of(odd, "openvino-x86", bits), tmp_path / "model.onnx"
    realize(odd.graph, plan, path, opset=20)
    packed, plain = (OpenVino(p, threads=1) for p in (path, as_int8(odd, plan)))
    assert packed.precisions() == plain.precisions()
    x = odd.images.numpy()
    np.testing.assert_array_equal(packed.run(x)["output"], plain.run(x)["output"])


@needs_openvino
@pytest.mark.parametrize(
    ("net", "bits"),
    [("conv_net", 6), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("conv_net", 3), ("vit", 3), ("vit", 6)))],
)
def test_openvino_gives_the_output_of_the_simulation(request, realized, net, bits):
    run = realized(request.getfixturevalue(net), "openvino-x86", recipe="mse", everything=True, bits=Bits(bits, 8))
    checks = compare(run.net.graph, run.plan, run.path, run.net.images.split(8), runtime="openvino")
    assert not checks.wrong
    assert all(check.difference < 3e-6 and not check.wrong for check in checks.outputs)


def test_weights_of_one_width_share_their_tables(vit, realized):
    stored = initializers(realized(vit, bits=Bits(6, 8)).path)
    tables = {name: t for name, t in stored.items() if name.startswith("unpack.") and t.dtype == np.int8}
    assert sorted(t.size for t in tables.values()) == [256 * 2, 256 * 4]
    assert len([name for name in stored if name.endswith(".bits4")]) == 8


def test_the_same_plan_gives_the_same_bytes(case, tmp_path):
    net, plan, path = case
    realize(net.graph, plan, tmp_path / "again.onnx", opset=load_target(plan.target).opset)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_eight_bits_are_written_as_they_are(odd, tmp_path, as_int8):
    plan = odd.plan("ort-x86-vnni")
    realize(odd.graph, plan, tmp_path / "model.onnx", opset=20)
    assert (tmp_path / "model.onnx").read_bytes() == as_int8(odd, plan).read_bytes()


class Twice(nn.Module):
    """Two linears of equal weights, which torch.onnx writes once where they have at most 1,024 elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.a, self.b = size, nn.Linear(size, size), nn.Linear(size, size)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(F.gelu(self.a(x.flatten(1)[:, : 4 * self.size].unflatten(1, (4, -1)))))


@pytest.mark.parametrize(("size", "stored"), [(8, 1), (32, 1), (33, 2)])
def test_equal_weights_are_stored_once_and_read_twice(capture_net, realized, size, stored):
    torch.manual_seed(0)
    run = realized(capture_net(Twice(size)), bits=Bits(5, 8))
    assert len([name for name in initializers(run.path) if name.endswith(".bits4")]) == stored
    checks = compare(run.net.graph, run.plan, run.path, run.net.images.split(8))
    assert checks.wrong == ()
    assert checks.kernels["found"] == checks.kernels["expected"] == 2


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 8)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_a_weight_that_the_file_does_not_have_is_an_error(capture_net, ort_target, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = capture_net(Large())
    monkeypatch.setattr(qdq, "flat_name", lambda site: "elsewhere")
    says = (
        r"no initializer fc__weight for the codes of fc:weight.* a fault of fewbit.* Try --keep-float 'fc:weight', or another"
    )
    with pytest.raises(FewbitFailed, match=says):
        realize(net.graph, net.plan(ort_target, bits=Bits(6, 8)), tmp_path / "model.onnx", opset=20)
    assert not (tmp_path / "model.onnx").exists()
