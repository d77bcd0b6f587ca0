"""The grids and granularities: NumPy's definition, the reference and the CPU agree to the bit."""

import numpy as np
import numpy_specification as specification
import pytest
import torch
from assert_same import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, axes, bits, tensors
from test_numerics import ROUND_TO, assert_like, front

import noisyq_fast
from noisyq_fast import Grid, dequantize, fake_quantize, fake_quantize_ema, quantize
from noisyq_fast.backends import BACKENDS, reference
from noisyq_fast.grid import KINDS
from noisyq_fast.operators.checks import STRAIGHT_THROUGH_ESTIMATORS

# With a width: of an odd grid 8 bits would not fit into int8.
grids = st.tuples(bits, st.sampled_from(KINDS)).filter(lambda grid: grid != (8, "odd"))
estimators = st.sampled_from(STRAIGHT_THROUGH_ESTIMATORS)
NEW = KINDS[1:]


@st.composite
def granularities(draw, x):
    """The arguments that name one which suits ``x``."""
    options = [st.fixed_dictionaries({"axis": axes(x)})]
    if x.dim() > 0:
        options.append(st.just({"axis": "token"}))
    if x.dim() > 1:
        sizes = [g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0] or [3]
        options.append(st.fixed_dictionaries({"group_size": st.sampled_from(sizes)}))
    return draw(st.one_of(options))


def grouped(x, axis=None, group_size=None):
    """The groups of an array along an axis of another shape, and the shape that scales have."""
    if group_size is not None:
        shape = (x.shape[0], x.shape[1] // group_size)
        return x.reshape(shape[0] * shape[1], group_size, *x.shape[2:]), 0, shape
    if axis == "token":
        return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1]), 0, x.shape[:-1]
    return x, axis, () if axis is None else (x.shape[axis],)


@settings(max_examples=400)
@given(data=st.data(), x=tensors(), grid=grids)
def test_reference_equals_numpy(data, x, grid):
    bits, kind = grid
    options = data.draw(granularities(x))
    if isinstance(options.get("axis"), int):
        options = {"axis": front(options["axis"], x)}
    groups, axis, shape = grouped(x.float().numpy(), **options)
    codes, scale, zero, values = specification.on_grid(groups, bits, kind, axis)
    with noisyq_fast.use_backend("reference"):
        y = fake_quantize(x, bits, grid=kind, **options)
        codes_, scale_, *zero_ = quantize(x, bits, grid=kind, **options)
    rounded = ROUND_TO[x.dtype](np.asarray(values, np.float32))
    assert_same(y.float(), torch.from_numpy(np.asarray(rounded)).reshape(x.shape))
    assert_same(codes_.float(), torch.from_numpy(np.asarray(codes)).reshape(x.shape))
    assert_same(scale_, torch.from_numpy(np.asarray(scale)).reshape(shape))
    assert codes_.dtype == (torch.uint8 if kind in ("unsigned", "affine") else torch.int8)
    assert len(zero_) == (kind == "affine")
    if zero_:
        assert_same(zero_[0].float(), torch.from_numpy(np.asarray(zero)).reshape(shape))


@settings(max_examples=600)
@given(data=st.data(), x=tensors(), grid=grids, ste=estimators)
def test_cpu_equals_reference(data, x, grid, ste):
    bits, kind = grid
    options = data.draw(granularities(x))
    results = []
    for backend in ("reference", "cpu"):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with noisyq_fast.use_backend(backend):
            y = fake_quantize(leaf, bits, grid=kind, ste=ste, **options)
            y.backward(torch.ones_like(y))
            codes, scale, *zero_point = quantize(x, bits, grid=kind, **options)
            zero = {"zero_point": zero_point[0]} if zero_point else {}
            values = dequantize(codes, scale, **options, **zero)
        results.append([y.detach(), leaf.grad, codes, scale, values, *zero_point])
        if x.numel() > 0:
            for output in (y, codes, values):
                assert_like(output, x)
    for actual, wanted in zip(*reversed(results), strict=True):
        assert_same(actual, wanted)


@settings(max_examples=400)
@given(data=st.data(), x=tensors(), grid=grids, ste=estimators, training=st.booleans())
def test_cpu_equals_reference_with_a_running_range(data, x, grid, ste, training):
    bits, kind = grid
    axis = data.draw(axes(x))
    shape = (2,) * (kind == "affine") + (() if axis is None else (x.shape[axis],))
    # Smaller than most values, so that they clip; of an affine grid any sign, low above high too.
    start = data.draw(tensors(st.just(shape), st.just(torch.float32))) / 2
    start = start if kind == "affine" else start.abs()
    if not training:
        start = start.nan_to_num(nan=1.0)
    weight = data.draw(st.sampled_from([None, *([0.0] if training else []), 1.0, 0.25, 0.999]))
    results = []
    for backend in ("reference", "cpu"):
        running = start.clone()
        of_each = running[0] if kind == "affine" else running
        observed = None if weight is None else torch.full_like(of_each, weight)
        leaf = x.detach().clone().requires_grad_()
        with noisyq_fast.use_backend(backend):
            y = fake_quantize_ema(
                leaf,
                running,
                bits,
                axis,
                averaging_constant=0.3,
                training=training,
                ste=ste,
                observed=observed,
                grid=kind,
            )
        y.backward(torch.ones_like(y))
        results.append((y.detach(), running, leaf.grad, *([observed] if weight else [])))
    for actual, wanted in zip(*reversed(results), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_after_a_relu_unsigned_bits_are_worth_one_more(bits, dtype):
    x = torch.randn(8, 100).relu().to(dtype)
    for options in ({}, {"axis": 0}, {"axis": "token"}, {"group_size": 20}):
        y = fake_quantize(x, bits, grid="unsigned", **options)
        assert torch.equal(y, fake_quantize(x, bits + 1, **options))
    codes, scale = quantize(x, bits, grid="unsigned")
    signed_codes, signed_scale = quantize(x, bits + 1)
    assert torch.equal(codes.int(), signed_codes.int())
    assert torch.equal(scale, signed_scale)


def test_how_many_values_a_relu_has():
    x = torch.linspace(-1, 1, 1001).relu()
    counts = {
        (bits, kind): len(fake_quantize(x, bits, grid=kind).unique())
        for bits in (2, 4)
        for kind in ("signed", "unsigned")
    }
    assert counts == {(2, "signed"): 2, (2, "unsigned"): 4, (4, "signed"): 8, (4, "unsigned"): 16}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_codes_reach_both_ends_of_the_grid(backend, bits, kind):
    if (bits, kind) == (8, "odd"):
        with pytest.raises(ValueError, match=r"bits: got 8, takes 2\.\.7 of an odd grid"):
            Grid(bits, kind)
        return
    grid = Grid(bits, kind)
    x = torch.linspace(-3, 3, 2001)
    codes, *_ = quantize(x, bits, grid=kind)
    assert (codes.min(), codes.max()) == (grid.code_min, grid.code_max)
    assert codes.dtype == grid.code_dtype


def test_an_odd_grid_has_no_zero_and_is_even_handed(backend):
    x = torch.tensor([-3.0, -1.1, -0.1, 0.0, 0.1, 1.9, 2.1, 3.0])
    y = fake_quantize(x, 2, grid="odd")
    assert y.tolist() == [-3, -1, -1, 1, 1, 1, 3, 3]
    codes, scale = quantize(x, 2, grid="odd")
    assert (codes % 2 == 1).all()
    assert torch.equal(dequantize(codes, scale), y)
    assert fake_quantize(torch.tensor([1.0, torch.inf]), 2, grid="odd").isnan().all()


def test_the_definitions_by_hand(backend):
    x = torch.tensor([-3.0, 0.2, 1.0, 4.5])
    # n = 15; s = 7.5 / 15 = 0.5, z = 6
    codes, scale, zero_point = quantize(x, 4, grid="affine")
    assert (codes.tolist(), scale, zero_point) == ([0, 6, 8, 15], 0.5, 6)
    # s = 4.5 / 7.5 = 0.6; 4.5 is 7.5 steps, rounds to 8 and is clipped to 7
    codes, scale = quantize(x, 4, grid="full")
    assert codes.tolist() == [-5, 0, 2, 7]
    assert scale.item() == pytest.approx(0.6)
    # s = 4.5 / 15 = 0.3
    codes, scale = quantize(x, 4, grid="unsigned")
    assert codes.tolist() == [0, 1, 3, 15]
    assert scale.item() == pytest.approx(0.3)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_affine_range_holds_zero(backend, sign):
    x = sign * torch.tensor([1.0, 2.0, 3.0])
    _, scale, zero_point = quantize(x, 2, grid="affine")
    assert scale == 1
    assert zero_point == (0 if sign == 1 else 3)
    assert torch.equal(fake_quantize(x, 2, grid="affine"), x)
    y = fake_quantize_ema(x, x[:2].clone(), 2, training=False, grid="affine")
    assert y.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_not_finite_is_nan_and_others_are_not(backend, kind, bad):
    x = torch.randn(3, 50)
    x[1, 7] = bad
    y = fake_quantize(x, 4, 0, grid=kind)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    codes, scale, *zero_point = quantize(x, 4, 0, grid=kind)
    assert (codes[1] == 0).all()
    assert not scale[1].isfinite()
    assert all(z[1] == 0 for z in zero_point)
    zero = {"zero_point": zero_point[0]} if zero_point else {}
    assert dequantize(codes, scale, 0, **zero)[1].isnan().all()


def test_an_affine_range_that_overflows_is_nan(backend):
    x = torch.tensor([-3e38, 3e38, 1.0])
    running = torch.tensor([-1.0, 1.0])
    assert fake_quantize_ema(x, running, 8, grid="affine").isnan().all()
    assert running.tolist() == [-1, 1]
    assert fake_quantize(x / 2, 8, grid="affine").isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_subnormals_and_nothing(backend, kind):
    smallest = torch.finfo(torch.float32).tiny if kind == "odd" else 0.0
    assert_same(fake_quantize(torch.zeros(3), 4, grid=kind), torch.full((3,), smallest))
    tiny = torch.tensor([1e-45, -1e-45, 1e-39])
    assert fake_quantize(tiny, 4, grid=kind).isfinite().all()
    _, scale, *_ = quantize(tiny, 4, grid=kind)
    assert scale == torch.finfo(torch.float32).tiny
    for axis in (None, 0, "token"):
        empty = torch.empty(2, 0)
        codes, scale, *_ = quantize(empty, 4, axis, grid=kind)
        assert codes.shape == (2, 0)
        assert (scale == torch.finfo(torch.float32).tiny).all()


# Gradients, and what PyTorch does with operators.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
def test_values_below_0_have_no_gradient_on_an_unsigned_grid(backend, training, ste):
    # -0.1 is rounded to 0 like 0.1, 3.6 to 4 steps of 1, beyond a range of 3.
    x = torch.tensor([-1.0, -0.1, -0.0, 0.1, 3.0, 3.6], requires_grad=True)
    y = fake_quantize_ema(x, torch.tensor(3.0), 2, training=training, ste=ste, grid="unsigned")
    y.backward(torch.arange(1.0, 7.0))
    last = 0 if ste == "clipped" and not training else 6
    assert x.grad.tolist() == [0, 0, 3, 4, 5, last]
    assert (y[:4] == 0).all()


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
def test_what_full_and_affine_grids_clip(backend, ste):
    passed = 0 if ste == "clipped" else 1
    # s = 1.5 / 1.5 = 1: codes -2 .. 1, and 1.5 rounds to 2; -1.5 to -2, which is a code.
    x = torch.tensor([1.5, -1.5, 1.4], requires_grad=True)
    y = fake_quantize(x, 2, grid="full", ste=ste)
    y.sum().backward()
    assert y.tolist() == [1, -2, 1]
    assert x.grad.tolist() == [passed, 1, 1]
    # s = 1, z = rint(1.5) = 2: steps -2 .. 1, and 1.5 rounds to 2.
    x = torch.tensor([-1.5, 1.5], requires_grad=True)
    y = fake_quantize(x, 2, grid="affine", ste=ste)
    y.sum().backward()
    assert y.tolist() == [-2, 1]
    assert x.grad.tolist() == [1, passed]
    # A range that is given clips on both sides.
    x = torch.tensor([-9.0, -1.0, 2.0, 9.0], requires_grad=True)
    y = fake_quantize_ema(x, torch.tensor([-1.0, 2.0]), 2, training=False, ste=ste, grid="affine")
    y.sum().backward()
    assert y.tolist() == [-1, -1, 2, 2]
    assert x.grad.tolist() == [passed, 1, 1, passed]


def saved_by(function, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(x)
    return y, sum(t.nbytes for t in saved)


@pytest.mark.parametrize("kind", NEW)
def test_what_is_saved_for_backward(kind):
    x = torch.randn(3, 21, requires_grad=True)
    for values, expected in ((x, 8 if kind == "unsigned" else 0), (x.detach().relu(), 0)):
        values = values.detach().requires_grad_()
        y, saved = saved_by(lambda x: fake_quantize(x, 4, grid=kind), values)
        assert saved == expected
        grad = torch.randn(3, 21)
        (received,) = torch.autograd.grad(y, values, grad)
        assert (received.data_ptr() == grad.data_ptr()) == (expected == 0)
    with torch.no_grad():  # nothing is computed for a gradient that nobody asks for
        assert not fake_quantize(x, 4, grid=kind).requires_grad


RANGES = {"signed": torch.tensor(2.0), "affine": torch.tensor([-1.0, 2.0])}
FUNCTIONS = {
    "channel": lambda x, kind: fake_quantize(x, 3, 0, grid=kind),
    "token": lambda x, kind: fake_quantize(x, 3, "token", grid=kind),
    "group": lambda x, kind: fake_quantize(x, 3, grid=kind, group_size=2),
    "given range": lambda x, kind: fake_quantize_ema(
        x,
        RANGES.get(kind, RANGES["signed"]),
        3,
        training=False,
        ste="clipped",
        grid=kind,
    ),
    "codes": lambda x, kind: quantize(x, 3, "token", grid=kind)[0].float(),
    "values": lambda x, kind: dequantize(*quantize(x, 3, 1, grid=kind)[:2], 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_loop_over_samples(kind, name):
    f = FUNCTIONS[name]
    x = torch.randn(3, 5, 4)
    for dim in (0, 1, 2):
        samples = x.movedim(0, dim)
        expected = torch.stack([f(sample, kind) for sample in x])
        assert torch.equal(torch.vmap(lambda x: f(x, kind), dim)(samples), expected)

    def energy(x):
        return f(x, kind).square().sum()

    if name in ("codes", "values"):
        return
    leaf = x.clone().requires_grad_()
    sum(energy(sample) for sample in leaf).backward()
    assert torch.equal(torch.vmap(torch.func.grad(energy))(x), leaf.grad)


@pytest.mark.parametrize("name", list(FUNCTIONS)[:4])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_second_derivatives(kind, name):
    f = FUNCTIONS[name]
    x = torch.randn(2, 4, requires_grad=True)

    def energy(x):
        return f(x, kind).square().sum()

    (first,) = torch.autograd.grad(energy(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    x = x.detach()
    assert torch.equal(torch.func.grad(energy)(x), first)
    assert torch.equal(torch.func.grad(lambda x: torch.func.grad(energy)(x).sum())(x), second)
    _, tangent = torch.func.jvp(energy, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, first.sum().detach())
    assert torch.equal(torch.func.jacfwd(energy)(x), first)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["unsigned", "affine"])
def test_compiles_to_one_graph(kind, name):
    f = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: f(x, kind), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = compiled(leaves[0]), f(leaves[1], kind)
    assert torch.equal(*outputs)
    if outputs[1].requires_grad:
        for y in outputs:
            y.square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_dequantize_is_differentiable_in_the_scale():
    codes = torch.randint(0, 16, (3, 4), dtype=torch.uint8)
    scale, zero_point = torch.rand(4, requires_grad=True), torch.tensor([3, 0, 15, 7]).byte()
    y = dequantize(codes, scale, 1, zero_point=zero_point)
    grad = torch.randn(3, 4)
    y.backward(grad)
    steps = codes.float() - zero_point.float()
    torch.testing.assert_close(y.detach(), steps * scale.detach())
    torch.testing.assert_close(scale.grad, (grad * steps).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_many_tensors_are_like_each(kind):
    tensors = [torch.randn(4, 6), torch.randn(2, 4, 3, 3).half()]
    for options in ({"axis": 1}, {"axis": "token"}, {"group_size": 2}):
        together = noisyq_fast.fake_quantize_many(tensors, [3, 7], grid=kind, **options)
        for y, x, b in zip(together, tensors, [3, 7], strict=True):
            assert torch.equal(y, fake_quantize(x, b, grid=kind, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_number_of_threads(kind, restore_threads):
    x = torch.randn(5, 37, 2000)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, 4, 1, grid=kind, ste="clipped")
        y.sum().backward()
        results.append((y.detach(), leaf.grad, *quantize(x, 4, 1, grid=kind)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


X = torch.randn(4, 6)
ONE = torch.tensor(1.0)
REFUSED = [
    (lambda: Grid(9), ValueError, "bits: got 9, takes 2..8"),
    (lambda: Grid(4.0), TypeError, r"bits: got 4.0 \(float\), takes an int"),
    (lambda: Grid("4"), TypeError, "bits: got '4'"),
    (lambda: Grid(True), TypeError, "bits: got True"),
    (lambda: Grid(8, "odd"), ValueError, "bits: got 8, takes 2..7 of an odd grid"),
    (lambda: fake_quantize(X.to_sparse(), 4, "token"), ValueError, "x: got a tensor of layout"),
    (lambda: quantize(X.to_sparse(), 4, group_size=2), ValueError, "x: got a tensor of layout"),
    (lambda: Grid(4, "even"), ValueError, "grid: got 'even', takes one of signed, full, unsigned"),
    (lambda: fake_quantize(X, 4, grid="even"), ValueError, "grid: got 'even'"),
    (lambda: quantize(X, 4, grid=4), ValueError, "grid: got 4"),
    (lambda: fake_quantize_ema(X, ONE, 4, grid=None), ValueError, "grid: got None"),
    (lambda: fake_quantize(X, 1, grid="full"), ValueError, "bits: got 1, takes 2..8"),
    (lambda: fake_quantize(X, 4, grid="full", ste="no"), ValueError, "ste: got 'no'"),
    (lambda: fake_quantize(X.double(), 4, grid="full"), TypeError, "x: got torch.float64"),
    (
        lambda: fake_quantize(X, 4, group_size=4),
        ValueError,
        r"group_size: got 4 .* \[4, 6\], whose 6 input channels leave a remainder of 2",
    ),
    (lambda: fake_quantize(X, 4, group_size=0), ValueError, "group_size: got 0"),
    (lambda: fake_quantize(X, 4, group_size=2.0), TypeError, "group_size: got 2.0"),
    (lambda: fake_quantize(X[0], 4, group_size=2), ValueError, r"group_size: .* \[6\]"),
    (lambda: fake_quantize(X, 4, 1, group_size=2), ValueError, "axis: got 1 with group_size 2"),
    (lambda: fake_quantize(X, 4, "token", group_size=2), ValueError, "group_size: got 2 with axis"),
    (lambda: fake_quantize(ONE, 4, "token"), ValueError, "axis: got 'token' for a tensor of"),
    (lambda: fake_quantize_ema(X, ONE, 4, "token"), ValueError, "axis: got 'token', which keeps"),
    (
        lambda: fake_quantize_ema(X, ONE, 4, grid="affine"),
        ValueError,
        r"running_absmax: got shape \[\], takes \[2\] for",
    ),
    (
        lambda: fake_quantize_ema(X, torch.ones(2), 4, grid="affine", observed=torch.ones(2)),
        ValueError,
        r"observed: got shape \[2\], takes that of an end of running_absmax, \[\]",
    ),
    (
        lambda: fake_quantize_ema(X, torch.full((2,), torch.nan), 4, training=False, grid="affine"),
        ValueError,
        "running_absmax: got NaN",
    ),
    (
        lambda: dequantize(X.byte(), torch.ones(2), "token"),
        ValueError,
        r"scale: got shape \[2\], takes \[4\]",
    ),
    (
        lambda: dequantize(X.to(torch.int8), ONE, zero_point=ONE.byte()),
        TypeError,
        "zero_point: got one for int8 codes",
    ),
    (
        lambda: dequantize(X.byte(), ONE, zero_point=ONE),
        TypeError,
        "zero_point: got torch.float32, takes torch.uint8",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_without_grids_leaves_them_to_the_next(backend):
    expected = next(b for b in ("cpu", "reference") if not BACKENDS[b].unavailable())
    for operator in reference.backend.functions:
        if "on_grid" in operator and operator not in BACKENDS[backend].functions:
            assert noisyq_fast.current_backend("cpu", operator) == expected
    assert noisyq_fast.current_backend("cpu", "quantize") == backend
