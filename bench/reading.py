"""Seconds and memory of reading an ONNX file of about 20 MB and capturing its graph, a process for each file.

    python bench/reading.py

The files are written by torch.onnx from nets of timm with random weights, a fixed batch and a free one. Before each is read a
small file is, which imports what reading needs. Memory is the peak of the process (VmHWM, Linux) less what it held before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from fewbit.capture import capture
from fewbit.load import load_model

NETS = ("vit_tiny_patch16_224", "efficientnet_b0", "mobilenetv3_large_100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs=2, type=Path, help="a small and a large file: what is started for each")
    args = parser.parse_args()
    if args.row:
        print(row(*args.row))
        return
    print("| file | MB | wall, s | processor, s | bytes above imports for each byte |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small = written(nn.Conv2d(3, 8, 3), Path(folder) / "small.onnx", free=True)
        for name in NETS:
            for free in (False, True):
                path = written(net(name), Path(folder) / f"{name}{', free batch' if free else ''}.onnx", free)
                subprocess.run([sys.executable, __file__, "--row", small, path], check=True)
                path.unlink()


def net(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False)


def written(module: nn.Module, path: Path, free: bool) -> Path:
    shapes = ({0: Dim("batch", min=1, max=64)},) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), (torch.zeros(2 if free else 1, 3, 224, 224),), dynamo=True, verbose=False, dynamic_shapes=shapes
        )
    assert program is not None
    program.save(path, external_data=False)
    return path


def row(small: Path, path: Path) -> str:
    """A line of the table."""
    capture(load_model(str(small)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, start, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    capture(load_model(str(path)))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    size = path.stat().st_size
    return f"| {path.stem} | {size / 1e6:.1f} | {seconds:.1f} | {used:.1f} | {(memory('VmHWM') - before) / size:.1f} |"


def memory(field: str) -> int:
    """A field of the status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
