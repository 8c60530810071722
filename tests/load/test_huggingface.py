"""Hugging Face folders: pixels as transformers makes them, the head of the folder's own task, float32, all weights or none."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capture.nets import images
from fewbit.capture import capture
from fewbit.core.inputs import fed
from fewbit.data.images import Preprocess
from fewbit.errors import BadModel
from fewbit.load import Loaded, load_model
from fewbit.load.huggingface import record_of
from fewbit.load.inputs import Given
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
    record, notes = record_of("hf:net", name, processor)
    preprocess = preprocess_of(Loaded("hf:net", None, record), {})
    assert not notes
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


@pytest.mark.parametrize(("high", "wide"), [(28, 28), (28, 56)])
def test_a_processor_that_keeps_the_ratio_makes_pictures_of_its_own_ratio_as_before(high, wide):
    """Depth Anything and DPT, as they are published."""
    sizes = {"size": {"height": high, "width": wide}, "ensure_multiple_of": 14}
    kept = transformers.DPTImageProcessor(**sizes, keep_aspect_ratio=True)
    record, (note,) = record_of("hf:net", "DPTImageProcessor", kept)
    preprocess = preprocess_of(Loaded("hf:net", None, record), {})
    assert f"each is resized to {high} x {wide}" in note
    for times in (2, 3):
        shown = picture(8 * wide * times, 8 * high * times)
        assert torch.equal(preprocess(shown), kept(shown, return_tensors="pt")["pixel_values"][0])
    squeezed = transformers.DPTImageProcessor(**sizes, keep_aspect_ratio=False)
    other = picture(64, 200)
    assert torch.equal(preprocess(other), squeezed(other, return_tensors="pt")["pixel_values"][0])


def test_a_processor_that_keeps_the_ratio_and_does_more_is_refused():
    """No picture gets the processor's own pixels where the size is no multiple of what the sides have to be."""
    kept = transformers.DPTImageProcessor(size={"height": 20, "width": 50}, ensure_multiple_of=16, keep_aspect_ratio=True)
    made = kept(Image.new("RGB", (96, 32)), return_tensors="pt")["pixel_values"].shape[2:]
    squeezed = transformers.DPTImageProcessor(size={"height": 20, "width": 50}, ensure_multiple_of=16)
    assert made != squeezed(Image.new("RGB", (96, 32)), return_tensors="pt")["pixel_values"].shape[2:]
    with pytest.raises(BadModel, match="one size is needed"):
        record_of("hf:net", "DPTImageProcessor", kept)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(vision_config={**SIZES, **vision}, text_config={**SIZES, **text}, projection_dim=8)
    net = transformers.CLIPModel(config).eval()
    return saved(folder, net, transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=THIRTY_TWO)), net


@pytest.mark.parametrize("texts", [1, 2])
def test_a_model_for_images_and_text_is_taken_with_constant_texts(clip, texts):
    ref, net = clip
    ids = torch.tensor([[48, 3, 5, 49], [48, 7, 49, 1]])[:texts]
    loaded = load_model(ref, given=Given({"input_ids": ids}))
    assert loaded.batch is None
    assert {one.name: (one.shape, one.has_batch) for one in loaded.inputs} == {
        "input_ids": ((texts, 4), False),
        "pixel_values": ((3, 32, 32), True),
    }
    x = images((3, 32, 32), 3)
    wanted = net(input_ids=ids, pixel_values=x)
    results = capture(loaded).module(*fed(loaded.inputs, x))
    found = dict(zip([one.name for one in loaded.outputs], results, strict=True))
    for name in ("logits_per_image", "image_embeds"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
    assert not {"text_embeds", "logits_per_text"} & {*found}
    (note,) = loaded.notes
    assert "left out: logits_per_text, text_embeds, text_model_output" in note


@pytest.mark.parametrize("texts", [2, 6])  # a batch of two or three images divides 6, and each would take some of them
def test_a_model_that_takes_all_texts_for_each_image_gets_them_repeated(texts, tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48}
    vision = {"image_size": 32, "patch_size": 16}
    config = transformers.OwlViTConfig(vision_config={**SIZES, **vision}, text_config={**SIZES, **text}, projection_dim=16)
    net = transformers.OwlViTForObjectDetection(config).eval()
    ref = saved(tmp_path, net, transformers.OwlViTImageProcessor(size=THIRTY_TWO))
    ids = torch.tensor([[48, k, 5, 49] for k in range(2, 2 + texts)])
    loaded = load_model(ref, given=Given({"input_ids": ids}))
    assert loaded.batch is None
    module, names = capture(loaded).module, [one.name for one in loaded.outputs]
    for x in (images((3, 32, 32), n) for n in (1, 3)):
        found = dict(zip(names, module(*fed(loaded.inputs, x)), strict=True))
        wanted = net(input_ids=ids.repeat(len(x), 1), pixel_values=x)
        for name in ("logits", "pred_boxes", "class_embeds"):
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)
    assert not any(name.startswith("text_model_output") for name in names)
    assert [("input_ids for each image" in note, "left out" in note) for note in loaded.notes] == [(True, False), (False, True)]


def test_outputs_with_layers_in_front_are_left_out_where_others_have_the_batch_there(tmp_path, monkeypatch):
    """As D-FINE and RF-DETR give what each layer of their decoder makes. With nothing else left it is refused."""

    class ViTWithLayers(transformers.ViTForImageClassification):
        def forward(self, pixel_values=None, **kwargs):
            logits = super().forward(pixel_values, **kwargs).logits
            both = {"logits": logits, "intermediate_logits": torch.stack((logits, 2 * logits))}
            return {name: value for name, value in both.items() if name != "logits" or self.config.num_labels == 5}

    monkeypatch.setattr(sys.modules["transformers"], "ViTWithLayers", ViTWithLayers, raising=False)
    torch.manual_seed(0)
    config = {**SIZES, "image_size": 32, "patch_size": 16}
    net = ViTWithLayers(transformers.ViTConfig(**config, num_labels=5)).eval()
    loaded, x = load_model(ref := saved(tmp_path / "five", net)), images((3, 32, 32), 3)
    assert loaded.batch is None
    assert loaded.notes == (
        f"{ref} gives outputs whose first dimension is not the batch; they are left out: intermediate_logits.",
    )
    torch.testing.assert_close(capture(loaded).module(x), net(x)["logits"], atol=1e-5, rtol=1e-4)
    net = ViTWithLayers(transformers.ViTConfig(**config, num_labels=4)).eval()
    with pytest.raises(BadModel, match=r"gives intermediate_logits of shape \(2, batch, 4\)"):
        load_model(saved(tmp_path / "four", net))


@pytest.mark.slow
def test_rf_detr_gives_its_logits_and_boxes_and_not_those_of_each_layer(tmp_path):
    torch.manual_seed(0)
    layers = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "out_indices": [1, 2]}
    backbone = {
        "model_type": "rf_detr_dinov2",
        "image_size": 32,
        "patch_size": 16,
        "num_windows": 1,
        "window_block_indexes": [0],
    }
    sizes = {"d_model": 32, "num_queries": 4, "decoder_layers": 2, "decoder_ffn_dim": 64, "group_detr": 1, "num_labels": 5}
    heads = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    config = transformers.RfDetrConfig(backbone_config={**layers, **backbone}, **sizes, **heads)
    net = transformers.RfDetrForObjectDetection(config).eval()
    loaded, x = load_model(saved(tmp_path, net)), images((3, 32, 32), 1)
    found = dict(zip([one.name for one in loaded.outputs], capture(loaded).module(x), strict=True))
    wanted = net(x)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3)
    assert not [name for name in found if name.startswith("intermediate")]
    assert "intermediate_hidden_states" in "".join(loaded.notes)


def test_a_model_for_images_and_text_says_what_is_missing(clip):
    with pytest.raises(BadModel, match=r"input_ids must be given.*--input input_ids=VALUE.*CLIPVisionModelWithProjection"):
        load_model(clip[0])
    with pytest.raises(BadModel, match=r"input_ids are whole numbers, and floats are given.*--input input_ids=ids\.npy"):
        load_model(clip[0], given=Given({"input_ids": torch.rand(1, 4)}))


@pytest.mark.slow
def test_a_model_whose_image_has_another_name_is_taken(tmp_path):
    sizes = {"num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1, "num_labels": 5}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 1}
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(**sizes, **heads, image_size=32)
    net = transformers.PerceiverForImageClassificationConvProcessing(config).eval()
    ref = saved(tmp_path, net, transformers.PerceiverImageProcessor(size=THIRTY_TWO, crop_size=THIRTY_TWO))
    x = images((3, 32, 32), 2)
    torch.testing.assert_close(capture(load_model(ref)).module(x), net(x).logits, atol=1e-5, rtol=1e-4)


def test_a_processor_that_takes_more_than_pictures_is_named_and_not_asked_where_arrays_are_given(tmp_path):
    ref = saved(tmp_path, vit(), transformers.VitMatteImageProcessor())
    with pytest.raises(BadModel, match=r"takes trimaps beside each picture.*arrays.*--input-size 3,HEIGHT,WIDTH and \.npy"):
        load_model(ref)
    loaded = load_model(ref, overrides={"input_size": (3, 32, 32)})
    assert loaded.input_shape == (3, 32, 32)
    assert "trimaps beside each picture. It is not asked" in loaded.notes[0]
    assert "processor" not in loaded.record


def test_all_options_together_decide_and_the_processor_is_not_asked(plain):
    given = {"input_size": (3, 32, 32), "resize": "squash", "mean": (0.1, 0.2, 0.3), "std": (0.5,)}
    loaded = load_model(f"hf:{plain}", overrides=given)
    assert "is not asked: --input-size, --resize, --mean and --std decide" in loaded.notes[0]
    found = preprocess_of(loaded, {**given, "interpolation": "bilinear"})
    assert found == Preprocess((3, 32, 32), (0.1, 0.2, 0.3), (0.5,) * 3, "bilinear", "squash", crop_pct=1.0)


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


SHORT = {"size": {"shortest_edge": 32}}
OF_TWO_SIZES = {
    "a crop, for size is one already": ("CLIPImageProcessor", {**SHORT, "do_center_crop": False}),
    "height and width": ("DetrImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 64}}),
    "the ratio": (
        "DPTImageProcessor",
        {"size": {"height": 20, "width": 50}, "ensure_multiple_of": 16, "keep_aspect_ratio": True},
    ),
    "nothing": ("ViltImageProcessor", {**SHORT, "size_divisor": 8}),
}


@pytest.mark.parametrize("case", OF_TWO_SIZES)
def test_what_is_said_to_give_one_size_gives_it(case):
    name, options = OF_TWO_SIZES[case]
    processor = getattr(transformers, name)(**options)
    with pytest.raises(BadModel, match="for pictures of two shapes; one size is needed") as error:
        record_of("hf:net", name, processor)
    advice = re.search(r"is needed: (.*) in preprocessor_config", str(error.value))
    assert (advice is None) == (case == "nothing")
    if advice:
        followed = getattr(transformers, name)(**{**options, **json.loads(f"{{{advice[1]}}}")})
        record, _ = record_of("hf:net", name, followed)
        found = [followed(picture(*shape), return_tensors="pt")["pixel_values"][0].shape for shape in ((80, 40), (40, 104))]
        assert [tuple(shape) for shape in found] == [record["input_size"]] * 2


class Clips(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x.unflatten(1, (2, 3))).logits


@pytest.mark.parametrize("kind", ["VideoMAE", "Timesformer"])
def test_a_model_that_takes_videos_is_said_to_and_taken_with_the_frames_in_the_channels(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SIZES, image_size=32, patch_size=16, num_frames=2, num_labels=3)
    net = getattr(transformers, f"{kind}ForVideoClassification")(config).eval()
    ref = saved(tmp_path, net, transformers.VideoMAEImageProcessor(**SHORT, crop_size=THIRTY_TWO))
    with pytest.raises(
        BadModel, match=r"takes videos.*5 dimensions .* fewbit takes images.*unflatten\(1, \(frames, channels\)"
    ):
        load_model(ref)
    x = images((6, 32, 32), 2)
    loaded = load_model(Clips(net), overrides={"input_size": (6, 32, 32)})
    wanted = net(torch.stack([x[:, :3], x[:, 3:]], 1)).logits
    torch.testing.assert_close(capture(loaded).module(x), wanted, atol=1e-5, rtol=1e-4)


class InOrder(torch.nn.Module):
    def __init__(self, net: torch.nn.Module, ids: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("ids", ids)

    def forward(self, x: torch.Tensor) -> Any:
        e = self.net.vilt.embeddings
        y = e.patch_embeddings(x).flatten(2).transpose(1, 2)
        y = torch.cat((e.cls_token.expand(y.shape[0], -1, -1), y), 1) + e.position_embeddings
        ids = self.ids.expand(y.shape[0], -1)
        return self.net(ids, image_embeds=y, pixel_mask=torch.ones(y.shape[:2])).logits


def test_a_model_that_draws_patches_at_random_is_named_and_taken_with_them_in_order(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        **SIZES, vocab_size=50, max_position_embeddings=8, image_size=32, patch_size=8, num_labels=3
    )
    net, ids = transformers.ViltForQuestionAnswering(config).eval(), torch.tensor([[3, 5, 7, 9]])
    ref = saved(tmp_path, net, transformers.ViltImageProcessor(**SHORT, size_divisor=8))
    with pytest.raises(BadModel, match=r"draws the order of an image's patches at random.*image_embeds=y, pixel_mask="):
        load_model(ref, given=Given({"input_ids": ids}))
    x = images((3, 32, 32), 2)
    loaded = load_model(InOrder(net, ids), overrides={"input_size": (3, 32, 32)})
    wanted = net(ids.expand(2, -1), pixel_values=x).logits
    torch.testing.assert_close(capture(loaded).module(x), wanted, atol=1e-5, rtol=1e-4)
