"""Fine-tuning: the student is the simulation, its gradient a clamp's, its plan one like any other, verified in codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Captured
from fewbit.choose import Bits, LabelledImages
from fewbit.choose.finetune import Finetune, TunedModel, cropped
from fewbit.choose.soft_codes import Straight
from fewbit.core.grid import Grid, QParams, fake
from fewbit.core.plan import Json, Plan
from fewbit.core.shelf import Shelf
from fewbit.errors import BadImages, BadValues
from fewbit.execute.simulate import simulate
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES
from fewbit.target import load_target
from fewbit.verify import compare
from planning import kl, numbers, plan_for

W4 = Bits(4, 4)
QUICK = Finetune(epochs=1, iterations=30, batch=8, lr=1e-3, alpha=1.0, temperature=1.0, ce=0.0, decay=0.0, real_crop=(1, 1))


def tuned(net: Captured, tune: Finetune = QUICK, target: str = "ort-x86-vnni", **options: object) -> Plan:
    recipe = replace(RECIPES["mse"], passes=(*RECIPES["mse"].passes, tune))
    options = {"images": net.images.split(8), "bits": W4, **options}
    return plan_for(net.graph, net.stats, load_target(target), recipe, **options)


def plain(net: Captured, target: str = "ort-x86-vnni") -> Plan:
    return plan_for(net.graph, net.stats, load_target(target), RECIPES["mse"], bits=W4)


def record(plan: Plan) -> Mapping[str, Json]:
    (log,) = plan.logs("finetune")
    return log.summary


def test_rounding_is_that_of_the_grid_and_its_gradient_that_of_a_clamp() -> None:
    x = torch.tensor([-3.0, -1.0, -0.26, 0.24, 0.9, 1.7, 1.76, 5.0], requires_grad=True)
    qparams, grid = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32)), Grid(3)
    found = Straight.apply(x, qparams, grid)
    assert torch.equal(found, fake(x.detach(), qparams, grid))
    found.sum().backward()
    low, high = (grid.low - 1 - 0.5) * 0.5, (grid.high - 1 + 0.5) * 0.5
    inside = (x.detach() >= low) & (x.detach() <= high)
    assert torch.equal(x.grad, inside.float())
    assert 0 < int(inside.sum()) < len(x)


def test_channels_of_a_weight_are_clipped_each_at_its_own_end() -> None:
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0]], requires_grad=True)
    qparams = QParams(torch.tensor([0.5, 1.5]), torch.zeros(2, dtype=torch.int32))
    Straight.apply(x, qparams, Grid(3, axis=0)).sum().backward()
    assert x.grad.tolist() == [[1, 0], [1, 1]]  # the ends are at 1.75 and 5.25


@pytest.mark.parametrize("name", ["conv_net", "vit", "mixed_net"])
def test_the_student_before_training_is_the_simulation(name: str, request: pytest.FixtureRequest) -> None:
    net = request.getfixturevalue(name)
    plan = net.plan("ort-x86-vnni", "mse", bits=W4)
    with torch.no_grad():
        torch.testing.assert_close(TunedModel(net.graph, plan)(net.images)[0], simulate(net.graph, plan)(net.images))


def test_no_steps_leave_the_plan_as_it_was(conv_net: Captured) -> None:
    found, start = tuned(conv_net, replace(QUICK, iterations=0)), plain(conv_net)
    for site, choice in start.choices.items():
        assert found.choices[site].qparams == choice.qparams
        if choice.codes is not None:
            assert torch.equal(found.choices[site].codes, choice.codes)


def test_training_lowers_the_loss_and_leaves_the_float_model_and_the_steps_alone(vit: Captured) -> None:
    net = vit
    before = {key: value.clone() for key, value in net.graph.module.state_dict().items()}
    start, found = plain(net), tuned(net, replace(QUICK, iterations=60, lr=0.1))
    assert kl(net.graph, found, net.images) < 0.9 * kl(net.graph, start, net.images)
    assert all(torch.equal(value, before[key]) for key, value in net.graph.module.state_dict().items())
    assert all(parameter.grad is None for parameter in net.graph.module.parameters())
    weights = [site for site, choice in start.choices.items() if choice.role == "weight"]
    assert any(not torch.equal(found.choices[site].codes, start.choices[site].codes) for site in weights)
    assert all(found.choices[site].grid == choice.grid for site, choice in start.choices.items())
    assert record(found)["last"] < record(found)["first"]


def test_the_same_seed_gives_the_same_plan(conv_net: Captured) -> None:
    plans = [tuned(conv_net, replace(QUICK, iterations=3, real_crop=(0.5, 1))) for _ in range(2)]
    assert plans[0].biases
    assert numbers(plans[0]) == numbers(plans[1])


@pytest.mark.parametrize("target", ["ort-x86-avx2", "ort-x86-vnni", "openvino-x86", "npu-int16"])
def test_a_tuned_plan_stays_on_its_grids_and_survives_its_files(conv_net: Captured, target: str, tmp_path: Path) -> None:
    plan = tuned(conv_net, replace(QUICK, iterations=5), target)
    for site, choice in plan.choices.items():
        if choice.codes is not None:
            assert int(choice.codes.int().min()) >= choice.grid.low, site
            assert int(choice.codes.int().max()) <= choice.grid.high, site
    save_plan(conv_net.graph, plan, tmp_path)
    again = simulate(conv_net.graph, load_plan(conv_net.graph, tmp_path))
    assert torch.equal(again(conv_net.images), simulate(conv_net.graph, plan)(conv_net.images))


def test_a_tuned_plan_has_the_runtimes_codes(conv_net: Captured, ort_target: str, tmp_path: Path) -> None:
    plan = tuned(conv_net, replace(QUICK, iterations=5), ort_target)
    realize(conv_net.graph, plan, tmp_path / "model.onnx", **load_target(ort_target).file_format)
    checks = compare(conv_net.graph, plan, tmp_path / "model.onnx", conv_net.images.split(8))
    assert not checks.wrong


def test_real_and_synthetic_images_are_both_drawn_and_counted(conv_net: Captured) -> None:
    spoilt = torch.full((3, *conv_net.images.shape[1:]), float("nan"))
    real, one = conv_net.images, replace(QUICK, iterations=1)
    for images, synthetic in ((real, spoilt), (spoilt, real)):  # one of them is in every batch
        with pytest.raises(BadValues, match="diverged: its loss is nan at iteration 1 of 2"):
            tuned(conv_net, replace(QUICK, iterations=2), images=[images], synthetic=LabelledImages(Shelf.of([synthetic])))
    both = record(tuned(conv_net, one, synthetic=LabelledImages(Shelf.of([real[:3]]))))
    assert (both["real"], both["synthetic"]) == (16, 3)
    for made in ({"real_images": False}, {"images": (), "synthetic": LabelledImages(Shelf.of([real]))}):
        alone = record(tuned(conv_net, one, **made))
        assert (alone["real"], alone["synthetic"]) == (0, 16)


def test_labels_are_needed_where_they_are_asked_for_and_images_always(conv_net: Captured) -> None:
    with pytest.raises(BadImages, match="--loss labels needs"):
        tuned(conv_net, replace(QUICK, loss="labels"))
    with pytest.raises(BadImages, match="no images to fine-tune on"):
        tuned(conv_net, images=())
    labels = conv_net.graph.module(conv_net.images).argmax(1)
    by_answer, by_label = (
        tuned(conv_net, replace(QUICK, iterations=2, ce=1.0, loss=loss), labels=labels) for loss in ("kl", "labels")
    )
    for site, choice in by_answer.choices.items():  # these labels are the model's answers
        if choice.codes is not None:
            assert torch.equal(choice.codes, by_label.choices[site].codes)


def test_the_loss_by_hand() -> None:
    taught, learnt = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = math.exp(1.0) / (math.exp(1.0) + 1)  # T = 2
    divergence = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    found = Finetune(alpha=3.0, temperature=2.0, ce=0.5).loss_of(taught, learnt, torch.tensor([1]))
    assert float(found) == pytest.approx(3 * 4 * divergence + 0.5 * math.log(2), rel=1e-5)


def test_a_crop_of_everything_is_the_image_or_its_mirror_and_a_smaller_one_shows_a_part() -> None:
    ramp = torch.arange(16.0).expand(64, 1, 16, 16).contiguous()
    random = torch.Generator().manual_seed(0)
    whole = cropped(ramp, (1.0, 1.0), random)
    spans = whole.amax((1, 2, 3)) - whole.amin((1, 2, 3))
    assert float(spans.min()) >= 15 * math.sqrt(3 / 4) - 1
    directions = (whole[:, 0, 0, -1] > whole[:, 0, 0, 0]).float().mean()
    assert 0.2 < float(directions) < 0.8
    part = cropped(ramp, (0.25, 0.25), random)
    assert float((part.amax((1, 2, 3)) - part.amin((1, 2, 3))).max()) < 15 * math.sqrt(0.25 * 4 / 3) + 1


def test_the_rate_falls_from_its_start_to_nothing() -> None:
    settings = Finetune(epochs=2, iterations=50, lr=2.0)
    assert settings.lr_at(0) == 2.0
    assert settings.lr_at(50) == pytest.approx(1.0)
    assert settings.lr_at(100) == pytest.approx(0.0)


def test_choose_says_what_a_recipe_that_trains_needs_before_any_work(conv_net: Captured) -> None:
    done: list[str] = []
    with pytest.raises(BadImages, match="no images to fine-tune on"):
        plan_for(conv_net.graph, conv_net.stats, load_target("ort-x86-vnni"), RECIPES["fdda"], progress=done.append)
    assert not done
