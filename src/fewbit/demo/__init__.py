"""The models that fewbit ships, by the name that is typed, with the images of each.

model   a vision transformer
cnn     a ResNet and a MobileNet
detr    a detector
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """`maker` is the function that returns the model, file.py:function; `calibration` and `test` are its images, `annotations`
    what is known of the latter beside classes.
    """

    maker: str
    calibration: Path = HERE / "calibration.parquet"
    test: Path = HERE / "test.parquet"
    annotations: Path | None = None

    @property
    def spec(self) -> str:
        return str(HERE / self.maker)


DETR = Demo("detr.py:detr", HERE / "scenes-calibration.parquet", HERE / "scenes-test.parquet", HERE / "scenes-test.parquet")
DEMOS = {
    "demo": Demo("model.py:model"),
    "demo:resnet20": Demo("cnn.py:resnet20"),
    "demo:mobilenet": Demo("cnn.py:mobilenet"),
    "demo:detr": DETR,
}
