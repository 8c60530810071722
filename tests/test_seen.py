"""What a file does on images that it was fitted to. Oracle: both files in onnxruntime, on the run's calibration images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

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


class Threes(nn.Module):
    """A classifier whose shapes are written for three images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(x)).mean((2, 3))).reshape(3, 4)


def test_of_a_model_with_a_fixed_batch_whole_batches_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.stages.seen.MOST", 16)  # which is no multiple of three
    images = np.random.default_rng(0).standard_normal((60, 3, 16, 16)).astype(np.float32)
    options = {"calibration": 48, "scored": 12, "bits": "w4a8", "recipe": "fast", "threads": 1}
    program = torch.export.export(Threes().eval(), (torch.zeros(3, 3, 16, 16),))
    with Run.start(Request(model=program, images=images, out=tmp_path / "run", **options), STAGES) as run:
        known, scored = run["known"], run["score"].rating.agreement
    assert (known["images"], known["others"]) == (18, scored)


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
