"""A report and its tables as a real run leaves them, made up: a small vision transformer with twelve blocks at w4a8."""

from __future__ import annotations

import base64
import itertools
import math
import random
from itertools import pairwise
from typing import Any

BLOCKS, HEADS, GRID = 12, 3, (7, 7)
# kind, operands (role, SQNR at eight bits)
OPS = (
    ("attn.qkv", "linear", (("input", 38.0), ("weight", 24.0))),
    ("attn.scores", "matmul", (("query", 36.0), ("key", 35.0))),
    ("attn.values", "matmul", (("probabilities", 27.0), ("value", 37.0))),
    ("attn.proj", "linear", (("input", 36.0), ("weight", 23.5))),
    ("mlp.fc1", "linear", (("input", 37.0), ("weight", 23.0))),
    ("mlp.fc2", "linear", (("input", 26.0), ("weight", 22.5))),
)
Rows = list[dict[str, Any]]


def thumbnail(hue: int) -> str:
    """A coloured disc as a data URI."""
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 64 64'><circle r='48' fill='hsl({hue},60%,45%)'/></svg>"
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _site(rng: random.Random, block: str, op: str, kind: str, role: str, sqnr: float) -> dict[str, Any]:
    weight = role == "weight"
    high = 0.4 if weight else 6 * math.exp(rng.gauss(0, 0.5))
    low = 0.0 if role == "probabilities" else -high * rng.uniform(0.7, 1)
    name = f"{block}.{op}" if op else block
    return {
        "site": f"{name}:{role}", "role": role, "op": name, "kind": kind,
        "bits": 4 if weight and block not in ("patch_embed.proj", "head") else 8,
        "grid": "int4 per channel, symmetric" if weight else "uint8 per tensor",
        "method": "gptq" if weight else "search", "why": "target has it",
        "scale": {"min": 0.0021, "max": 0.0417} if weight else round(high / 128, 6), "zero": 0 if weight else 121,
        "range": [round(low * 0.8, 4), round(high * 0.8, 4)], "observed": [round(low, 4), round(high, 4)],
        "sqnr_db": round(sqnr + rng.gauss(0, 1.6), 3), "clipped_share": round(abs(rng.gauss(0, 1e-4)), 7),
    }  # fmt: skip


def _sites(rng: random.Random) -> Rows:
    rows = [_site(rng, "patch_embed.proj", "", "conv", role, 39) for role in ("input", "weight")]
    for block in range(BLOCKS):
        for op, kind, operands in OPS:
            for role, sqnr in operands:
                drop = 9 if (block, op, role) == (9, "mlp.fc2", "input") else 0
                rows.append(_site(rng, f"blocks.{block}", op, kind, role, sqnr - 0.3 * block - drop))
    return rows + [_site(rng, "head", "", "linear", role, 35) for role in ("input", "weight")]


def _histogram(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["observed"]
    edges = [low + (high - low) * i / 80 for i in range(81)]
    counts = [int(2e5 * math.exp(-((3 * (a + b) / high) ** 2) / 2) * rng.uniform(0.8, 1.2)) for a, b in pairwise(edges)]
    counts[-1], counts[0] = 14, 3
    return {"edges": edges, "counts": counts} | {k: row[k] for k in ("site", "range", "observed", "sqnr_db")}


def _attention(rng: random.Random, block: int, head: int) -> dict[str, Any]:
    look = [[rng.random() for _ in range(GRID[1])] for _ in range(GRID[0])]
    noisy = [[round(value * 256) / 256 for value in line] for line in look]
    row = {"op": f"blocks.{block}.attn.scores", "image": 0, "head": head, "flipped_share": [0.0123, 0.0417, 0.0871][head]}
    return {**row, "float": look, "quantized": noisy, "x": "patch column", "y": "patch row"}


def _checks(sites: Rows) -> Rows:
    """No code differs with graph optimisations off; some are ties with them on."""
    rows = []
    for setting, (index, row) in itertools.product(("off", "on"), enumerate(sites)):
        ties = 0 if setting == "off" else (index * 7) % 11 // 8
        counts = {"compared": 24_576, "differing": ties, "ties": ties, "wrong": 0, "max_difference": int(ties > 0)}
        rows.append({"site": row["site"], "optimisations": setting, **counts})
    return rows


def _outliers() -> Rows:
    rows = []
    for block, op in itertools.product(range(BLOCKS), ("attn.qkv", "mlp.fc1", "mlp.fc2")):
        far = (block, op) == (2, "mlp.fc2")
        rows.append({
            "site": f"blocks.{block}.{op}:input", "reach": 122.4 if far else 6.0, "any": far, "limit": 10.0,
            "over": ["channel_ratio", "token_ratio"] if far else [],
            "channel_ratio": 42.0 if far else 3.0 + block / 4, "channel_count": 2 if far else 0,
            "channels": [7, 199] if far else [],
            "rest_of_channels": 0.25 if far else 1.0, "token_ratio": 14.8 if far else 1.5,
            "token_share": 0.0154 if far else 0.0, "position_count": 2 if far else 0,
            "positions": [0, 17] if far else [],
            "rest_of_tokens": 0.125 if far else 1.0, "done": "clipped at 61.2 of 122",
        })  # fmt: skip
    return rows


def _curve() -> Rows:
    """Accuracy that rises with the number of images."""
    return [
        {"images": 2**i, "range_change": 0.15 / 2**i if i else None, "float": 75.45, "quantized": 60 + 2.0 * i,
         "agreement": 70 + 2.0 * i, "measure": "top-1 accuracy", "unit": "%",
         "agreement_measure": "agreement in class", "interval": [2.0 * i - 17.45, 2.0 * i - 13.45], "runtime": "onnxruntime"}
        for i in range(8)
    ]  # fmt: skip


def _runs() -> Rows:
    """Two recipes at several widths."""
    rows = [
        ("liu2021, one width", "4", 3_361_904, 4.0, 71.2, [69.1, 73.1]),
        ("liu2021, one width", "8", 6_104_212, 8.0, 75.3, [73.3, 77.1]),
        ("liu2021, mixed precision", "mixed:5:4,5,6,7", 3_980_000, 4.97, 74.1, [72.1, 76.0]),
        ("mse, one width", "4", 3_361_904, 4.0, 62.4, [60.2, 64.5]),
    ]
    keys = ("kind", "label", "bytes", "bits", "accuracy", "interval")
    return [{**dict(zip(keys, row, strict=True)), "measure": "accuracy", "unit": "%", "float": 75.45} for row in rows]


def _mixed() -> dict[str, Any]:
    """Attention and an MLP in each block and two ops by themselves; a frontier of 200 points, five uniform widths above it."""
    names = [("patch_embed.proj", "op", 147_456)]
    for block in range(BLOCKS):
        names += [(f"blocks.{block}.attn", "attention", 147_456), (f"blocks.{block}.mlp", "mlp", 294_912)]
    units = []
    for index, (unit, kind, weights) in enumerate([*names, ("head", "op", 192_000)]):
        losses = {str(b): (100 + 7 * index) * 4.0 ** (4 - b) for b in (4, 5, 6, 7, 8)}
        units.append({"module": unit, "kind": kind, "bits": 4 + (index * 5) % 4, "weights": weights, "losses": losses})

    def point(mean: float, above: float = 1.0) -> dict[str, Any]:
        return {"bytes": int(690_000 * mean), "loss": 4000 * above * 4.0 ** (4 - mean)}

    line = [{**point(4 + 4 * i / 199), "mean": 4 + 4 * i / 199, "bits": [4, 8], "taken": i == 99} for i in range(200)]
    uniform = [{**point(b, 3.0), "bits": b} for b in (4, 5, 6, 7, 8)]
    return {"name": "mixed precision", "rows": units, "summary": {"mean": 5.0, "frontier": line, "uniform": uniform}}


def _joint() -> dict[str, Any]:
    """Two hundred evaluations that come down, one of them infinite, and what was measured before the start."""
    losses: list[float | None] = [0.2 + math.exp(-i / 60) + 0.2 * ((i * 37) % 11 == 0) for i in range(200)]
    best = list(itertools.accumulate((loss for loss in losses if loss is not None), min))
    losses[7] = None
    rows = [{"evaluation": i, "loss": losses[i], "best": best[i]} for i in range(200)]
    norms = [{"p": 2 + i / 4.5, "loss": 1.2 + 0.3 * (i / 4.5 - 1.2) ** 2} for i in range(10)]
    summary = {"loss": "KL from the float model", "images": 128, "evaluations": 200, "norms": norms, "out_of_time": True}
    return {"name": "joint search", "rows": rows, "summary": summary}


def _log() -> Rows:
    """An entry of each name that a pass of ours leaves, and one of a user's own pass."""
    heads = [
        {"op": f"blocks.{b}.attn.scores", "head": h, "with": 0.01 + 0.002 * b, "without": 0.01217 + 0.0015 * b + 0.001 * h}
        for b, h in itertools.product(range(BLOCKS), range(HEADS))
    ]
    place = {"kind": "norm", "strength": 0.5, "before": 0.02, "after": 0.01, "shift": True, "moved": True}
    unit = {"block": "blocks.0.attn", "before": 0.5, "after": 0.25, "iterations": 1200, "kept": True}
    entries = [
        {"name": "equalize", "rows": [{**place, "op": f"blocks.{b}.mlp.fc1"} for b in range(BLOCKS)], "summary": {}},
        _mixed(),
        {"name": "ranking", "rows": heads, "summary": {}},
        {"name": "output search", "rows": [{"input": "head:input", "before": 0.9, "after": 0.95}], "summary": {}},
        {"name": "gptq", "rows": [{"op": "head", "ridge": 0.003}], "summary": {}},
        _joint(),
        {"name": "reconstruct", "rows": [unit], "summary": {"seconds": 60.0, "images": 128, "held": 32}},
        {"name": "finetune", "rows": [], "summary": {"steps": 500, "loss": 0.125}},
        {"name": "my own <pass>", "rows": [{"site": "a<b", "gain_db": 1.5, "note": None}], "summary": {"sites": 1}},
    ]  # fmt: skip
    return [{"settings": f"Settings({index})", **entry} for index, entry in enumerate(entries)]


def _fallbacks() -> Rows:
    no_operand = "no 4-bit operand for a product of two activations"
    groups = [
        ([f"blocks.{b}.attn.scores:{r}" for b in range(BLOCKS) for r in ("q", "k")], "4 bits", "8 bits", no_operand, 0.0021),
        (["patch_embed.proj:weight"], "4 bits", "8 bits", "first layer", 0.0137),
        ([f"blocks.{b}.attn.softmax:input" for b in range(BLOCKS)], "8 bits", "float", "no integer kernel for softmax", 0.0),
    ]  # fmt: skip
    keys = ("requested", "actual", "why", "macs_share")
    rows = [{"site": site, **dict(zip(keys, rest, strict=True)), "kind": "site"} for sites, *rest in groups for site in sites]
    why = "float attention is faster here"
    faster = {"requested": "integers", "actual": "float", "why": why, "macs_share": 0.05, "kind": "chosen"}
    return [*rows, *({**faster, "site": f"blocks.{block}.attn.values"} for block in range(2))]


def canned() -> tuple[dict[str, Any], dict[str, Any]]:
    """(report, tables), new objects at every call, the same every time."""
    rng = random.Random(7)
    sites = _sites(rng)
    checks = _checks(sites)
    report = {
        "schema": 1, "model": "vit_tiny_patch32_224", "target": "ort-x86-vnni", "recipe": "best", "bits": "w4a8",
        "exemptions": ["patch_embed.proj stays at 8 bits", "head stays at 8 bits"],
        "images": {"calibration": 128, "scored": 2000},
        "accuracy": {"float": 75.45, "quantized": 74.6, "agreement": 92.35, "measure": "top-1 accuracy",
                     "agreement_measure": "agreement in class with the float model", "why": "",
                     "interval": [-1.55, -0.15], "unit": "%",
                     "rows": [{"what": "AP50", "float": 57.5, "quantized": 55.25, "unit": "%", "better": "more"}],
                     "outputs": [{"output": "logits", "measure": "correlation", "agreement": 99.41, "interval": [99.2, 99.6],
                                  "relative_error": 0.108}],
                     "runtime": "onnxruntime"},
        "size": {"float_bytes": 22_917_340, "onnx_bytes": 6_104_212, "packed_bytes": 3_361_904, "average_weight_bits": 4.31},
        "latency": {
            "onnxruntime": {"float_ms": 11.84, "quantized_ms": 6.91, "ratio": 1.713},
            "openvino": {"float_ms": 9.37, "quantized_ms": 5.02, "ratio": 1.867},
        },
        "verify": {"sites": len(sites), "codes_compared": sum(row["compared"] for row in checks),
                   "codes_differing": sum(row["differing"] for row in checks), "codes_wrong": 0, "max_difference": 1,
                   "worst_site": "blocks.0.attn.values:value", "stored_codes": 22_000_000, "outputs": 2, "problems": []},
        "calibration": {"source": "128 images of a folder", "images": 128, "range_change": 0.09, "shift": 0.04, "spread": 0.12,
                        "classes": 87.5, "duplicate_share": 0.0, "warnings": ["Too few calibration images."]},
        "integer_share": 0.9873,
        "fallbacks": _fallbacks(),
        "seconds": {"capture": 6.2, "observe": 41.8, "choose": 212.4, "verify": 33.6, "bench": 58.0},
        "peak_memory_bytes": 1_873_412_096,
    }  # fmt: skip
    worst = sorted(sites, key=lambda row: row["sqnr_db"])[:6]
    runtimes = (("onnxruntime", 11.84, 6.91), ("openvino", 9.37, 5.02))
    tables = {
        "sites": sites,
        "histograms": [_histogram(rng, row) for row in worst],
        "attention": [_attention(rng, block, head) for block in (2, 10) for head in range(HEADS)],
        "flips": [{"op": f"blocks.{b}.attn.scores", "head": h, "flipped_share": round(0.01 + 0.006 * b * rng.random(), 5)}
                  for b in range(BLOCKS) for h in range(HEADS)],
        "latency": [{"runtime": r, "batch": b, "threads": 2, "float_ms": f * b, "quantized_ms": q * b, "ratio": f / q,
                     "runs": 9, "float_spread": [f * b - 0.5, f * b + 0.5], "quantized_spread": [q * b, q * b + 1], "load": 1.5}
                    for b in (1, 8) for r, f, q in runtimes],
        "loads": [{"runtime": r, "threads": 2, "float_seconds": f / 100, "quantized_seconds": q / 100, "runs": 1,
                   "float_bytes": 151_400_000, "quantized_bytes": 98_700_000, "baseline_bytes": 61_200_000}
                  for r, f, q in runtimes],
        "size": [{"what": "float ONNX", "bytes": 22_917_340}, {"what": "integer ONNX", "bytes": 6_104_212}],
        "checks": checks,
        "outputs": [{"place": "as written", "output": "logits", "difference": 2.1e-6, "limit": 3.4e-5, "cosine": 0.9999981,
                     "agreement": 100.0, "right": True},
                    {"place": "openvino, as it ships", "output": "logits", "difference": 0.0934, "limit": 0.2,
                     "cosine": 0.9998712, "agreement": 99.6, "right": True}],
        "by_rules": [{"integer": 70, "nodes": 75, "expected": 74, "rules": "those of fewbit lint for openvino"}],
        "kernels": {"expected": 75, "found": 74, "ops": {"MatMulInteger": 24, "QLinearMatMul": 49, "QLinearConv": 1}},
        "images": [{"name": f"{i:04d}.png", "thumbnail": thumbnail(41 * i), "label": f"class {i % 5}",
                    "float": f"class {i % 5}", "quantized": f"class {3 if i == 4 else i % 5}"} for i in range(8)],
        "run": {"command": "fewbit quantize vit_tiny_patch32_224 --bits w4a8", "seed": 0,
                "versions": {"fewbit": "0.1.0", "torch": "2.9.0"}, "machine": {"processor": "x86-64 with VNNI", "threads": 2}},
        "inputs": [
            {"input": "images", "shape": "batch, 3, 224, 224", "type": "float32", "given": "the image"},
            {"input": "size", "shape": "2", "type": "int64", "given": "a constant: 640, 480"},
        ],
        "input": [{"size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "layout": "NCHW", "assumed": ["mean"]}],
        "runs": _runs(),
        "curve": _curve(),
        "goal": [{"index": 0, "what": "recipe mse", "drop": 0.5, "within": True, "taken": True, "ms": 2.0, "faster": 1.5}],
        "sensitivity": [{"module": f"blocks.{i}.mlp", "kind": "mlp", "ops": [f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2"],
                         "loss": 0.1 / (i + 1), "loss_share": 0.6 / (i + 1), "macs_share": 0.1, "images": 16}
                        for i in range(2)],
        "outliers": _outliers(),
        "carried": [{"node": "nms", "operator": "NonMaxSuppression", "opset": 11, "why": "torch has no such thing"}],
        "attended": [{"name": "0000.png", "thumbnail": thumbnail(10)}],
        "behind": [{"function": "sigmoid", "how": "float", "why": "no integer form", "nodes": 3}],
        "behind_cost": [{"ops": 2, "macs_share": 0.001, "loss": 0.21, "without": 0.2, "images": 4}],
        "pictures": [{"name": f"{i:04d}.png", "thumbnail": thumbnail(70 * i), "error": 0.5 / (i + 1)} for i in range(3)],
        "synthetic": [{"name": f"array[{i}]", "label": f"class {i}", "thumbnail": thumbnail(90 * i)} for i in range(4)],
        "log": _log(),
    }  # fmt: skip
    return report, tables


def searched() -> dict[str, Any]:
    """The report.json of a search with two points."""
    measures = {"measure": "top-1 accuracy", "unit": "%", "agreement_measure": "agreement in class"}
    row = {**measures, "point": "01", "quantized": 90.0, "agreement": 95.0, "float": 91.0, "ms": 1.0, "float_ms": 2.0,
           "faster": 2.0, "bytes": 1000000, "weight_bits": 5.0, "predicted_ms": 1.1, "integer_ops": 3, "front": True,
           "searched": True, "interval": [-2.0, 0.5], "over": "",
           "command": "fewbit quantize demo --bits </script>"}  # fmt: skip
    other = {**row, "point": "uniform 8", "ms": 1.5, "searched": False, "command": "fewbit quantize demo --bits 8"}
    return {"model": "demo", "target": "t", "recipe": "mse", "strategy": "greedy", "budgets": (), "evaluated": 2,
            "measure": "KL", "images": {"calibration": 1, "scored": 1}, "stopped": "", "left_float": [], "command": "c",
            "latency_table": {"runtime": "onnxruntime", "processor": "Apollo 7", "threads": 3},
            "points": [row, other]}  # fmt: skip
