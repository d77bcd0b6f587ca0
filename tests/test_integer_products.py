"""Products of codes, and what follows their sums, are exact: they equal NumPy's int64 to the bit."""

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from assert_same import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyq_fast
from noisyq_fast.backends import BACKENDS, cpu_integer, reference_integer

operators = torch.ops.noisyq
needs_cpu = pytest.mark.skipif(
    BACKENDS["cpu"].unavailable() is not None, reason=str(BACKENDS["cpu"].unavailable())
)


# The definition, in NumPy: `acc` in int64, then one rounding for each operation.


def steps(codes, zero_point, axis=0):
    codes = codes.numpy().astype(np.int64)
    if zero_point is None:
        return codes
    zero = zero_point.numpy().astype(np.int64)
    return codes - zero.reshape(zero.shape + (1,) * (codes.ndim - zero.ndim - axis))


def convolved(x, w, stride, padding, dilation, transposed, output_padding, groups):
    """Of ``[N, C, ...]`` and ``[O, C / groups, ...]``; transposed, ``[C, O / groups, ...]``."""
    kernel = w.shape[2:]
    channels = w.shape[1] if transposed else w.shape[0] // groups
    sizes = [
        (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
        if transposed
        else (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d, extra in zip(
            x.shape[2:], kernel, stride, padding, dilation, output_padding, strict=True
        )
    ]
    out = np.zeros((x.shape[0], channels * groups, *sizes), np.int64)
    small, large = (x, out) if transposed else (out, x)
    # Every position of the smaller is connected, over every position of the kernel, with one.
    for g, k in itertools.product(range(groups), np.ndindex(*kernel)):
        for at in np.ndindex(*small.shape[2:]):
            there = [i * s - p + j * d for i, s, p, j, d in zip(at, stride, padding, k, dilation)]
            if any(not 0 <= i < size for i, size in zip(there, large.shape[2:])):
                continue
            of = (slice(None), slice(g * channels, (g + 1) * channels))
            inputs = x.shape[1] // groups
            of_x = (slice(None), slice(g * inputs, (g + 1) * inputs))
            if transposed:
                w_k = w[(slice(g * inputs, (g + 1) * inputs), slice(None), *k)]
                out[(*of, *there)] += x[(*of_x, *at)] @ w_k
            else:
                w_k = w[(slice(g * channels, (g + 1) * channels), slice(None), *k)]
                out[(*of, *at)] += x[(*of_x, *there)] @ w_k.T
    return out


def in_float(acc, scale, weight_scale, bias):
    """``float32(acc) * (s * t) + bias``: the channels are second."""
    shape = (-1,) + (1,) * (acc.ndim - 2)
    factor = np.float32(scale) * weight_scale.numpy()
    y = acc.astype(np.float32) * factor.reshape(shape)
    return y if bias is None else y + bias.numpy().reshape(shape)


# What is drawn.


EXTREMES = {torch.int8: [-128, 127, -127, 0, 1], torch.uint8: [0, 255, 254, 128, 1]}


def codes_of(rng, shape, dtype, kind):
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    if kind == "any":
        values = rng.integers(low, high, shape)
    elif kind == "few bits":
        values = rng.integers(-7, 8, shape) if dtype == torch.int8 else rng.integers(0, 16, shape)
    else:
        values = rng.choice(EXTREMES[dtype], shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def zero_point_of(rng, shape, dtype, kind):
    if dtype == torch.int8 or kind == "none":
        return None
    values = {"low": np.zeros(shape), "high": np.full(shape, 255)}.get(
        kind, rng.integers(0, 256, shape)
    )
    return torch.from_numpy(np.asarray(values)).to(torch.uint8)


code_dtypes = st.sampled_from([torch.int8, torch.uint8])
code_kinds = st.sampled_from(["any", "few bits", "extremes"])
zero_kinds = st.sampled_from(["none", "any", "low", "high"])


def in_memory(draw, x):
    """The same values in another layout."""
    layouts = ["contiguous", "sliced", "permuted", "expanded"] + ["channels_last"] * (x.dim() == 4)
    layout = draw(st.sampled_from(layouts))
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 1]
    if layout == "permuted":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


@st.composite
def convolutions(draw):
    """The arguments of `convolve_codes`."""
    dims = draw(st.sampled_from([2, 2, 2, 1, 3]))
    transposed = draw(st.sampled_from([False, False, True]))

    def some(values):
        return draw(st.lists(st.sampled_from(values), min_size=dims, max_size=dims))

    kernel, stride, dilation = some([1, 2, 3]), some([1, 2]), some([1, 2])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (draw(st.sampled_from([1, 2, 5, 16])) for _ in range(2))
    if draw(st.booleans()):
        groups, inputs, outputs = 4, 1, 1  # depthwise
    padding = [draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True)]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sizes = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 4))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = draw(code_dtypes), draw(code_dtypes)
    x = codes_of(
        rng,
        (draw(st.sampled_from([0, 1, 2, 3])), inputs * groups, *sizes),
        *[dtypes[0], draw(code_kinds)],
    )
    of_weight = (inputs * groups, outputs) if transposed else (outputs * groups, inputs)
    w = codes_of(rng, (*of_weight, *kernel), dtypes[1], draw(code_kinds))
    zero = zero_point_of(rng, (), dtypes[0], draw(zero_kinds))
    w_zero = zero_point_of(rng, (outputs * groups,), dtypes[1], draw(zero_kinds))
    how = (stride, padding, dilation, transposed, extra if transposed else [0] * dims, groups)
    return in_memory(draw, x), zero, in_memory(draw, w), w_zero, *how


def exact_convolution(x, zero, w, w_zero, *how):
    *_, transposed, _, groups = how
    if transposed and w_zero is not None:
        zeros = w_zero.view(groups, 1, -1).expand(groups, len(w) // groups, -1).flatten(0, 1)
        w = steps(w, zeros)
    else:
        w = steps(w, w_zero)
    return convolved(steps(x, zero), w, *how)


def laid_out_like(y, x):
    """Channels last where the input's are."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return y.is_contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


@pytest.fixture(params=["cpu", "reference"])
def exact_backend(request):
    if BACKENDS[request.param].unavailable() is not None:
        pytest.skip(f"{request.param}: {BACKENDS[request.param].unavailable()}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


def test_convolutions_equal_numpy(exact_backend):
    @settings(max_examples=60)
    @given(st.data())
    def check(data):
        x, zero, w, w_zero, *how = data.draw(convolutions())
        acc = exact_convolution(x, zero, w, w_zero, *how)
        sums = operators.convolve_codes(x, zero, w, w_zero, *how)
        assert sums.dtype == torch.float32 and laid_out_like(sums, x)
        assert_same(sums, torch.from_numpy(acc.astype(np.float32)))

        scale, weight_scale = torch.tensor(0.3), torch.rand(acc.shape[1]) + 0.01
        bias = torch.randn(acc.shape[1]) if data.draw(st.booleans()) else None
        ones = (torch.ones(()).expand(x.shape), torch.ones(()).expand(w.shape))
        y = operators.integer_convolution(
            *(*ones, bias, x, scale, zero, None, w, weight_scale, w_zero, None, *how)
        )
        assert laid_out_like(y, x)
        assert_same(y, torch.from_numpy(in_float(acc, 0.3, weight_scale, bias)))

    check()


@st.composite
def linears(draw):
    """The arguments of `multiply_codes`, of which the zero points are of nothing, one or tokens."""
    terms, outputs = draw(st.sampled_from([0, 1, 7, 64])), draw(st.sampled_from([0, 1, 3, 17]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = draw(code_dtypes), draw(code_dtypes)
    groups = draw(st.sampled_from([(), (), (3,)]))
    leading = groups + (draw(st.sampled_from([0, 1, 5])),)
    leading = draw(st.sampled_from([leading, leading, ()])) if not groups else leading
    x = codes_of(rng, (*leading, terms), dtypes[0], draw(code_kinds))
    w = codes_of(rng, (*groups, outputs, terms), dtypes[1], draw(code_kinds))
    of_tokens = leading if draw(st.booleans()) else groups
    zero = zero_point_of(rng, of_tokens, dtypes[0], draw(zero_kinds))
    w_zero = zero_point_of(rng, (*groups, outputs), dtypes[1], draw(zero_kinds))
    return in_memory(draw, x) if leading else x, zero, in_memory(draw, w), w_zero


def test_linears_equal_numpy(exact_backend):
    @settings(max_examples=100)
    @given(linears(), st.booleans(), st.booleans())
    def check(arguments, has_bias, by_token):
        x, zero, w, w_zero = arguments
        acc = steps(x, zero) @ np.swapaxes(steps(w, w_zero), -1, -2)
        sums = operators.multiply_codes(*arguments)
        assert sums.is_contiguous()
        assert_same(sums, torch.from_numpy(np.asarray(acc.astype(np.float32))))

        of_scale = x.shape[:-1] if by_token else x.shape[: w.dim() - 2]
        scale, weight_scale = torch.rand(of_scale) + 0.1, torch.rand(w.shape[:-1]) + 0.1
        bias = torch.randn(w.shape[:-1]) if has_bias else None
        ones = (torch.ones(()).expand(x.shape), torch.ones(()).expand(w.shape))
        y = operators.integer_linear(
            *(*ones, bias, x, scale, zero, None, w, weight_scale, w_zero, None)
        )
        along = scale.numpy().reshape(of_scale + (1,) * (x.dim() - len(of_scale)))
        between = [] if w.dim() == 2 else [1]  # rows of a group
        of_channels = (*w.shape[:-2], *between, w.shape[-2])
        expected = acc.astype(np.float32) * (along * weight_scale.numpy().reshape(of_channels))
        if has_bias:
            expected = expected + bias.numpy().reshape(of_channels)
        assert_same(y, torch.from_numpy(np.asarray(expected)))

    check()


# Sums that no float holds.


@pytest.mark.parametrize("terms", [257, 4096, 33_026, 66_400])
def test_sums_beyond_floats_and_beyond_32_bits(exact_backend, terms):
    """Up to 255 * 255 * 66400, above 2^32."""
    x = torch.full((2, terms), 255, dtype=torch.uint8)
    x[1, ::2] = 254
    for w, zero, w_zero in (
        (torch.full((3, terms), -128, dtype=torch.int8), None, None),
        (torch.full((3, terms), 127, dtype=torch.int8), 255, None),
        (torch.full((3, terms), 255, dtype=torch.uint8), 0, [0, 1, 255]),
    ):
        w[1, 1::3] = 1
        zero = None if zero is None else torch.tensor(zero, dtype=torch.uint8)
        w_zero = None if w_zero is None else torch.tensor(w_zero, dtype=torch.uint8)
        acc = steps(x, zero) @ steps(w, w_zero).T
        expected = torch.from_numpy(acc.astype(np.float32))
        assert_same(operators.multiply_codes(x, zero, w, w_zero), expected)
        how = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        sums = operators.convolve_codes(
            x.view(2, terms, 1, 1), zero, w.view(3, terms, 1, 1), w_zero, *how
        )
        assert_same(sums.flatten(1), expected)


# Every route.


@contextlib.contextmanager
def route(name):
    """Forces one."""
    never = mock.Mock(return_value=False)
    with contextlib.ExitStack() as stack:
        replaced = {
            "own kernel": (),
            "oneDNN": ("has_own_kernel",),
            "floats": ("has_own_kernel", "is_exact_in_8_bits", "has_exact_products"),
        }
        for function in replaced[name.removesuffix(", oneDNN off").replace("doubles", "floats")]:
            stack.enter_context(mock.patch.object(cpu_integer, function, never))
        if name == "doubles":
            stack.enter_context(mock.patch.object(cpu_integer, "_EXACT_FLOAT", 0))
        if name.endswith("off"):
            enabled = torch.backends.mkldnn.enabled
            stack.callback(torch._C._set_mkldnn_enabled, enabled)
            torch._C._set_mkldnn_enabled(False)
        yield


ROUTES = ["own kernel", "oneDNN", "floats", "doubles", "floats, oneDNN off"]
SHAPES = {
    "3x3": ((16, 16, 9, 7), (16, 16, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "odd": ((3, 5, 11, 9), (19, 5, 3, 2), ([2, 1], [1, 0], [1, 2], False, [0, 0], 1)),
    "1x1": ((2, 48, 6, 5), (33, 48, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "depthwise": ((4, 12, 8, 8), (12, 1, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 12)),
    "groups": ((2, 8, 8, 8), (12, 4, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "first": ((2, 3, 15, 15), (16, 3, 7, 7), ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)),
}


@needs_cpu
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_route_of_the_cpu(name, shape, restore_threads):
    sizes, kernel, how = SHAPES[shape]
    rng = np.random.default_rng(0)
    for dtype, kind, zero in (
        (torch.int8, "few bits", None),
        (torch.int8, "extremes", None),
        (torch.uint8, "any", torch.tensor(3, dtype=torch.uint8)),
        (torch.uint8, "extremes", torch.tensor(255, dtype=torch.uint8)),
    ):
        x, w = codes_of(rng, sizes, dtype, kind), codes_of(rng, kernel, torch.int8, kind)
        expected = reference_integer.convolve_codes(x, zero, w, None, *how)
        for threads, last in ((1, False), (2, True)):
            torch.set_num_threads(threads)
            format_ = torch.channels_last if last else torch.contiguous_format
            with route(name):
                sums = cpu_integer.convolve_codes(
                    x.contiguous(memory_format=format_), zero, w, None, *how
                )
            assert_same(sums, expected)
            assert sums.is_contiguous(memory_format=format_)


@needs_cpu
@pytest.mark.parametrize("name", ["own kernel", "floats", "doubles"])
def test_every_route_of_a_matrix(name):
    rng = np.random.default_rng(0)
    x, w = (codes_of(rng, (n, 75), torch.int8, "extremes") for n in (33, 18))
    u = codes_of(rng, (33, 75), torch.uint8, "extremes")
    for codes, zero in ((x, None), (u, None), (u, torch.tensor(255, dtype=torch.uint8))):
        for rows in (codes, codes.T.contiguous().T, codes[::2, :], codes[:1].expand(9, 75)):
            with route(name):
                sums = cpu_integer.multiply_codes(rows, zero, w, None)
            assert_same(sums, reference_integer.multiply_codes(rows, zero, w, None))


@needs_cpu
@pytest.mark.parametrize("broken", ["wrong", "raises", "gone"])
def test_a_product_of_pytorch_that_is_not_exact_is_not_used(broken):
    x = torch.randint(-128, 128, (2, 4, 5, 5), dtype=torch.int8)
    w = torch.randint(-128, 128, (3, 4, 3, 3), dtype=torch.int8)
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def convolve(*arguments):
        sums = original(*arguments)
        sums.view(-1)[-1] += 1
        return sums

    def multiply(x, w):
        sums = product(x, w)
        sums[-1, -1] += 1
        return sums

    original, product = cpu_integer._convolve_8_bits, torch._int_mm
    if broken != "wrong":
        error = RuntimeError("no such primitive") if broken == "raises" else AttributeError("gone")
        convolve = multiply = mock.Mock(side_effect=error)
    try:
        cpu_integer._passes.cache_clear()
        cpu_integer.has_exact_products.cache_clear()
        with (
            mock.patch.object(cpu_integer, "_convolve_8_bits", convolve),
            mock.patch.object(torch, "_int_mm", multiply),
            route("oneDNN"),
        ):
            assert not cpu_integer.is_exact_in_8_bits(36, w.shape, *how[:3], 1)
            assert not cpu_integer.has_exact_products()
            assert_same(
                cpu_integer.convolve_codes(x, None, w, None, *how),
                reference_integer.convolve_codes(x, None, w, None, *how),
            )
            rows = x.view(2, 100), None, w.view(3, 36).repeat(1, 3)[:, :100], None
            assert_same(cpu_integer.multiply_codes(*rows), reference_integer.multiply_codes(*rows))
    finally:
        cpu_integer._passes.cache_clear()
        cpu_integer.has_exact_products.cache_clear()


@needs_cpu
@pytest.mark.parametrize("name", ["own kernel", "oneDNN", "floats"])
def test_neither_autocast_nor_low_precision_nor_a_default_dtype_changes_a_sum(name):
    x = torch.randint(0, 256, (2, 3, 7, 7), dtype=torch.uint8)
    w = torch.randint(-128, 128, (5, 3, 3, 3), dtype=torch.int8)
    operands = torch.tensor(9, dtype=torch.uint8), w, None
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    rows = x.view(2, -1), operands[0], w.view(-1, 27).repeat(1, 6)[:, :147], None
    expected = reference_integer.convolve_codes(x, *operands, *how)
    of_rows = reference_integer.multiply_codes(*rows)
    precision = torch.get_float32_matmul_precision()
    for dtype in (torch.float64, torch.float16):
        try:
            torch.set_float32_matmul_precision("medium")
            torch.set_default_dtype(dtype)
            cpu_integer._passes.cache_clear()
            with torch.autocast("cpu"), route(name):
                sums = cpu_integer.convolve_codes(x, *operands, *how)
                products = cpu_integer.multiply_codes(*rows)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision(precision)
        assert_same(sums, expected)
        assert_same(products, of_rows)


# Errors.


def product(x, w, **changes):
    how = {
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "transposed": False,
        "output_padding": [0, 0],
        "groups": 1,
    } | changes
    return operators.convolve_codes(x, None, w, None, *how.values())


def test_errors(exact_backend):
    x, w = torch.ones(2, 4, 5, 5, dtype=torch.int8), torch.ones(6, 4, 3, 3, dtype=torch.int8)
    zero = torch.zeros((), dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes: got images of .5, 2. pixels, .5, 2. with their"):
        product(x[..., :2], w)
    with pytest.raises(ValueError, match="takes at least the kernel, .7, 7. with its dilation"):
        product(x, w, dilation=[3, 3])
    for channels in (3, 5, 0):
        with pytest.raises(ValueError, match=f"{channels} channels, for a weight .* 4 channels"):
            product(x[:, :1].expand(2, channels, 5, 5), w)
    with pytest.raises(ValueError, match="4 channels, for a weight .* 8 channels"):
        product(x, w, groups=2)
    with pytest.raises(ValueError, match="3 axes, for a weight"):
        product(x[0], w)
    for name in ("stride", "dilation"):
        with pytest.raises(ValueError, match=f"{name}: got .1, 0., takes 1 or more"):
            product(x, w, **{name: [1, 0]})
    with pytest.raises(ValueError, match="padding: got .0, -1., takes 0 or more"):
        product(x, w, padding=[0, -1])
    with pytest.raises(TypeError, match="codes: got torch.float32, takes torch.int8"):
        product(x.float(), w)
    with pytest.raises(TypeError, match="weight: got torch.int32, takes torch.int8"):
        product(x, w.int())
    with pytest.raises(TypeError, match="int8 codes with a zero point"):
        operators.multiply_codes(x, zero, w.mT, None)
    with pytest.raises(ValueError, match="codes: got shape .2, 3. .* takes .*, 4."):
        operators.multiply_codes(x.view(-1, 4)[:2, :3], None, w[..., 0, 0], None)
    ones = torch.ones(2, 4), torch.ones(6, 4)
    rows, scale = (x.view(-1, 4)[:2], torch.tensor(1.0), None, None), torch.ones(6)
    for bias, weight_scale, name in (
        (None, scale[0], "weight_scale"),
        (None, scale[:5], "weight_scale"),
        (scale[:5], scale, "bias"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got shape .*, takes .6."):
            operators.integer_linear(*ones, bias, *rows, w[..., 0, 0], weight_scale, None, None)
    length = 2**37 + 1
    meta = torch.empty(1, dtype=torch.int8, device="meta").expand(2, length)
    with pytest.raises(ValueError, match=f"sums of {length} terms, takes up to {2**37}"):
        operators.multiply_codes(meta, None, meta, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_stay_loud(exact_backend, value):
    x, w = torch.zeros(2, 4, 3, 3, dtype=torch.int8), torch.ones(6, 4, 3, 3, dtype=torch.int8)
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    ones, scales = (torch.ones(x.shape), torch.ones(w.shape)), torch.ones(6)
    scales[2] = value
    for scale, weight_scale, loud in (
        (torch.tensor(value), torch.ones(6), slice(None)),
        (torch.tensor(1.0), scales, slice(2, 3)),
    ):
        y = operators.integer_convolution(
            *(*ones, None, x, scale, None, None, w, weight_scale, None, None, *how)
        )
        assert y[:, loud].isnan().all()
        others = torch.arange(6) != 2
        assert y[:, others].isfinite().all() or not scale.isfinite()
        z = operators.integer_linear(
            *(torch.ones(2, 36), torch.ones(6, 36), None, x.flatten(1), scale, None, None),
            *(w.flatten(1), weight_scale, None, None),
        )
        assert z[:, loud].isnan().all()
