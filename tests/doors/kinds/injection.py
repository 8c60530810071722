"""Inputs that carry code: nothing of it runs, and the input is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from doors.case import Case, each, either, quantize, refused, write
from doors.kinds.hugging_face import changed, edited

RUNS = 'touch "$MARKER"'


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        return os.system, (RUNS,)


CODE = pickle.dumps(Attack())


def cases() -> Iterator[Case]:
    yield from _programs()
    yield from _other_pickles()
    yield from _folders()
    yield from _paths()


def _programs() -> Iterator[Case]:
    """Code in an exported program, alone and in a run folder."""
    attacks: dict[str, Callable[[dict[str, bytes]], None]] = {
        "a pickle as sample inputs": _member("data/sample_inputs/model.pt", CODE),
        "torch's pickle as sample inputs": _member("data/sample_inputs/model.pt", _torch_pickle()),
        "the older pickle as sample inputs": _member("data/sample_inputs/model.pt", _torch_pickle(zipped=False)),
        "pickled weights": _pickled("weights"),
        "pickled constants": _pickled("constants"),
        "a pickle as every member": lambda members: members.update(dict.fromkeys(members, CODE)),
        "a pickle as the model": _member("models/model.json", CODE),
        "an expression": _expression('__import__("os").system("touch $MARKER")'),
        "an expression in a call": _expression('Function("f")(__import__("os").system("touch $MARKER"))'),
        "an expression of exec": _expression('exec("import os; os.system(\\"touch $MARKER\\")")'),
        "an expression of a lambda": _expression('(lambda: __import__("os").system("touch $MARKER"))()'),
        "an expression of subclasses": _expression("().__class__.__base__.__subclasses__()"),
        "an expression that takes ages": _expression("9**9**9**9"),
        "an expression that recurses": _expression("(" * 3000 + "1" + ")" * 3000),
        "an expression that is a file": _expression('open("marker", "w")'),
        "a target that is os.system": _target("os.system"),
        "a target that is builtins.exec": _target("builtins.exec"),
        "a target that is torch.load": _target("torch.load"),
        "a target that does not exist": _target("torch.ops.nope.nope.default"),
        "a path that climbs out": lambda members: members.update({"../../marker": b"x", "/tmp/../marker": b"x"}),
        "a weight that climbs out": _weight_path("../../../../net.py"),
        "a weight of another folder": _weight_path("/etc/hostname"),
        "a bomb": lambda members: members.update({name: bytes(1 << 28) for name in list(members)[:1]}),
        "extra files that are code": lambda members: members.update({"net/extra/x.py": CODE}),
        "an AOT model": lambda members: members.update({f"{_root(members)}/data/aotinductor/model/x.so": b"\x7fELF",
        f"{_root(members)}/data/aotinductor/model/wrapper.json": b"{}"}),
    }  # fmt: skip
    harmless = {"a path that climbs out", "extra files that are code", "an AOT model"}
    for name, attack in attacks.items():
        for file, command in (("net.pt2", quantize(model="net.pt2")), ("run/exported.pt2", ("verify", "run"))):
            needs = ("net.pt2",) if file == "net.pt2" else ("run",)
            right = either(file.split("/")[-1]) if name in harmless else refused(file.split("/")[-1])
            yield Case(
                f"{file} with {name}",
                command,
                right,
                before=_rewritten(file, attack),
                needs=needs,
            )


def _root(members: dict[str, bytes]) -> str:
    return next(iter(members)).split("/")[0]


def _member(end: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        names = [name for name in members if name.endswith(end)] or [f"{_root(members)}/{end}"]
        members.update(dict.fromkeys(names, content))

    return change


def _torch_pickle(*, zipped: bool = True) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(Attack(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _pickled(kind: str) -> Callable[[dict[str, bytes]], None]:
    """The first weight or constant said to be a pickle, with code in it."""

    def change(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith(f"model_{kind}_config.json"))
        config = json.loads(members[name]) or {"config": {}}
        entries = config.setdefault("config", {})
        if not entries:
            entries["x"] = {"path_name": f"{kind[:-1]}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        entry = next(iter(entries.values()))
        entry["use_pickle"] = True
        members[name] = json.dumps(config).encode()
        members[f"{name.rpartition('/')[0]}/{entry['path_name']}"] = _torch_pickle()

    return change


def _expression(text: str) -> Callable[[dict[str, bytes]], None]:
    """Another text wherever the model has a symbolic expression."""

    def change(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith("models/model.json"))

        def walk(value: object) -> object:
            if isinstance(value, dict):
                return {key: text if key == "expr_str" else walk(one) for key, one in value.items()}
            return [walk(one) for one in value] if isinstance(value, list) else value

        members[name] = json.dumps(walk(json.loads(members[name]))).encode()

    return change


def _target(name: str) -> Callable[[dict[str, bytes]], None]:
    """Another function at the first node."""

    def change(members: dict[str, bytes]) -> None:
        model = next(one for one in members if one.endswith("models/model.json"))
        content = json.loads(members[model])
        content["graph_module"]["graph"]["nodes"][0]["target"] = name
        members[model] = json.dumps(content).encode()

    return change


def _weight_path(path: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith("model_weights_config.json"))
        config = json.loads(members[name])
        next(iter(config["config"].values()))["path_name"] = path
        members[name] = json.dumps(config).encode()

    return change


def _rewritten(file: str, change: Callable[[dict[str, bytes]], None]) -> Callable[[Path], None]:
    """A zip file with its members changed; the archive is stored, as torch writes it."""

    def put(folder: Path) -> None:
        with zipfile.ZipFile(folder / file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        change(members)
        with zipfile.ZipFile(
            folder / file, "w", zipfile.ZIP_DEFLATED if any(len(m) > 1 << 27 for m in members.values()) else zipfile.ZIP_STORED
        ) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return put


def _other_pickles() -> Iterator[Case]:
    """Code in images, weights and files of a run."""
    import numpy as np

    def numpy_file(name: str) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            array = np.array([Attack()] * 4, object)
            (np.save if name.endswith("npy") else np.savez)(folder / name, array, allow_pickle=True)

        return put

    for name in ("x.npy", "x.npz"):
        yield Case(f"{name} with a pickle", quantize(images=name), refused(name), before=numpy_file(name), fast=True)
    for content, kind in (
        (CODE, "a pickle"),
        (_torch_pickle(), "torch's pickle"),
        (_torch_pickle(zipped=False), "the older pickle"),
    ):
        yield Case(
            f"--weights that are {kind}",
            quantize("--weights", "w.safetensors", model="test_vit"),
            refused("w.safetensors"),
            before=write("w.safetensors", content),
        )
        yield Case(f".pt2 that is {kind}", quantize(model="x.pt2"), refused("x.pt2"), before=write("x.pt2", content))
        yield Case(f"an image that is {kind}", quantize(), refused("x.png"), before=write("flat/x.png", content))
        for file in (
            "plan.safetensors",
            "images.safetensors",
            "model.onnx",
            "float.onnx",
            "exported.pt2",
            "run.json",
            "plan.json",
        ):
            command = ("evaluate", "run", "--images", "classes", "--no-labels") if file == "float.onnx" else ("verify", "run")
            yield Case(
                f"{file} of a run that is {kind}", command, refused(file), before=write(f"run/{file}", content), needs=("run",)
            )
    stats = write("out.part/stats.safetensors", CODE)
    yield Case("a .part with code", quantize(), refused("out.part"), before=each(stats, write("out.part/request.json", "{}")))


def _folders() -> Iterator[Case]:
    """Hugging Face folders with code of their own."""
    own = "import os\nos.system('touch \"$MARKER\"')\nfrom transformers import ViTConfig as C, ViTForImageClassification as M\n"
    for name, file, field, value in (
        ("a model", "config.json", "auto_map", {"AutoModelForImageClassification": "own.M"}),
        ("a config", "config.json", "auto_map", {"AutoConfig": "own.C"}),
        ("a processor", "preprocessor_config.json", "auto_map", {"AutoImageProcessor": "own.M"}),
    ):  # fmt: skip
        put = changed(each(edited(file, field, value), write("own.py", own)))
        yield Case(f"hf: folder with code for {name}", quantize(model="hf:d"), either("hf:d"), before=put)
        put = changed(each(edited(file, field, value), edited("config.json", "model_type", "own"), write("own.py", own)))
        yield Case(f"hf: folder with code for {name} of an own type", quantize(model="hf:d"), refused("hf:d"), before=put)
    for content, kind in (
        (CODE, "a pickle"),
        (_torch_pickle(), "torch's pickle"),
        (_torch_pickle(zipped=False), "the older pickle"),
    ):
        put = changed(each(lambda d: (d / "model.safetensors").unlink(), write("pytorch_model.bin", content)))
        yield Case(f"hf: folder with weights that are {kind}", quantize(model="hf:d"), refused("hf:d"), before=put)


def _paths() -> Iterator[Case]:
    """Files that point outside."""
    import onnx
    from onnx import TensorProto, helper

    def outside(folder: Path) -> None:
        path = folder / "run" / "model.onnx"
        model = onnx.load(path)
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "../../../../../../etc/hostname", "offset": "0", "length": "4"}.items():
            tensor.external_data.append(helper.make_operatorsetid("", 1) and onnx.StringStringEntryProto(key=key, value=value))
        path.write_bytes(model.SerializeToString())

    for name, command in {
        "verify": ("verify", "run"),
        "lint": ("lint", "run/model.onnx"),
        "evaluate": ("evaluate", "run", "--images", "classes", "--no-labels"),
    }.items():
        yield Case(f"{name}: ONNX data outside of the folder", command, refused("model.onnx"), before=outside, needs=("run",))
    for name in ("../../../etc/passwd", "/etc/passwd", "t.toml", "x/../t.toml"):
        text = f'extends = "{name}"\nname = "t"\n'
        yield Case(
            f"a target that extends {name}",
            quantize("--target", "t.toml"),
            refused("t.toml", "extends"),
            before=write("t.toml", text),
        )
