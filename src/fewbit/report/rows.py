"""What needs tensors on the way to tables.json: plan, statistics and measurements -> rows. The one file here with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnx import TensorProto
from PIL import Image

from fewbit.capture.sites import tensor_of
from fewbit.choose.range_method import Samples, fidelity
from fewbit.core.checks import Checks
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, Input, count, images_of, parts
from fewbit.core.inputs import rows as rows_of
from fewbit.core.plan import Choice, Plan
from fewbit.data.images import Images, data_uri
from fewbit.execute.samples import ROWS, channel_samples
from fewbit.observe import Stats
from fewbit.observe.outliers import LIMIT, Outliers
from fewbit.report import tables
from fewbit.report.tables import Rows
from fewbit.verify import Latency, Load, Score
from fewbit.verify.attention import attention_tables
from fewbit.verify.postprocess import postprocessing

FEW = 8  # numbers of a constant that are shown
IMAGES = 12  # scored images on the page
PIXELS, GAP = 256, 6  # the longest side of a prediction, and the space between two


def tables_of(
    graph: Graph, plan: Plan, stats: Stats, standing_out: Sequence[Outliers], checks: Checks, timings: Sequence[Latency],
    loading: Sequence[Load], sample: Batch, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """tables.json without `looked_at` and what the pipeline itself knows (run, curve, synthetic). `sample` are a few scored
    images; `standing_out` are the outliers of the user's model.
    """
    axes = {c.site: c.grid.axis for c in plan.choices.values() if c.codes is None and c.grid.axis is not None}
    whole = count(sample)
    by_channel = channel_samples(graph, parts(sample, graph.at_a_time(whole)), axes, ROWS // whole)
    rows, counts = [], {}
    for site in graph.sites:
        choice = plan.choices.get(site.name)
        if choice is None:
            continue
        if choice.role == "weight":
            samples = Samples.of_weight(tensor_of(graph, site), choice.grid)
        else:
            samples = Samples.of_histogram(stats.sites[site.name])
            counts[site.name] = stats.sites[site.name].to_json()
        if site.name in by_channel:
            channels = by_channel[site.name]
            samples = Samples.of_channels(channels.values, channels.low, channels.high)
        rows.append(_site(graph, plan, choice, samples))
    observed = {row["site"]: row["observed"] for row in rows}
    return {
        "sites": rows,
        "histograms": tables.histograms(rows, counts),
        "inputs": taken(graph),
        "outliers": outliers(graph, plan, standing_out, observed),
        "latency": [row.to_json() for row in timings],
        "loads": [row.to_json() for row in loading],
        "size": tables.files(folder),
        "checks": tables.checks(checks),
        "outputs": tables.outputs(checks),
        "log": [asdict(entry) for entry in plan.log],
    }


def looked_at(
    graph: Graph, plan: Plan, images: Images, score: Score, sample: Batch, classes: Sequence[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """Attention, what stands behind the last layers, and scored images. `sample` are the first of `images`, `classes` the names
    of the model's answers.
    """
    few = rows_of(sample, slice(0, graph.at_a_time(4)))
    maps, flips = attention_tables(graph, plan, few)
    return {
        "attended": [{"name": images.names[0], "thumbnail": data_uri(_first(sample, images))}] if maps else [],
        "attention": [row for op in maps for row in attention(op)],
        "flips": flips,
        **postprocessing(graph, plan, few),
        "images": [] if score.pictures else scored_images(images, score, classes),
        "pictures": predictions(images, score),
    }


def _first(sample: Batch, images: Images) -> Image.Image:
    """The first image of the sample as the model sees it."""
    picture = images.preprocess.undo(images_of(sample)[0])
    picture.thumbnail((PIXELS, PIXELS))
    return picture


def taken(graph: Graph) -> Rows:
    """The inputs of a model: name, shape, type, and what each was given."""
    types = {port.name: TensorProto.DataType.Name(port.type).lower() for port in graph.ports}
    return [
        {
            "input": one.name,
            "shape": ", ".join([*(["batch"] if graph.batch is None else [str(graph.batch)]) * one.has_batch, *_sizes(one)]),
            "type": types.get(one.name, str(one.dtype).removeprefix("torch.")),
            "given": _given(one),
        }
        for one in graph.inputs
    ]


def _sizes(one: Input) -> list[str]:
    return [f"any (here {n})" if i in one.free else str(n) for i, n in enumerate(one.shape)]


def _given(one: Input) -> str:
    """What an input was given, in words: of a constant its numbers, or of many the smallest and the largest."""
    if one.value is None or one.each:
        return "the image" if one.is_image else "a value with each image"
    values = one.value.flatten()
    if len(values) <= FEW:
        return f"a constant: {', '.join(f'{value:g}' for value in values.tolist())}"
    return f"a constant: {len(values):,} numbers from {float(values.min()):g} to {float(values.max()):g}"


def _site(graph: Graph, plan: Plan, choice: Choice, samples: Samples) -> dict[str, Any]:
    """One quantized site: what was chosen, and how close it comes."""
    site = graph.site(choice.site)
    readers = [name for name, _ in site.readers]
    op = next((name for name in readers if name in plan.integer_ops), readers[0])
    scale, zero = choice.qparams.scale.flatten().tolist(), choice.qparams.zero.flatten().tolist()
    low, high = reach(choice)
    decibel, clipped = fidelity(samples, choice.qparams, choice.grid)
    return {
        "site": site.name,
        "role": site.role,
        "op": op,
        "kind": graph.op(op).kind,
        "bits": choice.grid.mean_bits if choice.grid.widths else choice.grid.bits,
        "grid": str(choice.grid),
        "method": choice.method,
        "why": choice.why,
        "scale": scale[0] if len(scale) == 1 else {"min": min(scale), "max": max(scale)},
        "zero": zero[0] if len(set(zero)) == 1 else {"min": min(zero), "max": max(zero)},
        "range": [low, high],
        "observed": [samples.low.min().item(), samples.high.max().item()],
        "sqnr_db": decibel,
        "clipped_share": clipped,
    }


def reach(choice: Choice) -> tuple[float, float]:
    """The smallest and the largest number of a grid, over all channels."""
    scale, zero = choice.qparams.scale.flatten(), choice.qparams.zero.flatten()
    low, high = ((end - zero) * scale for end in choice.grid.ends())
    return low.min().item(), high.max().item()


def outliers(graph: Graph, plan: Plan, standing_out: Sequence[Outliers], observed: Mapping[str, Sequence[float]]) -> Rows:
    """Outliers of each activation of the user's model, and how the plan handles them; `observed` has the extremes of each
    site in the graph that the plan is for, which may be equalized.
    """
    factors: dict[str, float] = {}
    for row in (row for entry in plan.logs("equalize") for row in entry.rows):
        if row["moved"] and row["strength"]:
            factors[graph.op(row["op"]).operands.get("input", "")] = row["strength"]
    rows = []
    for one in standing_out:
        after = max(map(abs, observed.get(one.site, (one.reach,))))
        remedy = _remedy(plan.choices.get(one.site), one, after, factors)
        over = [name for name in ("channel_ratio", "token_ratio") if (getattr(one, name) or 0.0) > LIMIT]
        rows.append({**one.to_json(), "any": one.any, "limit": LIMIT, "over": over, "done": remedy})
    return rows


def _remedy(choice: Choice | None, outlier: Outliers, after: float, factors: Mapping[str, float]) -> str:
    if choice is None:
        return "stays float"
    if outlier.site in factors:
        return f"moved into the weights behind, strength {factors[outlier.site]:g}"
    if after < 0.9 * outlier.reach:
        return f"equalized: {outlier.reach:.3g} is {after:.3g}"
    if choice.grid.axis is not None:
        return "each channel has its own scale"
    low, high = reach(choice)
    most = max(high, -low)
    return f"clipped at {most:.3g} of {outlier.reach:.3g}" if most < 0.98 * outlier.reach else "covered by the range"


def attention(maps: Mapping[str, Any]) -> Rows:
    """The maps of one op, a row for each head; of a class token its attention over the patches, else queries by keys."""
    rows = []
    for head, flipped in enumerate(maps["flipped_share"][: len(maps["float"])]):
        row = {"op": maps["op"], "image": maps["image"], "head": head, "flipped_share": flipped, "x": "key", "y": "query"}
        row |= {key: maps[key][head] for key in ("float", "quantized")}
        if maps["class_token"]:
            height, width = maps["grid"]
            for key in ("float", "quantized"):
                patches = row[key][0][-height * width :]
                row[key] = [patches[i * width : (i + 1) * width] for i in range(height)]
            row |= {"x": "patch column", "y": "patch row"}
        rows.append(row)
    return rows


def scored_images(images: Images, score: Score, classes: Sequence[str] = ()) -> Rows:
    """A few scored images, those whose class changed first, or whose outputs are furthest off; classes by name, if known."""
    before, after = score.rating.float_answers, score.rating.answers
    if before is None or after is None:
        worst = score.errors.argsort(descending=True)[:IMAGES].tolist()
        return [{"name": images.names[i], "thumbnail": images.data_uri(i, 96), "error": float(score.errors[i])} for i in worst]
    order = score.errors.argsort(descending=True, stable=True)
    changed, same = (order[part[order]].tolist() for part in (before != after, before == after))
    rows = []
    for i in (changed[: IMAGES - 4] + same)[:IMAGES]:
        label = None if images.labels is None else int(images.labels[i])
        answers = {"label": label, "float": int(before[i]), "quantized": int(after[i])}
        named = {key: classes[v] if v is not None and 0 <= v < len(classes) else v for key, v in answers.items()}
        rows.append({"name": images.names[i], "thumbnail": images.data_uri(i, 96), **named})
    return rows


def predictions(images: Images, score: Score) -> Rows:
    """The predictions of both models side by side, as one picture for each image."""
    rows = []
    for i, both in score.pictures.items():
        beside = Image.new("RGB", (sum(one.width for one in both) + GAP, max(one.height for one in both)), "white")
        for one, x in zip(both, (0, both[0].width + GAP), strict=True):
            beside.paste(one, (x, 0))
        beside.thumbnail((2 * PIXELS + GAP, 2 * PIXELS))
        rows.append({"name": images.names[i], "thumbnail": data_uri(beside), "error": float(score.errors[i])})
    return rows


def thumbnails(images: Images, classes: Sequence[str] = (), count: int = 16) -> Rows:
    """The first images: name, class (by its name, if known) and a PNG inside a data URI."""
    rows = []
    for i in range(min(count, len(images))):
        label = None if images.labels is None else int(images.labels[i])
        named = classes[label] if label is not None and label < len(classes) else label
        rows.append({"name": images.names[i], "label": named, "thumbnail": images.data_uri(i, 96)})
    return rows
