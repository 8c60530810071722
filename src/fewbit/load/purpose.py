"""What a model is for, where its class says so: the task that its outputs are of, as `--task` names it."""

from __future__ import annotations

from torch import nn

SOFTMAX = ("Detr", "TableTransformer", "Yolos")  # detectors of transformers with a class for "no object"; others have a sigmoid
HEADS = {
    "ForSemanticSegmentation": "segment",
    "ForDepthEstimation": "depth:relative",
    "ForImageSuperResolution": "restore",
}
METRIC = ("GLPN", "ZoeDepth")  # depth in metres; others give its inverse, up to a scale and a shift


def purpose(module: nn.Module) -> str:
    """The task of a model of transformers or torchvision; empty where its class does not say."""
    kind = type(module)
    if kind.__module__.startswith("torchvision.models.segmentation"):
        return "segment"
    if not kind.__module__.startswith("transformers."):
        return ""
    name, _, head = kind.__name__.partition("For")
    if head == "ObjectDetection":
        return "detect:detr" if name in SOFTMAX else "detect:rtdetr"
    metric = name in METRIC or getattr(getattr(module, "config", None), "depth_estimation_type", "") == "metric"
    return "depth" if head == "DepthEstimation" and metric else HEADS.get(f"For{head}", "")
