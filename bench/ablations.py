"""Recipes that leave a part of a paper out, or have its own settings: for benches, beside those that users choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bench.module_search import ModuleSearch

from fewbit.choose import Recipe
from fewbit.choose.correct import OutputBias
from fewbit.choose.finetune import Finetune
from fewbit.choose.objectives import RankingLoss, SquaredError
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.ranges import Ranges
from fewbit.choose.reconstruct import Reconstruct
from fewbit.choose.sensitivity import NuclearNorm, OutputKL
from fewbit.recipes import ENTROPY, FAST, IN_TURN, LIU2021, MSE, RECIPES


def _liu2021(about: str, search: OutputSearch) -> Recipe:
    return replace(LIU2021, about=about, passes=(Ranges(), search))


BLOCKS = Reconstruct(
    iterations=200,
    batch=16,
    drop=0.5,
    learn_codes=False,  # in a few hundred iterations learning lowered no mean error below that of GPTQ's codes: bench/notes
    learn_scales=True,
    learn_biases=True,
    scale_lr=5e-3,
    seconds=600.0,
)
ABLATIONS: Mapping[str, Recipe] = {
    **RECIPES,
    "blocks": replace(
        FAST,
        about="fast, then scales and biases of each attention module and MLP learned for its output",
        passes=(*FAST.passes, BLOCKS),
    ),
    "liu2021-similarity": _liu2021("scales searched for the correlation of each op's output", OutputSearch()),
    "liu2021-ranking": _liu2021("the same, with the ranking loss on queries and keys", OutputSearch(ranking=RankingLoss())),
    "liu2021-bias": _liu2021(
        "similarity, and the mean error of each channel taken out of its bias", OutputSearch(correction=OutputBias())
    ),
    "liu2021-channel": _liu2021(
        "liu2021, each channel of a weight with the factor that is best for its own output",
        OutputSearch(ranking=RankingLoss(), per_channel=True, correction=OutputBias()),
    ),
    "output-mse": Recipe(
        "the search of liu2021 by squared error of each op's output, which sees scale, and bias",
        (Ranges(), OutputSearch(objective=SquaredError(), correction=OutputBias())),
    ),
    "liu2021-sequential": _liu2021(
        "liu2021, each op on what the quantized model so far gives it",
        OutputSearch(ranking=RankingLoss(), sequential=True, correction=OutputBias()),
    ),
    "liu2021-module": Recipe(
        "similarity of the outputs of attention modules and MLPs in place of single ops, and bias",
        (Ranges(), ModuleSearch(), OutputBias()),
        sensitivity=NuclearNorm(),
    ),
    "liu2021-kl": replace(
        LIU2021,
        about="liu2021, with --bits mixed:6.0 widths by the KL divergence of the model's answers",
        sensitivity=OutputKL(),
    ),
    "easyquant-onepass": Recipe(
        "EasyQuant's released tool: wider weights per channel in one pass, then wider activations in another",
        (
            ENTROPY,
            replace(IN_TURN, low=0.01, high=1.0, candidates=98, rounds=1, per_channel=True, sides="weights"),
            replace(IN_TURN, low=0.8, high=1.0, candidates=198, rounds=1, sides="inputs", resume=True),
        ),
    ),
    "fdda-paper": Recipe("fdda with the paper's number of iterations: days on a processor", (MSE, Finetune())),
}
