"""The recipes that have a name. A recipe is a value; a user's own is one as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fewbit.choose.aciq import AnalyticClip
from fewbit.choose.attention_steps import AttentionSteps
from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.correct import OutputBias, WeightMean
from fewbit.choose.distill import Distill
from fewbit.choose.entropy_range import EntropyRange
from fewbit.choose.finetune import SHORTER
from fewbit.choose.gptq import Gptq
from fewbit.choose.joint_search import JointSearch
from fewbit.choose.objectives import Cosine, RankingLoss
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.ranges import MinMax, MseRange, Percentile, Ranges
from fewbit.choose.recipe import Recipe
from fewbit.choose.reconstruct import Reconstruct
from fewbit.choose.sensitivity import NuclearNorm
from fewbit.equalize import Equalize
from fewbit.errors import FewbitError, UnknownName

RECOMMENDED = {  # shown first, with when to take them
    "fast": "(the default): about a minute; rotated below 6 bits of activations",
    "mse": "at 8 bits, where seconds count more than a point of agreement",
    "best": "where fast loses too much, with an hour",
}

ENTROPY, MSE = Ranges(EntropyRange(), MinMax()), Ranges(MseRange(), MseRange())
CHANNELS = Equalize(norms=False, values=False, keys=False, convolutions=False, probabilities=False)
IN_TURN = OutputSearch(objective=Cosine(), low=0.5, high=2.0, inverse=True, start=ENTROPY, sequential=True)
LIU2021 = Recipe(
    "Liu et al. 2021: similarity, ranking and bias; with --bits mixed:6.0 widths by nuclear norms as well",
    (Ranges(), OutputSearch(ranking=RankingLoss(), correction=OutputBias())),
    sensitivity=NuclearNorm(),
)
CLOSED = (Ranges(MseRange(), MinMax(), free_softmax=True), AttentionSteps())
GPTQ = Gptq(bias=True, gain=True)
FAST = Recipe(
    "closed form: equalized, ranges by squared error, GPTQ on what the quantized model reads, bias and gain",
    (*CLOSED, GPTQ),
    equalize=Equalize(),
)
PAPERS = Reconstruct(seconds=600.0)
LEARNED = (*CLOSED, replace(GPTQ, images=512), Distill())  # thousands of images are for what learns
ROTATED = Equalize(rotate=True, rotate_heads=True)
RECIPES: Mapping[str, Recipe] = {
    "mse": Recipe("the ranges with the smallest squared error of each tensor", (MSE,), equalize=CHANNELS),
    "fast": FAST,
    "best": replace(
        FAST,
        about="fast, then codes, scales and biases of the whole model learned for the float model's answers (slow; --time)",
        passes=LEARNED,
        judged=True,
    ),
    "fast-rotated": replace(
        FAST,
        about="fast, behind random rotations of the residual stream and of each head: outliers of channels are spread",
        equalize=ROTATED,
    ),
    "best-rotated": replace(
        FAST,
        about="best, behind the same rotations (slow; --time)",
        passes=LEARNED,
        equalize=ROTATED,
        judged=True,
    ),
    "minmax": Recipe("the whole range that was observed", (Ranges(),)),
    "percentile": Recipe("99.99 % of the activations, all of the weights", (Ranges(Percentile(), MinMax()),)),
    "kl": Recipe("activations by the entropy of their histogram, all of the weights", (ENTROPY,)),
    "liu2021": LIU2021,
    "easyquant": Recipe(
        "Wu et al. 2020 (EasyQuant): scales in turn for the cosine of each op's output, layer by layer", (ENTROPY, IN_TURN)
    ),
    "aciq": Recipe(
        "Banner et al. 2019 (ACIQ): analytic clipping, a width for each channel, the means of weights kept",
        (Ranges(AnalyticClip(), MinMax(), channel_bits=ChannelBits()), WeightMean()),
    ),
    "adaround": Recipe(
        "Nagel et al. 2020: each layer's rounding learned for its output (slow; --time)", (MSE, replace(PAPERS, scope="op"))
    ),
    "brecq": Recipe(
        "Li et al. 2021: rounding and scales learned block by block, by Fisher information (slow; --time)",
        (MSE, replace(PAPERS, fisher=True, learn_scales=True)),
    ),
    "qdrop": Recipe(
        "Wei et al. 2022: the same with half of the activations left float at random (slow; --time)",
        (MSE, replace(PAPERS, drop=0.5, learn_scales=True)),
    ),
    "lapq": Recipe(
        "LAPQ: ranges by the norm p that the model's loss likes best, then all scales together (slow; --time)",
        (JointSearch(start=MSE),),
    ),
    "fdda": Recipe(
        "FDDA: weights tuned on the images and on synthetic ones that share their batch-norm statistics (slow; --steps)",
        (MSE, SHORTER),
    ),
}


def recipe_named(name: str) -> Recipe:
    """The recipe with a name. Raises UnknownName with near matches."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]


def plain_ranges(recipe: Recipe, name: str) -> Ranges:
    """The ranges of a recipe that is nothing else, as a search of widths needs it. Raises FewbitError for any other."""
    if is_plain(recipe):
        return recipe.passes[0]  # type: ignore[return-value]
    plain = ", ".join(other for other, one in RECIPES.items() if is_plain(one))
    raise FewbitError(
        f"--recipe {name} looks at more than one tensor, so its scales change with every width that a search tries; "
        f"search with one of {plain}, then give the point that you like to fewbit quantize."
    )


def is_plain(recipe: Recipe) -> bool:
    """Whether every scale follows from its own tensor alone."""
    first = recipe.passes[0] if len(recipe.passes) == 1 and recipe.equalize in (None, CHANNELS) else None
    return isinstance(first, Ranges) and not first.gradients and first.channel_bits is None
