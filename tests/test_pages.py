"""Oracle: the same numbers read by safetensors and torch themselves; for what is held, the kernel's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.capture.mapped import mapped
from fewbit.core.pages import give_back
from fewbit.files import mapped_tensors
from fewbit.load.load import load_model
from fewbit.load.program import fingerprint

STATUS = Path("/proc/self/status")


def held(kind: str) -> float:
    """Megabytes of this process: RssAnon or RssFile."""
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(kind)).split()[1]) / 2**10


def test_tensors_of_a_file_are_those_that_safetensors_reads_after_their_pages_were_dropped_as_well(tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=random), "b": torch.randint(-9, 9, (7,), dtype=torch.int8), "none": torch.empty(0, 4),
        "one": torch.tensor(2.5), "half": torch.randn(6, generator=random).half(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"said": "so"})
    found, wanted = mapped_tensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    for _ in range(2):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name], tensor)
        give_back()


@pytest.mark.skipif(not STATUS.exists(), reason="Linux alone counts so")
def test_what_is_mapped_or_freed_is_given_back(tmp_path):
    save_file({"a": torch.ones(16 << 20)}, tmp_path / "x.safetensors")
    found = mapped_tensors(tmp_path / "x.safetensors")["a"]
    give_back()
    before = held("RssFile"), held("RssAnon")
    assert float(found.sum()) == 16 << 20
    assert held("RssFile") - before[0] > 60
    assert held("RssAnon") - before[1] < 20
    give_back()
    assert held("RssFile") - before[0] < 4


class Tied(torch.nn.Module):
    """A weight that two layers share, one that is stored transposed, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.turned = torch.nn.Parameter(torch.randn(4, 4).t())
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return self.second(self.first(y)) @ self.turned + self.shift


@pytest.mark.filterwarnings("ignore:No complete tensor")
def test_a_program_on_its_own_file_is_the_program(tmp_path):
    torch.manual_seed(0)
    program = load_model(Tied().eval(), overrides={"input_size": (3, 8, 8)}).program
    torch.export.save(program, tmp_path / "x.pt2")
    before = dict(program.state_dict)
    found = mapped(program, tmp_path / "x.pt2")
    assert all(program.state_dict[name] is tensor for name, tensor in before.items())
    assert fingerprint(found) == fingerprint(program)
    assert [*found.state_dict] == [*program.state_dict]
    for name, tensor in found.state_dict.items():
        own = program.state_dict[name]
        assert (type(tensor), tensor.requires_grad, tensor.stride()) == (type(own), own.requires_grad, own.stride())
        assert tensor.data_ptr() != own.data_ptr()
    x = torch.rand(2, 3, 8, 8)
    give_back()
    with torch.no_grad():
        assert torch.equal(found.module()(x), program.module()(x))
