"""Train the DETR of the demo on scenes of CIFAR-10 images, and write what the package ships.

    python -m bench.train_detr train --data DIR --work WORK         # on one core; goes on where it was stopped
    python -m bench.train_detr score --data DIR --count 2000        # AP of the weights in the package on unseen scenes

The backbone first learns the classes of CIFAR-10 images, many in a mosaic. Then all learn scenes (bench/scenes.py, train split)
with Hungarian matching and DETR's losses. Four things are there in training alone, and make it converge in hours: batch norms
that learn, frozen in what is shipped; groups of object queries that do not see each other, each matched for itself (Group
DETR, Chen et al. 2022), the first of which is shipped; a class and a box for each token behind the encoder; and more mosaics.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bench.scenes import OBJECTS, SIDE, Scene, Scenes, coco, numbered
from bench.train_demo import augmented, normalized, pixels
from numpy.random import Generator
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import box_convert, generalized_box_iou_loss

from fewbit.demo.detr import WEIGHTS, architecture, detr
from fewbit.demo.model import CLASSES

NOTHING = len(CLASSES)  # the class of a query without an object
GROUPS, CELLS = 4, 6  # groups of queries in training; tokens along a side
POOL, FRESH = 20_000, 0.25  # scenes at hand; the share of a batch that is replaced once it was used
BATCH, PEAK, DECAY, WARMUP, CLIP, KEPT = 32, 8e-4, 1e-2, 0.04, 1.0, 0.999
MOSAICS, ACROSS, TILES = 16, (2, 3, 4), 2.0  # mosaics beside a batch, tiles along their sides in turn, the weight of their loss
NO_OBJECT, CLASS, CORNERS, OVERLAP, DENSE = 0.1, 1.0, 5.0, 2.0, 1.0  # weights of losses; the first three are DETR's


@dataclass(frozen=True)
class Truth:
    """The objects of n scenes.

    Classes (n, OBJECTS), NOTHING where there are fewer; boxes as center and size in shares of the side (n, OBJECTS, 4); for
    each token the object that is seen at its center, -1 for none (n, CELLS, CELLS).
    """

    labels: Tensor
    boxes: Tensor
    owner: Tensor

    def __getitem__(self, index: Tensor) -> Truth:
        return Truth(self.labels[index], self.boxes[index], self.owner[index])


def truth_of(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """One row of a Truth."""
    n, step = len(scene.labels), SIDE // CELLS
    labels = torch.full((OBJECTS,), NOTHING)
    labels[:n] = torch.from_numpy(scene.labels)
    boxes = torch.zeros(OBJECTS, 4)
    boxes[:n] = box_convert(torch.from_numpy(scene.boxes) / SIDE, "xyxy", "cxcywh")
    seen = scene.masks[:, step // 2 :: step, step // 2 :: step]
    return labels, boxes, torch.from_numpy(np.where(seen.any(0), seen.argmax(0), -1))


class Pool:
    """Scenes at hand: batches are drawn from it, mirrored or not, and a part of what was drawn makes place for new scenes."""

    def __init__(self, source: Scenes, rng: Generator, size: int = POOL) -> None:
        self.source, self.rng = source, rng
        scenes = [source.scene(rng) for _ in range(size)]
        self.images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).contiguous()
        self.truth = Truth(*(torch.stack(rows) for rows in zip(*map(truth_of, scenes), strict=True)))

    def batch(self, size: int) -> tuple[Tensor, Truth]:
        """Images (size, 3, SIDE, SIDE), with other brightness and contrast each, ready for the model, and their objects."""
        index = torch.from_numpy(self.rng.choice(len(self.images), size, replace=False))
        images, truth = self.images[index], self.truth[index]
        if self.rng.random() < 0.5:
            boxes = torch.cat([1 - truth.boxes[..., :1], truth.boxes[..., 1:]], -1)
            images, truth = images.flip(-1), Truth(truth.labels, boxes, truth.owner.flip(-1))
        for i in index[: int(FRESH * size)].tolist():
            scene = self.source.scene(self.rng)
            self.images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
            self.truth.labels[i], self.truth.boxes[i], self.truth.owner[i] = truth_of(scene)
        shift, factor = (torch.from_numpy(self.rng.uniform(-0.3, 0.3, (2, size, 1, 1, 1)))).float()
        return normalized(images) * (1 + factor) + shift, truth


class Trained(nn.Module):
    """The network with what only training has: batch norms that learn, groups of queries, a class and a box for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.detr = architecture()
        self.detr.set_attn_implementation("eager")  # the fused one's backward pass is slower on a CPU
        self.queries = self.detr.config.num_queries
        width = self.detr.config.d_model
        self.detr.model.query_position_embeddings = nn.Embedding(GROUPS * self.queries, width)
        self.token_class, self.token_box = nn.Linear(width, NOTHING + 1), nn.Linear(width, 4)
        self.tile_class = nn.Linear(self.detr.model.backbone.intermediate_channel_sizes[-1], NOTHING)
        thaw(self.detr)
        self.requires_grad_(True)
        group = torch.arange(GROUPS * self.queries) // self.queries
        apart = torch.zeros(len(group), len(group)).masked_fill(group[:, None] != group[None], -1e4)
        self.register_buffer("apart", apart[None, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits and boxes behind each decoder layer (layers, batch, groups * queries, ...), and those of tokens."""
        model = self.detr.model
        features = model.backbone(x, torch.ones(len(x), SIDE, SIDE))[-1][0]
        tokens = model.input_projection(features).flatten(2).transpose(1, 2)
        place = model.position_embedding(shape=features.shape, device=x.device, dtype=x.dtype).flatten(2).transpose(1, 2)
        seen = model.encoder(inputs_embeds=tokens, spatial_position_embeddings=place).last_hidden_state
        slots = model.query_position_embeddings.weight[None].expand(len(x), -1, -1)
        state, states = torch.zeros_like(slots), []
        for layer in model.decoder.layers:
            state = layer(state, self.apart, place, slots, seen)
            states.append(model.decoder.layernorm(state))
        found = torch.stack(states)
        logits, boxes = self.detr.class_labels_classifier(found), self.detr.bbox_predictor(found)
        return logits.float(), boxes.float().sigmoid(), self.token_class(seen).float(), self.token_box(seen).float().sigmoid()

    def shipped(self) -> dict[str, Tensor]:
        """The weights of the unchanged class, of the first group of queries, as fp16."""
        state = {k: w for k, w in self.detr.state_dict().items() if not k.endswith("num_batches_tracked")}
        state["model.query_position_embeddings.weight"] = state["model.query_position_embeddings.weight"][: self.queries]
        return {name: w.half().contiguous() for name, w in state.items()}


def thaw(module: nn.Module) -> None:
    """Put batch norms that learn in the place of frozen ones."""
    for name, child in module.named_children():
        if type(child).__name__ == "DetrFrozenBatchNorm2d":
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            thaw(child)


def matched(logits: Tensor, boxes: Tensor, truth: Truth) -> Tensor:
    """For each query the object that it is matched to, -1 for none: (layers, batch, groups * queries)."""
    with torch.no_grad():
        labels = truth.labels.clamp(max=NOTHING - 1)[None, :, None].expand(*logits.shape[:3], -1)
        cost = -CLASS * logits.softmax(-1).gather(-1, labels)
        cost += CORNERS * torch.cdist(boxes, truth.boxes[None].expand(len(boxes), -1, -1, -1), p=1)
        cost += OVERLAP * overlap_loss(boxes[..., None, :], truth.boxes[None, :, None])
    counts, costs = (truth.labels < NOTHING).sum(1).tolist(), cost.unflatten(2, (GROUPS, -1)).numpy()
    found = np.full(costs.shape[:-1], -1)
    for place in np.ndindex(*costs.shape[:3]):
        queries, objects = linear_sum_assignment(costs[place][:, : counts[place[1]]])
        found[place][queries] = objects
    return torch.from_numpy(found).flatten(2)


def overlap_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of boxes given as center and size."""
    first, second = torch.broadcast_tensors(a, b)
    return generalized_box_iou_loss(box_convert(first, "cxcywh", "xyxy"), box_convert(second, "cxcywh", "xyxy"))


def set_loss(logits: Tensor, boxes: Tensor, truth: Truth, owner: Tensor, nothing: float) -> Tensor:
    """DETR's losses of predictions (..., batch, n, ...) whose objects are `owner` (..., batch, n), -1 for none."""
    labels = torch.where(owner >= 0, truth.labels.expand(*owner.shape[:-1], -1).gather(-1, owner.clamp(min=0)), NOTHING)
    weights = torch.tensor([1.0] * NOTHING + [nothing])
    loss = CLASS * F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weights)
    given = truth.boxes.expand(*owner.shape[:-1], -1, -1).gather(-2, owner.clamp(min=0)[..., None].expand(*owner.shape, 4))
    a, b = boxes[owner >= 0], given[owner >= 0]
    return loss + CORNERS * (a - b).abs().sum(-1).mean() + OVERLAP * overlap_loss(a, b).mean()


def loss_of(net: nn.Module, x: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the part of the last decoder layer."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, boxes, token_logits, token_boxes = net(x.contiguous(memory_format=torch.channels_last))
    owner = matched(logits, boxes, truth)
    layers = [set_loss(*rows, truth, one, NO_OBJECT) for *rows, one in zip(logits, boxes, owner, strict=True)]
    tokens = set_loss(token_logits, token_boxes, truth, truth.owner.flatten(1), 1.0)
    return torch.stack(layers).sum() + DENSE * tokens, layers[-1]


class Mosaics:
    """CIFAR-10 images side by side, 2 by 2 to 4 by 4: many more objects for the time that a scene takes."""

    def __init__(self, data: Path, seed: int) -> None:
        self.images, self.labels = pixels(pq.read_table(data / "train.parquet"))
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int, across: int) -> tuple[Tensor, Tensor]:
        """Mosaics (size, 3, SIDE, SIDE), ready for the model, and the classes of their tiles (size, across, across)."""
        index = torch.randint(len(self.images), (size * across * across,), generator=self.generator)
        x, side = augmented(normalized(self.images[index]), self.generator), SIDE // across
        tiles = F.interpolate(x, (side, side), mode="bilinear", antialias=True).view(size, across, across, 3, side, side)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(size, 3, SIDE, SIDE), self.labels[index].view(size, across, across)


def tile_loss(net: Trained, x: Tensor, labels: Tensor) -> Tensor:
    """The loss of the backbone on the tiles of mosaics."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = net.detr.model.backbone.model(x.contiguous(memory_format=torch.channels_last)).feature_maps[-1]
        logits = net.tile_class(F.adaptive_avg_pool2d(maps, labels.shape[-1]).permute(0, 2, 3, 1)).float()
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), label_smoothing=0.05)


def pretrain(net: Trained, mosaics: Mosaics, steps: int) -> None:
    """Teach the backbone the classes of tiles."""
    parameters, start, losses = [*net.detr.model.backbone.parameters(), *net.tile_class.parameters()], time.time(), []
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    net.train()
    for step in range(steps):
        loss = tile_loss(net, *mosaics.batch(BATCH, ACROSS[step % len(ACROSS)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            print(
                f"backbone  step {step + 1}/{steps}  loss {np.mean(losses[-200:]):.3f}  {time.time() - start:.0f} s", flush=True
            )


def rate(step: int, steps: int) -> float:
    """The share of the learning rate: up in WARMUP of the steps, down as half a cosine."""
    done = step / steps
    return done / WARMUP if done < WARMUP else 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))


def train(data: Path, work: Path, *, steps: int, first: int, seed: int, every: int) -> None:
    """Train, with a checkpoint every so many steps; the weights in WORK are the average, the test scenes are only scored."""
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    net, saved = Trained().to(memory_format=torch.channels_last), work / "checkpoint.pt"  # type: ignore[call-overload]
    state: dict[str, Any] = torch.load(saved, weights_only=True) if saved.exists() else {"step": 0}
    if not state["step"] and (work / "backbone.pt").exists():
        net.load_state_dict(torch.load(work / "backbone.pt", weights_only=True))
    elif not state["step"]:
        pretrain(net, Mosaics(data, seed), first)
        torch.save(net.state_dict(), work / "backbone.pt")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(KEPT), use_buffers=True)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}], lr=PEAK)
    if state["step"]:
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    pool = Pool(Scenes.of(data, "train"), np.random.default_rng((seed, state["step"])))
    mosaics = Mosaics(data, seed + state["step"] + 1)
    unseen = numbered(Scenes.of(data, "test"), 1, 300)
    net.train()
    start, losses = time.time(), []
    for step in range(state["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate(step, steps)
        loss, last = loss_of(net, *pool.batch(BATCH))
        loss = loss + TILES * tile_loss(net, *mosaics.batch(MOSAICS, ACROSS[step % len(ACROSS)]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        average.update_parameters(net)
        losses.append(last.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            weights = average.module.shipped()  # type: ignore[union-attr,operator]
            save_file(weights, work / "detr.safetensors")
            parts = {"net": net.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step + 1, **parts}, work / "checkpoint.part")
            (work / "checkpoint.part").rename(saved)
            ap, ap50 = score(weights, unseen)
            print(f"step {step + 1}/{steps}  loss {np.mean(losses):.3f}  AP {ap:.1f}  AP50 {ap50:.1f} on {len(unseen)} unseen  "
                  f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
            losses = []


@torch.no_grad()
def score(weights: dict[str, Tensor] | None, scenes: list[Scene]) -> tuple[float, float]:
    """AP and AP50 in percent of the unchanged class with these weights, or those of the package."""
    net = detr() if weights is None else architecture().eval()
    if weights is not None:
        net.load_state_dict({name: w.float() for name, w in weights.items()})
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    outputs = [net(normalized(x)) for x in images.split(50)]
    return average_precision(torch.cat([o.logits for o in outputs]), torch.cat([o.pred_boxes for o in outputs]), scenes)


def average_precision(logits: Tensor, boxes: Tensor, scenes: list[Scene]) -> tuple[float, float]:
    """AP and AP50 in percent by pycocotools; a query counts with its likeliest class."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    scores, labels = logits.softmax(-1)[..., :NOTHING].max(-1)
    corners = box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1) * SIDE
    rows = [
        [i, *box, float(s), int(label)]
        for i, found in enumerate(zip(box_convert(corners, "xyxy", "xywh").tolist(), scores, labels, strict=True))
        for box, s, label in zip(*found, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco(scenes)
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return 100 * float(judge.stats[0]), 100 * float(judge.stats[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="train: where checkpoints and weights go")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=3000, help="steps of the backbone alone")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--count", type=int, default=2000, help="score: scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "train":
        train(args.data, args.work, steps=args.steps, first=args.first, seed=args.seed, every=args.every)
        return
    ap, ap50 = score(None, numbered(Scenes.of(args.data, "test"), args.seed, args.count))
    print(f"{WEIGHTS.name}: AP {ap:.2f}, AP50 {ap50:.2f} on {args.count} scenes of seed {args.seed}")


if __name__ == "__main__":
    main()
