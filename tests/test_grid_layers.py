"""Quantizers, layers and models on other grids, for groups and for tokens."""

import copy
import warnings

import pytest
import torch
from assert_same import assert_same
from torch import nn

from noisyq_fast import (
    AbsMax,
    Grid,
    GroupedLinear,
    MovingAbsMax,
    QuantConv2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    QuantMultiheadAttention,
    calibrate,
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    freeze_ranges_,
    quantize_model_,
    summary,
)
from noisyq_fast.calibration import METHODS
from noisyq_fast.grid import AFFINE, KINDS

pytestmark = pytest.mark.filterwarnings("ignore:.*got values below 0")


@pytest.mark.parametrize("options", [{"axis": 0}, {"axis": "token"}, {"group_size": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_absmax(kind, options):
    quantizer, x = AbsMax(3, grid=kind, **options), torch.randn(4, 6)
    assert torch.equal(quantizer(x), fake_quantize(x, 3, grid=kind, **options))
    assert torch.equal(quantizer.eval()(2 * x), fake_quantize(2 * x, 3, grid=kind, **options))
    codes = quantizer.codes(x)
    assert (codes.zero_point is not None) == (kind == AFFINE)
    zero = {} if codes.zero_point is None else {"zero_point": codes.zero_point}
    assert torch.equal(dequantize(codes.codes, codes.scale, **options, **zero), quantizer(x))
    assert list(quantizer.buffers()) == []
    assert quantizer.grid == Grid(3, kind)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_moving_absmax(kind, axis):
    quantizer = MovingAbsMax(3, axis, None if axis is None else 4, 0.25, grid=kind)
    assert quantizer.range.isnan().all()
    with pytest.raises(ValueError, match="running_absmax: got NaN"):
        copy.deepcopy(quantizer).eval()(torch.ones(4))
    average = None
    others = () if axis is None else (0,)
    for factor in (1, 3, 2):
        x = factor * torch.randn(6, 4)
        assert torch.equal(quantizer(x), fake_quantize(x, 3, axis, grid=kind))
        low, high = x.amin(others).clamp(max=0), x.amax(others).clamp(min=0)
        seen = {"unsigned": high, "affine": torch.stack([low, high])}
        seen = seen.get(kind, torch.maximum(-low, high))
        average = seen if average is None else average + 0.25 * (seen - average)
        torch.testing.assert_close(quantizer.range, average)
    quantizer.eval()
    expected = fake_quantize_ema(x, quantizer.range, 3, axis, training=False, grid=kind)
    assert torch.equal(quantizer(x), expected)
    again = MovingAbsMax(3, axis, None if axis is None else 4, grid=kind).eval()
    again.set_range(*(quantizer.range if kind == "affine" else [quantizer.range]))
    assert torch.equal(again(x), expected)
    quantizer.reset()
    assert quantizer.range.isnan().all()


def test_set_range_takes_as_many_ends_as_the_range_has():
    with pytest.raises(ValueError, match="set_range: got 1 values on the affine grid, takes low"):
        MovingAbsMax(4, grid="affine").set_range(1.0)
    with pytest.raises(ValueError, match="set_range: got 2 values on the full grid, takes one"):
        MovingAbsMax(4, grid="full").set_range(-1.0, 1.0)


def make_model():
    sizes = (8, 8), (8, 8), (8, 3)
    return nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))


OPTIONS = {
    "weight_grid": "affine",
    "weight_group_size": 4,
    "activation_grid": "unsigned",
}


def test_a_model_with_grids_and_groups():
    model = quantize_model_(make_model(), 4, 3, **OPTIONS)
    assert [layer.widths() for layer in model[::2]] == [
        "W8 affine group 4/A8",
        "W4 affine group 4/A3 unsigned",
        "W8 affine group 4/A8 unsigned",
    ]
    x = torch.randn(5, 8)
    y = x
    for layer, weight_bits, bits, kind in (
        (model[0], 8, 8, "signed"),
        (model[2], 4, 3, "unsigned"),
        (model[4], 8, 8, "unsigned"),
    ):
        weight = fake_quantize(layer.weight, weight_bits, grid="affine", group_size=4)
        y = nn.functional.linear(fake_quantize(y, bits, grid=kind), weight, layer.bias).relu()
    assert torch.equal(model(x), y)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_model_itself_sees_the_grid_without_first_and_last_layers():
    model = quantize_model_(make_model(), first_last_bits=None, **OPTIONS)
    assert all(layer.input_quantizer.grid_kind == "unsigned" for layer in model[::2])
    override = {"0": {"activation_grid": "affine"}}
    model = quantize_model_(make_model(), overrides=override, **OPTIONS)
    assert model[0].input_quantizer.grid == Grid(8, "affine")


def test_tokens_keep_no_range_and_are_dynamic_in_evaluation():
    model = quantize_model_(
        nn.Sequential(nn.Linear(8, 4)), activation_granularity="token", activation_grid="affine"
    )
    assert list(model.buffers()) == []
    model.eval()
    for factor in (1, 7):
        x = factor * torch.randn(2, 3, 8)
        quantized = fake_quantize(x, 8, "token", grid="affine")
        weight = fake_quantize(model[0].weight, 8, 0)
        assert torch.equal(model(x), nn.functional.linear(quantized, weight, model[0].bias))


def test_overrides_of_grids():
    overrides = {
        "0": {"activation_grid": "full", "activation_granularity": "token"},
        "2": {"weight": AbsMax(5), "activation_bits": 6},
        "4": {"weight_group_size": None, "weight_grid": "signed"},
    }
    model = quantize_model_(make_model(), overrides=overrides, **OPTIONS)
    widths = [layer.widths() for layer in model[::2]]
    assert widths == ["W8 affine group 4/A8 full token", "W5/A6 unsigned", "W8/A8 unsigned"]


LAYERS = {
    "Conv2d": lambda: (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 6, 6)),
    "Conv2d, groups": lambda: (nn.Conv2d(8, 4, 3, groups=2), torch.randn(2, 8, 6, 6)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(8, 4, 3), torch.randn(2, 8, 6, 6)),
    "Embedding": lambda: (nn.Embedding(5, 8), torch.tensor([[0, 3]])),
    "GroupedLinear": lambda: (GroupedLinear(3, 8, 2), torch.randn(2, 3, 8)),
    "MultiheadAttention": lambda: (nn.MultiheadAttention(8, 2), [torch.randn(4, 2, 8)] * 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_all_kinds(name, kind):
    layer, x = LAYERS[name]()
    options = {"activation_granularity": "tensor" if "Conv" in name else "token"}
    options |= {"weight_group_size": 4, "weight_grid": kind, "activation_grid": kind}
    quantize_model_(layer, first_last_bits=None, **options)
    outputs = layer(*x) if isinstance(x, list) else layer(x)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    y.square().sum().backward()
    assert y.isfinite().all()
    of = {"MultiheadAttention": "in_proj_weight"}.get(name, "weight")
    weight = getattr(layer, of)
    by_channel = layer.by_channel(weight)
    expected = fake_quantize(by_channel, 4, grid=kind, group_size=4)
    assert torch.equal(layer.by_channel(layer.quantized_weight(weight)), expected)
    assert weight.grad.abs().sum() > 0


def test_per_group_ranges_have_the_grid_too():
    layer = quantize_model_(GroupedLinear(3, 8, 2), activation_grid="affine", first_last_bits=None)
    x = torch.randn(4, 3, 8)
    layer(x)
    assert_same(layer.input_quantizer.range, torch.stack([x.amin((0, 2)), x.amax((0, 2))]))


class QuantOfOnesOwn(QuantLayer, nn.Conv2d):
    """As `register_layer` takes it."""


REFUSED = [
    (
        lambda: quantize_model_(
            nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(6, 2)), 4, 4, weight_group_size=4
        ),
        r"layer '1': group_size: got 4 .* \[2, 6\], whose 6 input channels leave a remainder of 2",
    ),
    (
        lambda: quantize_model_(
            nn.Sequential(nn.Linear(6, 2), nn.Conv2d(8, 8, 3)), activation_granularity="token"
        ),
        "layer '1': activation: got one scale for each token for a QuantConv2d",
    ),
    (lambda: QuantConv2d(4, 4, 3, activation=AbsMax(4, "token")), "got one scale for each token"),
    (lambda: QuantOfOnesOwn(4, 4, 3, activation_granularity="token"), "got one scale for each tok"),
    (
        lambda: QuantConv2d(4, 4, 3, weight=AbsMax(4, "token")),
        "weight: got AbsMax.*'token'.; takes",
    ),
    (lambda: QuantLinear(6, 4, weight_group_size=4), "whose 6 input channels leave"),
    (lambda: QuantMultiheadAttention(6, 2, weight_group_size=4), "whose 6 input channels leave"),
    (lambda: QuantEmbedding(4, 6, weight_group_size=4), "whose 6 input channels leave"),
    (
        lambda: QuantEmbedding(4, 6, sparse=True, weight_group_size=3),
        r"weight: got AbsMax\(bits=4, group_size=3\) for an embedding with sparse gradients",
    ),
    (
        lambda: quantize_model_(
            nn.Sequential(nn.Embedding(4, 6, sparse=True)), weight_grid="unsigned"
        ),
        "layer '0': weight: got AbsMax.* for an embedding with sparse gradients",
    ),
    (lambda: MovingAbsMax(4).set_range(-1.0), "set_range: got .*, takes 0 or more"),
    (lambda: MovingAbsMax(4, grid="affine").set_range(1.0, -1.0), "takes the least before the la"),
    (lambda: quantize_model_(make_model(), weight_grid="even"), "weight_grid: got 'even'"),
    (lambda: quantize_model_(make_model(), activation_grid=1), "activation_grid: got 1"),
    (lambda: quantize_model_(make_model(), weight_group_size=0), "weight_group_size: got 0"),
    (
        lambda: quantize_model_(make_model(), activation_granularity="channel"),
        "activation_granularity: got 'channel', takes 'tensor' or 'token'",
    ),
    (
        lambda: quantize_model_(make_model(), weight=AbsMax(4), weight_grid="full"),
        r"weight_grid: got 'full' beside weight=AbsMax\(bits=4, axis=0\)",
    ),
    (
        lambda: quantize_model_(
            make_model(),
            activation=MovingAbsMax(4),
            overrides={"2": {"activation_grid": "affine"}},
        ),
        r"overrides\['2'\]: activation_grid: got 'affine' beside activation=MovingAbsMax",
    ),
    (lambda: MovingAbsMax(8, "token"), r"axis: got 'token', which keeps no range; use AbsMax"),
    (lambda: AbsMax(8, grid="even"), "grid: got 'even'"),
    (lambda: AbsMax(8, grid="odd"), "bits: got 8, takes 2..7 of an odd grid"),
    (lambda: AbsMax(4, grid="odd").like(bits=8), "bits: got 8, takes 2..7 of an odd grid"),
    (lambda: QuantLinear(4, 4, weight_bits=8, weight_grid="odd"), "weight_bits: got 8, takes 2..7"),
    (
        lambda: quantize_model_(make_model(), weight=AbsMax(4, grid="odd")),
        "first_last_bits: got 8, takes 2..7 of an odd grid",
    ),
    (
        lambda: quantize_model_(
            make_model(), weight_grid="odd", overrides={"2": {"weight_bits": 8}}
        ),
        r"overrides\['2'\]: weight_bits: got 8, takes 2..7 of an odd grid",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["signed", "full", "affine", "odd"])
def test_sparse_gradients_of_embeddings_pass(kind):
    embedding = QuantEmbedding(4, 6, sparse=True, weight_grid=kind)
    embedding(torch.tensor([1, 3, 1])).sum().backward()
    assert embedding.weight.grad.is_sparse
    expected = torch.tensor([0.0, 2.0, 0.0, 1.0])[:, None].expand(4, 6)
    assert torch.equal(embedding.weight.grad.to_dense(), expected)


def test_a_model_that_is_refused_is_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3), GroupedLinear(2, 6, 3))
    before = repr(model)
    keys = list(model.state_dict())
    for options in ({"weight_group_size": 4}, {"activation_granularity": "token"}):
        with pytest.raises(ValueError, match="layer"):
            quantize_model_(model, **options)
        assert repr(model) == before
        assert list(model.state_dict()) == keys
    quantize_model_(model)


# Checkpoints.


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_same_numbers(kind):
    options = OPTIONS | {"activation_grid": kind}
    models = [quantize_model_(make_model(), **options) for _ in range(2)]
    x = torch.randn(5, 8)
    models[0](x)
    models[1].load_state_dict(models[0].state_dict())
    outputs = [model.eval()(x) for model in models]
    assert torch.equal(*outputs)
    assert len(quantize_model_(make_model()).state_dict()["0.weight_quantizer._extra_state"]) == 3


def load(here, there):
    """A checkpoint of a layer with the options ``there`` into one with ``here``."""
    state = QuantLinear(8, 2, **there).state_dict()
    with pytest.raises(RuntimeError) as error:
        QuantLinear(8, 2, **here).load_state_dict(state, strict=False)
    return str(error.value)


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        (
            {"weight_grid": "full"},
            {},
            "weight_quantizer: the checkpoint has 4 bits on the signed grid, the model 4 bits on "
            "the full grid",
        ),
        (
            {},
            {"activation_grid": "affine", "activation_bits": 8},
            "input_quantizer: the checkpoint has 8 bits on the affine grid, the model 4 bits on "
            "the signed grid",
        ),
        (
            {"weight_group_size": 8},
            {"weight_group_size": 2},
            "the checkpoint has 4 bits on the signed grid for groups of 2, the model 4 bits on the "
            "signed grid for groups of 8",
        ),
        (
            {"activation": AbsMax(4, group_size=4)},
            {"activation": AbsMax(4, "token")},
            "signed grid for tokens, the model 4 bits on the signed grid for groups of 4",
        ),
        (
            {"weight_grid": "affine", "weight_bits": 3},
            {"weight_grid": "affine"},
            "weight_quantizer: the checkpoint has 4 bits, the model 3",
        ),
        (
            {"activation_granularity": "token"},
            {},
            "input_quantizer: the checkpoint has another kind of quantizer",
        ),
    ],
)
def test_another_grid_is_an_error_that_names_both(here, there, message):
    assert message in load(here, there)


@pytest.mark.parametrize("size", [1, 63, 64, 96, 4096, 2**18 - 1])
def test_every_group_size_is_kept(size):
    state = AbsMax(4, group_size=size).state_dict()
    AbsMax(4, group_size=size).load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"for groups of {size}, the model"):
        AbsMax(4, group_size=7).load_state_dict(state)


def test_modules_pickled_before_there_were_grids():
    layer, x = QuantLinear(4, 3), torch.randn(5, 4)
    expected = copy.deepcopy(layer)(x)
    for quantizer in layer.quantizers().values():
        for name in ("frozen", "grid_kind", "group_size", "_left_to_look_at", "range_of_ranks"):
            vars(quantizer).pop(name, None)
    assert torch.equal(layer(x), expected)
    freeze_ranges_(calibrate(layer, [x]))
    assert torch.equal(layer(x), expected)
    assert summary(layer, x).layers[0].weight_grid == "signed channel"


def test_checkpoints_of_the_first_version_are_on_the_signed_grid():
    old = QuantLinear(8, 2).state_dict()
    old = {k: v for k, v in old.items() if "_quantizer" not in k} | {
        "running_absmax": torch.tensor(2.0)
    }
    QuantLinear(8, 2).load_state_dict(dict(old))
    with pytest.raises(RuntimeError, match="has 4 bits on the signed grid, the model 4 bits on t"):
        QuantLinear(8, 2, activation_grid="unsigned").load_state_dict(dict(old))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_models_has_the_average_range(kind):
    models = [QuantLinear(8, 2, activation_grid=kind) for _ in range(3)]
    x = torch.randn(5, 8)
    models[0](x), models[1](3 * x)
    states = [model.state_dict() for model in models]
    mean = {k: torch.stack([state[k] for state in states]).float().mean(0) for k in states[0]}
    averaged = QuantLinear(8, 2, activation_grid=kind)
    averaged.load_state_dict(mean)
    expected = 2 * models[0].input_quantizer.range
    torch.testing.assert_close(averaged.input_quantizer.range, expected)


# Values below 0 on an unsigned grid.


def warned(model, *batches):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in batches:
            model(x)
    return [str(w.message) for w in caught]


def test_values_below_0_are_warned_about_once_by_the_name_of_the_layer():
    model = quantize_model_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()), **OPTIONS)
    x = torch.randn(5, 8)
    (message,) = warned(model, x, x)
    assert message.startswith("1.input_quantizer: got values below 0, which the unsigned grid")
    assert warned(model, x) == []
    model = quantize_model_(make_model(), **OPTIONS)
    assert warned(model, x, x) == []


def test_only_the_first_two_batches_in_training_are_looked_at():
    quantizer, good, bad = MovingAbsMax(4, grid="unsigned"), torch.ones(3), -torch.ones(3)
    quantizer.eval().set_range(1.0)
    assert warned(quantizer, bad) == []
    quantizer.train()
    assert len(warned(quantizer, good, bad)) == 1
    other = quantizer.like()
    assert warned(other, good, good, bad) == []
    assert len(warned(other.like(bits=3), bad, bad)) == 1


def test_compiled_layers_do_not_look():
    layer = QuantLinear(8, 2, activation_grid="unsigned")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_model_compiles_to_one_graph_with_the_same_numbers(kind, training):
    torch._dynamo.reset()
    model = quantize_model_(make_model(), **OPTIONS | {"activation_grid": kind})
    model(torch.randn(5, 8))
    eager = copy.deepcopy(model).train(training)
    compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(5, 8)
        outputs = [m(x) for m in (eager, compiled)]
        assert torch.equal(*outputs)
        for y in outputs:
            y.square().sum().backward()
    for (name, a), b in zip(eager.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# What a summary tells, and what calibration sets.


def test_a_summary_tells_grids_and_groups_and_what_they_take():
    model = quantize_model_(
        make_model(), overrides={"4": {"activation_granularity": "token"}}, **OPTIONS
    )
    first, middle, last = summary(model, torch.randn(2, 8)).layers
    assert (first.weight_grid, first.activation_grid) == ("affine group 4", "signed tensor")
    assert middle.activation_grid == "unsigned tensor"
    assert last.activation_grid == "unsigned token"
    # 8 rows of 2 groups, each with a scale and a zero point; a bias; a range.
    assert middle.size_in_bits == 4 * 64 + 16 * (32 + 8) + 32 * 8 + 32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_calibration(kind, method):
    layer = quantize_model_(
        nn.Sequential(nn.Linear(4, 2)), first_last_bits=None, activation_grid=kind
    )
    x = 0.5 + torch.randn(1000, 4)
    x[0, 0], x[0, 1] = 30.0, -10.0  # outliers
    calibrate(layer, [x[:500], x[500:]], method=method, percentile=99)
    found = layer[0].input_quantizer.range
    whole = {"unsigned": [30.0], "affine": [-10.0, 30.0]}.get(kind, [30.0])
    whole = torch.tensor(whole).squeeze()
    if method in ("absmax", "initial"):
        assert torch.equal(found, whole)
    else:
        assert (found.abs() < 0.6 * whole.abs()).all()
        assert (found * whole > 0).all()
    assert layer.eval()(x).isfinite().all()


def test_calibration_warns_of_values_below_0_on_an_unsigned_grid():
    model = quantize_model_(make_model()[:3], first_last_bits=None, **OPTIONS)
    with pytest.warns(UserWarning, match="^0.input_quantizer: got values below 0") as caught:
        calibrate(model, [torch.randn(5, 8)])
    assert len(caught) == 1


def test_frozen_ranges_on_an_affine_grid():
    model = quantize_model_(make_model(), activation_grid="affine")
    x = torch.randn(5, 8)
    model(x)
    freeze_ranges_(model)
    expected = model.eval()(3 * x)
    assert torch.equal(model.train()(3 * x), expected)
