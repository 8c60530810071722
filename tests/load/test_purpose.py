"""Oracle: the post-processing of the image processors of transformers, which differ by architecture."""

from __future__ import annotations

import pytest
from torch import nn

from fewbit.load.purpose import purpose


def test_a_module_of_ones_own_does_not_say():
    assert purpose(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Detr", "detect:detr"), ("Yolos", "detect:detr"), ("RTDetr", "detect:rtdetr"), ("DeformableDetr", "detect:rtdetr"),
        ("ConditionalDetr", "detect:rtdetr"),
    ],
)  # fmt: skip
def test_a_detectors_scores_are_those_of_its_own_post_processing(name, said):
    transformers = pytest.importorskip("transformers")
    import inspect

    kind = getattr(transformers, f"{name}ForObjectDetection")
    assert purpose(kind.__new__(kind)) == said
    processor = getattr(transformers, f"{name}ImageProcessor")
    source = inspect.getsource(processor.post_process_object_detection)
    assert ("softmax" in source and "use_focal_loss" not in source) == (said == "detect:detr")


def test_what_segments_or_measures_depth_says_so():
    transformers = pytest.importorskip("transformers")
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    assert purpose(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)) == "segment"
    for kind, said in (
        (transformers.SegformerForSemanticSegmentation, "segment"),
        (transformers.DPTForDepthEstimation, "depth:relative"),
        (transformers.GLPNForDepthEstimation, "depth"),
        (transformers.Swin2SRForImageSuperResolution, "restore"),
        (transformers.ViTForImageClassification, ""),
    ):
        assert purpose(kind.__new__(kind)) == said
