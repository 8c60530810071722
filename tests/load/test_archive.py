"""No code runs from a .pt2: each attack would leave a marker file behind if it did, and each is refused by its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from capture.nets import images
from fewbit.capture import capture
from fewbit.errors import BadFile, FewbitError
from fewbit.load import load_model
from fewbit.load.archive import _is_size

SIZE = (3, 6, 6)
Files = dict[str, bytes]
Attack = Callable[[Files, str], None]  # what it does to the members of an archive, to leave a marker at a path


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"conv-1 x": nn.Conv2d(3, 2, 3)})
        self.head = nn.Linear(2, 4)
        self.register_buffer("factor", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            y = self.layers["conv-1 x"](x) * self.factor
        return {"logits": self.head(y.mean((2, 3)).flatten(1)), "a/b": y}


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> Files:
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Small().eval(), (images(SIZE, 2),), dynamic_shapes=({0: Dim("batch")},)), path)
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def written(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def edited(member: str, edit: Callable[[Any, str], None]) -> Attack:
    """An attack that changes the value of a JSON member in place."""

    def attack(files: Files, marker: str) -> None:
        value = json.loads(files[f"net/{member}"])
        edit(value, marker)
        files[f"net/{member}"] = json.dumps(value).encode()

    return attack


class Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def pickled(files: Files, marker: str) -> None:
    buffer = io.BytesIO()
    torch.save(((Evil(marker),), {}), buffer)
    files["net/data/sample_inputs/model.pt"] = buffer.getvalue()


def pickled_weights(files: Files, marker: str) -> None:
    buffer = io.BytesIO()
    torch.save({"head.bias": Evil(marker)}, buffer)
    files["net/data/weights/model.pt"] = buffer.getvalue()


def pickled_weight(files: Files, marker: str) -> None:
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    config = json.loads(files["net/data/weights/model_weights_config.json"])
    config["config"]["head.bias"]["use_pickle"] = True
    files["net/data/weights/model_weights_config.json"] = json.dumps(config).encode()
    files["net/data/weights/" + config["config"]["head.bias"]["path_name"]] = buffer.getvalue()


def opaque(files: Files, marker: str) -> None:
    config = json.loads(files["net/data/constants/model_constants_config.json"])
    config["config"]["factor"]["path_name"] = "opaque_obj_0"
    files["net/data/constants/model_constants_config.json"] = json.dumps(config).encode()
    files["net/data/constants/opaque_obj_0"] = pickle.dumps(Evil(marker))


def library(files: Files, marker: str) -> None:
    files["net/data/aotinductor/model/model.so"] = b"\x7fELF"


def older(files: Files, marker: str) -> None:
    """Files of torch 2.7, which is what torch tries where reading the newer ones fails."""
    files["version"] = b"8.8"
    files["serialized_example_inputs.pt"] = pickle.dumps(Evil(marker))


def size(model: Any, marker: str) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0]["as_expr"]["expr_str"] = f"__import__('os').mkdir({marker!r})"


def target(model: Any, marker: str) -> None:
    model["graph_module"]["graph"]["nodes"][-1] |= {
        "target": "torch.os.mkdir", "inputs": [{"name": "", "arg": {"as_string": marker}, "kind": 1}],
    }  # fmt: skip


def operand(model: Any, marker: str) -> None:
    """Hidden under a key that is free text elsewhere."""
    argument = {"as_string_to_argument": {"metadata": {"as_operator": "torch.os.mkdir"}}}
    model["graph_module"]["graph"]["nodes"][-1]["inputs"].append({"name": "", "arg": argument, "kind": 1})


def native(model: Any, marker: str) -> None:
    model["graph_module"]["graph"]["nodes"][-1]["target"] = "torch.ops.load_library"


def file_written(model: Any, marker: str) -> None:
    model["graph_module"]["graph"]["nodes"][-1] |= {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [
            {"name": "filename", "arg": {"as_string": marker}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 4}, "kind": 1},
        ],
    }  # fmt: skip


def renamed(model: Any, marker: str) -> None:
    """A name in the code that torch generates: everywhere, so that the graph is one."""
    code = f"linear=__import__('os').mkdir({marker!r})"
    text = json.dumps(model["graph_module"]["graph"]).replace('"linear"', json.dumps(code))
    model["graph_module"]["graph"] = json.loads(text)
    signature = json.dumps(model["graph_module"]["signature"]).replace('"linear"', json.dumps(code))
    model["graph_module"]["signature"] = json.loads(signature)


def quoted(model: Any, marker: str) -> None:
    for entry in model["graph_module"]["signature"]["input_specs"]:
        if "buffer" in entry:
            entry["buffer"]["buffer_name"] = f'x" + str(__import__("os").mkdir({marker!r})) + "'


def argument_name(model: Any, marker: str) -> None:
    entry = model["graph_module"]["module_call_graph"][0]["signature"]
    entry["forward_arg_names"] = [f"x=__import__('os').mkdir({marker!r})"]


def tree_key(model: Any, marker: str) -> None:
    entry = model["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(entry["in_spec"])
    tree["children_spec"][1]["context"] = json.dumps([f"k=__import__('os').mkdir({marker!r})"])
    tree["children_spec"][1]["children_spec"] = [{"type": None, "context": None, "children_spec": []}]
    entry["in_spec"] = json.dumps([protocol, tree])


def tree_type(model: Any, marker: str) -> None:
    context = {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": ["logits", "a/b"]}
    _output_tree(model, "collections.defaultdict", context)


def tree_enum(model: Any, marker: str) -> None:
    _output_tree(model, "builtins.dict", [{"\u005f_enum__": True, "fqn": "antigravity:x", "name": "y"}, "a/b"])


def _output_tree(model: Any, kind: str, context: Any) -> None:
    entry = model["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(entry["out_spec"])
    entry["out_spec"] = json.dumps([protocol, {**tree, "type": kind, "context": json.dumps(context)}])


MODEL = "models/model.json"
ATTACKS: dict[str, tuple[Attack, str]] = {
    "pickled sample inputs": (pickled, "sample_inputs/model.pt holds more than tensors"),
    "pickled state": (pickled_weights, "weights/model.pt holds more than tensors"),
    "a pickled weight": (pickled_weight, "use_pickle"),
    "an opaque object": (opaque, "opaque_obj_0"),
    "a compiled library": (library, "data/aotinductor/model/model.so"),
    "the older format": (older, "is ambiguous|is not a readable exported program"),
    "the expression of a size": (edited(MODEL, size), "the size .* is not arithmetic"),
    "the target of a node": (edited(MODEL, target), "a node calls 'torch.os.mkdir'"),
    "a function as an operand": (edited(MODEL, operand), "a node calls 'torch.os.mkdir'"),
    "a library as a node": (edited(MODEL, native), "a node calls 'torch.ops.load_library'"),
    "an operator that writes files": (edited(MODEL, file_written), "a node calls 'torch.ops.aten.from_file.default'"),
    "the name of a node": (edited(MODEL, renamed), "is not a name of a"),
    "the name of a buffer": (edited(MODEL, quoted), "is not a name of a tensor"),
    "the name of an argument": (edited(MODEL, argument_name), "is not a name of a node"),
    "a key of the arguments": (edited(MODEL, tree_key), "comes out is called .k=__import__"),
    "a type of the outputs": (edited(MODEL, tree_type), "is a 'collections.defaultdict'"),
    "an enumeration of the outputs": (edited(MODEL, tree_enum), "is called '__enum__'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_before_anything_of_it_runs(name, members, tmp_path):
    attack, message = ATTACKS[name]
    files, marker = dict(members), tmp_path / "marker"
    attack(files, str(marker))
    path = written(tmp_path / "net.pt2", files)
    with pytest.raises(BadFile, match=message) as error:
        load_model(str(path))
    assert str(error.value).startswith(f"{path} is ")
    assert not marker.exists()


def test_two_members_of_one_name_are_refused(members, tmp_path):
    path = written(tmp_path / "net.pt2", members)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"net/{MODEL}", members[f"net/{MODEL}"])
    with pytest.raises(BadFile, match="is ambiguous"):
        load_model(str(path))


def test_a_file_that_is_no_archive_is_named_as_what_it_is(members, tmp_path):
    path = written(tmp_path / "net.pt2", members)
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 2)  # of the second of two disks
    several = whole[:end] + locator + whole[end:]
    for content, says in ((whole[:2000], "no archive, or cut off"), (several, "no archive"), (b"", "empty, of 0 bytes")):
        path.write_bytes(content)
        with pytest.raises(
            BadFile, match=rf"exported program: it is {says}.* Copy or download it again, or write it with torch\.export"
        ):
            load_model(str(path))


def test_the_same_file_untouched_loads_and_computes_what_its_module_does(members, tmp_path):
    torch.manual_seed(0)
    net, x = Small().eval(), images(SIZE, 3)
    graph = capture(load_model(str(written(tmp_path / "net.pt2", members))))
    for value, expected in zip(graph.module(x), net(x).values(), strict=True):
        torch.testing.assert_close(value, expected)


def test_guards_are_never_made_into_code(members, tmp_path):
    files, marker = dict(members), tmp_path / "marker"
    edited(MODEL, lambda model, _: model.update(guards_code=[f"__import__('os').mkdir({str(marker)!r})"]))(files, str(marker))
    capture(load_model(str(written(tmp_path / "net.pt2", files)))).module(images(SIZE, 2))
    assert not marker.exists()


@pytest.mark.parametrize("place", range(12))
def test_a_flipped_bit_is_found_wherever_it_is(place, members, tmp_path):
    path = written(tmp_path / "net.pt2", members)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[place]
        start = info.header_offset + 30 + len(info.filename)
    data[start + info.file_size // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(FewbitError, match=r"net\.pt2 is (refused: .* is damaged|not a readable)"):
        load_model(str(path))


@pytest.mark.parametrize("text", [
    "s77", "2*s77", "(s77//2) + 1", "Mod(s0, 4)", "Max(1, s77)", "s77**2", "Symbol('s77', positive=True, integer=True)",
    "Mul(Integer(2), Symbol('s77', positive=True, integer=True))", "Pow(Symbol('u0', integer=True), Integer(-1))", "Eq(s77, 1)",
])  # fmt: skip
def test_sizes_that_torch_writes_are_arithmetic(text):
    _is_size(text)


@pytest.mark.parametrize("text", [
    "exit()", "().__class__", "s77.evalf()", "[s77]", "lambda: s77", "Symbol('__import__')", "'s77'", "Integer('9')", "9**9**9",
    "Pow(9, Pow(9, 9))", "1 << s77", "f'{s77}'", "s77 if s77 else 1", "Symbol", "print(s77)", "s77 #", "s77\n", "ｅval(s77)",
    "Max(*s77)", "Float('1')", "(s77 := 1)", "", "s77 @ s77", "Symbol('s77')(1)", 77, ["s77"], None,
])  # fmt: skip
def test_anything_else_is_no_size(text):
    function = getattr(_is_size, "__wrapped__", _is_size)
    with pytest.raises(BadFile, match="is not arithmetic of symbols"):
        function(text)
