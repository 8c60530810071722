"""Whether inputs of the model, floats that are taken as they are, can have been made with its mean and std."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewbit.data.bands import Array
from fewbit.data.preprocess import Preprocess

BEYOND = 3  # so many times black to white above white no normalized image goes; with mean and std of another model it may be 1
COARSE = 16  # a white above this is of a model that takes pixels of 0 to 255
FINE = 8  # and no picture of such pixels is as dark as this everywhere


@dataclass
class Floats:
    """The least and the largest value of the images seen so far."""

    low: float = np.inf
    high: float = -np.inf

    def see(self, image: Array) -> None:
        self.low, self.high = min(self.low, float(image.min())), max(self.high, float(image.max()))

    def notes(self, source: str, preprocess: Preprocess) -> tuple[str, ...]:
        """A warning where all values look as if mean and std had not been applied, or are applied by the model as well.

        Values of normalized images reach on both sides of 0, a little over what black and white become, and are not told. Those
        within 0 to 1 are where black becomes less than 0; those that reach far above white, and hardly below 0, are pixels of 8
        or 16 bits; and where white becomes 255, values near 0 have been scaled or normalized.
        """
        if self.low > self.high:
            return ()
        black, white = (ends.flatten().tolist() for ends in preprocess.ends())
        unit = self.low >= 0 and self.high <= 1 and max(black) < 0
        pixels = self.low >= -self.high / 8 and self.high > max(white) + BEYOND * (max(white) - min(black))
        scaled = min(white) > COARSE and max(-self.low, self.high) < FINE
        if not (unit or pixels or scaled):
            return ()
        inside = "scale them to 0 to 255" if scaled else "subtract the mean and divide by the deviation of each channel"
        own = "--mean 0 --std 1, if it takes 0 to 1" if not pixels else "--mean 0 --std 0.00392157, if it takes 0 to 255"
        return (
            f"All values of {source} lie from {self.low:.2g} to {self.high:.3g}, and mean and std make {min(black):.3g} of "
            f"black and {max(white):.3g} of white. Floats are taken as they are: {inside}, or give uint8 pictures; if the "
            f"model takes them so, say it ({own}).",
        )
