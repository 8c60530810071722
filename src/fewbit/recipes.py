"""The recipes that have a name. A recipe is a value; a user's own is one as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fewbit.choose.aciq import AnalyticClip
from fewbit.choose.channel_bits import ChannelBits
from fewbit.choose.correct import LayerOutput, OutputBias, WeightMean
from fewbit.choose.distill import SHORTER, Distill
from fewbit.choose.gptq import Gptq
from fewbit.choose.module_search import ModuleSearch
from fewbit.choose.objectives import Cosine, RankingLoss, SquaredError
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.powell import JointSearch
from fewbit.choose.ranges import EntropyRange, MinMax, MseRange, Percentile
from fewbit.choose.recipe import Recipe
from fewbit.choose.sensitivity import NuclearNorm, OutputKL
from fewbit.choose.soft_codes import Reconstruct
from fewbit.equalize import Equalize
from fewbit.errors import UnknownName

TURNS = OutputSearch(objective=Cosine(), low=0.5, high=2.0, inverse=True, start="recipe", sequential=True)
EASYQUANT = Recipe(
    EntropyRange(),
    MinMax(),
    about="Wu et al. 2020 (EasyQuant): steps in turn for the cosine of each op's output, layer by layer",
    search=TURNS,
)
LIU2021 = Recipe(
    about="Liu et al. 2021: similarity, ranking and bias; with --bits mixed:6.0 widths by nuclear norms as well",
    search=OutputSearch(ranking=RankingLoss()),
    correction=OutputBias(),
    sensitivity=NuclearNorm(),
)
FAST = Recipe(
    MseRange(),
    MinMax(),
    Gptq(),
    about="closed form: equalized, ranges by squared error, GPTQ on what the quantized model reads, bias and gain",
    correction=LayerOutput(),
    free_softmax=True,
    equalize=Equalize(),
)
PAPERS = Reconstruct(seconds=600.0)
LEARNT = Reconstruct(
    steps=200,
    batch=16,
    drop=0.5,
    learn_codes=False,  # in a few hundred steps learning lowered no mean error below that of GPTQ's codes: bench/README.md
    learn_steps=True,
    learn_biases=True,
    step_rate=5e-3,
    seconds=600.0,
)
ROTATED = replace(
    FAST,
    about="fast, behind random rotations of the residual stream and of each head: outliers of channels are spread",
    equalize=Equalize(rotate=True, rotate_heads=True),
)
RECIPES: Mapping[str, Recipe] = {
    "minmax": Recipe(about="the whole range that was seen"),
    "percentile": Recipe(Percentile(), MinMax(), about="99.99 % of the activations, all of the weights"),
    "mse": Recipe(MseRange(), MseRange(), about="the ranges with the smallest squared error of each tensor"),
    "kl": Recipe(EntropyRange(), MinMax(), about="activations by the entropy of their histogram, all of the weights"),
    "easyquant": EASYQUANT,
    "easyquant-onepass": replace(
        EASYQUANT,
        about="EasyQuant's released tool: wider weights per channel in one pass, then wider activations in another",
        search=replace(TURNS, low=0.01, high=1.0, candidates=98, rounds=1, per_channel=True, sides="weights"),
        then=replace(TURNS, low=0.8, high=1.0, candidates=198, rounds=1, sides="inputs"),
    ),
    "aciq": Recipe(
        AnalyticClip(),
        MinMax(),
        about="Banner et al. 2019 (ACIQ): analytic clipping, a width for each channel, the means of weights kept",
        correction=WeightMean(),
        channels=ChannelBits(),
    ),
    "liu2021-similarity": replace(
        LIU2021, about="steps searched for the correlation of each op's output", search=OutputSearch(), correction=None
    ),
    "liu2021-ranking": replace(LIU2021, about="the same, and what makes attention scores keeps their order", correction=None),
    "liu2021-bias": replace(
        LIU2021, about="similarity, and the mean error of each channel taken out of its bias", search=OutputSearch()
    ),
    "liu2021": LIU2021,
    "liu2021-channel": replace(
        LIU2021,
        about="liu2021, each channel of a weight with the factor that is best for its own output",
        search=OutputSearch(ranking=RankingLoss(), per_channel=True),
    ),
    "output-mse": Recipe(
        about="the search of liu2021 by squared error of each op's output, which sees scale, and bias",
        search=OutputSearch(objective=SquaredError()),
        correction=OutputBias(),
    ),
    "liu2021-sequential": replace(
        LIU2021,
        about="liu2021, each op on what the quantized model so far gives it",
        search=OutputSearch(ranking=RankingLoss(), sequential=True),
    ),
    "liu2021-module": replace(
        LIU2021,
        about="similarity of the outputs of attention modules and MLPs in place of single ops, and bias",
        search=None,
        module=ModuleSearch(),
    ),
    "liu2021-kl": replace(
        LIU2021,
        about="liu2021, with --bits mixed:6.0 widths by the KL divergence of the model's answers",
        sensitivity=OutputKL(),
    ),
    "fast": FAST,
    "fast-rotated": ROTATED,
    "best": replace(
        FAST,
        about="fast, then steps and biases of each attention module and MLP learnt for its output (slow; --time)",
        rebuild=LEARNT,
    ),
    "adaround": Recipe(
        MseRange(),
        MseRange(),
        about="Nagel et al. 2020: each layer's rounding learnt for its output (slow; --time)",
        rebuild=replace(PAPERS, scope="op"),
    ),
    "brecq": Recipe(
        MseRange(),
        MseRange(),
        about="Li et al. 2021: rounding and steps learnt block by block, by Fisher information (slow; --time)",
        rebuild=replace(PAPERS, fisher=True, learn_steps=True),
    ),
    "qdrop": Recipe(
        MseRange(),
        MseRange(),
        about="Wei et al. 2022: the same with half of the activations left float at random (slow; --time)",
        rebuild=replace(PAPERS, drop=0.5, learn_steps=True),
    ),
    "lapq": Recipe(
        MseRange(),
        MseRange(),
        about="LAPQ: ranges by the norm p that the model's loss likes best, then all steps together (slow; --time)",
        joint=JointSearch(),
    ),
    "fdda": Recipe(
        MseRange(),
        MseRange(),
        about="FDDA: weights tuned on the images and on synthetic ones that share their batch-norm statistics (slow; --steps)",
        tune=SHORTER,
    ),
    "fdda-paper": Recipe(
        MseRange(), MseRange(), about="the same with the paper's number of steps: days on a processor", tune=Distill()
    ),
}
DEFAULT = "mse"


def recipe_named(name: str) -> Recipe:
    """The recipe with a name. Raises UnknownName with near matches."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
