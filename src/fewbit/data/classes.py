"""Class names in the order of a model's outputs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from fewbit.errors import BadFile

WNID = re.compile(r"n\d{8}")


def read_classes(path: str | Path) -> list[str]:
    """Class names in output order from a file: lines, or a JSON list or object. Raises BadFile.

    Lines that all start with a wnid give the wnid (synset_words.txt). A JSON object maps names to indices, indices to
    names (or to [name, ...]), or wnids to words; the last is taken in sorted wnid order, as ImageNet models answer.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text) if path.suffix == ".json" else lines
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not text in UTF-8; save it as UTF-8, one name per line, or JSON.") from error
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} is not a readable list of classes: {error}. Give one name per line, or JSON.") from error
    if isinstance(content, dict):
        content = _ordered(content, path)
    if not isinstance(content, list) or not content or not all(isinstance(name, str) for name in content):
        raise BadFile(f"{path} holds no list of class names. Give one class name per line, or a JSON list or object.")
    if all(WNID.fullmatch(name.split(maxsplit=1)[0] if name.strip() else "") for name in content):
        content = [name.split(maxsplit=1)[0] for name in content]
    if repeated := [name for name, times in Counter(content).items() if times > 1]:
        raise BadFile(f"{path} names the class '{repeated[0]}' twice; each output has one name. Remove one of them.")
    return list(content)


def _ordered(content: dict[str, Any], path: Path) -> list[Any]:
    """The classes of a JSON object in output order, empty if it is none of the three kinds."""
    if content and all(isinstance(v, int) for v in content.values()):
        pairs = sorted((v, k) for k, v in content.items())
    elif content and all(k.isdecimal() for k in content):
        pairs = sorted((int(k), v[0] if isinstance(v, list) and v else v) for k, v in content.items())
    elif content and all(WNID.fullmatch(k) for k in content):
        return sorted(content)
    else:
        return []
    if [i for i, _ in pairs] != list(range(len(pairs))):
        raise BadFile(f"{path} numbers {len(pairs)} classes, but not 0 to {len(pairs) - 1}. Give each output one name.")
    return [name for _, name in pairs]
