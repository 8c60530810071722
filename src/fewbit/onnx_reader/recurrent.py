"""LSTM, GRU and RNN as torch's own, whose gates stand in another order; they stay float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto
from torch import Tensor
from torch._subclasses import FakeTensor

from fewbit.onnx_reader.values import Known, Node, Registry, Value, tensor

DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}  # of one direction
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # torch's order by ONNX's: i o f c, and z r h
MOST = 64  # steps of time of a GRU that torch has not, each of which becomes nodes of its own


def lstm(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, h: Value = None, c: Value = None,
    peepholes: Value = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if peepholes is not None:
        raise ValueError("it has peepholes (its input P), and torch's LSTM has none")
    return _run(node, torch.lstm, x, (w, r, b), lengths, (h, c))


def gru(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, h: Value = None
) -> tuple[Tensor, ...]:  # fmt: skip
    after = node.get("linear_before_reset", 0)
    return _run(node, torch.gru if after else _gru_reset_before, x, (w, r, b), lengths, (h,))


def rnn(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, h: Value = None
) -> tuple[Tensor, ...]:  # fmt: skip
    given = [str(one).lower() for one in node.get("activations") or ()]
    return _run(node, torch.rnn_relu if "relu" in given else torch.rnn_tanh, x, (w, r, b), lengths, (h,))


def unusual(node: NodeProto) -> str:
    """What a recurrent node asks for that torch has not, in words; empty where it is taken."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in DEFAULTS:
        return ""
    given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    if len(node.input) > 7 and node.input[7]:
        return "with peepholes"
    texts = {name: [one.decode() for one in value] for name, value in given.items() if name == "activations"}
    return _refused(node.op_type, {**given, **texts})


def _refused(op: str, attributes: dict[str, Any]) -> str:
    if attributes.get("clip"):
        return f"with clip {attributes['clip']:g}"
    if attributes.get("input_forget"):
        return "with input_forget"
    given = [str(one).lower() for one in attributes.get("activations") or ()]
    places, wanted = [given[i : i + len(DEFAULTS[op])] for i in range(0, len(given), len(DEFAULTS[op]))], DEFAULTS[op]
    same = all(place == places[0] for place in places)
    if given and not (same and (tuple(places[0]) == wanted or (op == "RNN" and places[0] == ["relu"]))):
        return f"with activations {', '.join(attributes['activations'])}"
    return ""


def _run(
    node: Node, function: Callable[..., Any], x: Value, weights: Sequence[Value], lengths: Value, start: Sequence[Value]
) -> tuple[Tensor, ...]:  # fmt: skip
    """What a node writes: Y (time, directions, batch, hidden), then the last states (directions, batch, hidden)."""
    names = ("clip", "input_forget", "activations", "activation_alpha", "activation_beta", "hidden_size")
    if refused := _refused(node.op, {name: node.get(name) for name in names}):
        raise ValueError(f"it is one {refused}, which torch's {node.op} has not; give a file without, or cut it in front of it")
    w, r = tensor(weights[0]), tensor(weights[1])
    b = None if weights[2] is None else tensor(weights[2])
    directions, backwards = w.shape[0], node.get("direction", "forward") == "reverse"
    images_first = bool(node.get("layout", 0))
    given = tensor(x)
    given = given.transpose(0, 1) if images_first else given
    _refuse_lengths(lengths, given.shape[0])
    given = given.flip(0) if backwards else given
    if given.ndim != 3 or given.shape[2] != w.shape[2]:  # torch would read beside its weights
        raise ValueError(f"it reads numbers of shape {tuple(given.shape)}, and its weights are for {w.shape[2]} at each step")
    states = [_state(one, given, directions, r.shape[2], images_first=images_first) for one in start]
    parameters = [part for i in range(directions) for part in _parameters(node.op, w[i], r[i], None if b is None else b[i])]
    first = states if len(states) > 1 else states[0]
    out, *last = function(given, first, parameters, b is not None, 1, 0.0, False, directions == 2, False)
    out = out.flip(0) if backwards else out
    y = out.unflatten(2, (directions, r.shape[2])) if directions > 1 else out.unsqueeze(2)  # (time, batch, directions, hidden)
    y = y.transpose(0, 1) if images_first else y.transpose(1, 2)
    return (y, *(one.transpose(0, 1) if images_first else one for one in last))


def _refuse_lengths(lengths: Value, time: Any) -> None:
    """Raise ValueError where an image has fewer steps than there are; those that the image gives are seen when it runs."""
    if lengths is None or isinstance(lengths, FakeTensor):
        return
    found = lengths.array if isinstance(lengths, Known) else lengths.numpy()
    if bool((found != time).any()):
        raise ValueError(f"its sequence_lens are {found.tolist()}, and only all {time} steps of time are taken")


def _state(value: Value, x: Tensor, directions: int, hidden: int, *, images_first: bool) -> Tensor:
    """(directions, batch, hidden): zeros, or what is given; what is the same for all images is so for any number."""
    if value is None:
        return torch.zeros(directions, x.shape[1], hidden)
    state = tensor(value).transpose(0, 1) if images_first else tensor(value)
    images = (value.array.swapaxes(0, 1) if images_first else value.array) if isinstance(value, Known) else None
    if images is not None and bool((images == images[:, :1]).all()):
        return state[:, :1].expand(directions, x.shape[1], hidden).contiguous()
    if images is not None and state.shape[1] != x.shape[1]:  # torch would read beside it
        raise ValueError(f"its states are of {state.shape[1]} images, and {x.shape[1]} run")
    return state


def _parameters(op: str, w: Tensor, r: Tensor, b: Tensor | None) -> list[Tensor]:
    """Those of one direction for torch: (gates, inputs), (gates, hidden), and the bias of each."""
    both = [] if b is None else b.chunk(2)
    return [torch.cat([one.chunk(len(GATES[op]))[i] for i in GATES[op]]) for one in (w, r, *both)]


def _gru_reset_before(
    x: Tensor, first: Tensor, parameters: Sequence[Tensor], biased: bool, *rest: object
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A GRU with linear_before_reset 0: the state is reset in front of its product and not behind. Called as torch.gru is."""
    if not isinstance(x.shape[0], int) or x.shape[0] > MOST:
        raise ValueError(
            f"it has linear_before_reset 0 and {x.shape[0]} steps of time; that is taken up to {MOST}. Export it with "
            "linear_before_reset 1 (reset_after=True in Keras; what PyTorch has)"
        )
    count = 4 if biased else 2
    ways = [parameters[i : i + count] for i in range(0, len(parameters), count)]
    ends = [_one_way(x if i == 0 else x.flip(0), first[i], *way) for i, way in enumerate(ways)]
    outs = [torch.stack(states if i == 0 else states[::-1]) for i, states in enumerate(ends)]
    return torch.cat(outs, 2), torch.stack([states[-1] for states in ends])


def _one_way(
    x: Tensor, state: Tensor, w: Tensor, r: Tensor, inner: Tensor | None = None, outer: Tensor | None = None
) -> list[Tensor]:  # fmt: skip
    """The state (batch, hidden) behind each step of time; the gates are torch's, r z n."""
    hidden, states = r.shape[1], []
    bias = None if inner is None or outer is None else inner + outer
    for step in F.linear(x, w, bias).unbind(0):
        reset, update, new = step.chunk(3, 1)
        gates = F.linear(state, r[: 2 * hidden])
        reset, update = torch.sigmoid(reset + gates[:, :hidden]), torch.sigmoid(update + gates[:, hidden:])
        new = torch.tanh(new + F.linear(reset * state, r[2 * hidden :]))
        state = new + update * (state - new)
        states.append(state)
    return states


RECURRENT: Registry = {"GRU": gru, "LSTM": lstm, "RNN": rnn}
