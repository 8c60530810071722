"""The public names: what `fewbit.__all__` lists, what can be imported, and what docs/api.md shows are the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

PAGE = Path(__file__).parent.parent / "docs" / "api.md"


def test_the_list_is_sorted_and_has_no_doubles() -> None:
    """Constants, then classes, then the rest, as ruff sorts them."""
    assert fewbit.__all__ == sorted(set(fewbit.__all__), key=lambda name: (not name.isupper(), name.islower(), name))


@pytest.mark.parametrize("name", fewbit.__all__)
def test_every_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value = getattr(fewbit, name)
    if callable(value):
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = fewbit.quantise


def test_the_page_shows_exactly_these_names() -> None:
    shown = re.findall(r"^::: fewbit\.(\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(fewbit.__all__)
    assert len(re.findall(r"^:::", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == len(shown)


def test_importing_fewbit_loads_no_torch_and_no_runtime() -> None:
    heavy = "torch", "onnx", "onnxruntime", "openvino", "timm", "scipy", "pydantic"
    code = f"import sys, fewbit; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
