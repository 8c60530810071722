"""Oracles: the plan that was saved, and the bytes that its codes must take."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewbit.choose import parse_bits
from fewbit.core.plan import Fixed, Own, PassLog, SameAs, SharedWith
from fewbit.errors import BadFile, Stopped
from fewbit.execute.simulate import simulate
from fewbit.realize import load_plan, save_plan


def assert_same(a, b):
    """All that a plan says; of an integer bias what was wanted before rounding is in no file."""
    assert dataclasses.replace(a, choices={}, biases={}) == dataclasses.replace(b, choices={}, biases={})
    assert list(a.choices) == list(b.choices)
    assert list(a.biases) == list(b.biases)
    for op, bias in a.biases.items():
        other = b.biases[op]
        assert torch.equal(bias.values, other.values)
        assert (bias.integer is None) == (other.integer is None)
        if bias.integer is None:
            assert torch.equal(bias.real, other.real)
        else:
            assert torch.equal(bias.integer.codes, other.integer.codes)
            assert bias.integer.codes.dtype == other.integer.codes.dtype
            assert dataclasses.replace(bias.integer, codes=None) == dataclasses.replace(other.integer, codes=None)
    for name, choice in a.choices.items():
        other = b.choices[name]
        assert dataclasses.replace(choice, codes=None) == dataclasses.replace(other, codes=None)
        assert (choice.codes is None) == (other.codes is None)
        if choice.codes is not None:
            assert torch.equal(choice.codes, other.codes)
            assert choice.codes.dtype == other.codes.dtype


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("bits", ["8", "6", "w4a8", "w3a7"])
@pytest.mark.parametrize("target", ["ort-x86-avx2", "openvino-x86"])
def test_a_plan_comes_back_from_its_files_and_simulates_bit_by_bit_the_same(net, tmp_path, target, bits):
    plan = net.plan(target, "mse", bits=parse_bits(bits), keep_float=["head"], everything=True)
    save_plan(net.graph, plan, tmp_path)
    back = load_plan(net.graph, tmp_path)
    assert_same(plan, back)
    with torch.no_grad():
        answers = [simulate(net.graph, p)(net.images) for p in (plan, back)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("target", "recipe", "kinds"),
    [
        ("ort-x86-vnni", "liu2021", {"Own", "SameAs", "SharedWith"}),
        ("openvino-x86", "liu2021", {"Own"}),
        ("npu-int16", "easyquant", {"Own", "SharedWith"}),
    ],
)
def test_sources_biases_and_the_log_come_back(mixed_net, tmp_path, target, recipe, kinds):
    plan = mixed_net.plan(target, recipe)
    assert {type(choice.source).__name__ for choice in plan.choices.values()} == kinds
    (log,) = plan.logs("output search")
    assert log.rows
    save_plan(mixed_net.graph, plan, tmp_path)
    assert_same(plan, load_plan(mixed_net.graph, tmp_path))
    record = json.loads((tmp_path / "plan.json").read_text())
    assert [entry["name"] for entry in record["log"]] == [entry.name for entry in plan.log]
    assert [row["op"] for row in record["biases"]] == list(plan.biases)
    stored = load_file(tmp_path / "plan.safetensors")
    for op, bias in plan.biases.items():
        exact = bias.real if bias.integer is None else bias.integer.codes
        assert torch.equal(stored[f"{op}.bias"], exact)
        assert stored[f"{op}.bias"].dtype == (torch.float32 if bias.integer is None else torch.int32)


def test_every_source_of_a_scale_comes_back(vit, tmp_path):
    plan, sources = vit.plan("ort-x86-vnni"), [Own(), SameAs("x:output"), SharedWith(("a", "b")), SharedWith(()), Fixed()]
    assert plan.choices["blocks.0.pv:probs"].source == Fixed()
    some = {name: dataclasses.replace(c, source=s) for (name, c), s in zip(plan.choices.items(), sources, strict=False)}
    save_plan(vit.graph, dataclasses.replace(plan, choices={**plan.choices, **some}), tmp_path)
    back = load_plan(vit.graph, tmp_path)
    assert [back.choices[name].source for name in some] == sources


def test_a_log_of_any_pass_comes_back(conv_net, tmp_path):
    log = (PassLog("one", "One()", ({"a": 1, "b": [1.5, None, "x"]}, {"a": 2}), {"mean": 0.5}), PassLog("two", "Two()"))
    plan = dataclasses.replace(conv_net.plan("ort-x86-vnni"), log=log)
    save_plan(conv_net.graph, plan, tmp_path)
    assert load_plan(conv_net.graph, tmp_path).log == log


def test_the_same_plan_gives_the_same_bytes(net, tmp_path):
    for name in ("a", "b"):
        save_plan(net.graph, net.plan("ort-x86-vnni", "mse"), tmp_path / name)
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("bits", "share"), [("8", 8), ("w4a8", 4), ("w3a8", 3)])
def test_weights_take_the_bytes_of_their_bits(vit, tmp_path, bits, share):
    save_plan(vit.graph, vit.plan("ort-x86-vnni", bits=parse_bits(bits)), tmp_path)
    stored = {n: t.numel() * t.element_size() for n, t in load_file(tmp_path / "plan.safetensors").items()}
    sizes = {site.name: torch.Size(site.shape).numel() for site in vit.graph.sites if site.role == "weight"}
    assert len(sizes) == 8
    for name, size in sizes.items():
        assert stored[f"{name}.codes"] == size * share // 8


def test_every_tensor_that_stays_float_is_in_the_file_and_no_other(vit, tmp_path):
    save_plan(vit.graph, vit.plan("ort-x86-vnni"), tmp_path)
    kept = {n for n in load_file(tmp_path / "plan.safetensors") if n.startswith("float.")}
    total = sum(p.numel() for p in vit.module.parameters())
    quantized = sum(torch.Size(s.shape).numel() for s in vit.graph.sites if s.role == "weight")
    floats = load_file(tmp_path / "plan.safetensors")
    assert sum(floats[n].numel() for n in kept) == total - quantized


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_truncated_tensor_file_is_a_bad_file(conv_net, tmp_path, keep):
    save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    path = tmp_path / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFile, match=r"plan\.safetensors is not readable"):
        load_plan(conv_net.graph, tmp_path)


def test_a_missing_tensor_file_is_a_bad_file(conv_net, tmp_path):
    save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(BadFile, match=r"plan\.safetensors is not readable"):
        load_plan(conv_net.graph, tmp_path)


def test_a_missing_or_broken_plan_is_a_bad_file(conv_net, tmp_path):
    with pytest.raises(BadFile, match=r"plan\.json does not exist"):
        load_plan(conv_net.graph, tmp_path)
    save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    with pytest.raises(BadFile, match=r"plan\.json is not readable JSON"):
        load_plan(conv_net.graph, tmp_path)


def test_the_plan_of_another_model_is_a_bad_file(conv_net, vit, tmp_path):
    save_plan(vit.graph, vit.plan("ort-x86-vnni"), tmp_path)
    with pytest.raises(BadFile, match="do not fit each other or this model"):
        load_plan(conv_net.graph, tmp_path)


class Wider(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(8, width)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("bits", ["8", "w4a8"])
def test_the_plan_of_the_same_model_in_another_width_is_a_bad_file(capture_net, tmp_path, bits):
    narrow, wide = (capture_net(Wider(width)) for width in (4, 6))
    save_plan(narrow.graph, narrow.plan("ort-x86-vnni", bits=parse_bits(bits)), tmp_path)
    with pytest.raises(BadFile, match="do not fit"):
        load_plan(wide.graph, tmp_path)


@pytest.mark.parametrize(
    "record", ["[]", "{}", "null", '{"choices": [{"site": "stem:input"}]}', '{"choices": [{"grid": {"bits": 99}}]}']
)
def test_json_that_is_no_plan_is_a_bad_file(conv_net, tmp_path, record):
    save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    (tmp_path / "plan.json").write_text(record)
    with pytest.raises(BadFile, match="do not fit"):
        load_plan(conv_net.graph, tmp_path)


def test_codes_that_have_gone_missing_are_a_bad_file(conv_net, tmp_path):
    from safetensors.torch import save_file

    save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "a:weight.codes"}, tmp_path / "plan.safetensors")
    with pytest.raises(BadFile, match="do not fit"):
        load_plan(conv_net.graph, tmp_path)


def test_a_full_disk_stops_the_work_and_leaves_no_plan(conv_net, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(Stopped, match="the disk is full"):
        save_plan(conv_net.graph, conv_net.plan("ort-x86-vnni"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plan_json_says_what_people_ask(conv_net, tmp_path):
    plan = conv_net.plan("ort-x86-avx2", "mse", bits=parse_bits("w4a8"), keep_float=["b"])
    save_plan(conv_net.graph, plan, tmp_path)
    record = json.loads((tmp_path / "plan.json").read_text())
    assert (record["target"], record["recipe"], record["bits"], record["exemptions"]) == ("ort-x86-avx2", "mse", "w4a8", ["b"])
    rows = {row["site"]: row for row in record["choices"]}
    assert list(rows) == list(plan.choices)
    assert rows["stem:weight"]["bits"] == 4
    assert rows["stem:input"]["scale"] == plan.choices["stem:input"].qparams.scale.item()
    assert rows["stem:input"]["zero"] == plan.choices["stem:input"].qparams.zero.item()
