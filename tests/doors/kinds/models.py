"""Models that cannot be loaded, exported or quantized; broken records, programs, weights and folders."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, Right, either, quantize, refused, write
from doors.kinds import hugging_face
from doors.kinds.images import has_run
from small_net import NET

HEAD = (
    NET
    + """
def normed():
    net = Net()
    net.conv = nn.Sequential(net.conv, nn.BatchNorm2d(8))
    return net
"""
)
FORWARDS: dict[str, str] = {  # the forward of a model, all of which are refused before or after the export
    "an int": "return 3",
    "nothing": "return None",
    "text": "return 'a'",
    "an empty tuple": "return ()",
    "an empty dict": "return {}",
    "a scalar": "return self.head(self.conv(x).mean((2, 3))).sum()",
    "no batch": "return self.head(self.conv(x).mean((0, 2, 3)))",
    "integers": "return super().forward(x).argmax(1)",
    "booleans": "return super().forward(x) > 0",
    "complex": "return torch.complex(super().forward(x), super().forward(x))",
    "no classes": "return super().forward(x)[:, :0]",
    "a branch": "return x.sum((2, 3)) if x.sum() > 0 else x.mean((2, 3))",
    "an error": "raise RuntimeError('boom')",
    "an exit": "raise SystemExit(0)",
    "an assertion": "assert False",
    "a print loop": "raise KeyboardInterrupt",
    "the wrong size": "return self.head(x.flatten(1))",
    "numpy": "import numpy; return torch.from_numpy(numpy.asarray(x.detach().numpy()).mean((2, 3)))",
    "two inputs": "return (lambda a, b: a)(x)",
    "no operation": "return x",
    "a constant": "return torch.zeros(x.shape[0], 4)",
    "NaN": "return super().forward(x) / 0 * 0",
    "a root of negatives": "return torch.sqrt(super().forward(x) - 1000)",
    "infinity": "return super().forward(x) * 1e38 * 1e38",
    "noise": "return super().forward(x) + torch.randn(4)",
    "double": "return super().forward(x).double()",
    "half": "return super().forward(x).half()",
    "sparse": "return super().forward(x).to_sparse()",
    "a batch that is gone": "return super().forward(x).mean(0)",
    "a batch twice": "return super().forward(x).repeat(2, 1)",
}
FACTORIES: dict[str, str] = {  # the body of model()
    "returns None": "return None",
    "returns a class": "return Net",
    "returns a dict": "return Net().state_dict()",
    "returns a list": "return [Net()]",
    "raises": "raise ValueError('boom')",
    "raises without words": "raise ValueError",
    "exits with 0": "raise SystemExit(0)",
    "exits with 3": "raise SystemExit(3)",
    "exits with text": "raise SystemExit('bye')",
    "interrupts": "raise KeyboardInterrupt",
    "recurses": "return model()",
    "needs an argument": "return (lambda a: Net())()",
    "is out of memory": "raise MemoryError",
    "a module without parameters": "return nn.Identity()",
    "an empty Sequential": "return nn.Sequential()",
    "a ReLU": "return nn.Sequential(nn.ReLU(), nn.Flatten())",
    "NaN weights": "n = Net(); n.head.weight.data[0, 0] = float('nan'); return n",
    "infinite weights": "n = Net(); n.head.weight.data[0, 0] = float('inf'); return n",
    "NaN in a buffer": "n = normed(); n.conv[1].running_var[2] = float('nan'); return n",
    "NaN in a batch norm": "n = normed(); n.conv[1].running_mean[0] = float('nan'); return n",
    "a batch norm of negative variance": "n = normed(); n.conv[1].running_var[:] = -1; return n",
    "zero weights": "n = Net(); [p.data.zero_() for p in n.parameters()]; return n",
    "tiny weights": "n = Net(); [p.data.fill_(1e-42) for p in n.parameters()]; return n",
    "huge weights": "n = Net(); [p.data.fill_(1e38) for p in n.parameters()]; return n",
    "weights of 1e20": "n = Net(); [p.data.mul_(1e20) for p in n.parameters()]; return n",
    "a meta model": "return Net().to('meta')",
    "half weights": "return Net().half()",
    "double weights": "return Net().double()",
    "bfloat16 weights": "return Net().bfloat16()",
    "integer weights": "n = Net(); n.head.weight = nn.Parameter(n.head.weight.int(), requires_grad=False); return n",
    "lazy layers": "return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten())",
    "a scripted model": "return torch.jit.script(Net())",
    "one input channel": "return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())",
    "an input too small": "return nn.Sequential(nn.Conv2d(3, 4, 33), nn.Flatten())",
    "no class": "return nn.Sequential(nn.Flatten(), nn.Linear(768, 0))",
    "already quantized": "return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})",
}
MAY_RUN = {"noise", "double", "half", "zero weights", "tiny weights", "half weights", "double weights", "bfloat16 weights",
"a constant", "booleans", "no operation",
           "integers", "weights of 1e20"}  # fmt: skip
RECORDS: dict[str, str] = {  # lines that replace the record of the file
    "INPUT_SIZE text": "INPUT_SIZE = 'x'", "INPUT_SIZE None": "INPUT_SIZE = None", "INPUT_SIZE an int": "INPUT_SIZE = 32",
    "INPUT_SIZE negative": "INPUT_SIZE = (3, -16, 16)", "INPUT_SIZE zero": "INPUT_SIZE = (3, 0, 16)",
    "INPUT_SIZE 16.5": "INPUT_SIZE = (3, 16.5, 16)",
    "INPUT_SIZE of 10**6": "INPUT_SIZE = (3, 10**6, 10**6)", "INPUT_SIZE of two": "INPUT_SIZE = (16, 16)",
    "INPUT_SIZE of four": "INPUT_SIZE = (1, 3, 16, 16)",
    "INPUT_SIZE of 1 channel": "INPUT_SIZE = (1, 16, 16)", "INPUT_SIZE NaN": "INPUT_SIZE = (3, float('nan'), 16)",
    "INPUT_SIZE a bool": "INPUT_SIZE = True",
    "INPUT_SIZE texts": "INPUT_SIZE = ('3', '16', '16')", "INPUT_SIZE lacks": "del INPUT_SIZE",
    "INPUT_SIZE of 10**30": "INPUT_SIZE = (3, 10**30, 16)",
    "MEAN text": "MEAN = 'x'", "MEAN NaN": "MEAN = (float('nan'),) * 3", "MEAN None": "MEAN = None",
    "MEAN of two": "MEAN = (0.5, 0.5)", "MEAN 1e30": "MEAN = (1e30,) * 3",
    "MEAN texts": "MEAN = ('a', 'b', 'c')", "MEAN a number": "MEAN = 0.5", "STD zero": "STD = (0, 0, 0)",
    "STD negative": "STD = (-1, 1, 1)", "STD text": "STD = 'x'",
    "STD infinite": "STD = (float('inf'),) * 3", "STD 255": "STD = (10**30,) * 3", "CLASSES a number": "CLASSES = 5",
    "CLASSES None": "CLASSES = None",
    "CLASSES of numbers": "CLASSES = [1, 2, 3, 4]", "CLASSES text": "CLASSES = 'abcd'", "CLASSES too few": "CLASSES = ['a']",
    "CLASSES twice": "CLASSES = ['a', 'a', 'b', 'c']",
}  # fmt: skip
FREE = {"CLASSES twice", "MEAN None", "MEAN a number", "CLASSES None", "INPUT_SIZE texts", "CLASSES text"}
FILES: dict[str, str | bytes] = {
    "a syntax error": "def model(:\n", "not UTF-8": b"\xff\xfe\0", "empty": "", "zeros": bytes(100),
    "an import that lacks": "import nope_nope",
    "an import that exits": "raise SystemExit(0)", "an exit at import": "import sys; sys.exit()",
    "an endless nest": "x = " + "(" * 5000 + ")" * 5000,
    "model is a number": "model = 3", "model is a module": "from torch import nn\nmodel = nn.Linear(3, 3)",
    "an error at import": "1 / 0",
    "a relative import": "from . import x", "bytes of a pyc": b"\xa7\r\r\n" + bytes(20), "a null byte": "x = 1\0\n",
    "an interrupt at import": "raise KeyboardInterrupt",
}  # fmt: skip
NAMES = ("nope", "", " ", "resnet", "resnet18x", "hf:", "hf:nope", "hf:/nope", "nope.pt2", "nope.py:model", "net.py",
"net.py:", "net.py:nope", "net.py:Net", "net.py:torch",
         "net.py:INPUT_SIZE", "flat", "flat.pt2", "net.pt2:model", "demo:nope", "DEMO", "timm:nope", "hf-hub:nope/x",
         "http://localhost/x", "../net.py:nope", "net.py:model()",
         "net.onnx", "model.pth", "model.safetensors", "/dev/null", "/dev/null.pt2", "a" * 5000, "[/b]", "x\ty")  # fmt: skip


def cases() -> Iterator[Case]:
    for name, body in FORWARDS.items():
        text = f"{HEAD}\nclass Bad(Net):\n    def forward(self, x):\n        {body}\ndef model():\n    return Bad().eval()\n"
        yield _case(f"forward gives {name}", text, name)
    for name, body in FACTORIES.items():
        yield _case(f"model() {name}", f"{HEAD}\ndef model():\n    {body}\n", name)
    for name, line in RECORDS.items():
        text = f"{HEAD}\ndef model():\n    return Net().eval()\n{line}\n"
        says = "input" if "INPUT" in name else name.split()[0]
        yield Case(name, quantize(), either((says, says.lower())) if name in FREE else refused((says, "input-size",
            "input size", says.lower(), "class")),
                   before=write("net.py", text), seconds=60, fast="10**6" in name)  # fmt: skip
    for name, content in FILES.items():
        right = Right((2, 130), silent=True) if "interrupt" in name else refused("net.py")
        yield Case(f"file with {name}", quantize(), right, before=write("net.py", content))
    for name in NAMES:
        yield Case(f"MODEL {name[:30]!r}", quantize(model=name), either() if name == "net.py:Net" else refused())
    yield from _programs()
    yield from _weights()
    yield from hugging_face.cases()


def _case(name: str, text: str, what: str) -> Case:
    right = (
        either(holds=_honest) if what in MAY_RUN else Right((2, 130), silent=True) if "KeyboardInterrupt" in text else refused()
    )
    return Case(name, quantize(), right, before=write("net.py", text))


def _honest(folder: Path) -> str:
    """A run that is finished, and whose numbers are numbers."""
    if missing := has_run(folder):
        return missing
    accuracy = json.loads((folder / "out" / "report.json").read_text(), parse_constant=lambda text: f"not a number: {text}")[
        "accuracy"
    ]
    return "".join(
        f"{name}: {value}" for name, value in accuracy.items() if isinstance(value, str) and value.startswith("not a number")
    )


def _programs() -> Iterator[Case]:
    """Exported programs: what a .pt2 may be, and the record beside it."""
    for name, content in {
        "empty": b"",
        "text": b"no",
        "zip": b"PK\5\6" + bytes(18),
        "pickle": b"\x80\x02}q\0.",
        "zeros": bytes(9999),
    }.items():
        yield Case(
            f"pt2: {name}", quantize(model="x.pt2"), refused("x.pt2"), before=write("x.pt2", content), fast=name == "zip"
        )
    sizes = ("--input-size", "3,32,32")
    yield Case("pt2: another input size", quantize(*sizes, model="net.pt2"), refused("net.pt2"), needs=("net.pt2",))
    for text in ("[]", "null", "3", '"x"', "{", "[" * 100_000, "\xff", '{"mean": [1, 2]}', '{"mean": [NaN, 0, 0]}',
        '{"std": [0, 0, 0]}', '{"input_size": 16}',
                 '{"input_size": [3, 32, 32]}', '{"interpolation": 3}', '{"crop_pct": "x"}', '{"crop_pct": NaN}',
                 '{"mean": {"a": 1}}', '{"mean": "x"}', '{"nope": 1}'):  # fmt: skip
        content = text.encode("latin-1") if text == "\xff" else text
        yield Case(
            f"pt2: record {text[:30]}",
            quantize(model="net.pt2"),
            refused("net.json"),
            before=write("net.json", content),
            needs=("net.pt2",),
        )
    yield Case("pt2: a folder", quantize(model="d.pt2"), refused("d.pt2"), before=lambda folder: (folder / "d.pt2").mkdir())
    yield Case("pt2: torch.save of a module", quantize(model="x.pt2"), refused("x.pt2"), before=_saved)
    for name, (shape, more) in {"no batch": ((3, 16, 16), False), "two inputs": ((2, 3, 16, 16), True)}.items():
        yield Case(f"pt2: {name}", quantize(model="x.pt2"), refused("x.pt2"), before=_exported(shape, more))
    for member in ("archive_format", "version", "byteorder", "models/model.json", "data/weights/model_weights_config.json"):
        yield Case(
            f"pt2: without {member}", quantize(model="net.pt2"), either("net.pt2"), before=_without(member), needs=("net.pt2",)
        )
        yield Case(
            f"pt2: {member} is text",
            quantize(model="net.pt2"),
            either("net.pt2"),
            before=_without(member, b"no"),
            needs=("net.pt2",),
        )


def _saved(folder: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(3, 3), folder / "x.pt2")


def _exported(shape: tuple[int, ...], two: bool) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        import torch

        class Two(torch.nn.Module):
            def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return a + b

        net: torch.nn.Module = Two() if two else torch.nn.Flatten()
        torch.export.save(torch.export.export(net, tuple(torch.zeros(shape) for _ in range(1 + two))), folder / "x.pt2")

    return put


def _without(member: str, instead: bytes | None = None) -> Callable[[Path], None]:
    """The program without a member of its archive, or with another content there."""

    def put(folder: Path) -> None:
        path = folder / "net.pt2"
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                if not name.endswith(member):
                    archive.writestr(name, content)
                elif instead is not None:
                    archive.writestr(name, instead)

    return put


def _weights() -> Iterator[Case]:
    """Weights of a timm model that lack, are too many, of another shape, or no safetensors."""

    def changed(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            import timm
            import torch
            from safetensors.torch import save_file

            torch.manual_seed(0)
            weights = {name: tensor.contiguous() for name, tensor in timm.create_model("test_vit").state_dict().items()}
            change(weights)
            save_file(weights, folder / "w.safetensors")

        return put

    def first(weights: dict[str, object]) -> str:
        return next(name for name in weights if name.endswith("weight"))

    changes: dict[str, Callable[[dict[str, object]], object]] = {
        "one lacks": lambda w: w.pop(first(w)), "none": lambda w: w.clear(),
        "one too many": lambda w: w.update(nope=next(iter(w.values())).clone()),  # type: ignore[attr-defined]
        "another shape": lambda w: w.update({first(w): w[first(w)][:1].clone()}),
        "NaN": lambda w: w[first(w)].fill_(float("nan")),  # type: ignore[index,attr-defined]
        "infinite": lambda w: w[first(w)].fill_(float("inf")), "integers": lambda w: w.update({first(w): w[first(w)].int()}),
        # type: ignore[attr-defined,index]
    }  # fmt: skip
    for name, change in changes.items():
        yield Case(f"weights: {name}", quantize("--weights", "w.safetensors", model="test_vit"),
            either("w.safetensors") if name == "integers" else refused(
            ("w.safetensors", "weight")), before=changed(change))  # fmt: skip
    for name, content in {
        "empty": b"",
        "text": b"no",
        "a huge header": b"\xff" * 8 + b"{}",
        "zeros": bytes(99),
        "a pickle": b"\x80\x02}q\0.",
    }.items():
        yield Case(
            f"weights: {name}",
            quantize("--weights", "w.safetensors", model="test_vit"),
            refused("w.safetensors"),
            before=write("w.safetensors", content),
        )
