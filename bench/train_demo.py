"""Train the demo models on CIFAR-10 and write what the package ships: weights, calibration and test images.

    python -m bench.train_demo vit --data DIR
    python -m bench.train_demo resnet20 --data DIR
    python -m bench.train_demo resnet20-long --data DIR        # two cycles more; not shipped
    python -m bench.train_demo mobilenet --data DIR

DIR holds `train.parquet` and `test.parquet` with a column `image` ({bytes, path}) and a column `label`, the layout of
the Hugging Face copy of CIFAR-10. All are trained in bf16 autocast with cycles of the learning rate, random crop
and flip: the transformer as is usual for small ones (AdamW, CutMix and MixUp on a third of the batches, label smoothing), the
convolutional networks, too small to need either, by SGD with Nesterov momentum. A cycle may keep the running average of its
weights.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewbit.demo.cnn import NETS, weights_of
from fewbit.demo.model import CALIBRATION, MEAN, STD, TEST, WEIGHTS, architecture

CALIBRATION_IMAGES, TEST_IMAGES = 256, 1000


@dataclass(frozen=True)
class Cycle:
    """The learning rate goes up to `lr` and down to 0 once in so many epochs; `decay` is the weights'. `mixing` is the share of
    batches with CutMix or MixUp. With `average` the result is the exponential average of the weights, which keeps so much of
    itself at each step.
    """

    epochs: int
    lr: float
    decay: float
    mixing: float = 0.0
    smoothing: float = 0.0
    average: float | None = None


@dataclass(frozen=True)
class Training:
    """How one model is trained. `warmup` is the share of a cycle's steps; `clip` the largest norm of a gradient."""

    build: Callable[[], torch.nn.Module]
    weights: Path
    cycles: tuple[Cycle, ...]
    warmup: float
    clip: float = 5.0
    adam: bool = False

    def optimizer(self, net: torch.nn.Module, cycle: Cycle) -> torch.optim.Optimizer:
        """Weights decay, biases and norms do not."""
        decayed = [p for p in net.parameters() if p.ndim > 1]
        plain = [p for p in net.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": cycle.decay}, {"params": plain, "weight_decay": 0.0}]
        if self.adam:
            return torch.optim.AdamW(groups, lr=cycle.lr)
        return torch.optim.SGD(groups, lr=cycle.lr, momentum=0.9, nesterov=True)


def open_vit() -> torch.nn.Module:
    """The transformer with open attention: twice as fast as the fused one's backward pass on a CPU."""
    net = architecture()
    for block in net.blocks:
        block.attn.fused_attn = False  # type: ignore[union-attr]
    return net


def open_mobilenet() -> torch.nn.Module:
    """The net with depthwise convolutions of stride 2 in float32: their backward pass in bf16 is ten times slower on a CPU."""
    net = NETS["mobilenet"]()
    for conv in net.modules():
        if isinstance(conv, torch.nn.Conv2d) and conv.groups > 1 and conv.stride != (1, 1):
            conv.forward = partial(_in_float32, conv)  # type: ignore[method-assign]
    return net


def _in_float32(conv: torch.nn.Conv2d, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.float(), conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


STEEP = (Cycle(27, 0.1, 5e-4), Cycle(26, 0.1, 5e-4))
MILD = Cycle(20, 0.05, 5e-4, mixing=0.25, smoothing=0.05, average=0.9995)
MODELS: Mapping[str, Training] = {
    "vit": Training(open_vit, WEIGHTS, (Cycle(30, 1.5e-3, 0.05, 0.3, 0.05),), warmup=0.1, clip=1.0, adam=True),
    "resnet20": Training(NETS["resnet20"], weights_of("resnet20"), STEEP, warmup=0.2),
    "resnet20-long": Training(NETS["resnet20"], weights_of("resnet20-long"), (*STEEP, Cycle(36, 0.1, 5e-4), MILD), warmup=0.2),
    "mobilenet": Training(open_mobilenet, weights_of("mobilenet"), (Cycle(20, 0.1, 4e-4),), warmup=0.2),
}


def pixels(table: pa.Table) -> tuple[Tensor, Tensor]:
    """Images as uint8 (n, 3, 32, 32), labels as int64 (n,)."""
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def normalized(images: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) to the float32 input of the model."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels and mirror half of them: (n, 3, 32, 32) to the same."""
    n = len(x)
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, n), generator=generator)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None]
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, 31 - torch.arange(32), torch.arange(32)) + dx[:, None]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns[:, None, None, :]]


def mixed(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix or MixUp, half of the time each: images and soft labels (n, classes), with the second image of each pair."""
    order = torch.randperm(len(x), generator=generator)
    share = float(np.random.default_rng(int(torch.randint(1 << 31, (1,), generator=generator))).beta(0.8, 0.8))
    if torch.rand(1, generator=generator) < 0.5:
        return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]
    side = int(32 * math.sqrt(1 - share))
    top, left = (int(torch.randint(0, 33 - side, (1,), generator=generator)) for _ in range(2))
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = x[order][:, :, top : top + side, left : left + side]
    kept = 1 - side * side / 1024
    return x, kept * y + (1 - kept) * y[order]


@torch.no_grad()
def accuracy(net: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent, float32."""
    net.eval()
    hits = sum(
        int((net(normalized(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * hits / len(labels)


def train(model: Training, data: Path, *, batch: int, seed: int, first: int = 0) -> torch.nn.Module:
    """The trained network; scored and saved every three epochs. The test images are only scored, nothing is chosen by them.

    `first` is the cycle to begin with; above 0 it goes on from the weights that the one before has saved.
    """
    torch.manual_seed(seed)
    images, labels = pixels(pq.read_table(data / "train.parquet"))
    test_images, test_labels = pixels(pq.read_table(data / "test.parquet"))
    net = model.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub has no such overload
    start = time.time()
    for number, cycle in enumerate(model.cycles[first:], first):
        if number:
            load_weights(net, model.weights)
        generator = torch.Generator().manual_seed(seed + number)
        optimizer, steps = model.optimizer(net, cycle), cycle.epochs * (len(images) // batch)
        average = (
            AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(cycle.average), use_buffers=True) if cycle.average else None
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cycle.lr, total_steps=steps, pct_start=model.warmup)
        for epoch in range(cycle.epochs):
            net.train()
            for index in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
                x = augmented(normalized(images[index]), generator)
                y = F.one_hot(labels[index], 10).float()
                if torch.rand(1, generator=generator) < cycle.mixing:
                    x, y = mixed(x, y, generator)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = net(x.contiguous(memory_format=torch.channels_last)).float()
                    loss = F.cross_entropy(logits, y, label_smoothing=cycle.smoothing)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), model.clip)
                optimizer.step()
                schedule.step()
                if average is not None:
                    average.update_parameters(net)
            if epoch % 3 == 2 or epoch in (0, cycle.epochs - 1):
                kept = net if average is None else average.module
                score = accuracy(kept, test_images, test_labels)
                where = f"cycle {number + 1}/{len(model.cycles)}  epoch {epoch + 1}/{cycle.epochs}"
                print(f"{where}  loss {loss.item():.3f}  test {score:.2f} %  {time.time() - start:.0f} s", flush=True)
                save_weights(kept, model.weights)
    return kept.eval()


def load_weights(net: torch.nn.Module, path: Path) -> None:
    """The weights that `save_weights` has written."""
    net.load_state_dict({k: w.float() if w.is_floating_point() else w for k, w in load_file(path).items()})


def save_weights(net: torch.nn.Module, path: Path) -> None:
    """Write the weights as fp16."""
    save_file({name: w.half().contiguous() if w.is_floating_point() else w for name, w in net.state_dict().items()}, path)


def ship_images(data: Path, seed: int) -> None:
    """Write calibration images from the train split and test images from the test split."""
    rng = np.random.default_rng(seed)
    for source, target, count in (("train", CALIBRATION, CALIBRATION_IMAGES), ("test", TEST, TEST_IMAGES)):
        table = pq.read_table(data / f"{source}.parquet")
        pq.write_table(table.take(np.sort(rng.choice(len(table), count, replace=False))), target, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cycle", type=int, default=1, help="begin with this one, from the weights of the one before")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model == "vit":
        ship_images(args.data, args.seed)
    train(MODELS[args.model], args.data, batch=args.batch, seed=args.seed, first=args.cycle - 1)


if __name__ == "__main__":
    main()
