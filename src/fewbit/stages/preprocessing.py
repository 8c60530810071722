"""The preprocessing of a model: what its record and the request say, and what is assumed where neither does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.core.pixels import ASSUMED
from fewbit.data.images import Preprocess
from fewbit.data.preprocess import LETTERBOXES
from fewbit.errors import BadModel
from fewbit.load import Loaded
from fewbit.request.types import option


def preprocess_of(loaded: Loaded, overrides: Mapping[str, Any]) -> Preprocess:
    """The model's own record, with some fields replaced. Raises BadModel where its own image processor decides."""
    record = dict(loaded.record)
    kept = ("resize", "antialias", "processor", "channel_order", "fill")  # which timm's records lack
    own: dict[str, Any] = {k: record[k] for k in kept if k in record}
    if "processor" in own and (given := [option(name) for name in overrides if name != "input_size"]):
        raise BadModel(
            f"{', '.join(given)}: the image processor of {loaded.ref} makes its images; leave the option out, change "
            "preprocessor_config.json in its folder, or give all of --input-size, --resize, --mean and --std: then they decide."
        )
    own |= {name: value for name, value in overrides.items() if name != "input_size"}  # which the record has
    if own.get("resize") in LETTERBOXES and record.get("crop_pct") is None:  # which hold the whole picture
        own = {"crop_pct": 1.0, **own}
    return Preprocess.from_timm({**record, **overrides}).replace(**own)


def assumed(loaded: Loaded, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of the preprocessing that neither the model nor the request gives."""
    record = loaded.record
    given = {"resize"} if record.get("crop_mode") else set[str]()
    given |= {"crop_pct"} if overrides.get("resize", record.get("resize")) in LETTERBOXES else set()
    given |= {*overrides, *(name for name, value in record.items() if value is not None)} - {*record.get("assumed", ())}
    return () if "processor" in record else tuple(name for name in ASSUMED if name not in given | set(overrides))


def assumptions(loaded: Loaded, preprocess: Preprocess, unsaid: Sequence[str]) -> tuple[str, ...]:
    """A sentence that names what is assumed of the preprocessing, if there is any."""
    if not unsaid:
        return ()
    values = [getattr(preprocess, name) for name in unsaid]
    shown = [_shown(value) if isinstance(value, tuple) else f"{value}" for value in values]
    said = ", ".join(f"{option(name)} {value}" for name, value in zip(unsaid, shown, strict=True))
    return (f"{loaded.ref} does not say how its images were made; assumed is {said}. Set what was different in training.",)


def _shown(values: Sequence[float]) -> str:
    """Numbers of channels as they are typed: one where all are equal."""
    return ",".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))
