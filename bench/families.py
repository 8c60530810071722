"""The rows of bench/breadth.py: families of vision models, a small variant of each, with seeded weights.

A row is a name and a function that builds the net for images of `size` pixels. The kinds of nets alternate, so that the first
rows are of all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import nn

CLASSES, SIZE = 10, 64
TINY = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
VIT = {**TINY, "hidden_size": 48, "image_size": 64, "patch_size": 16}
CONV = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
SEGFORMER = {**PYRAMID, "decoder_hidden_size": 32}
SWIN = {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 3], "window_size": 4, "image_size": 64}
DETECT = {
    "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_queries": 12,
}  # fmt: skip

FOUR = ["stage1", "stage2", "stage3", "stage4"]
RESNET = ("ResNetConfig", {**CONV, "out_features": ["stage4"]})

# Names of timm, with the size of their images where it is not SIZE, and with their channels where they are not three.
TIMM = """
resnet18 vit_tiny_patch16_224 mobilenetv3_small_100 swin_tiny_patch4_window7_224:112 efficientnet_b0 convnext_atto
densenet121 coat_lite_tiny mobileone_s0 levit_128s:224 mixer_s32_224:224 xcit_nano_12_p16_224 regnety_002
crossvit_tiny_240:240 dla34 repvgg_a0 maxvit_rmlp_pico_rw_256 efficientformerv2_s0:224 resnetv2_18 efficientvit_b0
efficientvit_m0:224 convit_tiny:224 ghostnetv2_100 pvt_v2_b0 edgenext_xx_small inception_v3:96 vgg11 cait_xxs24_224
hrnet_w18_small poolformer_s12 visformer_tiny:224 fastvit_t8 gcvit_xxtiny:224 dpn48b mobilevit_xxs mobilevitv2_050
focalnet_tiny_srf res2net50_14w_8s resnest14d skresnet18 legacy_seresnet18 vovnet39a cspresnet50 halonet26t:256
botnet26t_256:256 lambda_resnet26t tnt_s_patch16_224:224 twins_svt_small volo_d1_224:224 beit_base_patch16_224
deit_tiny_patch16_224 eva02_tiny_patch14_224:56 nfnet_l0 tresnet_m rexnet_100 selecsls42 repvit_m0_9 starnet_s050
mambaout_femto davit_tiny efficientformer_l1:224 efficientvim_m1 fasternet_t0 hardcorenas_a hgnetv2_b0 hiera_tiny_224:224
inception_next_atto lcnet_035 lcnetv2_small lowformer_b0 caformer_s18 convformer_s18 mobilenetv4_conv_small
mobilenetv4_hybrid_medium mvitv2_tiny nest_tiny:224 nextvit_small pit_ti_224 rdnet_tiny repghostnet_050 sequencer2d_s:224
shvit_s1 swiftformer_xs swinv2_cr_tiny_224:224 swinv2_tiny_window8_256:128 tiny_vit_5m_224:224 vit_relpos_small_patch16_224
samvit_base_patch16_224 vitamin_small_224 vit_tiny_r_s16_p8_224 xception41 legacy_xception:96 mnasnet_100 mixnet_s tinynet_e
fbnetc_100 spnasnet_100 gmlp_ti16_224:224 resmlp_12_224:224 gmixer_12_224:224 convmixer_768_32 coatnet_pico_rw_224
cs3darknet_focus_s cspdarknet53 darknet53 eca_resnet33ts gernet_s gcresnet33ts bat_resnext26ts:256 eca_botnext26ts_256:256
sehalonet33ts:256 iformer_t csatv2 cspnext_tiny cpubone_nano efficientnet_lite0 tf_efficientnetv2_b0 test_vit
vit_small_patch14_reg4_dinov2:56 vit_small_patch16_rope_224 hieradet_small:256 inception_v4:96 inception_resnet_v2:96
ese_vovnet19b_dw semnasnet_075 mobilenetv1_100 mobilenetv2_050 resnext26ts seresnext26d_32x4d wide_resnet50_2 ecaresnet26t
resnet26d dm_nfnet_f0 convnextv2_atto naflexvit_base_patch16_gap pnasnet5large:96 vit_pwee_patch16_reg1_gap_256 repvgg_b0
deit3_small_patch16_224 vit_betwixt_patch16_rope_reg4_gap_256 vit_small_patch16_dinov3 regnetz_b16 resnet50_gn
resnet18::1 vit_tiny_patch16_224::1 resnet18::4 vit_tiny_patch16_224::4 efficientnet_b0::8
"""

# Functions of torchvision, likewise; a detector's backbone alone can be exported as well.
TORCHVISION = """
segmentation.lraspp_mobilenet_v3_large vit_b_32 googlenet shufflenet_v2_x0_5 segmentation.deeplabv3_mobilenet_v3_large
squeezenet1_1 detection.ssdlite320_mobilenet_v3_large swin_t alexnet mnasnet0_5 segmentation.fcn_resnet50 maxvit_t:224
swin_v2_t detection.retinanet_resnet50_fpn convnext_tiny efficientnet_v2_s mobilenet_v2 resnet18 regnet_x_400mf vgg11_bn
detection.fasterrcnn_mobilenet_v3_large_320_fpn resnext50_32x4d inception_v3:96 mobilenet_v3_large densenet121
efficientnet_b0 wide_resnet50_2 segmentation.deeplabv3_resnet50 detection.fcos_resnet50_fpn detection.ssd300_vgg16:96
detection.retinanet_resnet50_fpn.backbone detection.fasterrcnn_mobilenet_v3_large_320_fpn.backbone
detection.ssdlite320_mobilenet_v3_large.backbone:128 detection.ssd300_vgg16.backbone:300
"""

# Classes of transformers, with their configuration (a nested one as the name of its class and its fields) and the size.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "ViTForImageClassification": (VIT, SIZE),
    "SegformerForSemanticSegmentation": (
        SEGFORMER,
        SIZE,
    ),
    "DPTForDepthEstimation": (
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 24, 24],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
        SIZE,
    ),
    "YolosForObjectDetection": ({**VIT, "image_size": [64, 64], "num_detection_tokens": 10}, SIZE),
    "DetrForObjectDetection": ({**DETECT, "backbone_config": RESNET}, SIZE),
    "SiglipVisionModel": (VIT, SIZE),
    "CLIPVisionModel": (VIT, SIZE),
    "SamVisionModel": ({**VIT, "mlp_dim": 96, "output_channels": 32, "window_size": 2, "global_attn_indexes": [1]}, SIZE),
    "SwinForImageClassification": ({**SWIN, "image_size": 128}, 128),
    "Swin2SRForImageSuperResolution": (
        {
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 8,
            "image_size": 32,
            "upscale": 2,
        },
        32,
    ),
    "MobileViTForSemanticSegmentation": (
        {
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
            "image_size": 64,
            "aspp_out_channels": 32,
            "atrous_rates": [2, 3, 4],
        },
        SIZE,
    ),
    "BeitForSemanticSegmentation": ({**VIT, "num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "pool_scales": [1, 2]}, SIZE),
    "DepthAnythingForDepthEstimation": (
        {
            "backbone_config": (
                "Dinov2Config",
                {
                    "hidden_size": 48,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 3,
                    "image_size": 56,
                    "patch_size": 14,
                    "out_features": FOUR,
                    "reshape_hidden_states": False,
                },
            ),
            "reassemble_hidden_size": 48,
            "neck_hidden_sizes": [16, 16, 24, 24],
            "fusion_hidden_size": 16,
            "head_hidden_size": 8,
        },
        56,
    ),
    "VitPoseForPoseEstimation": (
        {
            "backbone_config": (
                "VitPoseBackboneConfig",
                {**VIT, "image_size": [64, 64], "patch_size": [16, 16], "out_indices": [2]},
            ),
            "num_labels": 17,
        },
        SIZE,
    ),
    "EfficientNetForImageClassification": (
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        SIZE,
    ),
    "GLPNForDepthEstimation": (
        SEGFORMER,
        SIZE,
    ),
    "UperNetForSemanticSegmentation": (
        {
            "backbone_config": ("ConvNextConfig", {**STAGES, "out_features": FOUR}),
            "hidden_size": 32,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 48,
            "auxiliary_channels": 16,
        },
        SIZE,
    ),
    "Dinov2ForImageClassification": ({**VIT, "patch_size": 14, "image_size": 56}, 56),
    "Dinov2WithRegistersModel": ({**VIT, "patch_size": 14, "image_size": 56}, 56),
    "DINOv3ViTModel": (VIT, SIZE),
    "DINOv3ConvNextModel": (STAGES, SIZE),
    "RTDetrForObjectDetection": ({}, 128),
    "ConditionalDetrForObjectDetection": ({**DETECT, "backbone_config": RESNET}, SIZE),
    "TableTransformerForObjectDetection": ({**DETECT, "backbone_config": RESNET}, SIZE),
    "MaskFormerForInstanceSegmentation": (
        {
            "backbone_config": ("SwinConfig", {**SWIN, "out_features": FOUR}),
            "decoder_config": ("DetrConfig", DETECT),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
        SIZE,
    ),
    "Mask2FormerForUniversalSegmentation": (
        {
            "backbone_config": ("SwinConfig", {**SWIN, "out_features": FOUR}),
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 64,
            "encoder_layers": 1,
            "num_attention_heads": 4,
            "dim_feedforward": 64,
            "decoder_layers": 3,
            "num_queries": 12,
        },
        SIZE,
    ),
    "DeformableDetrForObjectDetection": (
        {
            **DETECT,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "backbone_config": ("ResNetConfig", {**CONV, "out_features": FOUR[1:]}),
        },
        SIZE,
    ),
    "ViTMAEForPreTraining": (
        {**VIT, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        SIZE,
    ),
    "IJepaModel": (VIT, SIZE),
    "DeiTForImageClassificationWithTeacher": (VIT, SIZE),
    "BeitForImageClassification": (VIT, SIZE),
    "Data2VecVisionForImageClassification": (VIT, SIZE),
    "ViTMSNForImageClassification": (VIT, SIZE),
    "Swinv2ForImageClassification": (SWIN, SIZE),
    "ResNetForImageClassification": (CONV, SIZE),
    "RegNetForImageClassification": ({**CONV, "groups_width": 8}, SIZE),
    "ConvNextForImageClassification": (STAGES, SIZE),
    "ConvNextV2ForImageClassification": (STAGES, SIZE),
    "BitForImageClassification": ({**CONV, "num_groups": 8}, SIZE),
    "CvtForImageClassification": ({"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, SIZE),
    "LevitForImageClassification": (
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        SIZE,
    ),
    "PvtV2ForImageClassification": (
        {**PYRAMID, "image_size": 64},
        SIZE,
    ),
    "PoolFormerForImageClassification": ({**STAGES, "depths": [1, 1, 1, 1]}, SIZE),
    "SwiftFormerForImageClassification": ({"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]}, SIZE),
    "MobileViTV2ForImageClassification": ({"width_multiplier": 0.5, "image_size": 64}, SIZE),
    "MobileNetV1ForImageClassification": ({"depth_multiplier": 0.25, "image_size": 64}, SIZE),
    "MobileNetV2ForSemanticSegmentation": ({"depth_multiplier": 0.35, "image_size": 64}, SIZE),
    "FocalNetForImageClassification": ({"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}, SIZE),
    "HieraForImageClassification": (
        {"image_size": [64, 64], "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
        SIZE,
    ),
    "HGNetV2ForImageClassification": ({}, SIZE),
    "SuperPointForKeypointDetection": ({}, SIZE),
    "Owlv2VisionModel": (VIT, SIZE),
    "BlipVisionModel": (VIT, SIZE),
    "ZoeDepthForDepthEstimation": (
        {
            "backbone_config": (
                "BeitConfig",
                {**VIT, "num_hidden_layers": 4, "out_features": FOUR, "reshape_hidden_states": False},
            ),
            "neck_hidden_sizes": [16, 16, 24, 24],
            "fusion_hidden_size": 16,
            "bottleneck_features": 16,
            "num_relative_features": 8,
        },
        SIZE,
    ),
    "EomtForUniversalSegmentation": ({**VIT, "num_hidden_layers": 3, "num_blocks": 1, "num_queries": 8}, SIZE),
    "TextNetForImageClassification": ({}, SIZE),
    "VitDetModel": ({**VIT, "mlp_ratio": 2, "window_block_indices": [0], "window_size": 2}, SIZE),
    "Aimv2VisionModel": (VIT, SIZE),
    "Sam2VisionModel": ({}, 256),
    "DFineForObjectDetection": ({}, 128),
    "RTDetrV2ForObjectDetection": ({}, 128),
}


@dataclass(frozen=True)
class Row:
    """A model of a library, for images (channels, size, size)."""

    library: str
    name: str
    size: int
    channels: int = 3

    @property
    def label(self) -> str:
        """The name, with the channels where they are not three."""
        return self.name if self.channels == 3 else f"{self.name}-{self.channels}ch"

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.library}.{self.label}"

    def net(self, seed: int = 0) -> nn.Module:
        """The net with seeded weights, in evaluation mode."""
        torch.manual_seed(seed)
        options = {} if self.channels == 3 else {"in_chans": self.channels}
        return MAKERS[self.library](self.name, self.size, **options).eval()


def rows() -> Iterator[Row]:
    """Every row; the libraries take turns."""
    listed = (
        [named("timm", word) for word in TIMM.split()],
        [named("torchvision", word) for word in TORCHVISION.split()],
        [Row("transformers", name, size) for name, (_, size) in TRANSFORMERS.items()],
    )
    return (row for row in chain.from_iterable(zip_longest(*listed)) if row is not None)


def named(library: str, word: str) -> Row:
    """The row of a name, of name:size or of name:size:channels."""
    name, size, channels, *_ = (*word.split(":"), "", "")
    return Row(library, name, int(size or SIZE), int(channels or 3))


def _timm(name: str, size: int, **options: int) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=size, **options)
    except TypeError:  # a net that takes images of any size
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _torchvision(name: str, size: int) -> nn.Module:
    import torchvision

    group, _, function = name.removesuffix(".backbone").rpartition(".")
    make = getattr(getattr(torchvision.models, group) if group else torchvision.models, function)
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if group:
        options["weights_backbone"] = None
    extra = {
        "googlenet": {"init_weights": True},
        "inception_v3": {"init_weights": True},
        "maxvit_t": {"input_size": (size, size)},
    }
    options |= {"image_size": size} if function.startswith("vit_") else extra.get(function, {})
    net = make(**options)
    return net.backbone if name.endswith(".backbone") else net


def _transformers(name: str, size: int) -> nn.Module:
    import transformers

    def configured(kind: Any, fields: Mapping[str, Any]) -> Any:
        made = {k: configured(getattr(transformers, v[0]), v[1]) if isinstance(v, tuple) else v for k, v in fields.items()}
        return kind(**made)

    kind, (fields, _) = getattr(transformers, name), TRANSFORMERS[name]
    labels = {} if "num_labels" in fields or not name.partition("For")[1] else {"num_labels": CLASSES}
    return kind(configured(kind.config_class, {**labels, **fields}))


MAKERS: Mapping[str, Callable[..., nn.Module]] = {
    "timm": _timm, "torchvision": _torchvision, "transformers": _transformers,
}  # fmt: skip
