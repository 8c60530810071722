"""One model on every target: what runs in integers, and what the target's own arithmetic makes of the accuracy (HAGO, 2.8).

    python bench/hardware.py demo:resnet20 demo --scored 1000

`sums exact` is the simulation without the overflow step, `overflow` the one with it: the accumulators of the target. The rows
"ignoring sums" are plans made as if the accumulators held everything; their files would compute the last column but one on the
target. Codes: those of the realized file in onnxruntime as it is written, against those of the hardware simulation with the
same codes in front of every site, on 4 images; `ties` differ by one where the value stands on a rounding boundary.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from integer_arithmetic import Hardware
from torch import Tensor

from fewbit import Request, Run
from fewbit.choose import Bits, Context, choose
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.demo import model as demo
from fewbit.execute.simulate import simulate, trace
from fewbit.realize import float_onnx, realize
from fewbit.realize.qdq import CODES
from fewbit.recipes import recipe_named
from fewbit.request.recipe_options import default_bits
from fewbit.runtimes import OnnxRuntime
from fewbit.stages import PREPARE
from fewbit.target import Target, load_target, target_names
from fewbit.verify.ties import checked

NOT_HERE = ("ort-x86-channel",)  # no integer products
UNSAFE = ("npu-int16",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--targets", nargs="+", default=[name for name in target_names() if name not in NOT_HERE])
    parser.add_argument("--recipe", default="mse")
    parser.add_argument("--scored", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=128)
    args = parser.parse_args()
    head = (
        "model | target | MACs in integers | bits of activations, weights (by MACs) | float | sums exact | overflow | sums lost"
    )
    print(f"| {head} | codes as in the file |")
    print("|" + "---|" * 9)
    for ref in args.models:
        given = {"images": str(demo.CALIBRATION), "score": str(demo.TEST)}
        run = Run.start(Request(model=ref, calibration=args.calibration, scored=args.scored, **given), PREPARE)
        graph, scored, calibration = run["exact"], run["scored"], list(run["calibration"].batches(8))
        batches, labels = list(scored.batches(50)), torch.as_tensor(np.asarray(scored.labels))
        with torch.no_grad():
            exact = top1([graph.module(x) for x in batches], labels)
        for name in args.targets:
            target = load_target(name)
            cases = [("", target)] + ([(", ignoring sums", target.with_exact_sums())] if name in UNSAFE else [])
            for note, rules in cases:
                bits = default_bits(rules)
                context = Context(graph, run["observed"], rules, Bits(bits, bits), images=calibration, everything=True)
                plan = choose(context, recipe_named(args.recipe))
                row(ref, name + note, graph, plan, target, batches, labels, exact)


def row(
    ref: str, name: str, graph: Graph, plan: Plan, target: Target, batches: Sequence[Tensor], labels: Tensor, exact: float
) -> None:
    """Print one row of the table."""
    share = sum(graph.op(op).macs for op in plan.integer_ops) / graph.macs
    hardware = Hardware(graph, plan, target)
    runs = [hardware.run(x) for x in batches]
    counts = [pair for run in runs for pair in run.overflowed.values()]
    lost = sum(a for a, _ in counts)
    overflow = top1([run.output for run in runs], labels)
    if lost:  # where no sum was lost both simulations are one
        hardware = Hardware(graph, plan, target, overflow=False)
        runs = [hardware.run(x) for x in batches]
    scores = (f"{top1([run.output for run in runs], labels):.2f}", f"{overflow:.2f}")
    lost_share = f"{100 * lost / max(sum(b for _, b in counts), 1):.3f} %"
    cells = (ref, name, f"{100 * share:.1f} %", widths(graph, plan), f"{exact:.2f}", *scores, lost_share)
    print("| " + " | ".join(cells) + f" | {same_codes(graph, plan, target, batches[0][:4])} |", flush=True)


def top1(outputs: Sequence[Tensor], labels: Tensor) -> float:
    return 100 * float((torch.cat(list(outputs)).argmax(1) == labels).float().mean())


def widths(graph: Graph, plan: Plan) -> str:
    """Mean bits of inputs and of weights over the multiply-accumulates of integer ops with a weight."""
    ops = [graph.op(op) for op in plan.integer_ops if "weight" in graph.op(op).operands]
    total = sum(op.macs for op in ops)
    if not total:
        return "-"
    means = [sum(plan.choices[op.operands[o]].grid.bits * op.macs for op in ops) / total for o in ("input", "weight")]
    return f"{means[0]:.2f}, {means[1]:.2f}"


def same_codes(graph: Graph, plan: Plan, target: Target, images: Tensor) -> str:
    """Whether the file's codes are those of the hardware simulation; without a site, whether it is the float file."""
    sites = [name for name, choice in plan.choices.items() if choice.codes is None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        realize(graph, plan, path, **target.file_format)
        if not sites:
            float_onnx(graph, Path(folder) / "float.onnx", opset=target.opset)
            return "the float file, byte for byte" if path.read_bytes() == (Path(folder) / "float.onnx").read_bytes() else "no"
        found = OnnxRuntime(path, optimise=False, outputs=[site + CODES for site in sites]).run(images.numpy())
    got = {site: torch.from_numpy(found[site + CODES].astype(np.int32)) for site in sites}
    ours = Hardware(graph, plan, target).run(images, forced=got)
    _, traces = trace(simulate(graph, plan), images, forced=got)
    checks = [checked(site, replace(traces[site], codes=ours.codes[site]), got[site]) for site in sites]
    wrong, compared, ties = (sum(getattr(check, name) for check in checks) for name in ("wrong", "compared", "ties"))
    return f"{'yes' if not wrong else f'no, {wrong} wrong'} ({compared:,} compared, {ties} ties)"


if __name__ == "__main__":
    main()
