"""What a target file may not say at once: contradictions between its fields."""

from __future__ import annotations

from collections.abc import Iterator

from fewbit.capture.kinds import KINDS
from fewbit.runtimes import RUNTIMES
from fewbit.target.spec import Accumulator, Target
from fewbit.target.versions import least_ir


def contradictions(target: Target) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Contradictions between fields of a target: the location and an error message; one between two fields is at each."""
    runs: dict[str, str] = {}
    fusions = RUNTIMES[target.runtime].fusions
    if unknown := [name for name in target.fuse if name not in fusions]:
        has = f"it has {', '.join(fusions)}" if fusions else "it has none, leave it out"
        yield ("fuse",), f"fuse: {target.runtime} has no fused operator '{unknown[0]}'; {has}"
    special = [name for name, t in target.types.items() if t.container == 4 or (t.group_size and not t.multiples)]
    if target.ir_version is not None and target.ir_version < (least := least_ir(target.opset)):
        error = f"opset {target.opset} is in files of IR version {least} and later, not {target.ir_version}"
        yield ("ir_version",), error
    for name, (least, what) in ((name, t.least_opset) for name, t in target.types.items()):
        if target.opset < least:
            error = f"type '{name}': {what} are in files of opset {least} and later, not {target.opset}"
            yield ("opset",), error
            yield ("types", name), error
    if target.weights == "float" and (special or any(t.group_size for t in target.types.values())):
        yield ("weights",), 'codes of 4 bits and blocks are kept as codes: weights = "codes"'
    for i, rule in enumerate(target.op):
        known = KINDS[rule.kind].operands
        for operand, names in rule.operands.items():
            where = f"op {rule.kind}: operand {operand}"
            if operand not in known:
                yield ("op", i, "operands", operand), f"{where} does not exist; allowed are {', '.join(known)}"
            if not names:
                yield ("op", i, "operands", operand), f"{where} has no type; leave it out where it stays float"
            if missing := [name for name in names if name not in target.types]:
                error = f"{where} names type '{missing[0]}'; there are {', '.join(sorted(target.types))}"
                yield ("op", i, "operands", operand), error
            for name in () if operand == "bias" else (name for name in names if name in target.types):
                made = operand != "weight" or target.weights == "float"  # by a QuantizeLinear of the file
                if (bits := max(target.types[name].bits, target.types[name].container if made else 0)) > 16:
                    error = (
                        f"{where}: type '{name}' has codes of {bits} bits; QuantizeLinear makes at most 16, give it 16 or fewer"
                    )
                    yield ("op", i, "operands", operand), error
                    yield ("types", name), error
        if unlisted := [name for name in rule.shared if name not in rule.operands]:
            error = f"op {rule.kind}: shared names '{unlisted[0]}'; it can name {', '.join(rule.operands)}"
            yield ("op", i, "shared"), error
        types = [name for name in rule.types("weight") if name in target.types and target.types[name].group_size]
        plain = Accumulator(bits=rule.accumulator.bits, overflow=rule.accumulator.overflow)
        whole = rule.kind == "linear" and rule.output == "float" and "bias" not in rule.operands
        if types and not (whole and rule.accumulator == plain and plain.bits >= 32):
            error = (
                f"op {rule.kind}: type '{types[0]}' has blocks, which are for linear with float bias, float result, whole sums"
            )
            yield ("op", i, "operands", "weight"), error
        for name in rule.types("bias"):
            if name in target.types and target.types[name].granularity != "channel":
                error = f"op {rule.kind}: type '{name}' has one step for all channels; a bias has one for each: \"channel\""
                yield ("op", i, "operands", "bias"), error
        if rule.output == "integer" and "output" not in rule.operands:
            yield ("op", i, "output"), f'op {rule.kind}: output = "integer" needs types: operands = {{ ..., output = [...] }}'
        if runs.setdefault(rule.kind, rule.runs) != rule.runs:
            error = f'op {rule.kind}: runs = "{rule.runs}", before "{runs[rule.kind]}"; all entries of a kind have the same'
            yield ("op", i, "runs"), error
