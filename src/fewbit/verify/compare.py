"""Codes of the simulation against codes of the runtime, site by site.

The comparison is forced: each site of the simulation computes from the runtime's codes upstream. A float sum in another
order changes a value by about a millionth, so a code may differ only where the value lies on a rounding boundary; any
other difference is a bug at the site where it appears.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from fewbit.capture.kinds import KINDS
from fewbit.core.values import Checks, Graph, Plan, SiteCheck
from fewbit.execute.simulate import SiteTrace, simulate, trace
from fewbit.realize.qdq import CODES
from fewbit.realize.unpack import flat_name
from fewbit.runtimes import OnnxRuntime, open_session, runtimes_for

# How near to a rounding boundary, in codes, a value must stand for its code to count as a tie. Float32 sums of a few
# thousand terms in another order differ by about 1e-6 of their size; a position has a size of up to 255.
TIE = 2e-3

INTEGER_KERNELS = tuple(dict.fromkeys(kernel for kind in KINDS.values() for kernel in kind.kernels))


def compare(
    graph: Graph,
    plan: Plan,
    path: Path,
    batches: Iterable[Tensor],
    *,
    optimised: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Checks:
    """Run the realized model and the simulation on batches of (b, c, h, w) images and count where they differ.

    `optimised` also compares with onnxruntime's graph optimisations on, as the file runs where onnxruntime is the target's
    runtime. A file for another runtime is compared as written (off), and by its outputs there.
    """
    module = simulate(graph, plan)
    sites = [name for name, choice in plan.choices.items() if choice.codes is None]
    images = list(batches)
    tables: dict[bool, tuple[SiteCheck, ...]] = {}
    for optimise in (False, True) if optimised else (False,):
        progress(f"codes, graph optimisations {'on' if optimise else 'off'}")
        session = OnnxRuntime(path, optimise=optimise, outputs=[site + CODES for site in sites])
        counts = {site: SiteCheck(site, 0, 0, 0, 0, 0) for site in sites}
        for batch in images:
            values = session.run(batch.numpy())
            codes = {site: torch.from_numpy(values[site + CODES].astype(np.int32)) for site in sites}
            _, traces = trace(module, batch, forced=codes)
            for site in sites:
                counts[site] = counted(counts[site], traces[site], codes[site])
        tables[optimise] = tuple(counts.values())
    tables[False] += weights_alone(graph, plan, path)
    progress("outputs per runtime")
    outputs = {}
    with torch.no_grad():
        expected = torch.cat([module(batch) for batch in images])
    for runtime in runtimes_for(path):
        artefact = open_session(runtime, path)
        actual = torch.cat([torch.from_numpy(np.array(artefact.run(batch.numpy())["logits"])) for batch in images])
        outputs[runtime] = _outputs(expected, actual)
    return Checks(tables[False], tables.get(True, ()), outputs, kernels(plan, path))


def weights_alone(graph: Graph, plan: Plan, path: Path) -> tuple[SiteCheck, ...]:
    """Compare codes in the file with the plan's for weights whose op reads real numbers, as no activation codes cover them."""
    alone = [op for op in graph.ops if "weight" in op.operands and op.operands["input"] not in plan.choices]
    weights = {op.operands["weight"] for op in alone}
    choices = [plan.choices[site] for site in sorted(weights) if site in plan.choices]
    stored = {t.name: t for t in onnx.load(str(path)).graph.initializer} if choices else {}
    checks = []
    for choice in choices:
        tensor = stored.get(flat_name(choice.site))
        if tensor is None or choice.codes is None:  # packed, or in the file under the name of an equal one
            continue
        ours = choice.codes.t().to(torch.int32)
        theirs = torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.int32))
        difference = (ours - theirs).abs()
        wrong = int((difference > 0).sum())
        checks.append(SiteCheck(choice.site, ours.numel(), wrong, 0, wrong, int(difference.max())))
    return tuple(checks)


def kernels(plan: Plan, path: Path) -> dict[str, object]:
    """The integer kernels in onnxruntime's optimised graph, beside how many the plan expects."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        OnnxRuntime(path, save_optimised=optimised)
        nodes = onnx.load(str(optimised), load_external_data=False).graph.node
    count = Counter(node.op_type for node in nodes)
    makers = {output: node.op_type for node in nodes for output in node.output}
    pools = [makers.get(node.input[0], "") for node in nodes if node.op_type == "MaxPool"]
    of_codes = sum(maker.startswith(("QLinear", "QuantizeLinear", "MaxPool")) for maker in pools)
    total = sum(count[kind] for kind in INTEGER_KERNELS) + of_codes + _joined_layers(path)
    return {"expected": len(plan.integer_ops), "found": total, "ops": dict(count.most_common())}


def _joined_layers(path: Path) -> int:
    """The number of layers that run in the kernel of another one, their weights joined with its own."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    parts = {node.output[0]: len(node.input) for node in nodes if node.op_type == "Concat"}
    products = [node for node in nodes if node.op_type in ("MatMulIntegerToFloat", "QAttention")]
    return sum(parts.get(node.input[1], 1) - 1 for node in products)


def counted(check: SiteCheck, ours: SiteTrace, theirs: Tensor) -> SiteCheck:
    """A check with one more tensor of codes in it."""
    difference = (ours.codes - theirs).abs()
    where = difference > 0
    differing = int(where.sum())
    ties = 0
    if differing:
        position = ours.position[where]
        near = (position - position.floor() - 0.5).abs() <= TIE
        ties = int((near & (difference[where] == 1)).sum())
    return SiteCheck(
        check.site,
        check.compared + theirs.numel(),
        check.differing + differing,
        check.ties + ties,
        check.wrong + differing - ties,
        max(check.max_difference, int(difference.max())),
    )


def _outputs(expected: Tensor, actual: Tensor) -> dict[str, float]:
    return {
        "max_abs_difference": float((expected - actual).abs().max()),
        "cosine": float(torch.nn.functional.cosine_similarity(expected.flatten(), actual.flatten(), dim=0)),
        "argmax_agreement": 100 * float((expected.argmax(1) == actual.argmax(1)).float().mean()),
    }
