"""What a runtime says about a file that it does not take, in words for the file's owner: the cause, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from fewbit.errors import shortened
from fewbit.onnx_file import load_proto

ELSEWHERE = "Choose a target of another runtime (fewbit targets), or take these out of the model."
OTHERWISE = "Choose a target of another runtime (fewbit targets), or write that part of the model with other operators."
LONGEST = 400  # characters of a message without a known cause

ONNXRUNTIME = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .* failed: ?|This is an invalid model\. (Error: )?"
)
OPENVINO = re.compile(
    r"^(Exception from|Check '.*' failed at|FrontEnd API failed|.*failed\. Failed operations|Summary:|While validating)"
    r"|\.cpp:\d+"
)
FAILING = re.compile(r"while running (\w+) node\. Name:'([^']*)' Status Message: (.*)", re.DOTALL)
SOURCE = re.compile(r"^\S+\.(cc|h|cpp):\d+ .*?\) |^\S+\.(cc|h|cpp):\d+ ")  # a place in a runtime's own source
CLAIM = re.compile(r"(Exception during initialization: )?\S+\.(cc|h|cpp):\d+ .*? was false\. (?=\S)")  # and the claim there
BATCHWISE = "Batchwise recurrent operations"
LACKING = re.compile(r"No conversion rule found for operations: ([\w., -]+)")
REFUSED = re.compile(r"^-- [\w.]+-\d+ with a message:\n(.*?)(?=^\s*$|^-- |^Summary:|\Z)", re.MULTILINE | re.DOTALL)
NODE = re.compile(r"ONNX node '<Node\([\w.]+\): ([^>]*)>'")


def said(error: BaseException, path: Path | None = None) -> str:
    """The cause on one line: the node at which onnxruntime stops, the operators that openvino lacks, the node of the file that
    it does not take, or what either runtime says without its codes and the places in its own source.
    """
    text = str(error)
    if found := FAILING.search(text):
        return f"node {found[1]} '{found[2]}': {shortened(SOURCE.sub('', _plain(found[3])), LONGEST)}"
    if BATCHWISE in text:
        return "it has no LSTM, GRU or RNN with layout 1 (the batch in front of the time); layout 0 it has"
    if found := LACKING.search(text):
        lacks = [re.sub(r"-(\d+)$", r" (opset \1)", one.strip()) for one in found[1].split(",")]
        return f"it has no {' and no '.join(lacks)}. {ELSEWHERE}"
    if path is not None and (node := _refused(text, path)):
        return f"{node}. {OTHERWISE}"
    return shortened(CLAIM.sub("", _plain(text)) or type(error).__name__, LONGEST)


def _plain(text: str) -> str:
    lines = [ONNXRUNTIME.sub("", line.strip()) for line in text.splitlines()]
    return " ".join([line for line in lines if line and not OPENVINO.search(line)] or lines)


def _refused(text: str, path: Path) -> str:
    """The first node in the file that openvino does not take, with its reason: those behind it fail for that, too. Empty where
    it names none.
    """
    reasons = {node[1]: _plain(one[1]) for one in REFUSED.finditer(text) if (node := NODE.search(one[1]))}
    for node in load_proto(path, data=False).graph.node if reasons else ():
        for name in node.output:
            if reasons.get(name):
                return (
                    f"it does not take {node.op_type} '{node.name or name}': {shortened(reasons[name], LONGEST).rstrip('. ')}"
                )
    return ""
