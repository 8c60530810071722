"""Which of the images calibrate, choose and are scored: shares that have no image in common, in whole batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from fewbit.data.images import Images
from fewbit.errors import BadImages


def apart(calibration: Images, scored: Images, most: float = 0.5) -> Images:
    """The calibration images whose pixels are not scored too, in whatever file. Raises BadImages where a share of `most` of
    either are, or no calibration image is left.
    """
    both = set(calibration.pixels) & set(scored.pixels)
    if not both:
        return calibration
    kept = [i for i, pixels in enumerate(calibration.pixels) if pixels not in both]
    name = calibration.names[next(i for i, pixels in enumerate(calibration.pixels) if pixels in both)]
    shared, also = len(calibration) - len(kept), sum(pixels in both for pixels in scored.pixels)
    if not kept or shared >= most * len(calibration) or also >= most * len(scored):
        raise BadImages(
            f"{also} of {len(scored)} scored images are calibration images too ({shared} of {len(calibration)}, such as {name} "
            f"of {calibration.source}); scores need images of their own: give others with --images or --score DIR."
        )
    note = f"Scored images are no calibration images: {shared} of {calibration.source} are left out, such as {name}."
    return dataclasses.replace(calibration.subset(kept), notes=(*calibration.notes, note))


def halves(images: Images, batch: int) -> tuple[Images, Images]:
    """Images to choose a file by, and images to score it on: every second batch. Raises BadImages where there is one."""
    if len(images) < 2 * batch:
        raise BadImages(
            f"--max-drop chooses a file by some images and scores it on others, and there are only {len(images)} to score "
            "on; give more: --score DIR."
        )
    return every_second(images, batch)


def every_second(images: Images, batch: int) -> tuple[Images, Images]:
    """Every second batch of images, the first among them, and the others."""
    first, second = (images.subset(i for i in range(len(images)) if i // batch % 2 == half) for half in (0, 1))
    return first, second


def whole_batches(images: Images, batch: int | None) -> Images:
    """As many of the images as fill batches of a model that takes `batch` at a time (None: any number). Raises BadImages for
    fewer than one batch.
    """
    left_over = len(images) % (batch or 1)
    if batch is None or not left_over:
        return images
    if len(images) < batch:
        raise BadImages(f"{images.source} holds {len(images)} images to use, and the model takes {batch} at a time; give more.")
    note = f"The model takes {batch} images at a time: the last {left_over} of {images.source} are left out."
    chosen = images.subset(range(len(images) - left_over))
    return dataclasses.replace(chosen, notes=(*images.notes, note))


def unseen(scored: Images, calibrated: Collection[str]) -> Images:
    """The images that a run was not calibrated on, whose `pixels` it has as hexadecimal text. Raises BadImages where it was
    calibrated on half of them.
    """
    kept = [i for i, pixels in enumerate(scored.pixels) if pixels.hex() not in calibrated]
    if 2 * len(kept) <= len(scored):
        shared = f"{len(scored) - len(kept)} of the {len(scored)} images of {scored.source}"
        name = next(name for i, name in enumerate(scored.names) if i not in kept)
        raise BadImages(f"the run was calibrated on {shared}, such as {name}; scores need images of their own: --images DIR.")
    note = f"The run was calibrated on {len(scored) - len(kept)} of the images, which are left out."
    return scored if len(kept) == len(scored) else dataclasses.replace(scored.subset(kept), notes=(*scored.notes, note))
