"""ONNX files as they come: batches, types, external data, and what is refused, with a name in the message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.utils._pytree as pytree
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

from fewbit.capture import capture
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadFile, BadModel, FewbitError
from fewbit.load import load_model
from fewbit.load.program import graph_module
from fewbit.onnx_reader import microsoft, read_onnx
from fewbit.onnx_reader.operators import OPERATORS
from fewbit.realize import float_onnx
from fewbit.request import Request
from fewbit.stages import compare_onnx
from fewbit.stages.compare_onnx import as_it_runs
from fewbit.stages.load import load
from onnx_reader.test_microsoft import drawn

SIZE = (3, 8, 8)
Edit = Callable[[onnx.ModelProto], object]


def constant(name: str, value: object, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)


def net(*, batch: object = "batch", size: tuple[object, ...] = SIZE, opset: int = 17) -> onnx.ModelProto:
    """A convolution, a class token of one image, a joined token sequence, a linear layer, a mean; as exporters write it."""
    rows = 1 if batch == "batch" else batch
    nodes = [
        helper.make_node("Conv", ["in:put", "stem.weight", "stem.bias"], ["maps"], "/stem/Conv", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["maps"], ["positive"], name="/Relu"),
        *([] if batch != "batch" else [
            helper.make_node("Shape", ["positive"], ["shape"], name="/Shape"),
            helper.make_node("Gather", ["shape", "zero"], ["rows"], name="/Gather", axis=0),
            helper.make_node("Concat", ["rows", "rest"], ["target"], name="/Concat", axis=0),
            helper.make_node("Concat", ["rows", "ones"], ["wide"], name="/Concat_1", axis=0),
            helper.make_node("Expand", ["token", "wide"], ["tokens"], name="/Expand"),
        ]),
        helper.make_node("Reshape", ["positive", "target"], ["flat"], name="/Reshape"),
        helper.make_node("Transpose", ["flat"], ["turned"], name="/Transpose", perm=[0, 2, 1]),
        helper.make_node("Concat", ["tokens", "turned"], ["sequence"], name="/Concat_2", axis=1),
        helper.make_node("MatMul", ["sequence", "head_weight"], ["product"], name="/head/MatMul"),
        helper.make_node("Add", ["head_bias", "product"], ["sum"], name="/head/Add"),
        helper.make_node("ReduceMean", ["sum"], ["926"], name="/ReduceMean", axes=[1], keepdims=0),
    ]  # fmt: skip
    token = np.random.default_rng(1).standard_normal((1, 1, 6)).astype(np.float32)
    shapes = {"rest": [6, 16], "ones": [1, 1], "zero": [0]} if batch == "batch" else {"target": [rows, 6, 16]}
    weights = {
        "stem.weight": drawn(6, 3, 3, 3), "stem.bias": drawn(6), "head_weight": drawn(6, 4), "head_bias": drawn(4),
        **({"token": token} if batch == "batch" else {"tokens": token.repeat(rows, 0)}),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("in:put", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("926", TensorProto.FLOAT, [batch, 4])],
        [constant(n, v) for n, v in weights.items()] + [constant(n, v, np.int64) for n, v in shapes.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(model: onnx.ModelProto, folder: Path, **options: object) -> Path:
    onnx.save(model, folder / "model.onnx", **options)
    return folder / "model.onnx"


def of_runtime(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_a_file_is_its_network_whatever_batch_is_written_in_it(tmp_path: Path, batch: object) -> None:
    path, images = written(net(batch=batch), tmp_path), drawn(6, *SIZE)
    step = batch if isinstance(batch, int) else 6
    want = np.concatenate([of_runtime(path, part) for part in np.split(images, 6 // step)])
    graph = capture(load_model(str(path)))
    with torch.no_grad():
        got = graph.module(torch.from_numpy(images))
    np.testing.assert_allclose(got if isinstance(got, torch.Tensor) else got[0], want, rtol=1e-4, atol=1e-5)
    assert [(op.name, op.kind) for op in graph.ops] == [("stem", "conv"), ("head", "linear")]


def test_what_is_written_has_the_names_of_the_file_that_was_read(tmp_path: Path) -> None:
    loaded = load_model(str(written(net(), tmp_path)))
    torch.export.save(loaded.program, tmp_path / "again.pt2")
    for graph in (capture(loaded), capture(load_model(str(tmp_path / "again.pt2")))):
        float_onnx(graph, tmp_path / "float.onnx", opset=21)
        session = onnxruntime.InferenceSession(tmp_path / "float.onnx")
        ports = [(port.name, port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())]
        assert ports == [("in:put", "tensor(float)", ["batch", 3, 8, 8]), ("926", "tensor(float)", ["batch", 4])]


def test_batches_that_matter_are_refused(tmp_path: Path) -> None:
    model = net(batch=2)
    model.graph.node[0].input[0] = "mixed"
    model.graph.node.insert(0, helper.make_node("CumSum", ["in:put", "axis"], ["mixed"], name="over_the_batch"))
    model.graph.initializer.append(constant("axis", 0, np.int64))
    with pytest.raises(BadModel, match=r"model\.onnx has a batch of 2 written in it, .* its images depend on each other"):
        load_model(str(written(model, tmp_path)))


def test_a_free_size_is_given_and_a_fixed_one_is_not(tmp_path: Path) -> None:
    path = written(net(size=(3, "height", "width")), tmp_path)
    with pytest.raises(BadModel, match=r"'in:put' \(batch, 3, height, width\) .* --input-size"):
        load_model(str(path))
    loaded = load_model(str(path), overrides={"input_size": SIZE})
    assert loaded.input_shape == SIZE
    fixed = f"{path} takes images of any height and width; the files that come out take 8 x 8 alone: others "
    assert loaded.notes == (f"{fixed}cannot be exported, or give other numbers.",)  # the token sequence is 16 long
    path = written(net(), tmp_path)
    with pytest.raises(BadModel, match="leave --input-size out"):
        load_model(str(path), overrides={"input_size": (3, 16, 16)})


@pytest.mark.parametrize(("size", "wanted"), [((8, 8, 3), None), (("H", "W", 3), None), (("H", "W", 3), (3, 8, 9))])
def test_a_file_whose_channels_seem_to_be_last_is_told_so(
    tmp_path: Path, size: tuple[object, ...], wanted: tuple[int, ...] | None
) -> None:
    """As tf2onnx writes it: read as it says, floats in its order are its images, and pictures are not."""
    model = net(size=size)
    model.graph.node[0].input[0] = "turned_image"
    model.graph.node.insert(0, helper.make_node("Transpose", ["in:put"], ["turned_image"], perm=[0, 3, 1, 2]))
    path = str(written(model, tmp_path))
    shape = ", ".join(map(str, size))
    said = rf"The model takes \({shape}\), so its channels seem to be last; .* --inputs-as-nchw NAME` does, or give floats"
    pictures = list(np.zeros((4, 9, 9, 3), np.uint8))
    with pytest.raises(FewbitError, match=said) as refused:
        load(Request(model=path, images=pictures, **({} if wanted is None else {"input_size": wanted})))
    assert wanted is None or "give one that fits: --input-size 8,9,3." in str(refused.value)
    given = drawn(4, 8, 8, 3)
    read = load(Request(model=path, images=list(given), input_size=(8, 8, 3) if "H" in size else None)).loaded
    (got,) = pytree.tree_leaves(graph_module(read.program)(torch.from_numpy(given)))
    np.testing.assert_allclose(got.detach(), of_runtime(Path(path), given), rtol=1e-4, atol=1e-5)


def halved(model: onnx.ModelProto) -> None:
    """All real numbers in float16."""
    for one in model.graph.initializer:
        if one.data_type == TensorProto.FLOAT:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one).astype(np.float16), one.name))
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.elem_type = TensorProto.FLOAT16


def test_nodes_in_any_order_are_the_network_that_a_runtime_loads(tmp_path: Path) -> None:
    model, images = net(), drawn(2, *SIZE)
    nodes = [model.graph.node[i] for i in np.random.default_rng(0).permutation(len(model.graph.node))]
    shuffled = onnx.ModelProto.FromString(model.SerializeToString())
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    path = written(shuffled, tmp_path)
    with torch.no_grad():
        found = read_onnx(path).module(torch.from_numpy(images))["926"]
    np.testing.assert_allclose(found.numpy(), of_runtime(path, images), rtol=1e-5, atol=1e-6)


def test_float16_is_computed_in_float32(tmp_path: Path) -> None:
    model = net()
    halved(model)
    path, images = written(model, tmp_path), drawn(4, *SIZE)
    file = read_onnx(path)
    with torch.no_grad():
        (got,) = file.module(torch.from_numpy(images)).values()
    assert got.dtype == torch.float32
    assert file.notes == (f"{path} has weights in float16; it is computed in float32.",)
    np.testing.assert_allclose(got, of_runtime(path, images.astype(np.float16)), rtol=0.02, atol=0.02)  # 11 bits


def test_external_data_is_read(tmp_path: Path) -> None:
    model, images = net(), drawn(4, *SIZE)
    inside = read_onnx(written(model, tmp_path)).module(torch.from_numpy(images))["926"]
    path = written(model, tmp_path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    assert torch.equal(read_onnx(path).module(torch.from_numpy(images))["926"], inside)


def test_old_opsets_are_lifted(tmp_path: Path) -> None:
    old = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("BatchNormalization", ["a", *"ssss"], ["y"])],
            "old",
            [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [2, 3, 8, 8]), ("w", [6, 3, 3, 3]), ("s", [6]))],
            [helper.make_tensor_value_info("y", 1, [2, 6, 6, 6])],
            [constant("w", drawn(6, 3, 3, 3)), constant("s", np.abs(drawn(6)) + 0.5)],
        ),
        opset_imports=[helper.make_opsetid("", 6)], ir_version=3,
    )  # fmt: skip
    old.graph.node[1].attribute.append(helper.make_attribute("is_test", 1))
    path, images = written(old, tmp_path), drawn(2, *SIZE)
    got = read_onnx(path).module(torch.from_numpy(images))["y"]
    lifted = tmp_path / "lifted.onnx"
    onnx.save(onnx.version_converter.convert_version(old, 13), lifted)
    np.testing.assert_allclose(got, of_runtime(lifted, images), rtol=1e-4, atol=1e-5)


def quantized(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("QuantizeLinear", ["926", "scale"], ["codes"], name="/Q"))
    model.graph.initializer.append(constant("scale", 0.1))


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))


def tokens(model: onnx.ModelProto) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("in:put", TensorProto.INT64, ["batch", 128]))


def sparse(model: onnx.ModelProto) -> None:
    values, places = constant("sparse.weight", [1.0]), constant("places", [0], np.int64)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))


def with_node(name: str, domain: str = "") -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node(name, ["in:put"], ["early"], name=f"/first/{name}", domain=domain))
        model.graph.node[1].input[0] = "early"
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 3))

    return edit


def misspelt(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nobody"


def in_a_circle(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = model.graph.node[-1].output[0]


def of_tomorrow(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def name_of_two(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "maps"


def name_of_input(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "in:put"


def passed_on(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.input[0])


def by_image(model: onnx.ModelProto) -> None:
    """A shape that is computed from the pixels."""
    model.graph.node.extend([
        helper.make_node("Cast", ["926"], ["whole"], name="/Cast", to=TensorProto.INT64),
        helper.make_node("Reshape", ["926", "whole"], ["late"], name="/by_image/Reshape"),
    ])  # fmt: skip
    model.graph.output[0].name = "late"


def function(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto], domain: str = "my", **defaults: object) -> None:
    """A local function of one value, called in place of the Relu."""
    defaults = [helper.make_attribute(*one) for one in defaults.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model.functions.append(helper.make_function(domain, name, ["X"], ["Y"], nodes, opsets, attribute_protos=defaults))
    model.graph.node[1].op_type, model.graph.node[1].domain = name, domain
    if "my" not in {one.domain for one in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("my", 1))


def recursive(model: onnx.ModelProto) -> None:
    inner = helper.make_node("Deep", ["X"], ["Y"], domain="my")
    function(model, "Deeper", [inner])
    function(model, "Deep", [helper.make_node("Deeper", ["X"], ["Y"], domain="my")])


def overriding(model: onnx.ModelProto) -> None:
    function(model, "Relu", [helper.make_node("Neg", ["X"], ["Y"])], "")


def labels(model: onnx.ModelProto) -> onnx.ModelProto:
    """The name of the largest class, as classifiers of some services have it."""
    model.graph.node.extend([
        helper.make_node("ArgMax", ["926"], ["class"], axis=1, keepdims=0),
        helper.make_node("Gather", ["names", "class"], ["label"]),
    ])  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(list("abcd"), dtype=object), "names"))
    model.graph.output.insert(0, helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"]))
    return model


def scores_by_name(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node.append(helper.make_node("ZipMap", ["926"], ["map"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3]))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    row = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    del model.graph.output[:]
    model.graph.output.append(helper.make_value_info("map", helper.make_sequence_type_proto(row)))
    return model


@pytest.mark.parametrize(("edit", "name", "ends"), [(labels, "label", ["926", "class"]), (scores_by_name, "map", ["926"])])
def test_an_output_of_text_is_refused_with_the_cut_in_front_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit, name: str, ends: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = edit(net())
    onnx.save(model, "net.onnx")
    with pytest.raises(BadModel, match=f"output '{name}' of net.onnx is text, a map or a sequence; .* numbers are") as refused:
        load_model("net.onnx")
    call = str(refused.value)[str(refused.value).index("extract_model(") :].rstrip(".")
    exec(f"onnx.utils.{call}", {"onnx": onnx})
    assert [one.name for one in onnx.load("front.onnx").graph.output] == ends
    assert load_model("front.onnx").input_shape == SIZE


@pytest.mark.parametrize("last", [False, True], ids=["channels in front", "channels last"])
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT64])
def test_an_image_in_whole_numbers_is_refused_with_the_cut_that_makes_it_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, last: bool
) -> None:
    """The file behind the cut gives from floats what the whole file gives from pixels."""
    monkeypatch.chdir(tmp_path)
    model = net(size=(8, 8, 3) if last else SIZE)
    model.graph.input[0].type.tensor_type.elem_type = kind
    turn = [helper.make_node("Transpose", ["real"], ["turned_image"], "turn", perm=[0, 3, 1, 2])] if last else []
    model.graph.node[0].input[0] = "scaled"
    for node in reversed((
        helper.make_node("Cast", ["in:put"], ["real"], "real", to=TensorProto.FLOAT), *turn,
        helper.make_node("Div", ["turned_image" if last else "real", "most"], ["scaled"], "scale"),
    )):  # fmt: skip
        model.graph.node.insert(0, node)
    model.graph.initializer.append(constant("most", 255))
    onnx.save(model, "net.onnx")
    with pytest.raises(
        BadModel, match=r"image 'in:put' of net\.onnx is in u?int\d+; images in floats .* --std 0\.0039"
    ) as refused:
        load_model("net.onnx")
    call = str(refused.value)
    exec(f"onnx.utils.{call[call.index('extract_model(') : call.index(';', call.index('extract_model('))]}", {"onnx": onnx})
    pixels = np.random.default_rng(0).integers(0, 255, (2, *SIZE))
    given = (pixels.transpose(0, 2, 3, 1) if last else pixels).astype(helper.tensor_dtype_to_np_dtype(kind))
    loaded = load_model("floats.onnx")
    with torch.no_grad():
        (got,) = pytree.tree_leaves(capture(loaded).module(torch.from_numpy(pixels.astype(np.float32))))
    np.testing.assert_allclose(got, of_runtime(Path("net.onnx"), given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_advised_for_pixels_can_be_typed_and_gives_pixels(tmp_path: Path, channels: int, requantize: bool) -> None:
    """Oracle: the pixels themselves, which the advice has to leave as they are. A file of fewbit has its float twin named."""
    model = net(size=(8, 8, channels))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node[0].input[0] = "real"
    model.graph.node.insert(0, helper.make_node("Cast", ["in:put"], ["cast"], "real", to=TensorProto.FLOAT))
    model.graph.node.insert(1, helper.make_node("Transpose", ["cast"], ["real"], "turn", perm=[0, 3, 1, 2]))
    model.graph.initializer.extend([constant("step", 0.1), constant("zero", 0, np.uint8)])
    model.graph.node.insert(2, helper.make_node("QuantizeLinear", ["real", "step", "zero"], ["codes"], "Q"))
    model.graph.node.insert(3, helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["back"], "DQ"))
    model.graph.node[4].input[0] = "back"
    path = written(model, tmp_path)
    said = []
    for made in (False, True):
        if made:
            model.metadata_props.add(key="fewbit.made", value="{}")
            written(model, tmp_path)
        for twin in (False, True):
            if twin:
                (tmp_path / "float.onnx").write_bytes(b"")
            with pytest.raises(BadModel) as refused:
                read_onnx(path, requantize=requantize)
            said.append(str(refused.value))
        (tmp_path / "float.onnx").unlink()
    assert ["fewbit made" in one for one in said] == [False, False, True, True]
    assert said[2].endswith("can be given in its place: float.onnx, which lies in its run.")
    assert said[3].endswith(f"can be given in its place: {tmp_path / 'float.onnx'}, which lies beside it.")
    if requantize:
        words = said[0].rstrip(".").split()
        given = {name: words[words.index(f"--{name}") + 1] for name in ("mean", "std")}
        own = Preprocess((channels, 8, 8), **given)  # type: ignore[arg-type]
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
        np.testing.assert_allclose(own(pixels), pixels.transpose(2, 0, 1), atol=1e-3)


def node(op: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], output, **attributes)


SEQUENCES = {
    "joined": [
        node("SequenceConstruct", ["maps", "lower"], "s"), node("ConcatFromSequence", ["s"], "j", axis=2),
        node("Slice", ["j", "0s", "4s", "2s"], "two"),
    ],
    "stacked": [
        node("SequenceConstruct", ["maps", "lower"], "s"), node("ConcatFromSequence", ["s"], "j", axis=1, new_axis=1),
        node("ReduceMax", ["j"], "two", axes=[1], keepdims=0),
    ],
    "inserted": [
        node("SequenceEmpty", [], "e"), node("SequenceInsert", ["e", "maps"], "s"),
        node("SequenceInsert", ["s", "lower", "0"], "t"),
        node("SequenceAt", ["t", "-1"], "a"), node("SequenceAt", ["t", "0"], "b"), node("Sub", ["a", "b"], "two"),
    ],
    "optional": [node("Optional", ["lower"], "o"), node("OptionalGetElement", ["o"], "two")],
    "erased": [
        node("SequenceConstruct", ["maps", "lower", "maps"], "s"), node("SequenceErase", ["s", "0"], "e"),
        node("SequenceErase", ["e"], "f"),
        node("SequenceAt", ["f", "0"], "two"),
    ],
    "split by sizes": [
        node("SplitToSequence", ["maps", "24s"], "s", axis=1), node("SequenceAt", ["s", "0"], "a"),
        node("SequenceAt", ["s", "-1"], "b"),
        node("Concat", ["b", "a"], "two", axis=1),
    ],
    "split by one size, the last smaller": [
        node("SplitToSequence", ["maps", "4"], "s", axis=1), node("SequenceAt", ["s", "0"], "a"),
        node("SequenceAt", ["s", "-1"], "b"),
        node("Concat", ["b", "a"], "two", axis=1),
    ],
    "split into ones": [
        node("SplitToSequence", ["maps"], "s", axis=1, keepdims=0), node("SequenceAt", ["s", "-1"], "a"),
        node("SequenceLength", ["s"], "n"),
        node("Cast", ["n"], "count", to=TensorProto.FLOAT), node("Unsqueeze", ["a", "1s"], "b"),
        node("Mul", ["b", "count"], "c"),
        node("Add", ["lower", "c"], "two"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_that_the_file_lists_itself_are_read_between_its_layers(tmp_path: Path, name: str) -> None:
    model = net()
    model.graph.node[1].input[0] = "two"
    for one in reversed([node("Neg", ["maps"], "lower"), *SEQUENCES[name]]):
        model.graph.node.insert(1, one)
    model.graph.initializer.extend(constant(one, int(one), np.int64) for one in ("0", "-1", "4"))
    model.graph.initializer.extend(constant(f"{one}s", [one], np.int64) for one in (0, 1, 2, 4))
    model.graph.initializer.append(constant("24s", [2, 4], np.int64))
    path, images = written(model, tmp_path), drawn(3, *SIZE)
    with torch.no_grad():
        (got,) = pytree.tree_leaves(capture(load_model(str(path))).module(torch.from_numpy(images)))
    np.testing.assert_allclose(got, of_runtime(path, images), rtol=1e-4, atol=1e-5)


def sloped(**given: float) -> onnx.ModelProto:
    """A function that calls another, which has a slope of 0.4 where nothing is given."""
    model = net()
    steep = helper.make_node("LeakyRelu", ["X"], ["Y"])
    steep.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    function(model, "Steep", [steep], slope=0.4)
    function(model, "Outer", [helper.make_node("Steep", ["X"], ["Y"], domain="my", **given)])
    model.ir_version = 9
    return model


@pytest.mark.parametrize("given", [{}, {"slope": 0.7}], ids=str)
def test_what_a_function_has_where_a_call_gives_nothing_is_kept(tmp_path: Path, given: dict[str, float]) -> None:
    path, images = written(sloped(**given), tmp_path), drawn(3, *SIZE)
    with torch.no_grad():
        (got,) = pytree.tree_leaves(capture(load_model(str(path))).module(torch.from_numpy(images)))
    np.testing.assert_allclose(got, of_runtime(path, images), rtol=1e-4, atol=1e-5)


BAD: dict[str, tuple[Edit, str]] = {
    "recursive": (recursive, r"a function of .* calls itself: 'my\.\w+' calls 'my\.\w+' calls 'my\.\w+'; no runtime ends it"),
    "overriding": (
        overriding,
        r"calls a function 'Relu' that has the name of an operator of domain 'ai\.onnx', in node '/Relu'",
    ),
    "quantized": (quantized, r"is quantized already: 1 nodes \(QuantizeLinear\), the first is '/Q'"),
    "two inputs": (two_inputs, r"takes in:put \(batch, 3, 8, 8\) float32, mask \(batch, 1\) float32\. .* --input mask=VALUE"),
    "no image": (tokens, r"takes in:put \(\?, 128\) int64; one has to be an image in floats"),
    "sparse": (sparse, "weight 'sparse.weight' as a sparse tensor"),
    "control": (with_node("Loop"), r"not taken, in front of its layers: Loop '/first/Loop' \(opset 17\)"),
    "custom": (with_node("Magic", "my.own"), r"not taken, in front of its layers: my\.own\.Magic '/first/Magic' \(opset 3\)"),
    "damaged": (misspelt, "reads 'nobody', which nothing before it writes"),
    "circle": (in_a_circle, "reads '926', which nothing before it writes"),
    "of tomorrow": (of_tomorrow, r"is of opset 99, whose operators nobody here knows; 7 to \d+ are taken\. Export it again"),
    "name of two": (name_of_two, "two values of .* are called 'maps', and no runtime loads it"),
    "name of input": (name_of_input, "two values of .* are called 'in:put', and no runtime loads it"),
    "passed on": (
        passed_on,
        r"output 'in:put' of .* is its input, as it comes; .*extract_model.*, 'without\.onnx', \['in:put'\], \['926'\]\)",
    ),
    "by image": (
        by_image,
        r"node Reshape '/by_image/Reshape' \(opset 17\) cannot be run: its shape is computed from the image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    edit, message = BAD[name]
    model = net()
    edit(model)
    with pytest.raises(BadModel, match=message):
        load_model(str(written(model, tmp_path)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def text(path: Path) -> None:
    path.write_text("# not a network\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, text, empty, Path.unlink])
def test_a_file_that_is_none_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = written(net(), tmp_path)
    damage(path)
    with pytest.raises(FewbitError, match=r"model\.onnx"):
        load_model(str(path))


def moved_out(folder: Path, model: onnx.ModelProto) -> None:
    for one in model.graph.initializer:
        for entry in one.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    (folder / "weights.bin").rename(folder.parent / "weights.bin")


def shortened(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:600])


def removed(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "weights.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(moved_out, "outside of"), (shortened, "it is cut off"), (removed, "does not exist")],
    ids=["outside", "short", "missing"],
)
def test_external_data_that_is_not_there_is_named(tmp_path: Path, damage: Callable[..., None], message: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = written(net(), folder, save_as_external_data=True, size_threshold=0, location="weights.bin")
    model = onnx.load(path, load_external_data=False)
    damage(folder, model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadFile, match=f"tensor '.*' .*{message}"):
        load_model(str(path))


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_a_file_that_is_read_otherwise_than_a_runtime_runs_it_is_refused(
    tmp_path: Path, batch: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(net(batch=batch), tmp_path)
    loaded = load_model(str(path))
    assert as_it_runs(loaded, path) == ()
    monkeypatch.setitem(OPERATORS[""], "Relu", lambda node, x: torch.relu(x) + 1e-3 * x)
    with pytest.raises(BadModel, match=r"otherwise than onnxruntime .* output 926 differs .* first at node Relu '/Relu'"):
        load(Request(model=str(path), images=[torch.rand(SIZE) for _ in range(12)], task="tensors"))


def test_a_reading_is_compared_for_float16_for_a_stripped_file_and_where_no_runtime_runs_it_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved(model := net())
    float16 = written(model, tmp_path)
    loaded = load_model(str(float16))
    assert as_it_runs(loaded, float16) == ()  # 11 bits
    codes = tmp_path / "codes.onnx"
    onnx.save(between_codes(net()), codes)
    stripped = load_model(str(codes), requantize=True)
    assert as_it_runs(stripped, codes, requantize=True) == ()
    monkeypatch.setattr(compare_onnx, "OnnxRuntime", lacking)
    assert "so nobody has compared" in as_it_runs(loaded, float16)[-1]
    monkeypatch.undo()
    monkeypatch.setitem(OPERATORS[""], "Relu", lambda node, x: torch.relu(x) + 0.1 * x)
    for path, options in ((float16, {}), (codes, {"requantize": True})):
        with pytest.raises(BadModel, match="otherwise than onnxruntime"):
            as_it_runs(load_model(str(path), **options), path, **options)


@pytest.mark.parametrize("batch", ["batch", 3])
def test_a_reading_is_compared_on_the_images_that_were_given(
    tmp_path: Path, batch: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epsilon that is lost in noise counts beside dark images."""
    norm = "SkipSimplifiedLayerNormalization"
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["maps"], "conv"),
        helper.make_node("Reshape", ["maps", "rows"], ["tokens"], "join"),
        helper.make_node(norm, ["tokens", "tokens", "scale"], ["y"], "norm", domain="com.microsoft"),
    ]
    sizes = {"x": [batch, *SIZE], "y": [batch, 4, 64]}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    weights = [constant("w", drawn(4, 3, 1, 1)), constant("scale", np.ones(64)), constant("rows", [0, 4, 64], np.int64)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], weights)
    path = str(written(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path))
    request = Request(model=path, images=[1e-3 * torch.rand(SIZE) for _ in range(12)], task="tensors")
    assert [note for note in load(request).notes if "nobody has compared" in note] == []
    monkeypatch.setattr(microsoft, "EPSILON", 1e-6)
    assert as_it_runs(load_model(path), Path(path)) == ()
    with pytest.raises(BadModel, match=r"otherwise than onnxruntime .* output y differs .* first at node .*'norm'"):
        load(request)


@pytest.mark.parametrize("in_order", [0, 1])
def test_a_top_k_in_any_order_is_named_with_the_line_that_puts_it_in_order(
    tmp_path: Path, in_order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["maps"], "conv"),
        helper.make_node("TopK", ["maps", "k"], ["y", "places"], "best", axis=1, sorted=in_order),
    ]
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SIZE])]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5, 8, 8])]
    graph = helper.make_graph(nodes, "net", ports, results, [constant("w", drawn(9, 3, 1, 1)), constant("k", [5], np.int64)])
    path = written(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path)
    loaded = load_model(str(path))
    if in_order:
        assert as_it_runs(loaded, path) == ()
        return
    with pytest.raises(BadModel, match=r"node TopK 'best' of .*model.onnx has sorted=0") as refused:
        as_it_runs(loaded, path)
    monkeypatch.chdir(tmp_path)
    exec(str(refused.value).partition("in order: ")[2].removesuffix("."))
    assert as_it_runs(load_model("in_order.onnx"), Path("in_order.onnx")) == ()


def test_a_file_that_is_laid_out_for_one_processor_is_refused_with_how_to_save_it(tmp_path: Path) -> None:
    """onnxruntime itself lays it out, and saves it again as the message says."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["maps"], "conv"), helper.make_node("Relu", ["maps"], ["y"], "relu")]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["N", *SIZE]), ("y", ["N", 16, 8, 8]))]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], [constant("w", drawn(16, 3, 1, 1))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path, options, saved = written(model, tmp_path), onnxruntime.SessionOptions(), tmp_path / "saved.onnx"
    options.optimized_model_filepath = str(saved)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(saved).graph.node):
        pytest.skip("onnxruntime lays nothing out for this processor")
    with pytest.raises(
        BadModel, match=r"saved\.onnx was saved by onnxruntime with all .* such as com\.microsoft\.nchwc\."
    ) as found:
        load_model(str(saved))
    assert "extract_model" not in str(found.value)
    exec(str(found.value).rpartition(": ")[2].removesuffix("."), {"onnxruntime": onnxruntime, "options": options})
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = drawn(2, *SIZE)
    with torch.no_grad():
        (got,) = pytree.tree_leaves(capture(load_model(str(saved))).module(torch.from_numpy(images)))
    np.testing.assert_allclose(got, of_runtime(path, images), rtol=1e-4, atol=1e-5)


def test_why_onnxruntime_does_not_run_a_file_is_said_whole(tmp_path: Path) -> None:
    model, folder = net(), tmp_path / ("a folder with words " * 8)
    folder.mkdir()
    for node in (model.graph.node[0], model.graph.node[-1]):
        node.name = "twice"
    path = written(model, folder)
    (note,) = as_it_runs(load_model(str(path)), path)
    assert note == (
        f"onnxruntime does not run {path} itself (two nodes with same node name (twice)), so nobody has compared with it what "
        "fewbit reads there."
    )


def lacking(path: Path, **_: object) -> None:
    raise BadFile(f"onnxruntime cannot load {path}: it has no such operator.")


def between_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with codes of 8 bits behind its Relu."""
    pair = [
        helper.make_node("QuantizeLinear", ["positive", "step", "zero point"], ["codes"], "/Quantize"),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero point"], ["coarse"], "/Dequantize"),
    ]
    nodes = [*model.graph.node]
    for node in nodes:
        node.input[:] = ["coarse" if name == "positive" else name for name in node.input]
    place = next(i for i, node in enumerate(nodes) if node.op_type == "Relu") + 1
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *pair, *nodes[place:]])
    model.graph.initializer.extend([constant("step", 0.02), constant("zero point", 0, np.uint8)])
    return model


@pytest.mark.parametrize("op", ["GridSample", "RoiAlign"])
def test_a_free_batch_of_a_file_that_runs_with_one_image_alone_is_one(op: str, tmp_path: Path) -> None:
    """A grid that is stored for one image, which onnxruntime takes with one image alone; boxes that are of the first."""
    grid = np.random.default_rng(0).uniform(-1, 1, (1, 5, 6, 2))
    boxes, images = constant("boxes", [[0, 0, 6, 5]]), constant("of", [0], np.int64)
    node = {
        "GridSample": helper.make_node("GridSample", ["maps", "grid"], ["sampled"], "sample"),
        "RoiAlign": helper.make_node(
            "RoiAlign", ["maps", "boxes", "of"], ["sampled"], "sample", output_height=5, output_width=6
        ),
    }[op]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["maps"], "conv"), node], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SIZE])],
        [helper.make_tensor_value_info("sampled", TensorProto.FLOAT, ["N", 4, 5, 6])],
        [constant("w", drawn(4, 3, 3, 3)), constant("grid", grid), boxes, images],
    )  # fmt: skip
    path = written(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8), tmp_path)
    loaded = load_model(str(path))
    assert loaded.batch == 1
    assert any("takes one image at a time and no other batch" in note for note in loaded.notes)
    x = torch.rand(1, *SIZE)
    with torch.no_grad():
        got = graph_module(loaded.program)(x)
    np.testing.assert_allclose(got.numpy(), of_runtime(path, x.numpy()), atol=1e-5)


@pytest.mark.parametrize("images", [2, 3])
def test_a_grid_that_is_stored_for_several_images_asks_for_their_batch(images: int, tmp_path: Path) -> None:
    """And the line that it says makes a file that is taken."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["maps"], "conv"),
        helper.make_node("GridSample", ["maps", "grid"], ["y"], "sample"),
    ]
    places = np.random.default_rng(0).uniform(-1, 1, (images, 5, 6, 2))
    grid = constant("grid", places[:1].repeat(images, 0))
    sizes = {"x": ["N", *SIZE], "y": ["N", 4, 5, 6]}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], [constant("w", drawn(4, 3, 3, 3)), grid])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    with pytest.raises(BadModel, match=rf"'sample' .* grid is for {images} images, .*--dim_param BATCH --dim_value {images} "):
        load_model(str(written(model, tmp_path)))
    make_dim_param_fixed(model.graph, "N", images)  # what the line calls
    assert load_model(str(written(model, tmp_path))).batch == images
    model.graph.initializer[1].CopyFrom(constant("grid", places))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    with pytest.raises(BadModel, match=f"another part for each of {images} images, .* Export the model for one image"):
        load_model(str(written(model, tmp_path)))


def test_a_node_that_nobody_reads_is_left_out(tmp_path: Path) -> None:
    """As onnxruntime does, whatever it is."""
    model, images = net(), drawn(2, *SIZE)
    for op in ("Bernoulli", "NonZero"):
        model.graph.node.append(helper.make_node(op, ["head_bias"], [f"{op}.unread"], op))
    path = written(model, tmp_path)
    loaded = load_model(str(path))
    assert loaded.tail is None
    with torch.no_grad():
        got = graph_module(loaded.program)(torch.from_numpy(images))
    np.testing.assert_allclose(got.numpy(), of_runtime(path, images), rtol=1e-4, atol=1e-5)


def test_a_batch_that_seems_to_be_last_is_said_to_be(tmp_path: Path) -> None:
    model = net(size=(16, 16, "N"), batch=3)
    with pytest.raises(BadModel, match=r"'in:put' \(3, 16, 16, N\) .* seems to have its batch last; here it is first"):
        load_model(str(written(model, tmp_path)))
