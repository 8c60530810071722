"""A model with other inputs than its image: what it is given, from the request to the file in the runtimes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader

from fewbit import FewbitError, Request, quantize
from fewbit.capture import capture
from fewbit.choose import choose
from fewbit.choose.fisher import weighted_samples
from fewbit.core.inputs import Input, arrays_of, fed
from fewbit.core.record import Record
from fewbit.core.shelf import Rebatched
from fewbit.data.beside import columns
from fewbit.data.collection import examples
from fewbit.data.constants import constants
from fewbit.data.images import Preprocess, open_images
from fewbit.errors import BadFile, BadImages
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.files import read_json
from fewbit.load import Loaded, load_model
from fewbit.load.inputs import Given
from fewbit.observe import observe
from fewbit.onnx_file import load_proto
from fewbit.realize import float_onnx
from fewbit.recipes import RECIPES, recipe_named
from fewbit.run import Run
from fewbit.runtimes import open_session
from fewbit.stages.realize import write_model
from fewbit.target import load_target
from fewbit.verify import compare, loads
from planning import context_for, numbers

SIZE = (3, 12, 12)
PORTS = [("size", 1, [2]), ("image", 1, ["batch", *SIZE]), ("mask", 1, ["batch", 1, 12, 12])]


class Masked(nn.Module):
    """Boxes and a map of an image, from its size in pixels and a mask of what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.size, self.mask = nn.Linear(2, 4), nn.Conv2d(1, 8, 1)

    def forward(self, size: Tensor, image: Tensor, mask: Tensor, gain: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.stem(image * mask)) + self.mask(mask)
        boxes = self.head(x.flatten(2).mean(2)) + self.size(size / 10)
        return {"boxes": boxes if gain is None else boxes * gain, "map": x}


class Decoder(nn.Module):
    """A mask for each prompt: attention of points, given as numbers, with the pixels of an image's embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.points, self.keys = nn.Linear(2, 12), nn.Conv2d(3, 12, 1)

    def forward(self, embedding: Tensor, prompt: dict[str, Any]) -> Tensor:
        (points, labels) = prompt["points"], prompt["labels"]
        queries = self.points(points) + labels.unsqueeze(-1)
        pixels = self.keys(embedding).flatten(2)
        return ((queries @ pixels).softmax(-1) @ pixels.transpose(1, 2)).flatten(1)


def images(count: int) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(1))


MASK = (torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(2)) > 0.3).float()
GIVEN = {"size": torch.tensor([12.0, 9.0]), "mask": MASK}
PROMPT = {"points": torch.tensor([[[0.1, 0.9], [0.5, 0.2]]]), "labels": torch.tensor([[1, 0]])}


def loaded(model: Any, given: Any, **overrides: Any) -> Loaded:
    return load_model(model, overrides=overrides, given=Given(constants(given)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("inputs") / "run"
    quantize(Masked(), images(12), inputs=GIVEN, target="ort-x86-vnni", input_size=SIZE, out=out, seconds=0.01)
    return Run.open(out)


@pytest.mark.parametrize("name", ["model.onnx", "float.onnx"])
def test_the_file_has_every_input_by_name_in_order(run: Run, name: str) -> None:
    """The oracle of the float file is the net itself, for constants that no run has seen: they are still inputs."""
    session = ort.InferenceSession(str(run.folder / name))
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [(n, "tensor(float)", s) for n, _, s in PORTS]
    x, size, mask = images(3), torch.tensor([3.0, 40.0]), 1 - MASK.repeat(3, 1, 1, 1)
    found = session.run(None, {"image": x.numpy(), "size": size.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        expected = Masked()(size, x, mask)
    for output, array in zip(expected.values(), found, strict=True):
        limit = 1e-5 if name == "float.onnx" else 0.5
        assert (torch.from_numpy(array) - output).abs().max() <= limit * output.abs().max()


def test_a_finished_run_verifies_scores_and_times_with_the_constants(run: Run) -> None:
    checks = run.verify()
    assert not checks.wrong
    assert not checks.wrong_outputs
    assert not checks.file
    assert {check.output for check in checks.outputs} == {"boxes", "map"}
    activations = {
        site: math.prod(run["graph"].site(site).shape[1:]) for site, c in run["plan"].choices.items() if c.codes is None
    }
    assert {check.site: check.compared for check in checks.on} == {site: 3 * size for site, size in activations.items()}
    assert run.do("evaluate", scored=run.images(images(20)[12:]), runtime="onnxruntime", threads=1).images == 8
    timings, loads = run.do("bench", seconds=0.01, threads=1, runtimes=["onnxruntime"], batches=[2])
    assert [row.batch for row in timings] == [2]
    assert len(loads) == 1
    kinds = {one["name"]: (one["kind"], one["shape"], one["batch"]) for one in run.record["inputs"]}
    assert kinds == {
        "size": ("constant", [2], False), "image": ("image", [*SIZE], True), "mask": ("constant", [1, 12, 12], True)
    }  # fmt: skip


def test_the_report_lists_what_each_input_was_given(run: Run) -> None:
    rows = read_json(run.folder / "tables.json")["inputs"]
    mask = f"a constant: 144 numbers from {int(MASK.min())} to {int(MASK.max())}"
    assert [tuple(row.values()) for row in rows] == [
        ("size", "2", "float32", "a constant: 12, 9"),
        ("image", "batch, 3, 12, 12", "float32", "the image"),
        ("mask", "batch, 1, 12, 12", "float32", mask),
    ]
    assert mask in (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_readme_beside_the_program_says_how_other_inputs_are_given(run: Run, tmp_path: Path) -> None:
    """The oracle is the program: the command of the README, with another size, gives other boxes."""
    text = (run.folder / "deploy" / "README.md").read_text(encoding="utf-8")
    assert "more than a picture: `size`, `mask`." in text
    assert "calibration image" not in text  # both are constants
    command = re.search(r"python (predict\.py) picture\.jpg (size=FILE\.npy)", text)
    assert command is not None
    Image.fromarray(np.arange(432, dtype=np.uint8).reshape(12, 12, 3)).save(tmp_path / "picture.png")
    np.save(tmp_path / "size.npy", np.array([120.0, 9.0], np.float32))
    program = [sys.executable, str(run.folder / "deploy" / command[1]), str(tmp_path / "picture.png")]
    said = [
        subprocess.run([*program, *more], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
        for more in ([], [command[2].replace("FILE", "size")])
    ]
    assert said[0]
    assert said[0] != said[1]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_that_normalizes_inside_takes_its_other_inputs_as_they_are(run: Run, tmp_path: Path, runtime: str) -> None:
    """The oracle is the file without, on floats that were made of the same pixels."""
    graph, plan, path = run["graph"], run["plan"], tmp_path / "inside.onnx"
    preprocess = Preprocess(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), whole=True)
    write_model(graph, plan, path, run.record["file_format"], Record(preprocess.to_json()))
    assert [(i.name, i.type, i.shape) for i in ort.InferenceSession(str(path)).get_inputs()] == [
        ("size", "tensor(float)", [2]), ("image", "tensor(uint8)", ["batch", 12, 12, 3]),
        ("mask", "tensor(float)", ["batch", 1, 12, 12]),
    ]  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    batch = torch.stack([preprocess(Image.fromarray(one)) for one in pixels])
    arrays = arrays_of(graph.inputs, batch)
    inside, plain = open_session(runtime, path), open_session(runtime, run.folder / "model.onnx")
    np.testing.assert_array_equal(inside.feed(*arrays)[1], pixels)
    if runtime == "onnxruntime":
        for name, want in plain.run(*arrays).items():
            np.testing.assert_array_equal(inside.run(*arrays)[name], want, name)
    checks = compare(graph, plan, path, [batch], runtime="onnxruntime")
    assert (checks.wrong, checks.wrong_outputs) == ((), ())
    assert len(loads(run.folder / "float.onnx", path, graph.inputs, runtimes=[runtime], runs=1)) == 1


@pytest.mark.slow
def test_openvino_takes_every_input() -> None:
    result = quantize(Masked(), images(12), inputs=GIVEN, target="openvino-x86", input_size=SIZE, seconds=0.01)
    assert not result.checks.wrong
    assert not result.checks.wrong_outputs


def test_a_file_of_the_net_gets_the_plan_of_the_net(tmp_path) -> None:
    path, batch = tmp_path / "net.onnx", Dim("batch", min=1, max=64)
    torch.onnx.export(
        Masked().eval(), (GIVEN["size"], images(2), MASK.repeat(2, 1, 1, 1)), path, dynamo=True, verbose=False,
        input_names=[name for name, _, _ in PORTS], output_names=["boxes", "map"],
        dynamic_shapes=({}, {0: batch}, {0: batch}),
    )  # fmt: skip
    plans = []
    for model in (loaded(Masked(), GIVEN, input_size=SIZE), loaded(str(path), GIVEN)):
        assert [str(i) for i in model.inputs] == [
            "size (2) float32", "image (batch, 3, 12, 12) float32", "mask (batch, 1, 12, 12) float32"
        ]  # fmt: skip
        graph, batches = capture(model), [images(8)]
        context = context_for(graph, observe(graph, batches), load_target("ort-x86-vnni"), images=batches)
        plans.append(list(numbers(choose(context, RECIPES["mse"])).values()))
    assert plans[0] == plans[1]
    with pytest.raises(FewbitError, match=r"takes size \(2\) float32, image .*size must be given as well: --input size=VALUE"):
        loaded(str(path), {"mask": MASK})
    with pytest.raises(FewbitError, match=r"image .*mask must be given as well: --input mask=VALUE"):
        loaded(str(path), {"size": [1.0, 2.0]})


def test_what_a_constant_decides_is_weighed_by_its_gradient() -> None:
    """The recipe `fast` weighs values by gradients; `mask:input` depends on no image. The oracle is autograd on the net."""
    model = loaded(Masked(), GIVEN, input_size=SIZE)
    graph, x = capture(model), images(4)
    found = weighted_samples(graph, ["mask:input"], [x], 4)["mask:input"]
    assert set(found.values.flatten().tolist()) == {0.0, 1.0}
    assert len(found.counts.unique()) > 8
    context = context_for(graph, observe(graph, [x]), load_target("ort-x86-vnni"), images=[x])
    assert "mask:input" in choose(context, recipe_named("fast")).choices
    context.refuse_fixed_batch("any")  # the first input is not an image: its dimensions say nothing of the batch


def test_inputs_nested_in_dicts_and_given_by_keyword() -> None:
    """As a module with its tree of values, and as the program of that tree: None stands for the image."""
    net, given, x = Decoder().eval(), {"prompt": PROMPT}, images(3)
    with torch.no_grad():
        expected = net(x, {"points": PROMPT["points"].repeat(3, 1, 1), "labels": PROMPT["labels"].repeat(3, 1)})
    batch = {0: Dim("batch", min=1, max=64)}
    arguments = {"prompt": {"points": PROMPT["points"].repeat(2, 1, 1), "labels": PROMPT["labels"].repeat(2, 1)}}
    shapes = {"embedding": batch, "prompt": {"points": batch, "labels": batch}}
    program = torch.export.export(net, (images(2),), arguments, dynamic_shapes=shapes)
    flat = {f"prompt_{name}": value for name, value in PROMPT.items()}
    for model in (loaded(net, given, input_size=SIZE), loaded(program, flat)):
        assert [one.shape for one in model.inputs] == [SIZE, (2, 2), (2,)]
        graph = capture(model)
        torch.testing.assert_close(Executor(graph)(x)[0], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.cat([y for (y,) in Stream(Executor(graph), x.split(2)).outputs()]), expected)
        assert "matmul" in {op.kind for op in graph.ops}

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.net(batch["pixels"], batch["prompt"])

    model = loaded(Batched(), {"batch": {"pixels": None, "prompt": PROMPT}}, input_size=SIZE)
    assert [one.name for one in model.inputs] == ["batch.pixels", "batch.prompt.points", "batch.prompt.labels"]
    torch.testing.assert_close(capture(model).module(*fed(model.inputs, x)), expected, atol=1e-5, rtol=1e-4)


def test_what_is_left_out_has_a_default() -> None:
    model = loaded(Masked(), {**GIVEN, "gain": [[2.0, 2, 2, 2]]}, input_size=SIZE)
    plain = loaded(Masked(), GIVEN, input_size=SIZE)
    doubled, once = (Executor(capture(one))(images(2))[0] for one in (model, plain))
    torch.testing.assert_close(doubled, 2 * once)
    assert [one.name for one in model.inputs] == ["size", "image", "mask", "gain"]


def test_ops_on_what_no_image_changes_stay_float() -> None:
    """An input without a batch is read by the linear layer `size` alone, whose rows are those of no image."""
    graph = capture(loaded(Masked(), GIVEN, input_size=SIZE))
    assert {op.name for op in graph.ops} >= {"stem", "mask", "head"}
    (product,) = graph.float_products
    assert (product.name, product.function) == ("size", "linear of numbers that are the same for every image")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": [12.0, 9.0]}, r"Masked takes size, image, mask, gain\. .*mask must be given as well: --input mask=VALUE"),
        ({**GIVEN, "msk": 1}, r"unknown input of Masked 'msk'. Did you mean mask\?"),
        ({**GIVEN, "size": [1.0, 2.0, 3.0]}, r"Masked cannot be exported for size \(3\) float32, image"),
        ({**GIVEN, "image": images(1)}, r"Masked takes size, image, mask, gain, and .* leave out the one that is the image"),
    ],
)
def test_what_a_module_cannot_be_given(given: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitError, match=says):
        loaded(Masked(), given, input_size=SIZE)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["size"], "--input size is not NAME=VALUE; type it as in"),
        (["size=1", "size=2"], "--input size is given twice"),
        (["size=12;9"], "--input size=12;9 is not a number, list of numbers or .npy file"),
        (["size=[[1,2],[3]]"], "--input size: list is not an array of numbers"),
        (["size=12,NaN"], "--input size holds NaN"),
        (["size=[]"], r"--input size has shape \(0,\), without a number"),
        (["mask=nowhere.npy"], "--input mask: nowhere.npy does not exist"),
        (['size="a"'], "--input size: str is not an array of numbers"),
    ],
)
def test_what_is_typed_wrong_is_refused_before_any_work(texts: list[str], says: str) -> None:
    with pytest.raises(FewbitError, match=says):
        Request(model="demo", inputs=texts)


def test_what_can_be_typed(tmp_path) -> None:
    np.save(tmp_path / "mask.npy", MASK.numpy().astype(np.float64))
    np.savez(tmp_path / "all.npz", mask=MASK.numpy(), other=np.zeros(1))
    texts = ["a=5", "b=640,480", "c=[[0.5, 1]]", "d=true", f"e={tmp_path / 'mask.npy'}", f"mask={tmp_path / 'all.npz'}"]
    found = Request(model="demo", inputs=texts).inputs
    assert {name: value.tolist() for name, value in found.items() if value.numel() < 9} == {
        "a": 5, "b": [640, 480], "c": [[0.5, 1.0]], "d": True
    }  # fmt: skip
    assert found["b"].dtype == torch.int64
    assert found["c"].dtype == torch.float32
    assert torch.equal(found["e"], MASK)
    assert torch.equal(found["mask"], MASK)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(FewbitError, match=r"--input mask: .*broken.npy is not a readable NumPy file"):
        Request(model="demo", inputs=[f"mask={tmp_path / 'broken.npy'}"])


def test_shapes_and_types_of_a_file_are_kept(tmp_path) -> None:
    """Points in 32-bit integers whose number the file leaves free, in front of the image."""
    nodes = [
        onnx.helper.make_node("Cast", ["points"], ["real"], to=1),
        onnx.helper.make_node("ReduceMean", ["real"], ["mean"], axes=[1], keepdims=0),
        onnx.helper.make_node("Unsqueeze", ["mean", "axes"], ["column"]),
        onnx.helper.make_node("Add", ["x", "column"], ["moved"]),
        onnx.helper.make_node("Conv", ["moved", "w"], ["y"]),
    ]
    arrays = {"w": np.ones((2, 3, 1, 1), np.float32), "axes": np.array([2, 3])}
    graph = onnx.helper.make_graph(
        nodes, "net",
        [
            onnx.helper.make_tensor_value_info("points", onnx.TensorProto.INT32, ["b", "n", 3]),
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 3, 4, 4]),
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "points.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    points = [[1, 2, 3], [3, 4, 5]]
    model = loaded(str(path), {"points": points})
    assert [str(one) for one in model.inputs] == ["points (batch, 2, 3) int32", "x (batch, 3, 4, 4) float32"]
    x = torch.rand(3, 3, 4, 4)
    expected = ort.InferenceSession(str(path)).run(None, {"x": x.numpy(), "points": np.array([points] * 3, np.int32)})[0]
    np.testing.assert_allclose(Executor(capture(model))(x)[0].numpy(), expected, rtol=1e-5)
    for given, says in (
        ({"points": [[1, 2], [3, 4]]}, r"takes points \(batch, \?, 3\) int32; input points is given int64 .*\(2, 2\)"),
        ({"points": [[0.5, 1, 2]]}, "input points is given float32 numbers"),
        ({"point": points}, "unknown input of .* 'point'. Did you mean points?"),
        ({}, r"points must be given as well: --input points=VALUE"),
        ({"points": points, "x": images(1)}, "one has to be an image in floats"),
    ):
        with pytest.raises(FewbitError, match=says):
            loaded(str(path), given)


class Flagged(nn.Module):
    """All arguments have defaults; the image is by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 4, 3)

    def forward(self, *, flag: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        return self.net(pixel_values)


class Worded(Flagged):
    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.net(pixel_values)


class Framed(Flagged):
    def forward(self, before: Tensor | None = None, frame: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.net(frame)


@pytest.mark.parametrize(("net", "given"), [(Flagged, {}), (Worded, {}), (Framed, {"frame": None})])
def test_of_arguments_that_all_have_defaults_the_image_is_the_one_that_is_called_so(net: type[nn.Module], given: Any) -> None:
    module = net()
    model, x = loaded(module, given, input_size=SIZE), images(2)
    name = "frame" if given else "pixel_values"
    torch.testing.assert_close(Executor(capture(model))(x)[0], module(**{name: x}))


def test_an_image_that_went_to_another_argument_is_told_how_to_be_named() -> None:
    with pytest.raises(
        FewbitError, match=r"The image was given to before; where it belongs to frame, name that.*\{\"frame\": None\}"
    ):
        loaded(Framed(), {}, input_size=SIZE)


class Anything(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class Keywords(nn.Module):
    def forward(self, **named: Tensor) -> Tensor:
        return named["x"]


class Nothing(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize("net", [Anything, Keywords, Nothing])
def test_a_module_whose_forward_names_no_input_is_told_so(net: type[nn.Module]) -> None:
    with pytest.raises(FewbitError, match=rf"^{net.__name__} names no input: its forward\(.*\) has none\. The image needs one"):
        loaded(net(), {}, input_size=SIZE)


class Behind(nn.Module):
    """A mask of no image, which stands in front of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, mask: Tensor, image: Tensor) -> Tensor:
        return self.conv(image) * mask


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_image_says_what_the_batch_is_though_another_map_stands_in_front_of_it(suffix: str, tmp_path: Path) -> None:
    net, mask, path = Behind().eval(), torch.rand(1, 1, 12, 12), tmp_path / f"net{suffix}"
    shapes = ({}, {0: Dim("rows", min=1, max=64)})
    if suffix == ".onnx":
        torch.onnx.export(
            net, (mask, images(2)), path, dynamo=True, verbose=False, input_names=["mask", "image"], output_names=["y"],
            dynamic_shapes=shapes,
        )  # fmt: skip
    else:
        torch.export.save(torch.export.export(net, (mask, images(2)), dynamic_shapes=shapes), path)
    model = loaded(str(path), {"mask": mask})
    assert [str(one) for one in model.inputs] == ["mask (1, 1, 12, 12) float32", "image (batch, 3, 12, 12) float32"]
    assert model.batch is None
    graph = capture(model)
    torch.testing.assert_close(Executor(graph)(images(5))[0], net(mask, images(5)))
    float_onnx(graph, tmp_path / "out.onnx", opset=20)
    file = ort.InferenceSession(tmp_path / "out.onnx")
    dims = [file.get_inputs()[1].shape[0], file.get_outputs()[0].shape[0]]
    assert dims == (["rows", "rows"] if suffix == ".onnx" else ["batch", "batch"])
    found = file.run(None, {"mask": mask.numpy(), "image": images(3).numpy()})[0]
    np.testing.assert_allclose(found, net(mask, images(3)).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_map_in_colours_is_rather_the_image_and_a_name_nearly_right_is_named(tmp_path: Path) -> None:
    path, rows = tmp_path / "net.pt2", {0: Dim("rows", min=1, max=64)}
    example = torch.rand(2, 1, 12, 12), images(2)
    torch.export.save(torch.export.export(Behind().eval(), example, dynamic_shapes=(rows, rows)), path)
    with pytest.raises(FewbitError, match=r"One is the image; mask must be given as well: --input mask=VALUE"):
        loaded(str(path), {})
    with pytest.raises(FewbitError, match=r"unknown input of .* 'msk'. Did you mean mask\?"):
        loaded(str(path), {"msk": torch.rand(1, 1, 12, 12)})


def items(count: int) -> list[dict[str, Any]]:
    """An image with prompts of its own, as a Dataset gives it."""
    random = torch.Generator().manual_seed(3)
    return [
        {"image": x, "prompt": {"points": torch.rand(2, 2, generator=random), "labels": torch.tensor([i % 2, 1])}, "id": f"{i}"}
        for i, x in enumerate(images(count))
    ]


def test_what_comes_with_each_image_reaches_the_file(tmp_path) -> None:
    """The oracle of the float file is the net, image by image, each with its own prompts."""
    data = items(14)
    result = quantize(Decoder(), data, target="ort-x86-vnni", input_size=SIZE, out=tmp_path / "run", seconds=0.01)
    assert not result.checks.wrong
    assert not result.checks.wrong_outputs
    opened = Run.open(tmp_path / "run")
    kinds = {one["name"]: (one["kind"], one["shape"]) for one in opened.record["inputs"]}
    assert kinds == {
        "embedding": ("image", [*SIZE]), "prompt.points": ("each image", [2, 2]), "prompt.labels": ("each image", [2])
    }  # fmt: skip
    assert not opened.verify().wrong
    assert not opened.verify(data[3:9]).wrong
    assert opened.do("evaluate", scored=opened.images(items(20)[14:]), runtime="onnxruntime", threads=1).images == 6
    assert len(opened.do("bench", seconds=0.01, threads=1, runtimes=["onnxruntime"], batches=[2])[0]) == 1
    session, net = ort.InferenceSession(str(tmp_path / "run" / "float.onnx")), Decoder()
    for item in data[:3]:
        prompt = {name: value[None] for name, value in item["prompt"].items()}
        feeds = {"embedding": item["image"][None], **{f"prompt.{name}": value for name, value in prompt.items()}}
        (found,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        torch.testing.assert_close(torch.from_numpy(found), net(item["image"][None], prompt).detach(), atol=1e-5, rtol=1e-4)


SMALL = Preprocess(SIZE)
POINTS = (Input("points", (2, 2), each=True, value=torch.zeros(1, 2, 2)),)


def test_arrays_of_a_file_and_batches_of_a_loader_are_taken_image_by_image(tmp_path) -> None:
    x, points = images(5), torch.rand(5, 2, 2)
    np.savez(tmp_path / "x.npz", images=x.numpy(), points=points.numpy(), unread=np.zeros(1))
    loader = DataLoader([{"image": a, "points": b} for a, b in zip(x, points, strict=True)], batch_size=2)
    for source in (str(tmp_path / "x.npz"), loader):
        assert examples(source)[0]["points"].equal(points[0])
        opened = open_images(source, SMALL, others=POINTS)
        for batches in (list(opened.batches(2)), opened.batches(2)[0:3], list(Rebatched(opened.batches(3), 2))):
            assert [len(part) for part, _ in batches] == [2, 2, 1]
            assert torch.equal(torch.cat([part for part, _ in batches]), x)
            assert torch.equal(torch.cat([own for _, own in batches]), points)
        some, own = opened.subset([4, 1]).batches(8)[0]
        assert torch.equal(some, x[[4, 1]])
        assert torch.equal(own, points[[4, 1]])
        assert opened.fingerprint() != open_images(source, SMALL).fingerprint()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda item: item.pop("points"), r"list:2: it has no 'points', which the model takes with each image"),
        (
            lambda item: item.update(points=torch.zeros(3, 2)),
            r"list:2: its 'points' has shape \(3, 2\); the model takes points",
        ),
        (lambda item: item.update(points="a"), r"list:2: it has no 'points'"),
        (lambda item: item["points"].fill_(float("nan")), r"list:2: its 'points' holds NaN"),
    ],
)
def test_an_item_without_what_the_model_takes_is_named(change: Any, says: str) -> None:
    data = [{"image": x, "points": torch.rand(2, 2)} for x in images(4)]
    change(data[2])
    with pytest.raises(BadImages, match=says):
        open_images(data, SMALL, others=POINTS)


def test_a_source_without_what_the_model_takes_is_refused(tmp_path) -> None:
    with pytest.raises(BadImages, match=r"array has no 'points', which the model takes .*--input points=VALUE"):
        open_images(images(4), SMALL, others=POINTS)
    np.savez(tmp_path / "x.npz", images=images(4).numpy(), points=np.zeros((3, 2, 2)))
    with pytest.raises(BadImages, match=r"has 3 'points' and 4 images"):
        open_images(tmp_path / "x.npz", SMALL, others=POINTS)
    with pytest.raises(FewbitError, match=r"Decoder takes embedding, prompt\. .*or with each image, in dicts"):
        quantize(Decoder(), images(4), target="ort-x86-vnni", input_size=SIZE)


def test_pictures_alone_for_a_model_of_two_inputs_say_where_the_other_is_given():
    other = Input("mask", (2,), torch.float32, has_batch=True)
    said = "no 'mask', which .* when the model is quantized, the same for all: fewbit quantize --input mask=VALUE"
    with pytest.raises(BadImages, match=said):
        columns([other], {}, ["a.png"], "folder pictures")


def test_a_file_of_another_kind_is_no_onnx_file(tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 1}')
    with pytest.raises(
        BadFile, match=r"report\.json is not a readable ONNX file \(.*\)\. Give an ONNX file or the folder of a"
    ):
        load_proto(tmp_path / "report.json")


class Stereo(nn.Module):
    """How far what the left eye sees is from what the right one sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.eye = nn.Conv2d(3, 8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.eye(left) - 2 * self.eye(right)).mean((2, 3))


PAIRS = {name: torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("right", "left"))}


def pairs_as(kind: str, tmp_path: Path) -> Any:
    rows = [{name: x[i] for name, x in PAIRS.items()} for i in range(6)]
    if kind == "an .npz file":
        np.savez(tmp_path / "pairs.npz", **{name: x.numpy() for name, x in PAIRS.items()})
        return str(tmp_path / "pairs.npz")
    return {"dicts": rows, "a loader": DataLoader(rows, batch_size=4), "a generator": iter(rows)}[kind]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dicts", "a loader", "a generator", "an .npz file"])
@pytest.mark.parametrize("file", [False, True])
def test_names_of_the_inputs_say_which_is_the_image(kind: str, file: bool, tmp_path: Path) -> None:
    """The oracle is what lies in the source under the two names."""
    model: Any = Stereo()
    if file:
        port = {"dynamic_axes": {name: {0: "batch"} for name in ("left", "right")}, "input_names": ["left", "right"]}
        torch.onnx.export(model, (PAIRS["left"], PAIRS["right"]), tmp_path / "stereo.onnx", dynamo=False, **port)
        model = str(tmp_path / "stereo.onnx")
    each, source = examples(pairs_as(kind, tmp_path))
    loaded = load_model(model, given=Given({}, each), overrides={} if file else {"input_size": SIZE})
    assert [(one.name, one.is_image) for one in loaded.inputs] == [("left", True), ("right", False)]
    opened = open_images(source, SMALL, others=[one for one in loaded.inputs if one.each], image="left")
    image, beside = next(iter(opened.batches(6)))
    assert torch.equal(image, PAIRS["left"])
    assert torch.equal(beside, PAIRS["right"])


def test_the_only_input_may_be_named_too() -> None:
    rows = [{"x": PAIRS["left"][i], "label": 1, "place": torch.zeros(3, 12, 12)} for i in range(3)]
    each, source = examples(rows)
    (one,) = load_model(Looking().eval(), given=Given({}, each), overrides={"input_size": SIZE}).inputs
    assert one.is_image
    assert torch.equal(next(iter(open_images(source, SMALL, image=one.name).batches(3))), PAIRS["left"][:3])
    with pytest.raises(BadImages, match=r"keys right, left; one of the keys images, pixel_values, .* is needed"):
        open_images([{name: x[0] for name, x in PAIRS.items()}], SMALL)


class Looking(Stereo):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.eye(x).mean((2, 3))
