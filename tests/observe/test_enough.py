"""Whether calibration images are enough: silent for 64 of the demo's own, loud for what is too little or something else."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.capture import capture
from fewbit.core.graph import Graph
from fewbit.data.images import Preprocess, open_images
from fewbit.data.synthesize.teacher import Teacher
from fewbit.demo import model as demo
from fewbit.load import load_model
from fewbit.observe import Stats, observe
from fewbit.observe.calibration_check import CalibrationLimits, Inspection, inspect_images, range_change
from fewbit.observe.stats import Histogram
from fewbit.stages.observe import spread
from fewbit.stages.preprocessing import preprocess_of

GOOD = Inspection(64, 0.05, 0.1, 8.0, 0.0)


@pytest.fixture(scope="module", params=["demo", "demo:resnet20"])
def model(request: pytest.FixtureRequest) -> tuple[Graph, Teacher, Tensor]:
    """A demo, and 64 of its calibration images."""
    loaded = load_model(request.param)
    images = open_images(demo.CALIBRATION, preprocess_of(loaded, {}), limit=64)
    return capture(loaded), Teacher(loaded.program), torch.cat(list(images.batches(64)))


def warnings(model: tuple[Graph, Teacher, Tensor], images: Tensor) -> list[str]:
    graph, teacher, _ = model
    halves = [observe(graph, [images[i::2]]) for i in (0, 1)]
    return CalibrationLimits()(inspect_images(teacher, images.split(16)), range_change(*halves))["warnings"]


def test_64_of_the_demos_own_images_are_enough(model: tuple[Graph, Teacher, Tensor]) -> None:
    assert warnings(model, model[2]) == []


def test_two_constant_images_are_not(model: tuple[Graph, Teacher, Tensor]) -> None:
    found = warnings(model, torch.zeros(2, 3, 32, 32))
    assert any("unlike what the model was trained on" in w for w in found)
    assert any("one colour or repeat" in w for w in found)


def test_noise_and_forgotten_normalization_are_not_however_many(model: tuple[Graph, Teacher, Tensor]) -> None:
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for strange in (noise, model[2] * 0.25 + 0.47):
        found = warnings(model, strange)
        assert any("unlike what the model was trained on" in w for w in found)
        assert not any("Too few" in w for w in found)


def test_two_of_the_demos_own_are_too_few(model: tuple[Graph, Teacher, Tensor]) -> None:
    assert any("Too few" in w for w in warnings(model, model[2][:2]))


def test_the_same_image_again_says_nothing_new(model: tuple[Graph, Teacher, Tensor]) -> None:
    assert inspect_images(model[1], [model[2][:4], model[2][:4]]).duplicate_share == 0.5
    assert inspect_images(model[1], [model[2][:4]]).duplicate_share == 0


def test_distances_from_running_statistics_do_not_depend_on_batches(model: tuple[Graph, Teacher, Tensor]) -> None:
    whole, parts = (inspect_images(model[1], model[2].split(size)) for size in (64, 24))
    assert whole.shift == pytest.approx(parts.shift, rel=1e-3)
    assert whole.spread == pytest.approx(parts.spread, rel=1e-3)
    assert whole.classes == parts.classes


def test_classes_are_e_to_the_entropy_of_the_answers(model: tuple[Graph, Teacher, Tensor]) -> None:
    answers = model[1](model[2]).logits.argmax(1).tolist()
    shares = [answers.count(a) / 64 for a in set(answers)]
    assert inspect_images(model[1], [model[2]]).classes == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_the_change_of_ranges_by_hand() -> None:
    def stats(*spans: float) -> Stats:
        return Stats({str(i): Histogram.of(torch.linspace(0, s, 4001)) for i, s in enumerate(spans)}, 1)

    assert range_change(stats(1.0), stats(1.0)) == 0
    assert range_change(stats(1.0), stats(2.0)) == pytest.approx(0.5, abs=0.01)
    assert range_change(stats(1.0, 1.0, 1.0), stats(1.0, 1.25, 2.0)) == pytest.approx(0.2, abs=0.01)  # the median


@pytest.mark.parametrize(
    ("found", "change", "word"),
    [
        (GOOD, 0.01, None),
        (GOOD, None, "one calibration image"),
        (GOOD, 0.2, "differ by 20 %"),
        (Inspection(64, 0.5, 0.1, 8.0, 0.0), 0.01, "0.50 standard deviations off"),
        (Inspection(64, 0.05, 1.0, 8.0, 0.0), 0.01, "factor of 2.72"),
        (Inspection(64, None, None, 1.1, 0.0), 0.01, "the same answer"),
        (Inspection(4, None, None, 1.0, 0.0), 0.01, None),
        (Inspection(64, None, None, None, 0.5), 0.01, "50 % of the 64"),
    ],
)
def test_each_number_has_its_warning(found: Inspection, change: float | None, word: str | None) -> None:
    said = CalibrationLimits()(found, change)["warnings"]
    assert len(said) == (word is not None)
    assert word is None or word in said[0]


@pytest.mark.parametrize(
    ("count", "most", "together", "expected"),
    [
        (10, 10, 1, range(10)),
        (4000, 512, 1, range(0, 4000, 8)),
        (11, 4, 1, [0, 3, 6, 9]),
        (12, 4, 2, [0, 1, 6, 7]),  # whole batches of a model that takes two
    ],
)
def test_some_of_many_images_are_from_all_over_them(count: int, most: int, together: int, expected: Iterable[int]) -> None:
    images = open_images(np.zeros((count, 1, 1, 3), np.uint8), Preprocess((3, 1, 1), (0.0,) * 3, (1.0,) * 3), labels=False)
    found = spread(images, most, together)
    assert list(found.names) == [images.names[i] for i in expected]
