"""A model with several outputs, the whole way. Oracle: the model itself, its names and its shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.request import Request
from fewbit.run import Run
from fewbit.runtimes import OnnxRuntime
from fewbit.stages import STAGES


class Detector(nn.Module):
    """Boxes, scores and the class of each cell, in a record."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor]]:
        x = F.relu(self.stem(x))
        scores = self.scores(x)
        return {"boxes": self.boxes(x).exp(), "heads": (scores,), "classes": scores.argmax(1)}


@pytest.mark.filterwarnings("ignore")
def test_each_output_has_its_name_and_is_proven_and_compared_by_itself(ort_target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = Detector().eval(), torch.randn(24, 3, 16, 16)
    request = Request(model=net, images=images, labels=False, target=ort_target, input_size=(3, 16, 16), out=tmp_path / "run")
    with Run.start(request, STAGES) as run:
        checks, score, model = run["checks"], run["score"], run["model"]
        assert not checks.wrong
        assert not checks.wrong_outputs
        activations = [site for site, choice in run["plan"].choices.items() if choice.codes is None]
        sizes = {site: math.prod(run["graph"].site(site).shape[1:]) for site in activations}
        assert {check.site: check.compared for check in checks.on} == {site: 6 * size for site, size in sizes.items()}
        found = OnnxRuntime(model, threads=1).run(images[:4].numpy())
    assert list(found) == [one.name for one in score.outputs] == ["boxes", "heads.0", "classes"]
    expected = net(images[:4])
    for name, value in {"boxes": expected["boxes"], "heads.0": expected["heads"][0]}.items():
        assert found[name].shape == value.shape
        assert F.cosine_similarity(torch.from_numpy(found[name]).flatten(), value.flatten(), 0) > 0.99
    assert (torch.from_numpy(found["classes"]) == expected["classes"]).float().mean() > 0.9
