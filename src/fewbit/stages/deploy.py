"""Deploy: the folder with everything that a program needs beside the file."""

from __future__ import annotations

from pathlib import Path, PurePath

from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.deploy.folder import FOLDER, About, write
from fewbit.request import Request
from fewbit.stages.load import Inputs
from fewbit.stages.realize import type_of


def deploy(exact: Graph, plan: Plan, inputs: Inputs, request: Request, folder: Path) -> Path:
    """Write `deploy/`; the model lies beside it."""
    images = inputs.record.images(inputs.record.inside, type_of(exact))
    about = About(
        PurePath(plan.model).name, plan.target, plan.recipe, plan.bits, request.hardware.runs_in, inputs.classes or (), images
    )
    return write(folder / FOLDER, exact, about)
