"""A run and the program in it, on pictures that were not calibrated on. Oracle: what fewbit itself gives the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fewbit import Run
from fewbit.data.decode import decode
from fewbit.demo import DEMOS
from fewbit.deploy import read
from fewbit.deploy.program import loaded
from fewbit.run import quantize
from fewbit.runtimes import open_session


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_200_pictures_become_the_same_pixels_and_the_same_outputs(tmp_path: Path, inside: bool) -> None:
    options = {"recipe": "minmax", "calibration": 32, "scored": 40, "seconds": 0.01, "normalize_inside": inside}
    quantize("demo:resnet20", out=tmp_path / "run", **options)
    run = Run.open(tmp_path / "run")
    assert read(run.folder / "model.onnx").intact
    task = json.loads((run.folder / "deploy" / "task.json").read_text())
    predict = loaded(task["pieces"])
    model, session = predict.Model(run.folder / "deploy"), open_session(task["runtime"], run.folder / "model.onnx")
    pictures = pq.read_table(DEMOS["demo:resnet20"].test).slice(0, 200).column("image").to_pylist()
    assert len(pictures) == 200
    for picture in pictures:
        content = picture["bytes"]
        x = run.preprocess(decode(content, "picture", 3))[None].numpy()
        (wanted,), feeds = session.feed(x), model.feeds(predict.opened(content, "picture", 3))
        (given,) = feeds.values()
        assert given.dtype == wanted.dtype
        np.testing.assert_array_equal(given, wanted)
        for found, logits in zip(model.run(feeds), session.run(x).values(), strict=True):
            np.testing.assert_array_equal(found, logits)
