"""TorchScript as a model. Oracle: the module that was traced, on fresh images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import BadFile, BadModel, FewbitError
from fewbit.load import load_model
from fewbit.load.program import graph_module
from fewbit.load.trials import tensors_in

SIZE = (3, 8, 8)


class Tokens(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 5, 16))
        self.token, self.norm, self.out = nn.Parameter(torch.randn(1, 1, 16)), nn.LayerNorm(16), nn.Linear(16, 5)
        self.qkv, self.up = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.place
        q, k, v = self.qkv(self.norm(y)).reshape(x.shape[0], 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 5, 16)
        return self.out((y + self.up(F.gelu(y)))[:, 0])


def convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net


class Written(nn.Module):
    """A batch of one is written in what is traced of it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.view(1, 192))


def saved(net: nn.Module, folder: Path, *more: Tensor, batch: int = 1) -> str:
    path = folder / "m.pt"
    torch.jit.trace(net, (torch.rand(batch, *SIZE), *more), check_trace=False).save(str(path))
    return str(path)


@pytest.mark.parametrize(("make", "batch"), [(convolutions, None), (Tokens, None), (Written, 1)])
def test_what_was_traced_is_what_is_read(make: Any, batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = make().eval()
    loaded = load_model(saved(net, tmp_path), overrides={"input_size": SIZE})
    x = torch.rand(batch or 3, *SIZE)
    with torch.no_grad():
        got = tensors_in(graph_module(loaded.program)(x))[0]
        assert torch.allclose(got, net(x), atol=1e-5)
    assert (loaded.batch, loaded.ref) == (batch, str(tmp_path / "m.pt"))
    assert not any("onnx" in note for note in loaded.notes)


class Two(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


def test_what_is_no_function_of_images_is_refused(tmp_path: Path) -> None:
    def refused(path: str, message: str, size: Any = SIZE) -> None:
        with pytest.raises(FewbitError, match=message):
            load_model(path, overrides={"input_size": size} if size else {})

    refused(saved(Two(), tmp_path, torch.ones(1)), r"takes x, scale; it has to take images alone\. Give the module")
    refused(saved(convolutions().eval(), tmp_path), "does not say its input size. Give it: --input-size 3,224,224", None)
    refused(str(tmp_path / "m.pt"), r"does not take one image \(1, 4, 8, 8\): .*expected input.* --input-size", (4, 8, 8))
    refused(
        saved(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten(), nn.Dropout()), tmp_path), "traced in training. Trace model.eval"
    )


class Saves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "stolen.pt")
        return x


class Opens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("secret", False, 1)


class Early(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    @torch.jit.export
    def __getstate__(self) -> tuple[float, bool]:
        return self.scale, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[float, bool]) -> None:
        print("loaded")
        self.scale, self.training = state

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.ops.profiler._record_function_enter("x", None)
        return x


@pytest.mark.parametrize(
    ("net", "found"),
    [(Saves, "save"), (Opens, "from_file"), (Early, "__setstate__"), (Foreign, r"ops\.profiler\._record_function_enter")],
)
def test_code_that_could_do_more_than_compute_is_not_loaded(
    net: Any, found: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(net()).save("m.pt")
    monkeypatch.setattr(torch.jit, "load", None)  # not reached
    with pytest.raises(BadFile, match=rf"^m\.pt is refused: code/.*\.py has {found}, which can do more than compute"):
        load_model("m.pt", overrides={"input_size": SIZE})
    assert "loaded" not in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.pt"]


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path: Path) -> None:
    path = Path(saved(convolutions().eval(), tmp_path))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "n.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\xff" if name.endswith(".py") else old.read(name))
    with pytest.raises(BadFile, match=r"n\.pt is damaged: .* save it again with torch\.jit\.save"):
        load_model(str(tmp_path / "n.pt"), overrides={"input_size": SIZE})
    (tmp_path / "o.pt").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadFile, match=r"o\.pt is cut off"):
        load_model(str(tmp_path / "o.pt"), overrides={"input_size": SIZE})


def test_another_function_of_torch_onnx_is_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    real = torch.onnx.export
    path = saved(convolutions().eval(), tmp_path)
    other = torch.jit.trace(convolutions().eval(), torch.rand(1, *SIZE))
    monkeypatch.setattr(torch.onnx, "export", lambda model, *args, **options: real(other, *args, **options))
    with pytest.raises(BadModel, match=r"m\.pt is TorchScript that torch\.onnx writes as another function"):
        load_model(path, overrides={"input_size": SIZE})
