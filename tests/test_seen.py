"""What a file does on images that it was fitted to. Oracle: both files in onnxruntime, on the run's calibration images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fewbit import Run
from fewbit.core.inputs import images_of
from fewbit.report.answers import more_images
from fewbit.request import Request
from fewbit.stages import STAGES, Stage
from fewbit.stages.seen import seen

OPTIONS = {"model": "demo:resnet20", "calibration": 20, "scored": 12, "threads": 1, "seconds": 0.01}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    request = Request(bits="w2a4,first=8", recipe="fast", out=tmp_path_factory.mktemp("seen") / "run", **OPTIONS)
    with Run.start(request, STAGES) as run:
        yield run


def classes(file: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file))
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0].argmax(1)  # type: ignore[no-any-return]


def test_the_agreement_on_calibration_images_is_that_of_both_files_on_them(fitted: Run) -> None:
    images = torch.cat([images_of(batch) for batch in fitted["calibration"].batches(8)])
    same = classes(fitted["twin"], images) == classes(fitted["model"], images)
    assert 0.2 < same.mean() < 1
    assert fitted["known"]["agreement"] == pytest.approx(100 * same.mean())
    assert fitted["known"]["images"] == 20
    score = fitted["score"]  # still that of the scored images
    assert (score.images, score.rating.agreement) == (12, fitted["known"]["others"])


def test_nothing_is_looked_at_where_codes_were_not_fitted_to_images(fitted: Run, tmp_path: Path) -> None:
    for changed in ({"bits": "8", "recipe": "fast"}, {"bits": "w2a4", "recipe": "mse"}):
        run = fitted.fork(tmp_path / changed["recipe"], Request(**OPTIONS, **changed))
        (tmp_path / changed["recipe"]).mkdir()
        values = {name: fitted[name] for name in Stage.takes(seen)}
        assert seen(**{**values, "plan": run["plan"]}) is None


@pytest.mark.parametrize(
    ("agreement", "said"),
    [(95.0, "a part of the 15.0 points between"), (84.0, "no more than chance away: more of them would bring little")],
)
def test_what_more_images_can_bring_is_said(agreement: float, said: str) -> None:
    p, q = agreement / 100, 0.8
    chance = 196 * (p * (1 - p) / 256 + q * (1 - q) / 1000) ** 0.5  # 3.6 and 5.1 points
    (line,) = more_images({"images": 256, "agreement": agreement, "others": 80.0, "chance": chance})
    assert said in line
    assert line.startswith(f"On 256 of the calibration images agreement is {agreement:.2f}")
    assert more_images(None) == []
