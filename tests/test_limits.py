"""Oracle: the limits of a process, set before the command begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource")

SIZE = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (64 << 20)"


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("RLIMIT_NOFILE", "12", "may open 12 files, and 24 are needed"),
        ("RLIMIT_AS", SIZE, "MB more memory, and 128 MB are needed"),
    ],
)
def test_too_little_is_said_before_the_work_starts(tmp_path, limit, value, said):
    code = (
        f"import resource, sys; import fewbit.cli; resource.setrlimit(resource.{limit}, ({value},) * 2); "
        "sys.argv = ['fewbit', 'targets']; from fewbit.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
