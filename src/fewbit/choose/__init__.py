"""Choose: a grid, a scale and, for weights, the codes of every site, by the passes of a recipe in order.

The frame
    choose            every pass in order, then what holds for all of them
    recipe            what a recipe and a pass are
    context           what a pass may read: graph, statistics, target, calibration images
    builder           a plan while a pass changes it
    headroom          which codes and scales the accumulator has room for
    parts             concatenations whose parts differ, in float or with a fallback
    off_boundaries    scales on which many numbers stand exactly between two codes are moved a little
    common_step       parts of a concatenation take the step of the whole where it is almost theirs
Ranges: each tensor by its own values
    ranges            the pass, with the range methods MinMax, Percentile and MseRange
    range_method      what a range method is
    entropy_range     by the entropy of the histogram (TensorRT)
    aciq              in closed form from a distribution (ACIQ)
    channel_bits      a width for each channel (ACIQ)
    fisher            how much each element of an activation matters, by its gradient; for GPTQ and reconstruction as well
Search on outputs: the scales of an op by what it gives
    output_search     of its input and weight (EasyQuant)
    output_scores     many candidate scales at once
    objectives        what is maximised or minimised
    attention_steps   of probabilities, queries and keys
    rank_flips        how often keys of a head change their order
Search on the whole model
    joint_search      all scales together (LAPQ)
    powell            minima without a gradient
    loss              the whole model's loss
GPTQ: the error of a rounded column goes into the others
    gptq              the pass
    rounding          codes on second moments, for several scales, and descent behind
    regression        real weights and gains that fit second moments
    wide_layers       a layer with very many inputs, its columns in parts
    columns           codes of a weight, column by column
    moments           first and second moments of an op's inputs
    layer_rows        the inputs of each layer, quantized so far and in float
Learning
    reconstruct       codes, block by block (AdaRound, BRECQ, QDrop)
    learn             a block while it is learned
    soft_codes        the code below or the one above
    distill           codes, scales and biases of the whole model, for the float model's answers
    finetune          weights and biases of the whole model, for the float model's answers (FDDA)
Bias
    correct           the mean error that remains, subtracted
Mixed precision: a width for each module
    allocate          under a budget of bytes
    sensitivity       the loss for each width of one module
    frontier          the smallest loss for every number of bytes
"""

from fewbit.choose.allocate import Allocation, allocate
from fewbit.choose.choose import choose
from fewbit.choose.context import Context, LabelledImages
from fewbit.choose.recipe import Pass, Recipe
from fewbit.core.bits import Bits, Mixed, parse_bits

__all__ = ["Allocation", "Bits", "Context", "LabelledImages", "Mixed", "Pass", "Recipe", "allocate", "choose", "parse_bits"]
