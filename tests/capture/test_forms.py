"""What a model's author may type, and the one form of it that is left. Oracle: the module itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

from capture.nets import count, graph_of, randomize
from capture.test_normalize import SIZE, TOKENS, WIDTH, Net, heads, same, tokens
from fewbit.capture import capture, normalize
from fewbit.capture.canonicalize import drop_writes
from fewbit.load import load_model
from fewbit.load.program import graph_module, writes_through_views

W = torch.randn(WIDTH, 7, generator=torch.Generator().manual_seed(5))
B = torch.randn(7, generator=torch.Generator().manual_seed(6))
Does = Callable[[Net, Tensor], Tensor]

TO_LINEAR: dict[str, Does] = {
    "matmul": lambda net, x: tokens(x) @ net.w,
    "matmul and add": lambda net, x: tokens(x) @ net.w + net.b,
    "add first": lambda net, x: net.b + tokens(x) @ net.w,
    "mm": lambda net, x: torch.mm(tokens(x).flatten(0, 1), net.w),
    "addmm": lambda net, x: torch.addmm(net.b, tokens(x).flatten(0, 1), net.w),
    "expanded weight": lambda net, x: torch.bmm(tokens(x), net.w.expand(x.shape[0], -1, -1)),
    "transposed weight": lambda net, x: tokens(x) @ net.w.t().contiguous().t(),
    "weight on the left": lambda net, x: net.w.t() @ tokens(x).transpose(1, 2),
    "einsum": lambda net, x: torch.einsum("btc,co->bto", tokens(x), net.w),
    "einsum weight first": lambda net, x: torch.einsum("oc,btc->bot", net.w.t(), tokens(x)),
    "einsum to heads": lambda net, x: torch.einsum("btc,chd->bhtd", tokens(x), net.w[:, :6].reshape(WIDTH, 2, 3)),
    "einsum from heads": lambda net, x: torch.einsum("bhtd,hdo->bto", heads(x), net.w.reshape(2, 6, 7)),
    "chunk of a packed weight": lambda net, x: F.linear(tokens(x), torch.cat([net.w, net.w]).t().chunk(2, 1)[1]),
}


@pytest.mark.parametrize("form", TO_LINEAR)
def test_a_product_with_a_constant_matrix_is_one_linear(form):
    found = count(same(Net(TO_LINEAR[form], w=W, b=B)))
    assert found["linear"] == 1
    assert not {"matmul", "mm", "bmm", "addmm", "einsum", "add", "chunk"} & set(found)


NEUTRAL: dict[str, Does] = {
    "add": lambda net, x: x + 0,
    "add a constant": lambda net, x: net.zero + x,
    "subtract": lambda net, x: x - 0.0,
    "multiply": lambda net, x: 1 * x,
    "divide": lambda net, x: x / 1,
}
OTHER: dict[str, Does] = {
    "subtracted from": lambda net, x: 0 - x,
    "under one": lambda net, x: 1 / (x + 9),
    "of integers": lambda net, x: (x * 99).int() / 1,
    "of another shape": lambda net, x: net.zero.reshape(1, 1, 1, 1, 1) + x,
}


@pytest.mark.parametrize("form", [*NEUTRAL, *OTHER])
def test_arithmetic_that_changes_no_number_is_left_out_and_no_other(form):
    """torch.onnx leaves it out too: a tensor and its copy, each with a site, would have one quantizer in the file."""
    zero = torch.zeros(1, 1, 1, 1)
    found = count(same(Net({**NEUTRAL, **OTHER}[form], zero=zero)))
    assert bool({"add", "sub", "mul", "div", "rsub", "reciprocal"} & set(found)) == (form in OTHER)


@pytest.mark.parametrize("form", ["stored", "computed", "with a bias"])
def test_a_linear_whose_weight_is_a_vector_is_a_product_without_an_axis_of_outputs(form):
    """As D-FINE takes the mean of a distribution over places."""

    def does(net: Net, x: Tensor) -> Tensor:
        vector = torch.cat((2 * net.v[:1], net.v[1:])) if form == "computed" else net.v
        return F.linear(tokens(x), vector, net.v[0] if form == "with a bias" else None)

    found = count(same(Net(does, v=W[:, 0])))
    assert found["matmul"] == 1
    assert found["linear"] == 0


def test_an_einsum_with_its_weight_first_is_a_linear_on_the_tokens_as_they_are():
    found = count(same(Net(lambda net, x: torch.einsum("oc,btc->bto", net.w.t(), tokens(x)), w=W)))
    assert not {"flatten", "unflatten", "permute"} & set(found)


def test_a_scaled_addmm_keeps_its_factors():
    net = Net(lambda net, x: torch.addmm(net.b, tokens(x).flatten(0, 1), net.w, beta=0.5, alpha=3), w=W, b=B)
    found = count(same(net))
    assert found["linear"] == 1
    assert found["addmm"] == 0


TO_MATMUL: dict[str, Does] = {
    "bmm": lambda net, x: torch.bmm(tokens(x), tokens(x).transpose(1, 2)),
    "baddbmm": lambda net, x: torch.baddbmm(net.m, tokens(x), tokens(x).transpose(1, 2), beta=2, alpha=0.5),
    "einsum": lambda net, x: torch.einsum("bhqd,bhkd->bhqk", heads(x), heads(x)),
    "einsum out of order": lambda net, x: torch.einsum("bhkd,bhqd->bkhq", heads(x), heads(x)),
    "einsum over two": lambda net, x: torch.einsum("bhqd,bhkd->bqk", heads(x), heads(x)),
    "einsum of an image": lambda net, x: torch.einsum("bchw,bcij->bhwij", x, x),
    "linear with a computed weight": lambda net, x: F.linear(net.m @ tokens(x), tokens(x)[0], tokens(x)[0, :, 0]),
}


@pytest.mark.parametrize("form", TO_MATMUL)
def test_a_product_of_two_activations_is_a_matmul(form):
    found = count(same(Net(TO_MATMUL[form], m=torch.randn(1, TOKENS, TOKENS)[0])))
    assert found["matmul"] == 1
    assert not {"bmm", "baddbmm", "einsum"} & set(found)


@pytest.mark.parametrize("equation", ["bhqd,bhqd->bhq", "bhqd,bhkd->bhqkd", "bhqd,bhkd->bh", "bqqk,bkd->bqd"])
def test_an_einsum_that_is_no_product_of_matrices_stays(equation):
    """One without a sum over both, without columns, with a sum over one operand alone, and a diagonal."""

    def does(net: Net, x: Tensor) -> Tensor:
        if "qq" in equation:
            return torch.einsum(equation, tokens(x)[:, None] * tokens(x)[:, :, None], tokens(x).transpose(1, 2))
        return torch.einsum(equation, heads(x), heads(x))

    assert count(same(Net(does), atol=1e-4))["einsum"] == 1


def test_the_attention_map_of_an_einsum_stands_on_the_left():
    net = Net(lambda net, x: torch.einsum("bhkd,bhqk->bhqd", heads(x), heads(x).softmax(-1) @ net.m), m=torch.ones(6, 16))
    reversed_net = Net(
        lambda net, x: torch.einsum("bhkd,bhqk->bhqd", heads(x), (heads(x) @ heads(x).transpose(2, 3)).softmax(-1))
    )
    assert count(same(net))["einsum"] == 0
    module = same(reversed_net)
    last = [node for node in module.graph.nodes if node.target is torch.ops.aten.matmul.default][-1]
    assert last.args[0].target is torch.ops.aten.softmax.int


# constants


def test_what_reads_only_constants_is_computed_once():
    """A relative position bias: a table, looked up, turned, masked, and 16 times a sigmoid."""
    index = torch.randint(0, 9, (TOKENS * TOKENS,), generator=torch.Generator().manual_seed(0))

    def does(net: Net, x: Tensor) -> Tensor:
        bias = net.table[net.index].view(TOKENS, TOKENS, -1).permute(2, 0, 1)
        bias = 16 * torch.sigmoid(bias) + (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None])
        return heads(x) @ heads(x).transpose(2, 3) + bias.unsqueeze(0)

    found = count(same(Net(does, table=torch.randn(9, 2), index=index), atol=1e-4))
    assert found["matmul"] == found["add"] == 1
    assert not {"index", "sigmoid", "arange", "sub", "mul", "permute"} & set(found)


def exported(net: nn.Module) -> GraphModule:
    """A model that draws random numbers, which the door refuses."""
    return graph_module(torch.export.export(net.eval(), (torch.zeros(2, *SIZE),)))


def test_random_numbers_are_no_constant():
    net = Net(lambda net, x: x + torch.rand_like(net.m) + torch.bernoulli(net.m), m=torch.full((8, 8), 0.5))
    found = count(normalize(exported(net)))
    assert found["rand_like"] == found["bernoulli"] == 1


def test_a_constant_that_is_expanded_to_the_batch_is_not_stored_for_each_image():
    net = Net(lambda net, x: torch.cat([net.token.expand(x.shape[0], -1, -1), tokens(x)], 1), token=torch.randn(1, 1, WIDTH))
    module = same(net)
    assert count(module)["expand"] == 1
    assert sum(b.numel() for b in module.buffers()) == WIDTH


def test_a_constant_that_is_expanded_to_a_fixed_shape_is_not_stored_at_that_size():
    module = same(Net(lambda net, x: x + net.row.expand(3, 8, 8), row=torch.randn(8)))
    assert sum(b.numel() for b in module.buffers()) == 8


def test_constants_that_nobody_reads_any_more_are_gone():
    net = Net(lambda net, x: net.bn(net.conv(x)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    assert len(same(net).state_dict()) == 2


# writes


def test_an_activation_in_place_becomes_one_that_is_not():
    net = Net(lambda net, x: F.hardtanh_(F.relu_(net.conv(x)).add_(x.mean()), 0, 2), conv=nn.Conv2d(3, 6, 3))
    assert count(same(net)) == {"conv2d": 1, "relu": 1, "mean": 1, "add": 1, "hardtanh": 1}


def test_who_reads_later_reads_what_was_written():
    """Built by hand: torch.export lets later readers read the write itself."""
    graph = Graph()
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2))
    before = graph.call_function(torch.ops.aten.add.Tensor, (doubled, 1))
    graph.call_function(torch.ops.aten.relu_.default, (doubled,))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (before, doubled)))
    module = GraphModule(nn.Module(), graph)
    x = torch.tensor([-1.0, 2.0])
    expected = module(x)
    drop_writes(module)
    module.recompile()
    assert torch.equal(module(x), expected)
    assert count(module)["relu"] == 1


def write_into_a_part(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0
    y[:, :, 1:3].add_(1)
    return y


def write_into_the_whole(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, 1:]
    y.relu_()
    return part


def write_twice(net: Net, x: Tensor) -> Tensor:
    y = x * 2
    z = y.relu_()
    z.add_(1)
    return y


@pytest.mark.parametrize("does", [write_into_a_part, write_into_the_whole, write_twice])
def test_a_write_that_is_seen_under_another_name_is_kept(does):
    module = same(Net(does))
    assert not {name for name in count(module) if name.endswith("_")}


def test_writes_of_a_program_are_made_explicit_once_and_with_the_tensors_that_it_has_then(monkeypatch):
    net, x = Net(lambda net, x: write_into_a_part(net, net.conv(x)), conv=nn.Conv2d(3, 3, 1)), torch.rand(2, *SIZE)
    program, traced = torch.export.export(net, (x,)), []
    run_decompositions = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram, "run_decompositions", lambda own, table: traced.append(own) or run_decompositions(own, table)
    )
    torch.testing.assert_close(graph_module(program)(x), net(x))
    net.conv.weight = program.state_dict["conv.weight"] = nn.Parameter(net.conv.weight.detach() + 1)
    torch.testing.assert_close(graph_module(program)(x), net(x))
    assert len(traced) == 1
    traced.clear()
    kept = weakref.ref(program)
    del program
    gc.collect()
    assert kept() is None  # neither the program nor what was made of it stays


def test_a_write_into_a_view_that_alone_is_read_is_simple():
    net = Net(lambda net, x: net.conv(x).flatten(2).relu_(), conv=nn.Conv2d(3, 6, 3))
    module = torch.export.export(net, (torch.zeros(2, *SIZE),))
    assert not writes_through_views(module.graph)


# identities


IDENTITIES: dict[str, Does] = {
    "detach": lambda net, x: (x * 2).detach(),
    "clone": lambda net, x: (x * 2).clone(),
    "contiguous": lambda net, x: (x * 2).contiguous(),
    "cast to its own type": lambda net, x: (x * 2).to(torch.float32).float().type_as(x),
    "dropout": lambda net, x: F.dropout(x * 2, 0.3, training=False),
    "dropout of nothing": lambda net, x: F.dropout(x * 2, 0.0, training=True),
    "channel dropout": lambda net, x: F.dropout2d(x * 2, 0.3, training=False),
    "there and back": lambda net, x: (x * 2).flatten(1).unflatten(1, (3, 64)).reshape(x.shape),
    "expand to itself": lambda net, x: (x * 2).expand(-1, 3, 8, 8),
}


@pytest.mark.parametrize("form", IDENTITIES)
def test_what_computes_nothing_is_gone(form):
    assert set(count(same(Net(IDENTITIES[form])))) <= {"mul", "sym_size"}


def test_a_cast_that_changes_the_numbers_stays():
    net = Net(lambda net, x: (x * 3).to(torch.int32).to(torch.float32))
    assert count(same(net))["to"] == 2


def test_dropout_that_is_left_on_stays():
    assert count(normalize(exported(Net(lambda net, x: F.dropout(x, 0.5)))))["dropout"] == 1


class Twice(nn.Module):
    """Regions under no_grad and autocast; one addition of two equal constants, and one norm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(SIZE[-1])
        self.left, self.right = nn.Linear(SIZE[-1], 5), nn.Linear(SIZE[-1], 5)
        self.register_buffer("here", torch.ones(1, 4, *SIZE[1:]))
        self.register_buffer("there", torch.ones(1, 4, *SIZE[1:]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            y = torch.tanh(y)
        with torch.autocast("cpu", enabled=False):
            y = torch.sigmoid(y.float())
        product = self.left(y + self.here) @ self.right(y + self.there).transpose(2, 3)
        return product + (self.norm(y) * self.norm(y)).mean(-1, keepdim=True)


def test_what_is_computed_twice_is_computed_once_and_regions_are_opened():
    found = count(graph_of(randomize(Twice(), SIZE), SIZE).module)
    assert found["layer_norm"] == 1
    assert found["add"] == 2  # of the equal constants, of both results
    assert (found["tanh"], found["sigmoid"]) == (1, 1)
    assert not {"wrap_with_set_grad_enabled", "wrap_with_autocast"} & set(found)


class Short(nn.Module):
    """Parts in bfloat16, in a context and in a function of their own."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.on, self.a, self.b, self.head = on, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            x = self.b(self.a(x).relu())
            with torch.autocast("cpu", enabled=False):
                x = x.float() * 2
            x = self.head(x.relu().mean((2, 3)))
        return x


@pytest.mark.parametrize("exported", [False, True], ids=["module", "program"])
def test_what_asks_for_fewer_digits_is_computed_in_float32(exported: bool) -> None:
    """The oracle is the same module with autocast off."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = Short(True).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    model = torch.export.export(net, (x,), dynamic_shapes=shapes) if exported else net
    loaded = load_model(model, overrides={} if exported else {"input_size": (3, 8, 8)})
    assert "under torch.autocast in bfloat16; it is computed in float32." in loaded.notes[0]
    graph = capture(loaded)
    assert [op.name for op in graph.ops] == ["a", "b", "head"]
    with torch.no_grad():
        torch.testing.assert_close(graph.module(x), Short(False).eval()(x), rtol=1e-5, atol=1e-6)
        assert net(x).dtype == torch.bfloat16  # the model is left as it was


@pytest.mark.parametrize(
    ("rows", "columns", "kind"), [(4, 2, "max_pool2d"), (7, 1, "max_pool2d"), (3, 2, "amax"), (5, 3, "amax")]
)
def test_an_adaptive_maximum_has_windows_in_numbers(rows: int, columns: int, kind: str) -> None:
    """The oracle is torch's own, on windows that divide the map, overlap evenly or do not."""
    found = same(Net(lambda net, x: F.adaptive_max_pool2d(x, (rows, columns))))
    assert "adaptive_max_pool2d" not in count(found)
    assert count(found)[kind] > 0


def test_a_random_slope_is_its_mean_outside_of_training() -> None:
    found = same(Net(lambda net, x: F.rrelu(x, 0.1, 0.4)))
    assert count(found)["leaky_relu"] == 1


class Correlated(nn.Module):
    """A filter of each image, with the images of a batch as groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.filters = nn.Conv2d(3, 4, 3), nn.Linear(4, 36)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        filters = self.filters(x.mean((2, 3))).reshape(b * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), filters, groups=b * c).reshape(b, c, h - 2, w - 2)


def test_groups_of_images_are_taken_one_image_at_a_time() -> None:
    net = Correlated().eval()
    loaded = load_model(net, overrides={"input_size": (3, 12, 12)})
    assert loaded.batch == 1
    assert "takes one image at a time" in loaded.notes[0]
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(capture(loaded).module(x), net(x))
