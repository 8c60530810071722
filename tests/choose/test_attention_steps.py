"""Scales searched for attention's result. Oracles: every candidate tried on the whole net's own tensors, autograd's softmax."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product

import pytest
import torch

from fewbit.capture.structure import heads
from fewbit.choose import Bits, Recipe, choose
from fewbit.choose.attention_steps import AttentionSteps
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.grid import QParams, fake
from fewbit.execute.executor import Executor

RANGES = Ranges(MinMax(), MinMax(), free_softmax=True)
SEARCH = AttentionSteps()


@pytest.fixture(scope="module")
def sharp(vit, capture_net):
    """A net with a few large probabilities and many small ones, whose sum counts: values have a common mean."""
    net = copy.deepcopy(vit.module)
    net.blocks[0].qkv.weight.data[:32] *= 1.5
    net.blocks[0].qkv.bias.data[32:] += 3
    return capture_net(net)


@pytest.fixture(scope="module")
def plans(sharp, ort_target):
    """The plans before and after the search, at 4 bits."""
    context = sharp.context(ort_target, bits=Bits(4, 4))
    return [choose(context, Recipe("", passes)) for passes in ((RANGES,), (RANGES, SEARCH))]


@pytest.fixture(scope="module")
def operands(sharp):
    """Float operands of the scores and of the product behind them: query, key, probabilities, value; and what scales scores."""
    (one,) = heads(sharp.graph)
    nodes = {node.name: node for node in sharp.graph.module.graph.nodes}
    names = [argument.name for op in (one.scores, one.mix) for argument in nodes[op.node].args[:2]]
    values = {}
    Executor(sharp.graph)(sharp.images, {name: partial(values.__setitem__, name) for name in names})
    query, key, probs, value = (values[name] for name in names)
    scale = next(one for one in (1.0, query.shape[-1] ** -0.5) if torch.allclose((query @ key * one).softmax(-1), probs))
    return one, query, key, probs, value, scale


def scaled(choice, factor):
    return QParams(choice.qparams.scale * factor, choice.qparams.zero)


def test_probabilities_have_the_candidate_whose_product_with_values_is_nearest(plans, operands):
    before, after = plans
    one, _, _, probs, value, _ = operands
    old, values = (before.choices[one.mix.operands[name]] for name in ("probs", "value"))
    right, exact = fake(value, values.qparams, values.grid), probs @ value

    def error(factor):
        return float((fake(probs, scaled(old, factor), old.grid) @ right - exact).square().sum())

    best = min(SEARCH.finer, key=error)
    assert best != 1
    assert float(after.choices[old.site].qparams.scale) == pytest.approx(best * float(old.qparams.scale))
    assert torch.equal(after.choices[values.site].qparams.scale, values.qparams.scale)


def test_queries_and_keys_have_the_pair_whose_softmax_moves_the_result_least(plans, operands):
    before, after = plans
    one, query, key, _, value, scale = operands
    choices = [before.choices[one.scores.operands[name]] for name in ("query", "key")]
    logits = query @ key * scale

    def error(factors):
        a, b = (fake(x, scaled(c, f), c.grid) for x, c, f in zip((query, key), choices, factors, strict=True))
        _, change = torch.autograd.functional.jvp(lambda x: x.softmax(-1), logits, a @ b * scale - logits)
        return float((change @ value).square().sum())

    best = min(product(SEARCH.around, repeat=2), key=error)
    assert best != (1, 1)
    for choice, factor in zip(choices, best, strict=True):
        assert float(after.choices[choice.site].qparams.scale) == pytest.approx(factor * float(choice.qparams.scale))


class WithSink(torch.nn.Module):
    """Attention with a key of zeros besides, whose probabilities are cut off: most rows that are left sum to little."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)[:, :, :48].reshape(-1, 12, 12)
        logits = self.q(x) @ self.k(x).transpose(1, 2) - 60 * x[..., :1].abs()
        return self.out(torch.nn.functional.pad(logits, (0, 1)).softmax(-1)[..., :-1] @ self.v(x)).mean(1)


def test_rows_of_which_a_part_was_cut_off_count_as_they_are(capture_net, ort_target):
    torch.manual_seed(0)
    net = capture_net(WithSink())
    before, after = (
        choose(net.context(ort_target, bits=Bits(4, 4)), Recipe("", passes)) for passes in ((RANGES,), (RANGES, SEARCH))
    )
    (mix,) = [op for op in net.graph.ops if "probs" in op.operands]
    node = next(node for node in net.graph.module.graph.nodes if node.name == mix.node)
    found = {}
    Executor(net.graph)(net.images, {one.name: partial(found.__setitem__, one.name) for one in node.args[:2]})
    probs, value = (found[one.name] for one in node.args[:2])
    assert float(probs.sum(-1).min()) < 1e-6
    old, values = (before.choices[mix.operands[name]] for name in ("probs", "value"))
    right, exact = fake(value, values.qparams, values.grid), probs @ value
    errors = {f: float((fake(probs, scaled(old, f), old.grid) @ right - exact).square().sum()) for f in SEARCH.finer}
    best = min(errors, key=errors.__getitem__)
    assert float(after.choices[old.site].qparams.scale) == pytest.approx(best * float(old.qparams.scale))


def test_blocks_are_recorded_in_the_order_of_the_graph(vit, capture_net, ort_target):
    """In one that no hash of a name decides: plans are files, and the same run writes the same bytes."""
    net = copy.deepcopy(vit.module)
    net.blocks = torch.nn.Sequential(*(copy.deepcopy(net.blocks[0]) for _ in range(4)))
    deep = capture_net(net)
    plan = choose(deep.context(ort_target, bits=Bits(4, 4), sampled=None), Recipe("", (RANGES, SEARCH)))
    rows = next(entry.rows for entry in plan.log if entry.name == "attention steps")
    mixes = [op.name for op in deep.graph.ops if "probs" in op.operands]
    assert len(mixes) == 4
    assert [row["op"] for row in rows if row["what"] == "probabilities"] == mixes


def test_scales_that_a_target_fixes_stay_and_a_net_without_attention_is_left_alone(vit, conv_net, ort_target):
    context = vit.context(ort_target, bits=Bits(4, 4))
    fixed = choose(context, Recipe("", (Ranges(), SEARCH)))  # the softmax's scale is the target's convention here
    probs = next(c for c in fixed.choices.values() if not c.is_free)
    assert torch.equal(probs.qparams.scale, choose(context, Recipe("", (Ranges(),))).choices[probs.site].qparams.scale)
    plain = conv_net.context(ort_target)
    assert choose(plain, Recipe("", (RANGES, SEARCH))).choices.keys() == choose(plain, Recipe("", (RANGES,))).choices.keys()
