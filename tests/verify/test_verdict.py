"""Whatever number of a run is changed by hand is found, and named. The oracle is what was changed."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch.export import Dim, export

from fewbit.choose import Bits
from fewbit.core.grid import QParams
from fewbit.core.inputs import Input
from fewbit.core.record import Record
from fewbit.deploy import as_stored, stamped
from fewbit.deploy import made as entry_of
from fewbit.errors import BadFile, BadModel, FewbitFailed
from fewbit.execute.executor import Executor
from fewbit.files import read_json
from fewbit.load import load_model
from fewbit.load.program import fingerprint
from fewbit.realize import load_plan, rendered, rendered_float, save_plan, with_metadata
from fewbit.report.tables import verify as summary
from fewbit.run import Run, quantize
from fewbit.runtimes import AS_WRITTEN, runtime_names
from fewbit.stages.twin import twin_of
from fewbit.target import load_target
from fewbit.verify import compare, deviations, twin_checks
from fewbit.verify.file import initializers, stored_codes
from fewbit.verify.outputs import Moved, apart, disturbances, judged

NETS = ("realized_conv_net", "realized_vit")
needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")


@pytest.fixture(scope="module", params=NETS)
def run(request):
    return request.getfixturevalue(request.param)


def with_tensor(model: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """A copy of a model in which one initializer is another."""
    other = copy.deepcopy(model)
    tensor = next(tensor for tensor in other.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return other


def one_more(array):
    """With its last value changed by the smallest step."""
    flat = array.reshape(-1)
    flat[-1] = np.nextafter(flat[-1], np.inf, dtype=flat.dtype) if flat.dtype.kind == "f" else flat[-1] ^ 1
    return array


def test_every_number_of_a_file_is_compared_and_the_one_that_was_changed_is_named(run):
    model = onnx.load(run.path)
    assert deviations("model.onnx", model, onnx.load(run.path)) == ()
    for name in initializers(model):
        (found,) = deviations("model.onnx", with_tensor(model, name, one_more), model)
        assert found.name.split()[0] == name
        assert found.what.startswith("has 1 of ")


def test_a_scale_and_a_zero_point_are_named_by_their_site(run):
    model = onnx.load(run.path)
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    site = node.output[0].removesuffix(".codes")
    for place, what in ((1, "scale"), (2, "zero point")):
        found = deviations("model.onnx", with_tensor(model, node.input[place], one_more), model)
        assert found[0].name.startswith(f"{node.input[place]} (")
        assert what in found[0].name
    assert site in run.plan.choices


def test_a_node_that_is_missing_added_or_another_is_named(realized_conv_net):
    model = onnx.load(realized_conv_net.path)
    other, conv = copy.deepcopy(model), next(i for i, node in enumerate(model.graph.node) if node.op_type == "Conv")
    output = model.graph.node[conv].output[0]
    next(a for a in other.graph.node[conv].attribute if a.name in ("pads", "strides", "auto_pad", "group")).CopyFrom(
        onnx.helper.make_attribute("strides", [7, 7])
    )
    assert output in deviations("model.onnx", other, model)[0].name
    del other.graph.node[conv]
    assert deviations("model.onnx", other, model)[0].what == "is missing"
    assert deviations("model.onnx", model, other)[0].what == "does not belong there"
    other = copy.deepcopy(model)
    other.opset_import[0].version += 1
    assert [found.name for found in deviations("model.onnx", other, model)] == ["the header"]


def test_an_entry_of_the_metadata_that_is_missing_added_or_another_is_named(realized_conv_net):
    model = onnx.load(realized_conv_net.path)
    said, other = copy.deepcopy(model), copy.deepcopy(model)
    onnx.helper.set_model_props(said, {"stride": "32", "fewbit.preprocess": "{}"})
    onnx.helper.set_model_props(other, {"stride": "16", "fewbit.preprocess": "{}"})
    found = (deviations("model.onnx", *pair) for pair in ((other, said), (model, said), (said, model)))
    kinds = ("is another", "is missing", "does not belong there")
    assert [(one.name, one.what) for (one, *_) in found] == [("metadata entry stride", kind) for kind in kinds]


@pytest.mark.parametrize("bits", [Bits(8, 8), pytest.param(Bits(3, 8), marks=pytest.mark.slow)], ids=str)
def test_one_changed_code_of_any_weight_is_found_in_the_file(realized, conv_net, realized_conv_net, bits):
    made = realized_conv_net if bits == Bits(8, 8) else realized(conv_net, bits=bits, everything=True)
    model, graph = onnx.load(made.path), made.net.graph
    assert not any(check.wrong for check in stored_codes(graph, made.plan, made.path, model))
    for site, choice in made.plan.choices.items():
        if choice.codes is None:
            continue
        codes = choice.codes.clone()
        codes.view(-1)[-1] += 1 if codes.view(-1)[-1] < 1 else -1
        other = {**made.plan.choices, site: dataclasses.replace(choice, codes=codes)}
        checks = stored_codes(graph, dataclasses.replace(made.plan, choices=other), made.path, model)
        assert [(check.site, check.wrong) for check in checks if check.wrong] == [(site, 1)]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_negated_head_is_wrong_in_every_output(realized_conv_net, tmp_path, part):
    made, path = realized_conv_net, tmp_path / "model.onnx"
    model = onnx.load(made.path)
    name = next(name for name in initializers(model) if name in ("head__weight", "head.bias") and part in name)
    onnx.save(with_tensor(model, name, lambda array: -array), path)
    checks = compare(made.net.graph, made.plan, path, [made.net.images])
    assert {check.place for check in checks.wrong_outputs} == {check.place for check in checks.outputs}
    assert [check.site for check in checks.wrong] == (["head:weight"] if part == "weight" else [])
    assert "head:weight" in summary(checks)["problems"][0] or "output logits" in summary(checks)["problems"][0]


def test_rounding_of_float32_is_inside_the_limit_and_a_thousand_times_of_it_is_not(conv_net, vit):
    for net in (conv_net, vit):
        executor = Executor(net.graph)
        with torch.no_grad():
            found, exact = net.module(net.images), copy.deepcopy(net.module).double()(net.images.double())
            (disturbed,), (free,) = executor(net.images, calls=disturbances(executor)), executor(net.images)
            moved = apart(disturbed, free)
        (check,) = judged("here", {"logits": exact.float()}, {"logits": found}, {"logits": moved})
        assert 0 < check.difference < check.limit < 1e-4 * float(exact.abs().max())
        off = exact.float() + 1e3 * (found - exact.float())
        assert judged("here", {"logits": exact.float()}, {"logits": off}, {"logits": moved})[0].wrong


def test_where_rounding_moves_a_few_boxes_far_it_does_not_explain_that_all_of_them_are_elsewhere():
    boxes = torch.rand(4, 50, 4, generator=torch.Generator().manual_seed(0))
    tied, elsewhere = boxes.clone(), (boxes + 0.4).remainder(1)
    tied[1, 7] += 0.3  # one query of 200 reads another code
    moved = apart(tied, boxes) | Moved(0.1, 2e-6)
    assert moved == Moved(pytest.approx(0.3, rel=1e-5), 2e-6)
    assert apart(elsewhere, boxes).usual == pytest.approx(
        float(np.median((elsewhere - boxes).abs().double().numpy())), rel=1e-3
    )
    right, wrong = (judged("here", {"boxes": boxes}, {"boxes": found}, {"boxes": moved})[0] for found in (tied, elsewhere))
    assert not right.wrong
    assert wrong.difference < wrong.limit
    assert wrong.wrong
    assert wrong.said == f"differs by {wrong.usual:.3g} in the middle, where float32 rounding explains {wrong.usual_limit:.2g}"


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64])
def test_of_classes_one_may_be_another_where_no_rounding_is_seen_to_change_one(kind):
    mask = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).to(kind)
    one, two = mask.clone(), mask.clone()
    one[0, 0, 0, :1], two[0, 0, 0, :2] = 1 - one[0, 0, 0, :1].long(), 1 - two[0, 0, 0, :2].long()
    checks = [judged("here", {"mask": mask}, {"mask": found}, {"mask": apart(mask, mask)})[0] for found in (mask, one, two)]
    assert [check.difference for check in checks] == [0, 1 / 128, 2 / 128]
    assert [check.wrong for check in checks] == [False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None], ids=str)
def test_an_output_that_is_no_number_or_not_there_is_wrong(value):
    expected = torch.ones(2, 3)
    found = {} if value is None else {"logits": torch.full((2, 3), value)}
    (check,) = judged("here", {"logits": expected}, found, {"logits": Moved(1.0, 1.0)})
    assert check.wrong


@pytest.mark.parametrize("runtime", [AS_WRITTEN, pytest.param("openvino", marks=needs_openvino)])
def test_the_float_twin_is_compared_with_the_model_that_was_given(realized_conv_net, tmp_path, runtime):
    made, images = realized_conv_net, realized_conv_net.net.images
    given = export(made.net.module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch", min=1, max=65536)},))
    assert not any(check.wrong for check in twin_of(made.net.graph, given, made.float_path, images, runtime))
    model, changed = onnx.load(made.float_path), tmp_path / "float.onnx"
    onnx.save(with_tensor(model, "head.bias", lambda array: array * np.float32(1.001)), changed)
    assert all(check.wrong for check in twin_checks(given, made.net.graph.inputs, changed, runtime, [images]))
    with pytest.raises(FewbitFailed, match="is not the model that was given"):
        twin_of(made.net.graph, given, changed, images, runtime)


@needs_openvino
def test_openvino_shows_its_codes_and_a_changed_step_is_found_at_its_site(realized, conv_net, openvino_target):
    made = realized(conv_net, openvino_target, everything=True)
    choice = made.plan.choices["depth:output"]
    changed = dataclasses.replace(choice, qparams=QParams(choice.qparams.scale * 1.02, choice.qparams.zero))
    plan = dataclasses.replace(made.plan, choices={**made.plan.choices, "depth:output": changed})
    assert not compare(conv_net.graph, made.plan, made.path, [conv_net.images], runtime="openvino").wrong
    checks = compare(conv_net.graph, plan, made.path, [conv_net.images], runtime="openvino")
    assert [next(check.site for check in table if check.wrong) for table in (checks.off, checks.on)] == ["depth:output"] * 2
    assert "first at depth:output" in summary(checks)["problems"][0]


@pytest.fixture(scope="module")
def saved(realized_conv_net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_plan(realized_conv_net.net.graph, realized_conv_net.plan, folder)
    return folder


def numbers(value, place=()):
    """The places of all numbers and keys of a JSON value."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(each, (*place, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place


def test_every_number_of_plan_json_stands_for_one_of_the_plan(realized_conv_net, saved, tmp_path):
    graph, record = realized_conv_net.net.graph, json.loads((saved / "plan.json").read_text())
    (tmp_path / "plan.safetensors").write_bytes((saved / "plan.safetensors").read_bytes())
    places = [("schema",), *(("choices", *place) for place in numbers(record["choices"][:3]) if place[-1] != "axis")]
    assert {place[-1] for place in places} >= {"schema", "scale", "zero", "bits"}
    for place in places:
        changed = copy.deepcopy(record)
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = inside[place[-1]] * 2 + 1
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        own = place[-1] == "zero" and inside["role"] == "weight"
        if "grid" in place or own:  # stands there alone: it makes another plan, which is compared with the file
            continue
        with pytest.raises(BadFile, match=str(place[-1])):
            load_plan(graph, tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({**record, "extra": None}))
    with pytest.raises(BadFile, match=r"plan\.json has an unknown extra"):
        load_plan(graph, tmp_path)


def test_every_float_and_every_step_of_plan_safetensors_is_that_of_the_model(realized_conv_net, saved, tmp_path):
    graph, tensors = realized_conv_net.net.graph, load_file(saved / "plan.safetensors")
    (tmp_path / "plan.json").write_bytes((saved / "plan.json").read_bytes())
    activations = [site for site, choice in realized_conv_net.plan.choices.items() if choice.codes is None]
    names = [name for name in tensors if name.startswith("float.")] + [
        f"{site}.{k}" for site in activations for k in ("scale", "zero")
    ]
    assert len(names) > 10
    for name in names:
        value = tensors[name].clone()
        value.view(-1)[-1] += 1
        save_file({**tensors, name: value}, tmp_path / "plan.safetensors")
        with pytest.raises(BadFile, match=name.rsplit(".", 1)[0] if name.startswith("float.") else name.rsplit(".", 1)[1]):
            load_plan(graph, tmp_path)
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "plan.safetensors")
    with pytest.raises(BadFile, match="unknown tensor more"):
        load_plan(graph, tmp_path)


@pytest.fixture
def stamped_as():
    """(the entry in a file, what a run gives) -> what verify says of that file."""
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))

    def says(stored, entry):
        found, expected = onnx.ModelProto(), onnx.ModelProto()
        found.CopyFrom(empty)
        expected.CopyFrom(empty)
        stamped(found, stored)
        return deviations("model.onnx", found, stamped(expected, as_stored(entry, found)))

    return says


def test_an_entry_is_compared_in_the_keys_that_an_older_fewbit_knew(stamped_as):
    ours = {"fewbit": "2", "new": 1, "hashes": {"model": "a", "later": "b"}, "measured": {"float": 82.1, "why": ""}}
    older = {"hashes": {"model": "a"}, "fewbit": "2", "measured": {"float": 82.1}}
    assert stamped_as(ours, ours) == stamped_as(older, ours) == ()
    for changed, says in (
        ({**older, "hashes": {"model": "c"}}, "has another hashes.model"),
        ({**older, "measured": {"float": 99.0}}, "has another measured.float"),
        ({**older, "old": 1}, "has old, which this fewbit does not write (it was written by fewbit 2)"),
    ):
        (found,) = stamped_as(changed, ours)
        assert (found.name, found.what) == ("metadata entry fewbit.made", says)


@pytest.mark.slow
def test_a_finished_run_is_realized_again_and_whatever_was_changed_in_its_files_is_named(conv_net, ort_target, tmp_path):
    out = tmp_path / "run"
    quantize(conv_net.module, conv_net.images, target=ort_target, out=out, input_size=(3, 8, 8), seconds=0.01)
    run = Run.open(out)
    assert run.verify().file == ()
    graph, exact, given, plan, record = (run[name] for name in ("graph", "exact", "given", "plan", "record"))
    form = record["file_format"]
    made, said = (rendered(graph, plan, **form), rendered_float(exact, opset=form["opset"])), Record.from_json(record).entries()
    again, twin = (ir.to_proto(with_metadata(model, said)) for model in made)
    again = stamped(again, entry_of(plan, record, read_json(out / "report.json")))
    assert again.SerializeToString() == (out / "model.onnx").read_bytes()
    assert twin.SerializeToString() == (out / "float.onnx").read_bytes()
    assert fingerprint(load_model(str(out / "exported.pt2")).program) == fingerprint(given) == record["hashes"]["model"]
    weight = plan.choices["a:weight"]
    scale = weight.qparams.scale.clone()
    scale.view(-1)[1] *= 1.0001
    changed = dataclasses.replace(weight, qparams=QParams(scale, weight.qparams.zero))
    other = dataclasses.replace(plan, choices={**plan.choices, "a:weight": changed})
    wanted = ir.to_proto(with_metadata(rendered(graph, other, **form), said))
    wanted = stamped(wanted, entry_of(plan, record, read_json(out / "report.json")))
    found, entry = deviations("model.onnx", onnx.load(out / "model.onnx"), wanted)
    assert "scale of a__weight" in found.name
    assert entry.name == "metadata entry fewbit.made"  # which has the hash of the file that was measured
    assert load_target(ort_target).file_format == {**form, "fuse": tuple(form["fuse"])}
    for name, value in (("target", "arm-int7"), ("bits", "w4a4"), ("recipe", "mse")):
        with pytest.raises(BadFile, match=name):
            run.do("files", plan=dataclasses.replace(plan, **{name: value}))


class Whole(torch.nn.Module):
    """The whole number below or above each pixel of an image of one pixel."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).flatten(1)


@pytest.mark.parametrize(("function", "operator", "factor"), [
    (torch.floor, "Floor", 1 - 2**-24), (torch.ceil, "Ceil", 1 + 2**-23),
])  # fmt: skip
def test_a_twin_whose_numbers_stand_on_a_border_is_right_and_a_wrong_one_is_not(tmp_path, function, operator, factor):
    """One disturbance moves the pixel to one side of 1, at random; the file computes it on the other one."""

    def written(by):
        nodes = [onnx.helper.make_node("Mul", ["images", "by"], ["a"]), onnx.helper.make_node(operator, ["a"], ["b"]),
                 onnx.helper.make_node("Flatten", ["b"], ["logits"])]  # fmt: skip
        ports = ([onnx.helper.make_tensor_value_info(*one)] for one in (("images", 1, [1, 1, 1, 1]), ("logits", 1, [1, 1])))
        graph = onnx.helper.make_graph(nodes, "net", *ports, [numpy_helper.from_array(np.float32(by), "by")])
        opsets = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "float.onnx")
        return tmp_path / "float.onnx"

    x = torch.ones(1, 1, 1, 1)
    program, inputs = export(Whole(function), (x,)), (Input("images", (1, 1, 1)),)
    (check,) = twin_checks(program, inputs, written(factor), AS_WRITTEN, [x])
    assert (check.difference, check.wrong) == (1, False)
    assert twin_checks(program, inputs, written(9), AS_WRITTEN, [x])[0].wrong


def test_an_output_whose_shape_rounding_decides_is_not_compared():
    with pytest.raises(BadModel, match=r"keypoints has the shape \(1, 0, 2\) or \(1, 75, 2\)"):
        apart(torch.zeros(1, 0, 2), torch.zeros(1, 75, 2), "keypoints")
