"""FDDA's student: the weights and biases of the quantized model trained against the float model's answers (section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context, LabelledImages
from fewbit.choose.headroom import codes_are_safe, unsafe_codes, weight_of
from fewbit.choose.soft_codes import straight
from fewbit.core.graph import Graph, flat_name
from fewbit.core.plan import Json, PassLog, Plan, described
from fewbit.core.shelf import Shelf
from fewbit.data.synthesize.fdda import Fdda
from fewbit.data.synthesize.source import SHORT, in_steps
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms
from fewbit.errors import BadImages, BadValues
from fewbit.execute.executor import Executor
from fewbit.task import task_of


@dataclass(frozen=True)
class Finetune:
    """Fine-tuning of weights and biases on real and synthetic images together, from the float model's answers.

        L = alpha · T² · KL(softmax(float / T) ‖ softmax(quantized / T)) + CE(quantized, label)

    Each iteration takes `batch` real and `batch` synthetic images, cropped to a random part of `real_crop` and `made_crop` of
    their area, resized and mirrored at random. SGD with Nesterov's `momentum`, `lr` falling to 0 along half a cosine. The
    scales of the plan stay; rounding passes gradients straight through. `images` generates `pool` synthetic images.
    Labels are the float model's own answers, or with `loss` = `labels` those of the images. Defaults are the paper's.
    """

    epochs: int = 350
    iterations: int = 200
    batch: int = 16
    lr: float = 1e-6
    momentum: float = 0.9
    decay: float = 1e-4
    alpha: float = 20.0
    temperature: float = 20.0
    ce: float = 1.0
    real_crop: tuple[float, float] = (0.08, 1.0)
    made_crop: tuple[float, float] = (0.5, 1.0)
    loss: str = "kl"
    images: Fdda = Fdda()
    pool: int = 4096

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "weights and biases tuned on real and synthetic images, for the float model's answers"

    def __post_init__(self) -> None:
        if min(self.epochs, self.iterations) < 0 or min(self.batch, self.pool) < 1 or self.loss not in ("kl", "labels"):
            raise ValueError(f"counts of at least 1 and the loss kl or labels are allowed, not {self}")

    @property
    def steps(self) -> int:
        """Iterations in all."""
        return self.epochs * self.iterations

    def in_steps(self, steps: int) -> Finetune:
        """The same with `steps` iterations of the student, and as many of the generator before it."""
        pool = min(self.pool, steps * self.batch)
        return replace(self, epochs=1, iterations=steps, images=in_steps(self.images, steps), pool=pool)

    def lr_at(self, step: int) -> float:
        return 0.5 * self.lr * (1 + math.cos(math.pi * step / max(self.steps, 1)))

    def check_model(self, teacher: Teacher) -> None:
        """Raises BadModel for a model without batch norms, whose statistics the synthetic images follow."""
        refuse_without_norms(teacher)

    def check(self, context: Context) -> None:
        """Raises BadImages without images or, where labels are the loss, without labels; FewbitError where there are groups."""
        context.refuse_groups(self)
        context.refuse_fixed_batch(self)
        sets = _image_sets(context)
        if not sets or not all(len(images) for images in sets):
            raise BadImages("no images to fine-tune on; a few of each class are needed: --images DIR, or --images synthetic.")
        if self.loss == "labels" and any(images.labels is None for images in sets):
            raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with its weights and biases trained on real images, synthetic ones, or both, and quantized again.

        A weight whose new codes would not be safe in the accumulator keeps its old ones, which is a fallback. Raises BadValues
        where the loss diverges.
        """
        self.check(context)
        graph, builder = context.graph, PlanBuilder(plan, context)
        student = TunedModel(graph, plan)
        record = train(student, context, self)
        unchanged = set_tuned(builder, student, described(self))
        return builder.plan(PassLog.of("finetune", self, summary={**record, "kept": unchanged}))

    def loss_of(
        self, teacher: Float[Tensor, "b classes"], student: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]
    ) -> Tensor:
        """The loss of a batch of answers; KL is the mean over images."""
        t = self.temperature
        exact, quantized = (F.log_softmax(x / t, 1) for x in (teacher, student))
        kl = F.kl_div(quantized, exact, reduction="batchmean", log_target=True)
        return self.alpha * t * t * kl + self.ce * F.cross_entropy(student, labels)


SHORTER = Finetune(epochs=30, iterations=100, lr=1e-5, images=SHORT, pool=1024, real_crop=(0.5, 1.0))


class TunedModel(nn.Module):
    """A plan whose weights and biases are trained: its grids and scales, rounding with a straight gradient.

    `weights` are real numbers, before training the float model's; `biases` begin as the plan's. The codes of an integer bias
    follow from it at the end and are too fine to matter meanwhile.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self._executor = Executor.of(graph, plan, read=straight)
        self._choices = {flat_name(name): choice for name, choice in plan.choices.items() if choice.role == "weight"}
        self._ops: dict[str, str] = {}
        for flat, choice in self._choices.items():
            self.weights[flat] = nn.Parameter(weight_of(graph, graph.site(choice.site)).clone())
        for name in plan.integer_ops:
            if "weight" in graph.op(name).operands and (bias := self._executor.bias(name)) is not None:
                self._ops[flat_name(name)] = name
                self.biases[flat_name(name)] = value = nn.Parameter(bias.clone())
                self._executor.set_bias(name, value)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        for flat, choice in self._choices.items():
            self._executor.give(choice.site, straight(self.weights[flat], choice))
        return self._executor(images)

    def tuned_weights(self) -> dict[str, Tensor]:
        return {choice.site: self.weights[flat].detach() for flat, choice in self._choices.items()}

    def tuned_biases(self) -> dict[str, Tensor]:
        return {name: self.biases[flat].detach() for flat, name in self._ops.items()}


def _class_output(graph: Graph) -> int:
    """Which output has the classes. Raises BadImages for a model that has none."""
    index = task_of(graph).logits
    if index is None:
        raise BadImages("fine-tuning needs a model that gives a class for an image; take another recipe: --recipe fast.")
    return index


def train(student: TunedModel, context: Context, settings: Finetune) -> dict[str, Json]:
    """Train in place; returns the first and last losses for the log. Raises BadValues where the loss is not finite."""
    sets = _image_sets(context)
    real = sets[0] if context.real_images and context.images else None
    random = torch.Generator().manual_seed(context.seed)
    parameters = [*student.weights.values(), *student.biases.values()]
    optimizer = torch.optim.SGD(
        parameters, settings.lr, settings.momentum, weight_decay=settings.decay, nesterov=settings.momentum > 0
    )
    exact, index = Executor(context.graph), _class_output(context.graph)
    losses: list[float] = []
    for step in range(settings.steps):
        batch, labels = zip(*(_batch(images, settings, images is real, random) for images in sets), strict=True)
        x = torch.cat(batch)
        with torch.no_grad():
            teacher = exact(x)[index].flatten(1)
        classes = teacher.argmax(1) if settings.loss == "kl" else torch.cat(cast("tuple[Tensor, ...]", labels))
        loss = settings.loss_of(teacher, student(x)[index].flatten(1), classes.to(teacher.device))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise BadValues(
                f"fine-tuning diverged: its loss is {losses[-1]} at iteration {step + 1} of {settings.steps}. Take a recipe "
                "that does not train (--recipe mse), or a smaller learning rate: Finetune(lr=...)."
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # and none of the graph's own parameters
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        optimizer.step()
        if step % 10 == 9 or step == settings.steps - 1:
            context.progress(f"loss {losses[-1]:.4g}")
    span = max(1, len(losses) // 10)
    return {
        "steps": settings.steps,
        "real": 0 if real is None else len(real),
        "synthetic": sum(len(images) for images in sets if images is not real),
        "labels": "of the images" if settings.loss == "labels" else "the float model's answers",
        "first": sum(losses[:span]) / span if losses else None,
        "last": sum(losses[-span:]) / span if losses else None,
    }


def set_tuned(builder: PlanBuilder, student: TunedModel, method: str) -> list[str]:
    """Put trained weights, quantized again, and trained biases into a plan.

    Returns the sites of weights with unchanged codes: the new ones would not be safe in the accumulator.
    """
    graph, unchanged, biases = builder.graph, [], student.tuned_biases()
    for op_name, bias in biases.items():
        builder.correct(op_name, bias)
    for name, value in student.tuned_weights().items():
        choice, grids = builder.choices[name], builder.allowed.sites[name]
        op = graph.op(graph.site(name).readers[0][0])
        updated = replace(choice, method=f"{choice.method}; {method}")
        recoded = builder.recoded(updated, value, biases.get(op.name))
        if not codes_are_safe(graph, recoded, builder.choices, grids):
            builder.fallbacks.append(unsafe_codes(graph, recoded, builder.choices, grids, "tuned"))
            unchanged.append(name)
            continue
        builder.set(recoded)
    return unchanged


def _image_sets(context: Context) -> list[LabelledImages]:
    """The images to train on: the calibration images and, beside real ones, the synthetic ones."""
    images = LabelledImages(Shelf.of(context.images, context.folder), context.labels) if context.images else None
    return [source for source in (images, context.synthetic) if source is not None]


def _batch(source: LabelledImages, settings: Finetune, real: bool, random: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """A random batch, cropped, and its labels."""
    rows = torch.randint(len(source), (settings.batch,), generator=random)
    area = settings.real_crop if real else settings.made_crop
    return cropped(source.images.rows(rows), area, random), None if source.labels is None else source.labels[rows]


def cropped(
    images: Float[Tensor, "b c h w"], area: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Each image cut to a random part of its area, sides within 3/4 to 4/3 of each other, resized back, mirrored or not."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    share, ratio = uniform(*area), torch.exp(uniform(-1.0, 1.0) * math.log(4 / 3))
    wide, high = (share * ratio).sqrt().clamp_max(1), (share / ratio).sqrt().clamp_max(1)
    x, y = ((1 - side) * uniform(-1.0, 1.0) for side in (wide, high))  # of the middle, in [-1, 1] across the image
    mirror = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    place = torch.stack([torch.stack([wide * mirror, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
