"""What the pipeline does about too few images: makes some, says whether they are enough, and shows what more would bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.capture import Loaded
from fewbit.capture.export import fingerprint
from fewbit.choose import LabelledImages
from fewbit.core.values import Json
from fewbit.data.images import Images, Preprocess, open_images, refuse_same
from fewbit.data.synthesize.source import Synthesis, asked_for, method_for
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms
from fewbit.errors import BadImages, FewbitError
from fewbit.files import read_json, write_json
from fewbit.observe import Stats, observe
from fewbit.observe.calibration_check import Enough, look, range_change
from fewbit.progress import Progress
from fewbit.recipes import RECIPES, Recipe
from fewbit.run import Request

CURVE = tuple(2**i for i in range(9))  # 1 to 256 images
LOOKED_AT = 64  # images that the float model is asked about
MADE = "synthetic.safetensors"
POOL = "pool.safetensors"
CALIBRATION = "calibration.json"
SHOWN = 16


def with_steps(recipe: Recipe, name: str, steps: int | None, *, synthetic: bool) -> Recipe:
    """A recipe whose training has another number of steps. Raises FewbitError where nothing is trained or made."""
    if steps is None:
        return recipe
    if steps < 1:
        raise FewbitError(f"--steps {steps}: at least 1 is needed.")
    if recipe.tune is not None:
        return replace(recipe, tune=recipe.tune.in_steps(steps))
    if not synthetic:
        found = ", ".join(n for n, r in RECIPES.items() if r.tune is not None)
        raise FewbitError(f"--steps is for --images synthetic and for recipes that train ({found}); recipe {name} does not.")
    return recipe


def synthesis(
    teacher: Teacher, source: Any, score: Any, preprocess: Preprocess, outputs: int | None, known: Any, request: Request
) -> tuple[Synthesis, Images]:
    """The images that `--images synthetic` asks for, and the real ones to score on.

    Raises BadImages without images to score on, and for a model whose answers are no classes.
    """
    _, beside = asked_for(source)
    if score is None:
        raise BadImages("synthetic images calibrate; real ones are needed to score on: --score DIR.")
    if outputs is None:
        raise BadImages("synthetic images are made for classes, and the model's output is no list of them; give --images DIR.")
    method = method_for(teacher, real=beside is not None, steps=request.steps)
    real = None
    if beside is not None:
        labels = request.loss == "labels" and request.labels
        real = open_images(beside, preprocess, classes=known if labels else None, labels=labels, skip_bad=request.skip_bad)
    held_out = open_images(
        score, preprocess, classes=known, limit=request.scored, labels=request.labels, skip_bad=request.skip_bad,
        seed=request.seed,
    )  # fmt: skip
    if real is not None:
        refuse_same(real, held_out)
    return Synthesis(method, request.calibration, outputs, preprocess, request.seed, real), held_out


def made(asked: Synthesis, teacher: Teacher, file: Path, progress: Progress) -> Images:
    """The synthetic images, made in a stage of their own."""
    with progress.stage("synthesize", asked.total):
        return asked(teacher, file, lambda text: progress.advance(1, text))


def refuse_training(loaded: Loaded, outputs: int | None) -> None:
    """Raise where a recipe that trains could make no images beside the real ones: BadModel without batch norm, BadImages
    without classes.
    """
    refuse_without_norms(Teacher(loaded.program))
    if outputs is None:
        raise BadImages("FDDA makes images for classes, and the model's output is no list of them; take another recipe.")


def lots(
    recipe: Recipe, loaded: Loaded, images: Images, outputs: int | None, synthetic: bool, request: Request, part: Path,
    progress: Progress,
) -> tuple[LabelledImages | None, LabelledImages | None]:  # fmt: skip
    """What a recipe that trains sees: the real images, and a pool of synthetic ones made beside them.

    Images that are synthetic already are the pool.
    """
    assert recipe.tune is not None
    given = LabelledImages(torch.cat(list(images.batches(64))), images.labels)
    if synthetic:
        return None, given
    assert outputs is not None
    asked = Synthesis(recipe.tune.images, recipe.tune.pool, outputs, images.preprocess, request.seed, images)
    pool = made(asked, Teacher(loaded.program), part / POOL, progress)
    return given, LabelledImages(torch.cat(list(pool.batches(64))), pool.labels)


def halves(images: Images) -> list[Images]:
    """The even and the odd images; one part where there is one image."""
    parts = [images.subset(range(i, len(images), 2)) for i in (0, 1)]
    return [part for part in parts if len(part)]


def judged(loaded: Loaded, images: Images, found: list[Stats], part: Path) -> dict[str, Json]:
    """Whether the calibration images are enough, from what was observed on their halves; kept in a file."""
    change = range_change(*found) if len(found) == 2 else None
    step = -(-len(images) // LOOKED_AT)
    seen = look(Teacher(loaded.program), images.subset(range(0, len(images), step)).batches(8))
    verdict = Enough()(replace(seen, images=len(images)), change)
    write_json(part / CALIBRATION, verdict)
    return verdict


def curve(
    images: Images, part: Path, seed: int, progress: Progress, graph: Any,
    scored: Callable[[Stats, Images, Path], dict[str, Json]],
) -> list[dict[str, Json]]:  # fmt: skip
    """What the model is worth after calibration on 1, 2, 4, ... 256 of the images, each set inside of the next.

    `scored` chooses, realizes into a file and evaluates. Rows that a killed run has left are not made again.
    """
    path = part / "curve.json"
    rows: list[dict[str, Json]] = read_json(path)["rows"] if path.exists() else []
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = sorted({n for n in CURVE if n <= len(images)} | {min(len(images), CURVE[-1])})
    with progress.stage("curve", len(counts)):
        for count in counts:
            if count not in {row["images"] for row in rows}:
                some = images.subset(sorted(order[:count]))
                stats = [observe(graph, half.batches(8)) for half in halves(some)]
                change = range_change(*stats) if len(stats) == 2 else None
                whole = stats[0] if len(stats) == 1 else stats[0].merge(stats[1])
                rows.append({"images": count, "range_change": change, **scored(whole, some, part / "curve.onnx")})
                write_json(path, {"rows": rows})
            progress.advance()
    (part / "curve.onnx").unlink(missing_ok=True)
    return rows


def refuse_curve(recipe: Recipe, name: str) -> None:
    """Raise FewbitError for a recipe whose search would be run nine times over."""
    if recipe.joint is not None or recipe.tune is not None or recipe.rebuild is not None:
        plain = ", ".join(n for n, r in RECIPES.items() if r.is_plain)
        raise FewbitError(
            f"--curve chooses again for every number of images, and recipe {name} takes long for one; "
            f"draw it with one of {plain}."
        )


def thumbnails(images: Images, pixels: int = 96) -> list[dict[str, Json]]:
    """The first images for the report: name, class and a PNG inside a data URI."""
    rows = []
    for i in range(min(SHOWN, len(images))):
        label = None if images.labels is None else int(images.labels[i])
        rows.append({"name": images.names[i], "label": label, "thumbnail": images.data_uri(i, pixels)})
    return rows


def identity_of(asked: Synthesis | None, chosen: Images | None, loaded: Loaded) -> str:
    """What stands for the calibration images in a run's identity: their bytes, or all that the synthetic ones follow from."""
    if asked is not None:
        return asked.key(fingerprint(loaded.program))
    assert chosen is not None
    return chosen.fingerprint()
