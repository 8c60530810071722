"""Every way to name a model, and what is said when it cannot be used."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.ao.nn.quantizable as quantizable
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models.quantization.resnet import QuantizableBasicBlock
from torchvision.models.resnet import BasicBlock

from capture.nets import assert_same_function, images
from fewbit.capture import capture
from fewbit.data.constants import constants
from fewbit.errors import BadFile, BadModel, BadValues, UnknownName
from fewbit.load import export, load_model
from fewbit.load.inputs import Given, image
from fewbit.load.program import fingerprint, graph_module
from fewbit.realize import float_onnx

SIZE = (3, 8, 8)
DYNAMIC = ({0: Dim("batch")},)
PYTHON = """
from torch import nn

INPUT_SIZE, MEAN, CLASSES = (3, 8, 8), (0.1, 0.2, 0.3), ["cat", "dog"]


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))


def number():
    return 3


def broken():
    raise ValueError("no weights here")
"""


class Classifier(nn.Module):
    """A convolution and a linear; `form` is what it returns its logits in."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixel_values: Tensor) -> Any:
        features = self.conv(pixel_values)
        logits = self.head(features.mean((2, 3)))
        forms = {
            "tensor": logits,
            "tuple": (logits, features),
            "nested": [{"first": (logits,)}, features],
            "dict": {"features": features, "logits": logits},
            "record": Record(features, logits),
            "dataclass": Fields(logits, Record(features, logits)),
        }
        return forms[self.form]


class Record(NamedTuple):
    last_hidden_state: Tensor
    logits: Tensor


@dataclass
class Fields:
    """A plain dataclass, which torch does not open; `mask` is left at None."""

    logits: Tensor
    hidden: Record
    mask: Tensor | None = None


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def loaded(net: nn.Module, **overrides: object) -> Any:
    return load_model(net.eval(), overrides={"input_size": SIZE, **overrides})


def saved(path: Path, net: nn.Module, shapes: Any = DYNAMIC) -> str:
    torch.export.save(torch.export.export(net.eval(), (images(SIZE, 2),), dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(PYTHON)
    return path


# what a model returns


NAMES = {  # of the outputs: True for the logits
    "tensor": {"logits": True},
    "tuple": {"output.0": True, "output.1": False},
    "nested": {"output.0.first.0": True, "output.1": False},
    "dict": {"features": False, "logits": True},
    "record": {"last_hidden_state": False, "logits": True},
    "dataclass": {"logits": True, "hidden.last_hidden_state": False, "hidden.logits": True},
}


def test_one_file_in_two_folders_is_one_program_to_the_byte_and_names_neither(tmp_path):
    source = "from torch import nn\nINPUT_SIZE = (3, 8, 8)\nclass Net(nn.Conv2d):\n    def forward(self, x):\n"
    source += "        return super().forward(x).relu().mean((2, 3))\n\ndef model():\n    net = Net(3, 4, 3)\n"
    source += "    nn.init.ones_(net.weight), nn.init.ones_(net.bias)\n    return net\n"
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "net.py").write_text(source)
        torch.export.save(load_model(f"{folder / 'net.py'}:model").program, folder / "net.pt2")
        files.append((folder / "net.pt2").read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_every_tensor_is_found_under_its_name_in_whatever_a_module_or_a_program_returns(form, exported, tmp_path):
    if exported and form in ("record", "dataclass"):
        pytest.skip("torch.export.save takes no record that is not registered")
    net = Classifier(form).eval()
    graph = capture(load_model(saved(tmp_path / "net.pt2", net)) if exported else loaded(net))
    assert [op.name for op in graph.ops] == ["conv", "head"]
    assert [(one.name, one.shape) for one in graph.outputs] == [
        (name, (5,) if is_logits else (4, 6, 6)) for name, is_logits in NAMES[form].items()
    ]
    x = images(SIZE, 3)
    with torch.no_grad():
        features, returned = net.conv(x), graph.module(x)
        for value, is_logits in zip(returned if len(NAMES[form]) > 1 else [returned], NAMES[form].values(), strict=True):
            torch.testing.assert_close(value, net.head(features.mean((2, 3))) if is_logits else features)


def test_a_program_that_takes_its_images_by_name_is_called_like_any_other():
    net = Classifier().eval()
    shapes = {"pixel_values": {0: Dim("batch")}}
    program = torch.export.export(net, (), {"pixel_values": images(SIZE, 2)}, dynamic_shapes=shapes)
    assert_same_function(net, capture(load_model(program)).module, SIZE)


def test_a_model_without_any_tensor_in_its_output_is_refused():
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, int]:
            return {"classes": 3}

    with pytest.raises(BadModel, match="returns dict without a tensor"):
        loaded(Nothing())


def test_advice_to_the_writers_of_torchao_is_not_for_users(tmp_path):
    """torch logs it where a model's file imports transformers and torchao is there; other lines of that log stay."""
    log, lines = logging.getLogger("torch.utils._pytree"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    says = f"logging.getLogger({log.name!r}).warning"
    advice = f"{says}('Calling register_constant() on Enum subclasses is deprecated')"
    (tmp_path / "nets.py").write_text(
        f"import logging\nfrom torch import nn\nINPUT_SIZE = (3, 8, 8)\n{advice}\ndef net():\n    {advice}\n"
        f"    {says}('other')\n    return nn.Conv2d(3, 4, 3)\n"
    )
    try:
        load_model(f"{tmp_path}/nets.py:net")
        log.warning("register_constant() on Enum subclasses, later")
    finally:
        log.removeHandler(handler)
    assert lines == ["other", "register_constant() on Enum subclasses, later"]


# modules


def test_control_flow_on_values_is_refused_in_one_line_with_the_line_of_the_model(capfd):
    with pytest.raises(BadModel) as error:
        loaded(Branching())
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("Branching cannot be exported for input (batch, 3, 8, 8): ")
    assert "what it does next depends on numbers that it has computed, at test_export.py:" in message
    assert "GuardOn" not in message
    assert "unhinted" not in message
    assert "data-dependent" in str(error.value.__cause__)  # torch's own words
    assert "test_export.py:" in message
    assert "if x.sum() > 0:" in message
    assert capfd.readouterr().err == ""


def test_a_wrong_input_size_is_refused_with_the_reason():
    with pytest.raises(BadModel, match=r"cannot be exported for input \(batch, 1, 8, 8\).*3 channels.*--input-size"):
        loaded(Classifier(), input_size=(1, 8, 8))


class Clips(nn.Module):
    """Three channels at four times, one behind the other; `folded`: in the channels of an image."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.conv = folded, nn.Conv3d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(1, (3, 4)) if self.folded else x).flatten(1, 2)


def test_a_model_of_clips_is_told_to_fold_the_time_into_the_channels():
    folded, asked = (
        Clips(True),
        r"Of clips fold the time into the channels: .* self\.net\(x\.unflatten\(1, ",
    )
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph_module(loaded(folded, input_size=(12, 8, 8)).program)(x), folded(x))  # as is advised
    for overrides in ({"input_size": SIZE}, {}):
        with pytest.raises(BadModel, match=asked):
            load_model(Clips(False), overrides=overrides)
    with pytest.raises(BadModel) as said:
        loaded(Classifier(), input_size=(1, 8, 8))
    assert "clips" not in str(said.value)


def test_a_module_without_an_input_size_is_asked_for_one():
    with pytest.raises(BadModel, match=r"Classifier does not say its input size.*--input-size"):
        load_model(Classifier())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value):
    net = Classifier()
    net.head.weight.data[2, 1] = value
    with pytest.raises(BadValues, match=r"head\.weight of Classifier"):
        loaded(net)


def test_a_statistic_that_is_nan_is_named_and_an_infinite_mask_is_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    loaded(net)
    net[1].running_var[2] = float("nan")
    with pytest.raises(BadValues, match=r"1\.running_var"):
        loaded(net)


def test_a_module_with_nothing_to_quantize_is_refused():
    with pytest.raises(BadModel, match="Flatten has no linear, convolution or matrix product"):
        capture(loaded(nn.Flatten()))


def test_timm_models_bring_their_record():
    net = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48)
    record = load_model(net).record
    assert record["input_size"] == (3, 224, 224)
    assert record["mean"] == net.pretrained_cfg["mean"]
    assert record["crop_pct"] == net.pretrained_cfg["crop_pct"]


# .pt2 files


def test_an_exported_file_computes_what_its_module_computes_and_reads_its_sidecar(tmp_path):
    net = Classifier().eval()
    path = saved(tmp_path / "net.pt2", net)
    (tmp_path / "net.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5], "classes": ["a", "b"], "task": "classify"}))
    found = load_model(path, overrides={"std": (1, 1, 1)})
    assert found.record == {"mean": (0.5, 0.5, 0.5), "std": (1, 1, 1), "input_size": SIZE, "task": "classify"}
    assert found.classes == ("a", "b")
    assert_same_function(net, capture(found).module, SIZE)


def test_a_truncated_file_is_refused_by_its_name(tmp_path):
    path = tmp_path / "net.pt2"
    saved(path, Classifier())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadFile) as error:
        load_model(str(path))
    assert f"{path} is not a readable exported program" in str(error.value)
    assert "torch.export.save" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_with_what_a_model_can_be(tmp_path):
    for name in ("net.pt2", "net.py:function"):
        with pytest.raises(BadFile, match="does not exist"):
            load_model(str(tmp_path / name))


def test_a_sidecar_that_is_no_json_is_refused(tmp_path):
    path = saved(tmp_path / "net.pt2", Classifier())
    (tmp_path / "net.json").write_text("mean = 3")
    with pytest.raises(BadFile, match=r"net\.json is not JSON"):
        load_model(path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[1]", BadFile, "holds a list; a record is needed"),
        ("null", BadFile, "holds a NoneType"),
        ("[" * 100_000, BadFile, "is not JSON"),
        ('{"mean": "grey"}', BadModel, "mean grey is not allowed"),
        ('{"std": [0, 0, 0]}', BadModel, "std .* is not allowed"),
        ('{"classes": 5}', BadModel, "classes is 5; a list of names"),
        ('{"mean": [1, 2]}', BadModel, "mean has 2 numbers and the model 3 channels"),
    ],
)
def test_a_sidecar_with_anything_else_is_refused(text, error, message, tmp_path):
    path = saved(tmp_path / "net.pt2", Classifier())
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(error, match=message) as found:
        load_model(path)
    assert str(tmp_path / "net.json") in str(found.value)


def test_a_program_with_a_free_size_or_two_inputs_is_told_them():
    net, x = Classifier().eval(), images(SIZE, 2)
    free = torch.export.export(net, (x,), dynamic_shapes=({0: Dim("batch"), 2: Dim("height", min=4)},))
    with pytest.raises(BadModel, match=r"was exported for any height\. Say one size: --input-size"):
        load_model(free)

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(BadModel, match="y must be given as well"):
        load_model(torch.export.export(Two(), (x, x), dynamic_shapes=(*DYNAMIC, *DYNAMIC)))


def test_another_input_size_than_the_exported_one_is_refused():
    program = torch.export.export(Classifier().eval(), (images(SIZE, 2),), dynamic_shapes=DYNAMIC)
    with pytest.raises(BadModel, match=r"exported for input \(3, 8, 8\), not \(3, 16, 16\)"):
        load_model(program, overrides={"input_size": (3, 16, 16)})


def test_nan_in_an_exported_program_is_named():
    net = Classifier().eval()
    net.conv.bias.data[0] = float("nan")
    with pytest.raises(BadValues, match=r"conv\.bias"):
        load_model(torch.export.export(net, (images(SIZE, 2),), dynamic_shapes=DYNAMIC))


# file.py:function


def test_a_function_of_a_file_gives_module_record_and_classes(python):
    found = load_model(f"{python}:small_net")
    assert found.input_shape == SIZE
    assert found.record["mean"] == (0.1, 0.2, 0.3)
    assert found.classes == ("cat", "dog")
    assert [op.kind for op in capture(found).ops] == ["conv", "linear"]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("smal_net", UnknownName, "unknown function in nets.py 'smal_net'. Did you mean small_net"),
        ("xyz", UnknownName, "There are: broken, number, small_net"),
        ("number", BadModel, "returned int; a torch.nn.Module is needed"),
        ("broken", BadModel, "ValueError: no weights here"),
    ],
)
def test_a_function_that_gives_no_module_is_refused(python, function, error, message):
    with pytest.raises(error, match=message):
        load_model(f"{python}:{function}")


def test_a_file_that_cannot_be_imported_is_refused(tmp_path):
    (tmp_path / "nets.py").write_text("import not_there_at_all")
    with pytest.raises(BadModel, match=r"nets\.py cannot be imported: ModuleNotFoundError"):
        load_model(f"{tmp_path / 'nets.py'}:small_net")


def test_a_file_may_import_its_neighbour_and_define_dataclasses(tmp_path):
    (tmp_path / "a_neighbour_of_nets.py").write_text("WIDTH = 4")
    (tmp_path / "nets.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from a_neighbour_of_nets import WIDTH\n\nINPUT_SIZE = (3, 8, 8)\n\n\n@dataclass\nclass Settings:\n"
        "    width: int = WIDTH\n\n\ndef net():\n    return nn.Conv2d(3, Settings().width, 3)\n"
    )
    assert capture(load_model(f"{tmp_path / 'nets.py'}:net")).ops[0].macs == 6 * 6 * 4 * 27


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        *(
            (f"INPUT_SIZE = {size}", "INPUT_SIZE")
            for size in ("'large'", "32", "(3, -8, 8)", "(3, 32.5, 32)", "(3, 10**6, 10**6)")
        ),
        ("INPUT_SIZE = None", "does not say its input size"),
        *(
            (f"INPUT_SIZE = (3, 8, 8)\nMEAN = {mean}", "MEAN .* is not allowed")
            for mean in ("'grey'", "(0, 0, float('nan'))", "11")
        ),
        ("INPUT_SIZE = (3, 8, 8)\nSTD = (0.5, 0.5)", r"STD has 2 numbers and the model 3 channels; .* as in --std 0\.5"),
        (
            "INPUT_SIZE = (1, 8, 8)\nCHANNEL_ORDER = 'bgr'",
            r"CHANNEL_ORDER bgr needs 3 channels, .* The input size is \(1, 8, 8\)",
        ),
        ("INPUT_SIZE = (3, 8, 8)\nCLASSES = 5", "CLASSES is 5; a list of names is needed"),
    ],
)
def test_a_constant_of_a_file_that_cannot_be_is_named(constant, message, tmp_path):
    (tmp_path / "nets.py").write_text(f"from torch import nn\n{constant}\ndef net(): return nn.Conv2d(3, 4, 3)\n")
    with pytest.raises(BadModel, match=message) as found:
        load_model(f"{tmp_path / 'nets.py'}:net")
    assert "nets.py" in str(found.value)


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "def net(): raise SystemExit(0)", "def net(): exit()"])
def test_a_file_that_ends_the_program_is_an_error(text, tmp_path):
    (tmp_path / "nets.py").write_text(text)
    with pytest.raises(BadModel, match=r"nets\.py .*SystemExit"):
        load_model(f"{tmp_path / 'nets.py'}:net")


@pytest.mark.parametrize("name", ["nets.py", "nets.py:"])
def test_a_file_without_a_function_lists_its_own(name, python):
    with pytest.raises(UnknownName, match="There are: broken, number, small_net"):
        load_model(str(python.parent / name))


class Gives(nn.Module):
    def __init__(self, out: Any) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 8), out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.conv(x).flatten(1))


BAD_OUTPUTS = {
    "one number": (
        lambda y: y.mean(),
        r"shape \(\); its first dimension has to be the batch, .* Return it with a row for each image: \w+\.mean\(",
    ),
    "one row": (lambda y: y[0], r"shape \(4\); .* where it is of one image, \w+\[None\]\.$"),
    "one number beside rows": (lambda y: (y, y.mean()), r"shape \(\); .*, or leave it out of what the model returns\.$"),
    "flat": (lambda y: y.flatten(), r"shape \(4\*batch\)"),
    "steps in front": (
        lambda y: y.view(-1, 2, 2).transpose(0, 1),
        r"Return it with the batch in front: \w+\.transpose\(0, 1\); .*: model.register_forward_hook\(lambda .*\)\.$",
    ),
    "a constant": (
        lambda y: (y, torch.arange(5.0)),
        r"\(5\); .*row for each image; where it is of one image, \S+\[None\], or leave",
    ),
    "no name": (lambda y: {"": y}, "returns a tensor under the name '', which no file can have"),
    "one name twice": (lambda y: {1: y, "1": y * 2}, "returns two tensors under the name '1'"),
    "no classes": (lambda y: y[:, :0], r"shape \(batch, 0\), without a number"),
    "an int": (lambda y: 3, "returns int without a tensor"),
    "the end of the program": (lambda y: exit(), "SystemExit"),
    "dropout": (lambda y: nn.functional.dropout(y, 0.5, training=True), "two answers for one image"),
    "noise": (lambda y: y + torch.randn_like(y), "two answers for one image"),
}


@pytest.mark.parametrize("turn", [lambda y: y.view(-1, 2, 2).transpose(0, 1), lambda y: y.view(-1, 2, 2).movedim(0, 2)])
def test_the_line_that_a_refusal_says_puts_the_batch_in_front(turn):
    model = Gives(turn).eval()
    with pytest.raises(BadModel, match="batch in front") as refused:
        load_model(model, overrides={"input_size": (3, 8, 8)})
    eval(str(refused.value).partition("change to its code: ")[2].removesuffix("."))
    assert [one.shape for one in load_model(model, overrides={"input_size": (3, 8, 8)}).outputs] == [(2, 2)]


@pytest.mark.parametrize("out", [lambda y: y.mean()[None], lambda y: (y, y.new_ones(1, 7) * 2), lambda y: y[0][None]])
def test_an_output_of_one_image_is_taken_one_image_at_a_time(out, tmp_path):
    net, x = Gives(out).eval(), torch.rand(1, 3, 8, 8)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}})
    with torch.no_grad():
        want = torch.utils._pytree.tree_leaves(net(x))
    for given in (net, str(path)):
        found = load_model(given, overrides={"input_size": (3, 8, 8)})
        assert found.batch == 1
        assert any("takes one image at a time and no other batch" in note for note in found.notes)
        with torch.no_grad():
            got = torch.utils._pytree.tree_leaves(graph_module(found.program)(x))
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(one, other)


def test_an_output_of_a_file_that_has_no_rows_is_left_out_by_what_the_message_says(tmp_path):
    path, fewer = tmp_path / "net.onnx", tmp_path / "rows.onnx"
    names = {"input_names": ["x"], "output_names": ["y", "z"], "dynamic_axes": {"x": {0: "N"}, "y": {0: "N"}}}
    torch.onnx.export(Gives(lambda y: (y, y.mean())).eval(), (torch.rand(2, 3, 8, 8),), path, dynamo=False, **names)
    with pytest.raises(
        BadModel, match=r"gives z of shape \(\); .* Leave it out: (.*), or export the model with a row"
    ) as found:
        load_model(str(path))
    (code,) = re.findall(r"Leave it out: (.*\)), or export", str(found.value))
    exec(code.replace("'rows.onnx'", f"'{fewer}'"), {"onnx": onnx})
    assert [one.name for one in load_model(str(fewer)).outputs] == ["y"]


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_an_output_that_cannot_be_compared_is_refused(case, tmp_path):
    out, message = BAD_OUTPUTS[case]
    with pytest.raises(BadModel, match=message):
        loaded(Gives(out))
    if case not in ("an int", "the end of the program"):  # and as a file
        with pytest.raises(BadModel, match=message):
            load_model(saved(tmp_path / "net.pt2", Gives(out)))


def test_a_program_in_another_precision_is_refused(tmp_path):
    net, x = Classifier().eval().half(), images(SIZE, 2).half()
    with pytest.raises(BadModel, match=r"exported in float16; export it in float32: model\.float\(\)"):
        load_model(torch.export.export(net, (x,), dynamic_shapes=DYNAMIC))


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_weights_that_were_never_loaded_are_refused(value):
    net = Classifier()
    for parameter in net.parameters():
        parameter.data.fill_(value)
    with pytest.raises(BadValues, match="every weight of Classifier is zero or below 1e-30"):
        loaded(net)


class Beside(Classifier):
    """A classifier with a buffer, which it may add to its logits."""

    def __init__(self, form: str, value: float, reads: bool) -> None:
        super().__init__(form)
        self.register_buffer("beside", torch.tensor([0.0, value]))
        self.reads = reads

    def forward(self, pixel_values: Tensor) -> Any:
        return super().forward(pixel_values + self.beside.sum() if self.reads else pixel_values)


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_numbers_that_are_none_are_refused_only_where_something_reads_them(tmp_path, form):
    for bad in (float("nan"), float("inf")):
        unread = Beside(form, bad, reads=False)
        unread.left = nn.Parameter(torch.full((2,), bad))
        same = Classifier(form)
        same.load_state_dict(unread.state_dict(), strict=False)
        x = images(SIZE, 2)
        found = pytree.tree_leaves(graph_module(loaded(unread).program)(x))
        for ours, theirs in zip(found, pytree.tree_leaves(same(x)), strict=True):
            torch.testing.assert_close(ours, theirs)
    nan = float("nan")
    message = r"^weight beside of .* holds NaN or infinite values \(1 of 2\); .* Give a checkpoint"
    for give in (loaded, lambda net: load_model(saved(tmp_path / "net.pt2", net))):
        with pytest.raises(BadValues, match=message):
            give(Beside(form, nan, reads=True))
    broken = Classifier(form)
    broken.conv.weight.data[0, 0, 0, 0] = float("-inf")
    with pytest.raises(BadValues, match=r"^weight conv\.weight of .* \(1 of 108\)"):
        loaded(broken)


class Joins(Classifier):
    """A classifier that joins features and tokens that are none, from numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("none", torch.from_numpy(np.zeros((1, 0, 6, 6), np.float32)))
        self.nothing = nn.Parameter(torch.from_numpy(np.zeros((4, 0), np.float32)))

    def forward(self, pixel_values: Tensor) -> Any:
        features = torch.cat([self.conv(pixel_values), self.none.expand(pixel_values.shape[0], -1, -1, -1)], 1)
        return self.head(torch.cat([features.mean((2, 3)), self.nothing.sum(0).expand(pixel_values.shape[0], 0)], 1))


@pytest.mark.parametrize("given", [False, True], ids=["module", "program"])
def test_a_tensor_without_numbers_is_stored_whatever_its_strides(tmp_path, given):
    net, x = Joins().eval(), images(SIZE, 2)
    assert set(net.none.stride()) == {0}
    model = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC) if given else net
    torch.export.save(load_model(model, overrides={"input_size": SIZE}).program, tmp_path / "net.pt2")
    again = load_model(str(tmp_path / "net.pt2"))
    torch.testing.assert_close(graph_module(again.program)(x), net(x))


# timm


def test_an_unknown_name_is_refused_with_near_names_or_with_what_there_is():
    with pytest.raises(UnknownName, match=r"Did you mean .*vit_tiny_patch16_224"):
        load_model("vit_tiny_patch16_225")
    with pytest.raises(UnknownName) as error:
        load_model("net.tflite")
    assert "path.pt2" in str(error.value)
    assert f"{len(timm.list_models())} names of timm" in str(error.value)
    assert len(str(error.value)) < 300


def test_weights_that_cannot_be_downloaded_are_asked_for_as_a_file(monkeypatch):
    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no connection to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BadModel, match=r"no connection to the hub.*--weights"):
        load_model("resnet10t")


def test_weights_are_read_from_a_file(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("resnet10t").eval()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "weights.safetensors")
    found = load_model("resnet10t", weights=tmp_path / "weights.safetensors", overrides={"input_size": (3, 64, 64)})
    state = found.program.state_dict
    assert all(torch.equal(state[name], tensor) for name, tensor in net.named_parameters())


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadModel, match=r"weights\.safetensors are not those of resnet10t: it lacks conv1"):
        load_model("resnet10t", weights=tmp_path / "weights.safetensors")


def test_the_fingerprint_tells_weights_and_architectures_apart():
    torch.manual_seed(0)
    net = Classifier()
    first = fingerprint(loaded(net).program)
    assert first == fingerprint(loaded(net).program)
    net.head.bias.data[0] += 1
    second = fingerprint(loaded(net).program)
    assert len({first, second, fingerprint(loaded(Classifier("tuple")).program)}) == 3


def test_the_fingerprint_covers_constants_inner_graphs_and_what_is_given():
    class Net(nn.Module):
        def __init__(self, constant: float, slope: float, given: str) -> None:
            super().__init__()
            self.conv, self.slope, self.given = nn.Conv2d(3, 4, 3), slope, given
            self.register_buffer("constant", torch.tensor(constant), persistent=False)

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y = nn.functional.leaky_relu(self.conv(x), self.slope)
            return {self.given: y * self.constant}

    prints = set()
    for constant, slope, given in ((1.0, 0.1, "a"), (2.0, 0.1, "a"), (1.0, 0.2, "a"), (1.0, 0.1, "b")):
        torch.manual_seed(0)
        net = Net(constant, slope, given).eval()
        programs = [torch.export.export(net, (images(SIZE, 2),), dynamic_shapes=DYNAMIC) for _ in range(2)]
        first, again = map(fingerprint, programs)
        assert first == again
        prints.add(first)
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_in_another_precision_is_computed_in_float32_and_says_so(dtype):
    torch.manual_seed(0)
    net = Classifier().eval().to(dtype)
    found = loaded(net)
    assert found.notes == (f"Classifier has weights in {str(dtype)[6:]}; it is computed in float32.",)
    assert net.head.weight.dtype == dtype
    x = images(SIZE, 3)
    torch.testing.assert_close(capture(found).module(x), net.float()(x))


def test_a_model_that_cannot_be_exported_with_any_batch_is_refused_with_torch_s_own_reason():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0), nn.Unflatten(0, (1, 100)))
    with pytest.raises(BadModel, match=r"cannot be exported for input \(batch, 3, 8, 8\): RuntimeError.*Check --input-size"):
        export(net, [image((3, 8, 8))])


class Chooses(nn.Module):
    def forward(self, x):
        return x[x > 0].reshape(1, -1) if float(x.sum()) > 0 else x


def test_a_model_that_chooses_by_its_values_is_refused_with_what_to_give_instead():
    with pytest.raises(BadModel, match=r"by their values.* as a module of its own: file\.py:function\.$"):
        load_model(Chooses(), overrides={"input_size": (3, 8, 8)})


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, device="meta"), nn.LazyConv2d(4, 3)], ids=["meta", "lazy"])
def test_weights_without_numbers_are_named(layer):
    with pytest.raises(BadModel, match=r"weight 0\.weight of Sequential has no numbers yet"):
        load_model(nn.Sequential(layer), overrides={"input_size": (3, 8, 8)})


class Waves(nn.Module):
    def forward(self, x):
        return torch.complex(x, x)


def test_complex_outputs_are_refused_with_what_to_return():
    with pytest.raises(BadModel, match=r"gives output in complex numbers.* write torch\.view_as_real"):
        load_model(Waves(), overrides={"input_size": (3, 8, 8)})


class InPlace(nn.Module):
    """Normalizes its images where they lie, and scales another input there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        gain *= 2
        return self.conv(x) * gain


@pytest.mark.parametrize("as_program", [False, True])
def test_a_model_that_writes_into_its_inputs_is_not_called_random(as_program):
    torch.manual_seed(0)
    net, x, gain = InPlace().eval(), torch.rand(1, *SIZE), torch.rand(4, 1, 1)
    expected = net(x.clone(), gain.clone())
    model = torch.export.export(net, (x.clone(), gain.clone())) if as_program else net
    given = Given({"gain": gain.clone()})
    loaded = load_model(model, overrides={} if as_program else {"input_size": SIZE}, given=given)
    torch.testing.assert_close(capture(loaded).module(x.clone(), gain.clone()), expected)
    assert torch.equal(given.constants["gain"], gain)


class NamedAsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.conv(images)
        return {"images": y, "images_output": -y}


def test_an_output_that_is_named_as_the_input_gets_another_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NamedAsItsInput().eval()
    loaded = load_model(model, overrides={"input_size": (3, 8, 8)})
    assert [one.name for one in loaded.outputs] == ["images_output_", "images_output"]
    said = "output 'images' of NamedAsItsInput is 'images_output_' in the files that come out: an input has that name, "
    assert [note for note in loaded.notes if note.startswith(said)]
    float_onnx(capture(loaded), tmp_path / "float.onnx", opset=21)
    x = torch.randn(2, 3, 8, 8)
    got = onnxruntime.InferenceSession(tmp_path / "float.onnx").run(["images_output_", "images_output"], {"images": x.numpy()})
    with torch.no_grad():
        for one, want in zip(got, model(x).values(), strict=True):
            np.testing.assert_allclose(one, want, atol=1e-5)


# what cannot be quantized for what it is made of


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.conv(x)).mean((2, 3)))

    def inner(self, x: Tensor) -> Tensor:
        return x


class Branches(Plain):
    def inner(self, x: Tensor) -> Tensor:
        return torch.cond(x.mean() > 0, lambda y: y * 2, lambda y: y + 1, (x,))


class Flexible(Plain):
    def inner(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)[:, :, None]
        return flex_attention(rows, rows, rows).unflatten(3, (6, 6))[:, :, 0]


class Draws(Plain):
    def inner(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.ones(x.shape[0], 1, 1, 1))


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Branches, "Branches: cond is torch's cond, which has graphs of its own.*torch.where"),
        (Flexible, "Flexible: flex_attention is torch's .*scaled_dot_product_attention"),
        (Draws, "Draws: bernoulli is torch's bernoulli, which draws at random.*out in eval mode"),
    ],
)
def test_an_operator_that_no_file_takes_is_named(net: type[nn.Module], says: str) -> None:
    with pytest.raises(BadModel, match=says):
        loaded(net().eval())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_a_module_that_was_quantized_before_is_named_and_a_prepared_one_gives_its_float_weights() -> None:
    """The oracle of what the message says is the weights after it was done."""
    ao = torch.ao.quantization
    with pytest.raises(
        BadModel, match=r"Plain has been quantized by torch.ao: head is torch\.ao\.nn\.quantized\.dynamic.*float model"
    ):
        loaded(ao.quantize_dynamic(Plain().eval(), {nn.Linear}))
    net = Plain().train()
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model = ao.prepare_qat(net)
    model(torch.rand(2, 3, 8, 8))
    with pytest.raises(BadModel, match=r"conv\.weight_fake_quant is \w+, which rounds") as error:
        loaded(model.eval())
    exec(str(error.value).rpartition("model then: ")[2], {"torch": torch, "model": model})
    found, want, x = loaded(model), Plain().eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(graph_module(found.program)(x), want(x))


class Block(nn.Module):
    """A residual block of torchvision, of those that can be quantized by torch.ao or of the ordinary ones."""

    def __init__(self, ready: bool) -> None:
        super().__init__()
        kind = QuantizableBasicBlock if ready else BasicBlock
        self.block, self.head, stubs = kind(3, 3), nn.Linear(3, 5), torch.ao.quantization
        self.before, self.after = (stubs.QuantStub(), stubs.DeQuantStub()) if ready else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.block(self.before(x)).mean((2, 3))))


class Attends(nn.Module):
    """Attention over the rows of an image."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.attention = kind(24, 4)  # batch_first is another function in torch.ao, which leaves the heads in front

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(2, 0, 1, 3).flatten(2)
        return self.attention(rows, rows, rows)[0].mean(0)


class Recurs(nn.Module):
    """A recurrence over the rows of an image."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(24, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1]


def weights_of(ordinary: nn.Module) -> dict[str, Tensor]:
    """Weights of one of the nets above, by their names in torch.ao's."""
    named = dict(ordinary.state_dict())
    for kind in ("weight", "bias"):
        if (value := named.get(f"attention.in_proj_{kind}")) is not None:
            named.update({f"attention.linear_{n}.{kind}": part for n, part in zip("QKV", value.chunk(3), strict=True)})
        for gates in ("ih", "hh"):
            if (value := named.pop(f"recurrent.{kind}_{gates}_l0", None)) is not None:
                named[f"recurrent.layers.0.layer_fw.cell.{gates[0]}gates.{kind}"] = value
    return named


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    ("ready", "plain"),
    [
        (lambda: Block(True), lambda: Block(False)),
        (lambda: Attends(quantizable.MultiheadAttention), lambda: Attends(nn.MultiheadAttention)),
        (lambda: Recurs(quantizable.LSTM), lambda: Recurs(nn.LSTM)),
    ],
)
def test_a_float_model_that_is_ready_for_torch_ao_is_the_ordinary_model(ready: Any, plain: Any, tmp_path: Path) -> None:
    """The oracle is torch's or torchvision's ordinary module with the same weights; the file runs in onnxruntime."""
    net, ordinary, x = ready(), plain().eval(), images(SIZE, 3)
    net.load_state_dict(weights_of(ordinary))
    float_onnx(capture(loaded(net)), tmp_path / "float.onnx", opset=20)
    session = onnxruntime.InferenceSession(tmp_path / "float.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, ordinary(x).numpy(), rtol=1e-4, atol=1e-5)


def test_weights_that_are_no_plain_tensors_are_named() -> None:
    net = Plain().eval()
    net.head.weight = nn.Parameter(TwoTensor(net.head.weight.data, net.head.weight.data), requires_grad=False)
    with pytest.raises(BadModel, match=r"weight head\.weight is torch's TwoTensor and no plain tensor"):
        loaded(net)


class Counts(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("kept", torch.zeros(1))

    def inner(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


class Timed(Plain):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3))) * t[:, None]


def test_a_buffer_that_a_model_changes_is_named() -> None:
    with pytest.raises(BadModel, match=r"Counts gives two answers for one image: it changes seen when it is called"):
        loaded(Counts().eval())


class Unread(Counts):
    """Counts its calls in buffers, one of them as a new tensor, and gives what does not depend on them."""

    def inner(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.kept = self.kept + self.seen
        return x


def test_noise_in_a_dataclass_is_found() -> None:
    with pytest.raises(BadModel, match="two answers for one image"):
        loaded(Gives(lambda y: Fields(y, Record(y, y + torch.randn_like(y)))))


def test_buffers_are_put_back_and_no_run_of_the_program_changes_them() -> None:
    net = Unread().eval()
    seen, kept = net.seen, net.kept
    module = graph_module(loaded(net).program)
    x = images(SIZE, 2)
    with torch.no_grad():
        module(x)
    assert net.seen is seen
    assert net.kept is kept
    assert net.seen.item() == net.kept.item() == 0


class Attributes(Plain):
    """Counts its calls in tensors that are plain attributes, one of them as a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.kept, self.table = torch.zeros(()), torch.zeros(()), torch.full((1, 1), torch.nan).expand(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.kept = self.kept + self.seen
        return super().forward(x)


def test_tensors_that_are_plain_attributes_are_put_back_too() -> None:
    net = Attributes().eval()
    seen, kept, table = net.seen, net.kept, net.table
    loaded(net)
    assert (net.seen is seen, net.kept is kept, net.table is table) == (True, True, True)
    assert seen.item() == kept.item() == 0


class ByKeyword(Plain):
    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def test_an_image_that_is_taken_by_keyword_alone_is_given_so() -> None:
    net, x = ByKeyword().eval(), images(SIZE, 3)
    found = loaded(net)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(found.program)(x), net(pixel_values=x))
    assert [one.name for one in found.inputs] == ["images"]


class Opened(list):
    """A container that torch opens once it is registered."""


torch.utils._pytree.register_pytree_node(Opened, lambda one: (list(one), None), lambda values, _: Opened(values))


def test_what_is_no_tensor_is_named_and_a_container_that_torch_knows_is_opened(tmp_path: Path) -> None:
    found = loaded(Gives(lambda y: (y, 0.5, None, {"text": "a"}, y.shape[0], Opened([y * 2]))))
    assert [one.name for one in found.outputs] == ["output.0", "output.5.0"]
    (note,) = found.notes
    assert "returns output.1 (float), output.3.text (str), output.4 (int) beside its tensors" in note
    program = torch.export.export(Gives(lambda y: (y, 0.5)).eval(), (images(SIZE, 2),), dynamic_shapes=DYNAMIC)
    (note,) = load_model(program).notes
    assert "returns output.1 (float) beside its tensors" in note


def test_a_number_for_an_input_with_a_batch_is_said_to_need_one() -> None:
    def opened(value: Any) -> Any:
        return load_model(Timed().eval(), given=Given(constants({"t": value})), overrides={"input_size": SIZE})

    with pytest.raises(BadModel, match=r"Input t is given a number without a batch; .*--input t=\[NUMBER\]"):
        opened(5)
    assert [one.has_batch for one in opened([5]).inputs] == [True, True]


class Worded(Plain):
    """As decoders of transformers take token ids (batch, tokens), and say so where none are given."""

    def forward(self, x: Tensor, decoder_ids: Tensor | None = None, decoder_embeds: Tensor | None = None) -> Tensor:
        if decoder_ids is None:
            raise ValueError("You have to specify either decoder_ids or decoder_embeds")
        batch, _ = decoder_ids.shape
        return self.head(self.conv(x).mean((2, 3))) + decoder_ids.sum(1).reshape(batch, 1)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([2, 5, 7], r"Input decoder_ids is given a flat list; .*--input decoder_ids=\[\[2,5,7\]\] .* Or: Check --input-size"),
        ([5], r"Input decoder_ids is given a flat list; .*--input decoder_ids=\[\[5\]\] "),
        (None, r"either decoder_ids or decoder_embeds\. Give it: --input decoder_ids=VALUE.* Or: Check --input-size"),
    ],
)
def test_a_flat_list_or_none_for_an_input_of_rows_is_told_what_to_type(value: list[int] | None, says: str) -> None:
    given = Given(constants({"decoder_ids": value} if value else {}))
    with pytest.raises(BadModel, match=says):
        load_model(Worded().eval(), given=given, overrides={"input_size": SIZE})
    typed = Given(constants({"decoder_ids": [value or [2, 5, 7]]}))  # what the message says
    assert len(load_model(Worded().eval(), given=typed, overrides={"input_size": SIZE}).inputs) == 2


class Flagged(Plain):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = self.head(self.conv(x).mean((2, 3)))
        return y * 2 if twice else y


class Unsaid(Plain):
    def forward(self, x: Tensor, twice) -> Tensor:  # type: ignore[no-untyped-def]
        y = self.head(self.conv(x).mean((2, 3)))
        return y * 2 if twice else y


class Chosen(Plain):
    def forward(self, x: Tensor, twice: Tensor) -> Tensor:
        y = self.head(self.conv(x).mean((2, 3)))
        return torch.where(twice, y * 2, y)


@pytest.mark.parametrize("net", [Flagged, Unsaid])
def test_a_flag_is_said_to_be_no_input(net: Callable[[], nn.Module]) -> None:
    given = Given(constants({"twice": True}))
    with pytest.raises(
        BadModel, match=r"twice is a flag, True, and inputs are tensors\. .* self\.net\(x, twice=True\)\."
    ) as error:
        load_model(net().eval(), given=given, overrides={"input_size": SIZE})
    assert "NUMBER" not in str(error.value)
    assert len(load_model(Chosen().eval(), given=given, overrides={"input_size": SIZE}).inputs) == 2
