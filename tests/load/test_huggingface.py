"""Hugging Face folders: pixels as transformers makes them, the head of the folder's own task, float32, all weights or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capture.nets import images
from fewbit.capture import capture
from fewbit.data.images import Preprocess
from fewbit.errors import BadModel
from fewbit.load import Loaded, load_model
from fewbit.load.huggingface import record_of
from fewbit.stages.preprocessing import preprocess_of

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
THIRTY_TWO = {"height": 32, "width": 32}


def vit(**more: Any) -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5, **more)
    )


def saved(folder: Path, net: Any, processor: Any = None) -> str:
    (processor or transformers.ViTImageProcessor(size=THIRTY_TWO)).save_pretrained(folder)
    net.save_pretrained(folder)
    return f"hf:{folder}"


def picture(wide: int, high: int) -> Image.Image:
    values = np.random.default_rng(wide).integers(0, 256, (high // 8, wide // 8, 3), np.uint8)
    return Image.fromarray(values).resize((wide, high), Image.Resampling.BICUBIC)


PROCESSORS = {
    "squash": ("ViTImageProcessor", {"size": THIRTY_TWO}),
    "no rescale": ("ViTImageProcessor", {"size": THIRTY_TWO, "do_rescale": False, "do_normalize": False}),
    "another factor": ("ViTImageProcessor", {"size": THIRTY_TWO, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}),
    "no normalize": ("ViTImageProcessor", {"size": THIRTY_TWO, "do_normalize": False}),
    "blue first": ("MobileViTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": THIRTY_TWO}),
    "crop_pct": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}),
    "shortest edge": ("CLIPImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": THIRTY_TWO, "resample": 2}),
    "no resize": ("BitImageProcessor", {"do_resize": False, "crop_size": THIRTY_TWO}),
    "nearest": ("ViTImageProcessor", {"size": THIRTY_TWO, "resample": 0}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    saved(folder, vit())
    return folder


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_folders_own_processor(case):
    name, options = PROCESSORS[case]
    processor = getattr(transformers, name)(**options)
    preprocess = preprocess_of(Loaded("hf:net", None, record_of("hf:net", name, processor)), {})
    reread = Preprocess.from_json(json.loads(json.dumps(preprocess.to_json())))
    for shape in ((50, 40), (33, 61), (20, 24)):
        expected = processor(picture(*shape), return_tensors="pt")["pixel_values"][0].float()
        assert preprocess.size == tuple(expected.shape)
        assert torch.equal(preprocess(picture(*shape)), expected)
        assert torch.equal(reread(picture(*shape)), expected)
    colour = Image.new("RGB", (40, 40), (200, 100, 30))
    assert preprocess.undo(preprocess(colour)).getpixel((16, 16)) == (200, 100, 30)


def test_an_older_processor_of_pillow_makes_nearly_the_same_pixels(plain):
    """Pillow resizes as the torchvision processors do, up to a rounding of one level."""
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8)
    (plain / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    found = preprocess_of(load_model(f"hf:{plain}"), {})(picture(50, 40))
    resized = picture(50, 40).resize((50, 40), Image.Resampling.BICUBIC)  # the shorter side becomes 32 / 0.8 = 40
    crop = np.asarray(resized.crop((9, 4, 41, 36)), np.float32).transpose(2, 0, 1) / 255
    assert (found - torch.from_numpy((crop - 0.5) / 0.5)).abs().max() < 1.01 / 127.5


def test_a_processor_that_keeps_the_shape_of_pictures_is_refused(tmp_path):
    ref = saved(tmp_path, vit(), transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False))
    with pytest.raises(
        BadModel, match=r"gives \(3, 32, 42\) and \(3, 53, 32\) for pictures of two shapes.*preprocessor_config"
    ):
        load_model(ref)


def test_options_that_the_processor_decides_are_refused(plain):
    loaded = Loaded("hf:net", None, {"processor": "{}", "input_size": (3, 32, 32)})
    with pytest.raises(BadModel, match="--mean, --crop-pct: the image processor of hf:net"):
        preprocess_of(loaded, {"mean": (0, 0, 0), "crop_pct": 1.0, "input_size": (3, 32, 32)})
    with pytest.raises(BadModel, match=r"gives \(3, 32, 32\); change its preprocessor_config"):
        load_model(f"hf:{plain}", overrides={"input_size": (3, 64, 64)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_in_another_precision_is_computed_in_float32_and_says_so(dtype, tmp_path):
    torch.manual_seed(0)
    net = vit().eval()
    loaded = load_model(saved(tmp_path, net.to(dtype)))
    assert loaded.notes == (f"hf:{tmp_path} was saved in {str(dtype)[6:]}; it is computed in float32.",)
    assert {t.dtype for t in loaded.program.state_dict.values()} == {torch.float32}
    x = images((3, 32, 32), 2)
    torch.testing.assert_close(capture(loaded).module(x), net.float()(x).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_folder_keeps_the_head_of_its_own_task(tmp_path):
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    torch.manual_seed(0)
    net = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes, num_labels=7)).eval()
    ref = saved(tmp_path, net, transformers.SegformerImageProcessor(size=THIRTY_TWO))
    x = images((3, 32, 32), 2)
    torch.testing.assert_close(capture(load_model(ref)).module(x), net(x).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "config.json",
            lambda config: {**config, "id2label": {str(i): str(i) for i in range(7)}},
            r"has weights of other shapes than its config\.json says: classifier\.bias \(5,\) for \(7,\), "
            r"classifier\.weight \(5, 16\) for \(7, 16\)\. Fix config\.json, of a head id2label",
        ),
        (
            "config.json",
            lambda config: [config],
            r"cannot be loaded: config\.json holds a list, and an object \{\.\.\.\} is needed",
        ),
        ("preprocessor_config.json", lambda config: [], r"preprocessor_config\.json holds a list, and an object"),
    ],
    ids=["other classes", "list", "list of the processor"],
)
def test_a_configuration_of_another_model_or_of_none_is_named(name, change, says, tmp_path):
    ref, path = saved(tmp_path, vit()), tmp_path / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadModel, match=says):
        load_model(ref)


def test_weights_that_are_missing_or_have_no_place_are_named(tmp_path):
    saved(tmp_path, vit())
    config = json.loads((tmp_path / "config.json").read_text())

    def load_as(architecture: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        load_model(f"hf:{tmp_path}")

    with pytest.raises(BadModel, match=r"has no place for weights of ViTModel: classifier\.bias, classifier\.weight|lacks"):
        load_as("ViTModel")
    with pytest.raises(BadModel, match=r"lacks weights of ViTForMaskedImageModeling: decoder"):
        load_as("ViTForMaskedImageModeling")
    with pytest.raises(BadModel, match="is a Nothing, which transformers"):
        load_as("Nothing")
    with pytest.raises(BadModel, match="takes input_ids"):
        load_as("BertModel")


def test_code_in_a_folder_is_not_run(tmp_path):
    saved(tmp_path, vit())
    marker = tmp_path / "marker"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((tmp_path / name).read_text())
        fields["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor"), "own.Own")
        fields |= {"model_type": "own"} if name == "config.json" else {}
        (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(BadModel, match="cannot be loaded"):
        load_model(f"hf:{tmp_path}")
    assert not marker.exists()
