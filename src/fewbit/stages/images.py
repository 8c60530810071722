"""Images: those that calibrate, synthesized if requested, those that files are chosen by, and those that are scored."""

from __future__ import annotations

from pathlib import Path

from fewbit.data.images import Images, Memory
from fewbit.data.shares import halves, whole_batches
from fewbit.data.synthesize.source import Synthesis
from fewbit.data.synthesize.teacher import Teacher
from fewbit.progress import Progress
from fewbit.request import Options
from fewbit.stages.load import Inputs

MADE = "synthetic.safetensors"


def images(inputs: Inputs, asked: Options, folder: Path, progress: Progress) -> tuple[Images, Images, Images]:
    """The calibration images (synthesized if requested), each decoded once; those that files are chosen by, where a drop has a
    limit; and the scored images, which are others then.
    """
    calibration = inputs.calibration
    if isinstance(calibration, Synthesis):
        progress.begin("synthesize", calibration.total)
        teacher = Teacher(inputs.loaded.program, inputs.loaded.inputs, asked.place)
        made = calibration(teacher, folder / MADE, lambda text: progress.advance(1, text))
        calibration = whole_batches(made, inputs.loaded.batch)
    judged, scored = halves(inputs.scored, inputs.loaded.batch or 1) if asked.drops else (inputs.scored, inputs.scored)
    return calibration.remembered(Memory(folder)), judged, scored
