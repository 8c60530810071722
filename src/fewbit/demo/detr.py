"""A small DETR (Carion et al. 2020) for scenes of CIFAR-10 images, trained by `bench.train_detr`: 1.6 M parameters.

transformers' own DetrForObjectDetection with the ResNet of RT-DETR in front of it: a scene of 96 px becomes 36 tokens of
width 128, for 2 encoder and 3 decoder layers with 4 heads; 12 object queries, 10 classes and "no object".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from fewbit.demo.model import CLASSES, MEAN, STD
from fewbit.errors import BadModel

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection

INPUT_SIZE = (3, 96, 96)
WEIGHTS = Path(__file__).parent / "detr.safetensors"

__all__ = ["CLASSES", "INPUT_SIZE", "MEAN", "STD", "WEIGHTS", "architecture", "detr"]


def architecture() -> DetrForObjectDetection:
    """The untrained network: (batch, 3, 96, 96) normalized images to logits (batch, 12, 11) and boxes (batch, 12, 4)."""
    try:
        from transformers import DetrConfig, DetrForObjectDetection, RTDetrResNetConfig  # here: an extra, and slow to import
    except ImportError as error:
        raise BadModel("demo:detr needs the transformers package: pip install 'fewbit[hf]'.") from error
    backbone = RTDetrResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic")
    backbone.out_features = ["stage3"]
    config = DetrConfig(
        backbone_config=backbone,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_queries=12,
        dropout=0.0,
        id2label=dict(enumerate(CLASSES)),
    )
    return DetrForObjectDetection(config)


def detr() -> DetrForObjectDetection:
    """The trained network in eval mode; weights are stored as fp16 and used as fp32, and "float" means these."""
    net = architecture()
    net.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    return net.eval()
