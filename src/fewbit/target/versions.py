"""The opsets and IR versions of files: which there are, and which IR version goes with an opset."""

from __future__ import annotations

OPSETS, IRS = (13, 23), (7, 13)


def least_ir(opset: int) -> int:
    """The IR version of the release of ONNX that an opset came with."""
    import onnx

    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def usual_ir(opset: int) -> int:
    """The IR version of a file where nobody says one: 10, later where the opset needs it, and of an older opset its own, for
    the runtimes of its time.
    """
    least = least_ir(opset)
    return max(least, 10) if opset >= 20 else least
