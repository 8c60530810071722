"""Images of any size, before the work begins: whether float.onnx is the model at other sizes than the one that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewbit.capture import capture
from fewbit.core.inputs import example, image_among
from fewbit.errors import stopped
from fewbit.folder import TWIN
from fewbit.load import Loaded
from fewbit.load.trials import noise_of
from fewbit.realize import rendered_float, save
from fewbit.runtimes import AS_WRITTEN
from fewbit.verify import twin_checks


def holds_at_other_sizes(loaded: Loaded, form: Mapping[str, Any]) -> bool:
    """Whether float.onnx gives what the model gives at each of the sizes that are compared (True where there is none).

    torch.onnx writes paddings and windows as numbers, those of one size. `form` is the target's file format. A file that cannot
    be written or run for all sizes does not hold.
    """
    image = image_among(loaded.inputs)
    if not image.others:
        return True
    with TemporaryDirectory(prefix="fewbit-") as folder:
        twin = Path(folder) / TWIN
        try:
            graph = capture(loaded)
            save(rendered_float(graph, opset=form["opset"], ir_version=form["ir_version"]), twin, twin=True)
            for size in image.others:
                images = noise_of(graph.in_a_file(1), size).half().float()  # which a file in float16 can hold
                checks = twin_checks(loaded.program, graph.inputs, twin, AS_WRITTEN, [example(graph.inputs, images)])
                if any(check.wrong for check in checks):
                    return False
        except Exception as error:  # whatever is wrong with the one size as well is said when that is captured
            if halt := stopped(error):
                raise halt from error
            return False
    return True
