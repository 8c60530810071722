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


def thumbnail(hue: int) -> str:
    """A coloured disc as a data URI."""
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 64 64'>"
        f"<rect width='64' height='64' fill='hsl({hue},40%,80%)'/>"
        f"<circle cx='{20 + hue % 25}' cy='32' r='16' fill='hsl({(hue + 150) % 360},60%,45%)'/></svg>"
    )
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _site(rng: random.Random, block: str, op: str, kind: str, role: str, sqnr: float) -> dict[str, Any]:
    weight = role == "weight"
    seen = 0.4 if weight else 6 * math.exp(rng.gauss(0, 0.5))
    low = 0.0 if role == "probabilities" else -seen * rng.uniform(0.7, 1)
    return {
        "site": f"{block}.{op}:{role}" if op else f"{block}:{role}",
        "role": role,
        "op": f"{block}.{op}" if op else block,
        "kind": kind,
        "bits": 4 if weight and block not in ("patch_embed.proj", "head") else 8,
        "grid": "int4 per channel, symmetric" if weight else "uint8 per tensor",
        "method": "gptq" if weight else "search",
        "why": "target has it" if weight else "lowest mse of 100",
        "scale": {"min": 0.0021, "max": 0.0417} if weight else round(seen / 128, 6),
        "zero": 0 if weight else 121,
        "kept": [round(low * 0.8, 4), round(seen * 0.8, 4)],
        "seen": [round(low, 4), round(seen, 4)],
        "sqnr_db": round(sqnr + rng.gauss(0, 1.6), 3),
        "clipped_share": round(abs(rng.gauss(0, 1e-4)), 7),
        "block": block,
    }


def _sites(rng: random.Random) -> list[dict[str, Any]]:
    rows = [_site(rng, "patch_embed.proj", "", "conv", role, 39) for role in ("input", "weight")]
    for block in range(BLOCKS):
        for op, kind, operands in OPS:
            for role, sqnr in operands:
                drop = 9 if (block, op, role) == (9, "mlp.fc2", "input") else 0
                rows.append(_site(rng, f"blocks.{block}", op, kind, role, sqnr - 0.3 * block - drop))
    return rows + [_site(rng, "head", "", "linear", role, 35) for role in ("input", "weight")]


def _histogram(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["seen"]
    edges = [low + (high - low) * i / 80 for i in range(81)]
    spread = high / 6
    counts = [int(2e5 * math.exp(-(((a + b) / 2 / spread) ** 2) / 2) * rng.uniform(0.8, 1.2)) for a, b in pairwise(edges)]
    counts[-1], counts[0] = 14, 3
    return {"edges": edges, "counts": counts} | {k: row[k] for k in ("site", "kept", "seen", "sqnr_db")}


def _attention(rng: random.Random, block: int, image: str, hue: int) -> dict[str, Any]:
    tokens, heads, noisy = 1 + GRID[0] * GRID[1], [], []
    for head in range(HEADS):
        y0, x0 = rng.uniform(1, 5), rng.uniform(1, 5)
        look = [0.3] + [math.exp(-((i // 7 - y0) ** 2 + (i % 7 - x0) ** 2) / (2 + head)) for i in range(tokens - 1)]
        total = sum(look)
        heads.append([[value / total for value in look] for _ in range(tokens)])
        noisy.append([[round(value / total * 256 + rng.gauss(0, 0.4)) / 256 for value in look] for _ in range(tokens)])
    return {
        "op": f"blocks.{block}.attn.scores",
        "image": image,
        "float": heads,
        "quantized": noisy,
        "flipped_share": [0.0123, 0.0417, 0.0871],
        "grid": list(GRID),
        "class_token": True,
        "thumbnail": thumbnail(hue),
    }


def _checks(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for setting in ("off", "on"):
        for index, row in enumerate(sites):
            ties = 0 if setting == "off" else (index * 7) % 11 // 8
            rows.append(
                {"site": row["site"], "optimisations": setting, "compared": 24_576, "differing": ties, "ties": ties}
                | {"wrong": 0, "max_difference": int(ties > 0)}
            )
    return rows


def _units() -> list[dict[str, Any]]:
    """The modules of mixed precision: attention and an MLP in each block, and two ops by themselves."""
    names = [("patch_embed.proj", "op", 147_456)]
    for block in range(BLOCKS):
        names += [(f"blocks.{block}.attn", "attention", 147_456), (f"blocks.{block}.mlp", "mlp", 294_912)]
    rows = []
    for index, (unit, kind, weights) in enumerate([*names, ("head", "op", 192_000)]):
        bits = 4 + (index * 5) % 4
        losses = {str(b): (100 + 7 * index) * 4.0 ** (4 - b) for b in (4, 5, 6, 7, 8)}
        nuclear = None if unit == "head" else 180.0 + 3 * index
        row = {"unit": unit, "kind": kind, "bits": bits, "weights": weights, "nuclear": nuclear, "losses": losses}
        rows.append({**row, "loss": losses[str(bits)]})
    return rows


def _frontier() -> list[dict[str, Any]]:
    """A frontier of 200 points from 4 to 8 bits, the five uniform widths above it, and the point taken."""

    def row(kind: str, bits: float, above: float = 1.0) -> dict[str, Any]:
        loss = 4000 * above * 4.0 ** (4 - bits)
        return {"kind": kind, "label": f"{bits:.3g} bits", "bytes": int(690_000 * bits), "loss": loss, "bits": bits}

    line = [row("a width for each module", 4 + 4 * i / 199) for i in range(200)]
    return [*line, *(row("one width", float(b), 3.0) for b in (4, 5, 6, 7, 8)), row("this run", line[99]["bits"])]


def _joint() -> list[dict[str, Any]]:
    """Two hundred evaluations that come down, one of them infinite."""
    losses = [0.2 + math.exp(-i / 60) + 0.2 * ((i * 37) % 11 == 0) for i in range(200)]
    best = list(itertools.accumulate(losses, min))
    rows = [{"evaluation": i, "loss": losses[i], "best": best[i], "what": "KL from the float model"} for i in range(200)]
    rows[7]["loss"] = None
    rows[0] |= {"images": 128, "sites": 85, "evaluations": 200, "out_of_time": True, "seconds": 300.0}
    return rows


def _outliers() -> list[dict[str, Any]]:
    rows = []
    for block in range(BLOCKS):
        for op in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
            far = (block, op) == (2, "mlp.fc2")
            rows.append(
                {
                    "site": f"blocks.{block}.{op}:input", "reach": 122.4 if far else 6.0, "any": far, "limit": 10.0,
                    "channel_ratio": 42.0 if far else 3.0 + block / 4, "channels": [7, 199] if far else [],
                    "rest_of_channels": 0.25 if far else 1.0, "token_ratio": 14.8 if far else 1.5,
                    "token_share": 0.0154 if far else 0.0, "positions": [0, 17] if far else [],
                    "rest_of_tokens": 0.125 if far else 1.0, "done": "clipped at 61.2 of 122",
                }
            )  # fmt: skip
    return rows


def _curve() -> list[dict[str, Any]]:
    """Accuracy that rises with the number of images."""
    return [
        {
            "images": 2**i, "range_change": 0.15 / 2**i if i else None, "float": 75.45, "quantized": 60 + 2.0 * i,
            "agreement": 70 + 2.0 * i, "cosine": 0.9, "interval": [58 + 2.0 * i, 62 + 2.0 * i], "runtime": "onnxruntime",
        }
        for i in range(8)
    ]  # fmt: skip


def _norms() -> list[dict[str, Any]]:
    """Ten values of p, the parabola through them and the start at its vertex."""
    rows = [
        {"kind": "measured", "p": 2 + i / 4.5, "loss": 1.2 + 0.3 * (i / 4.5 - 1.2) ** 2 + 0.01 * (i % 3)} for i in range(10)
    ]
    line = [{"kind": "parabola", "p": 2 + i / 20, "loss": 1.21 + 0.3 * (i / 20 - 1.2) ** 2, "r2": 0.98} for i in range(41)]
    return [*rows, *line, {"kind": "start", "p": 3.2, "loss": 1.2, "what": "KL from the float model"}]


def _runs() -> list[dict[str, Any]]:
    """Two recipes at several widths, and the float model."""
    rows = [
        ("liu2021, one width", "4", 3_361_904, 4.0, 71.2, [69.1, 73.1]),
        ("liu2021, one width", "8", 6_104_212, 8.0, 75.3, [73.3, 77.1]),
        ("liu2021, a width for each module", "mixed:5:4,5,6,7", 3_980_000, 4.97, 74.1, [72.1, 76.0]),
        ("mse, one width", "4", 3_361_904, 4.0, 62.4, [60.2, 64.5]),
        ("float", "float model", 22_917_340, 32.0, 75.45, None),
    ]
    keys = ("kind", "label", "bytes", "bits", "accuracy", "interval")
    return [{**dict(zip(keys, row, strict=True)), "measure": "accuracy"} for row in rows]


def _refusals() -> list[dict[str, Any]]:
    rows = [
        {
            "site": f"blocks.{block}.attn.scores:{role}",
            "requested": "4 bits",
            "actual": "8 bits",
            "why": "ort-x86-vnni has no 4-bit operand for a product of two activations",
            "macs_share": 0.0021,
        }
        for block in range(BLOCKS)
        for role in ("query", "key")
    ]
    why = "ort-x86-vnni has no integer kernel for softmax"
    return [
        *rows,
        {
            "site": "patch_embed.proj:weight",
            "requested": "4 bits",
            "actual": "8 bits",
            "why": "first layer",
            "macs_share": 0.0137,
        },
        *(
            {
                "site": f"blocks.{b}.attn.softmax:input",
                "requested": "8 bits",
                "actual": "float",
                "why": why,
                "macs_share": 0.0,
            }
            for b in range(BLOCKS)
        ),
    ]


def canned() -> tuple[dict[str, Any], dict[str, Any]]:
    """(report, tables), new objects at every call, the same every time."""
    rng = random.Random(7)
    sites = _sites(rng)
    checks = _checks(sites)
    timing = {
        "capture": 6.2,
        "observe": 41.8,
        "equalize": 3.1,
        "choose": 212.4,
        "realize": 4.9,
        "verify": 33.6,
        "bench": 58.0,
    }
    report = {
        "schema": 1,
        "model": "vit_tiny_patch32_224",
        "target": "ort-x86-vnni",
        "recipe": "best",
        "bits": "w4a8",
        "exemptions": ["patch_embed.proj stays at 8 bits", "head stays at 8 bits"],
        "images": {"calibration": 128, "scored": 2000},
        "accuracy": {
            "float": 75.45,
            "quantized": 74.6,
            "agreement": 92.35,
            "cosine": 0.99412,
            "interval": [72.65, 76.46],
        }
        | {"runtime": "onnxruntime"},
        "size": {
            "float_bytes": 22_917_340,
            "onnx_bytes": 6_104_212,
            "packed_bytes": 3_361_904,
            "average_weight_bits": 4.31,
        },
        "latency": {
            "onnxruntime": {"float_ms": 11.84, "quantized_ms": 6.91, "ratio": 1.713},
            "openvino": {"float_ms": 9.37, "quantized_ms": 5.02, "ratio": 1.867},
        },
        "verify": {
            "sites": len(sites),
            "codes_compared": sum(row["compared"] for row in checks),
            "codes_differing": sum(row["differing"] for row in checks),
            "codes_wrong": 0,
            "max_difference": 1,
            "worst_site": "blocks.0.attn.values:value",
        },
        "calibration": {
            "source": "128 images of a folder",
            "images": 128,
            "range_change": 0.09,
            "shift": 0.04,
            "spread": 0.12,
            "classes": 87.5,
            "idle": 0.0,
            "warnings": ["Too few calibration images: the ranges of two halves differ by 9 %."],
        },
        "integer_share": 0.9873,
        "fallbacks": _refusals(),
        "seconds": timing,
        "peak_memory_bytes": 1_873_412_096,
    }
    worst = sorted(sites, key=lambda row: row["sqnr_db"])[:6]
    tables = {
        "sites": sites,
        "histograms": [_histogram(rng, row) for row in worst],
        "attention": [_attention(rng, 2, "0017.png", 20), _attention(rng, 10, "0017.png", 20)],
        "flips": [
            {"op": f"blocks.{b}.attn.scores", "head": h, "flipped_share": round(0.01 + 0.006 * b * rng.random(), 5)}
            for b in range(BLOCKS)
            for h in range(HEADS)
        ],
        "latency": [
            {
                "runtime": r,
                "batch": batch,
                "threads": 2,
                "float_ms": f * batch,
                "quantized_ms": q * batch,
                "ratio": f / q,
                "runs": 50,
            }
            for batch in (1, 8)
            for r, f, q in (("onnxruntime", 11.84, 6.91), ("openvino", 9.37, 5.02))
        ],
        "ranking": [
            {"op": f"blocks.{b}.attn.scores", "head": h, "with": 0.01 + 0.002 * b, "without": 0.01217 + 0.0015 * b + 0.001 * h}
            for b in range(BLOCKS)
            for h in range(HEADS)
        ],
        "loads": [
            {"runtime": r, "threads": 2, "float_seconds": f, "quantized_seconds": q, "float_bytes": 151_400_000}
            | {"quantized_bytes": 98_700_000, "baseline_bytes": 61_200_000, "runs": 1}
            for r, f, q in (("onnxruntime", 0.0821, 0.1634), ("openvino", 0.2512, 0.4187))
        ],
        "size": [
            {"what": "float ONNX", "bytes": 22_917_340},
            {"what": "integer ONNX", "bytes": 6_104_212},
            {"what": "packed weights", "bytes": 3_361_904},
        ],
        "checks": checks,
        "outputs": [
            {"runtime": "onnxruntime", "max_abs_difference": 0.0021, "cosine": 0.9999981, "argmax_agreement": 100.0},
            {"runtime": "openvino", "max_abs_difference": 0.0934, "cosine": 0.9998712, "argmax_agreement": 99.6},
        ],
        "kernels": {
            "expected": 74,
            "found": 74,
            "ops": {"MatMulInteger": 24, "QLinearMatMul": 49, "QLinearConv": 1, "Softmax": 12},
        },
        "seconds": timing,
        "images": [
            {
                "name": f"{i:04d}.png",
                "thumbnail": thumbnail(41 * i),
                "label": f"class {i % 5}",
                "float": f"class {i % 5}",
            }
            | {"quantized": f"class {3 if i == 4 else i % 5}"}
            for i in range(8)
        ],
        "run": {
            "command": "fewbit quantize vit_tiny_patch32_224 --images images --target ort-x86-vnni --bits w4a8",
            "versions": {"fewbit": "0.1.0", "torch": "2.9.0", "onnxruntime": "1.23.0", "python": "3.11.7"},
            "seed": 0,
            "hashes": {"model": "9f2c4be17c0d", "images": "b81f0c22a9ee", "target": "10d3f7a6c2b4"},
            "machine": {"processor": "x86-64 with VNNI", "threads": 2},
        },
        "frontier": _frontier(),
        "units": _units(),
        "runs": _runs(),
        "joint": _joint(),
        "curve": _curve(),
        "outliers": _outliers(),
        "synthetic": [{"name": f"array[{i}]", "label": i, "thumbnail": thumbnail(90 * i)} for i in range(4)],
        "norms": _norms(),
    }
    return report, tables
