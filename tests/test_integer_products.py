"""Products of codes, and what follows their sums, equal NumPy and the reference to the bit."""

import contextlib
import itertools
import os
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from assert_same import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyq_fast
from noisyq_fast.backends import BACKENDS, cpu_integer, reference_integer
from noisyq_fast.backends.reference import MASKED
from noisyq_fast.grid import KINDS, Grid

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
            there = [
                i * s - p + j * d
                for i, s, p, j, d in zip(at, stride, padding, k, dilation, strict=True)
            ]
            if any(not 0 <= i < size for i, size in zip(there, large.shape[2:], strict=True)):
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
        max(1, d * (k - 1) + 1 - 2 * p) + 2 * p * transposed + draw(st.integers(0, 4))
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
    @settings(max_examples=40)
    @given(st.data())
    def check(data):
        x, zero, w, w_zero, *how = data.draw(convolutions())
        acc = exact_convolution(x, zero, w, w_zero, *how)
        sums = operators.convolve_codes(x, zero, w, w_zero, *how)
        assert sums.dtype == torch.float32
        assert laid_out_like(sums, x)
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
    leading = (*groups, draw(st.sampled_from([0, 1, 5])))
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
    with pytest.raises(ValueError, match=r"codes: got images of .5, 2. pixels, .5, 2. with their"):
        product(x[..., :2], w)
    with pytest.raises(ValueError, match=r"takes at least the kernel, .7, 7. with its dilation"):
        product(x, w, dilation=[3, 3])
    for channels in (3, 5, 0):
        with pytest.raises(ValueError, match=rf"{channels} channels, for a weight .* 4 channels"):
            product(x[:, :1].expand(2, channels, 5, 5), w)
    with pytest.raises(ValueError, match=r"4 channels, for a weight .* 8 channels"):
        product(x, w, groups=2)
    with pytest.raises(ValueError, match="3 axes, for a weight"):
        product(x[0], w)
    for name in ("stride", "dilation"):
        with pytest.raises(ValueError, match=rf"{name}: got .1, 0., takes 1 or more"):
            product(x, w, **{name: [1, 0]})
    with pytest.raises(ValueError, match=r"padding: got .0, -1., takes 0 or more"):
        product(x, w, padding=[0, -1])
    with pytest.raises(TypeError, match=r"codes: got torch.float32, takes torch.int8"):
        product(x.float(), w)
    with pytest.raises(TypeError, match=r"weight: got torch.int32, takes torch.int8"):
        product(x, w.int())
    with pytest.raises(TypeError, match="int8 codes with a zero point"):
        operators.multiply_codes(x, zero, w.mT, None)
    with pytest.raises(ValueError, match=r"codes: got shape .2, 3. .* takes .*, 4."):
        operators.multiply_codes(x.view(-1, 4)[:2, :3], None, w[..., 0, 0], None)
    ones = torch.ones(2, 4), torch.ones(6, 4)
    rows, scale = (x.view(-1, 4)[:2], torch.tensor(1.0), None, None), torch.ones(6)
    for bias, weight_scale, name in (
        (None, scale[0], "weight_scale"),
        (None, scale[:5], "weight_scale"),
        (scale[:5], scale, "bias"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: got shape .*, takes .6."):
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


# What follows the sums: on the CPU to the bit as in the reference.


@st.composite
def sums_of_channels(draw, bounds=(1, 7 * 7 * 9, 2**15 - 1, 2**15, 2**24, 2**31 - 2**7)):
    """Whole floats, or int16 where these are wide enough, and their bound; four-axed ones laid out
    either way, and as many as several threads share."""
    channels = draw(st.sampled_from([1, 2, 3, 8, 17]))
    shape = draw(
        st.sampled_from([(2, 0), (1,), (5,), (2, 5), (3, 4, 5), (2, 3, 3, 3), (25, 31, 33)])
    )
    bound = draw(st.sampled_from(bounds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (shape[0], channels, *shape[1:])
    if draw(st.booleans()):
        values = rng.integers(-bound, bound + 1, shape)
    else:
        values = rng.choice([-bound, bound], shape, p=[0.1, 0.9])
    values = np.minimum(values.astype(np.float32), np.float32(2**31 - 2**7))  # as it was rounded
    sums = torch.from_numpy(values)
    if sums.dim() == 4 and draw(st.booleans()):
        sums = sums.contiguous(memory_format=torch.channels_last)
    if bound < 2**15 and draw(st.booleans()):
        sums = sums.to(torch.int16)
    return sums, bound


def both(name, *arguments):
    """What the reference computes, and the CPU with one thread and with two."""
    results = []
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2)):
        torch.set_num_threads(threads)
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        results.append(BACKENDS[backend].functions[name](*copies))
    return results


def assert_equal_to_the_bit(name, *arguments):
    expected, *others = both(name, *arguments)
    for found in others:
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                assert a.dtype == b.dtype
                assert_same(a, b)
    return expected


@needs_cpu
def test_moments_are_those_of_python_integers(restore_threads):
    @settings(max_examples=40)
    @given(sums_of_channels())
    def check(drawn):
        sums, bound = drawn
        kept, total, squares, low, high = assert_equal_to_the_bit("moments", sums, bound)
        assert kept.dtype == (torch.int16 if bound < 2**15 else torch.float32)
        assert torch.equal(kept.float(), sums.float())
        for c, of_channel in enumerate(reference_integer.by_channel(sums)):
            upper, lower = squares[c].tolist()
            assert 0 <= lower < 2**32
            assert (int(total[c]), (upper << 32) + lower) == whole_sums(of_channel)
            if len(of_channel):
                assert (low[c], high[c]) == (of_channel.min(), of_channel.max())

    check()


def whole_sums(values):
    """Of v and of v^2, as Python's integers."""
    whole = values.numpy().astype(np.int64)
    squares = whole * whole  # below 2^62
    return int(whole.sum()), (int((squares >> 31).sum()) << 31) + int((squares % 2**31).sum())


@needs_cpu
def test_squares_beyond_63_bits(restore_threads):
    sums = torch.full((100, 3, 4, 4), float(2**31 - 2**7))
    _, total, squares, _, _ = assert_equal_to_the_bit("moments", sums, 2**31 - 2**7)
    exact = 1600 * (2**31 - 2**7) ** 2
    assert exact > 2**63
    assert squares.tolist() == [[exact >> 32, exact & 0xFFFFFFFF]] * 3
    weight = torch.ones(3), torch.zeros(3)
    *_, mean, variance = assert_equal_to_the_bit(
        "normalization", total, squares, 1600, torch.ones(3), *weight, 1e-5
    )
    assert mean.tolist() == [2**31 - 2**7] * 3
    assert variance.tolist() == [0] * 3


@needs_cpu
def test_normalization_follows_the_formula(restore_threads):
    """Against fractions: exact but for the roundings that the formula names."""

    @settings(max_examples=60)
    @given(sums_of_channels(), st.booleans(), st.sampled_from([1e-30, 1e-5, 1.0]))
    def check(drawn, has_affine, eps):
        sums, bound = drawn
        count = reference_integer.by_channel(sums).shape[1]
        if count == 0:
            return
        _, total, squares, _, _ = BACKENDS["reference"].functions["moments"](sums, bound)
        scale = torch.rand(len(total)) * 2.0**-20 + 1e-9
        affine = (torch.randn(len(total)), torch.randn(len(total))) if has_affine else (None, None)
        factor, term, _mean, inverse, of_batch, variance = assert_equal_to_the_bit(
            "normalization", total, squares, count, scale, *affine, eps
        )
        for c, of_channel in enumerate(reference_integer.by_channel(sums)):
            s, (whole, of_squares) = float(scale[c]), whole_sums(of_channel)
            exact = Fraction(whole, count)
            nearest = round(float(whole) / count)
            spread = float(of_squares - 2 * nearest * whole + count * nearest**2)
            d = float(whole - count * nearest)
            batch_mean = (nearest + d / count) * s
            batch_variance = (spread - d * d / count) / count * (s * s)
            one = np.float32(1 / np.sqrt(batch_variance + eps))
            slope = float(one) * (float(affine[0][c]) if has_affine else 1.0)
            shift = (float(affine[1][c]) if has_affine else 0.0) - batch_mean * slope
            assert float(of_batch[c]) == batch_mean
            assert float(variance[c]) == batch_variance
            assert float(inverse[c]) == one
            assert float(factor[c]) == np.float32(slope * s)
            assert float(term[c]) == np.float32(shift)
            assert abs(Fraction(batch_mean) - exact * Fraction(s)) <= abs(exact) * s * 2.0**-51
            true = (Fraction(of_squares, count) - exact**2) * Fraction(s) ** 2
            assert (
                abs(Fraction(batch_variance) - true)
                <= true * Fraction(2) ** -48
                + Fraction(d * d) * Fraction(s) ** 2 * Fraction(2) ** -50
            )

    check()


def channel_values(rng, channels, special):
    values = rng.standard_normal(channels).astype(np.float32)
    if special:
        values[rng.integers(channels)] = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0]))
    return torch.from_numpy(values)


@needs_cpu
def test_maps_and_codes_of_sums(restore_threads):
    @settings(max_examples=60)
    @given(st.data(), sums_of_channels(bounds=(441, 2**24)), st.booleans(), st.booleans())
    def check(data, drawn, relu, special):
        sums, _ = drawn
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        channels = sums.shape[reference_integer.channel_axis(sums)]
        factor, term = (channel_values(rng, channels, special) for _ in range(2))
        residual = torch.randn(sums.shape) if data.draw(st.booleans()) else None
        if residual is not None and special and residual.numel():
            residual.view(-1)[-1] = float("-inf")
        y = assert_equal_of_map(sums, factor, term, residual, relu)[0]
        sizes = (-1, *[1] * (sums.dim() - 2)) if sums.dim() > 2 else (-1,)
        with np.errstate(all="ignore"):
            expected = sums.float().numpy() * factor.numpy().reshape(sizes)
            expected = expected + term.numpy().reshape(sizes)
            expected = expected if residual is None else expected + residual.numpy()
        expected = torch.from_numpy(np.where(expected < 0, 0, expected) if relu else expected)
        assert_same(y, expected)

        kind, bits = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(2, 7))
        grid = Grid(bits, kind)
        y, *_ = reference_integer.map_sums(sums, factor, term, None, relu, False, False)
        within = torch.tensor([-0.7, 2.0]) if grid.is_affine else torch.tensor(2.0)
        codes, scale, zero = assert_equal_to_the_bit(
            "codes_of_sums", sums, factor, term, relu, within, grid
        )
        steps = codes.float() - zero.float() * grid.is_affine
        fake = noisyq_fast.fake_quantize_ema(y, within, bits, training=False, grid=kind)
        if y.isnan().any():
            assert scale.isnan()  # there is no code for it: all is loud
        else:
            assert_same(steps * scale, fake)

    check()


def assert_equal_of_map(sums, factor, term, residual, relu):
    """`map_sums`, of which the bits are in the order of memory."""
    expected, *others = both("map_sums", sums, factor, term, residual, relu, True, True)
    for y, zeros, range_ in others:
        assert_same(y, expected[0])
        assert_same(range_[1], expected[2][1])
        if not range_[1].isnan():  # which says all
            assert_same(range_[0], expected[2][0])
        is_zero = reference_integer.pack(torch.empty_like(y, dtype=torch.bool).copy_(~(y > 0)))
        assert_same(zeros, is_zero)
    return expected


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype, restore_threads):
    """Those of the sums, equal to the bit; sums of them, which the CPU adds up in float32 first,
    within 2^-17 of the sum of the magnitudes, and the same to the bit with all threads."""

    @settings(max_examples=30)
    @given(st.data(), sums_of_channels(bounds=(441, 2**24)), st.booleans(), st.booleans())
    def check(data, drawn, relu, uses_batch):
        sums, bound = drawn
        if sums.numel() == 0:
            return
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        channels = sums.shape[reference_integer.channel_axis(sums)]
        weight = channel_values(rng, channels, False) if data.draw(st.booleans()) else None
        scale = torch.rand(channels) / bound + 1e-9
        _, total, squares, _, _ = reference_integer.moments(sums, bound)
        count = sums.numel() // channels
        factor, term, mean, inverse, _, _ = reference_integer.normalization(
            total, squares, count, scale, weight, None, 1e-5
        )
        grad = torch.from_numpy(rng.standard_normal(sums.shape)).to(dtype)
        grad = in_memory(data.draw, grad)
        of_norm = (grad, sums, factor, term, relu, mean, inverse, scale, weight, uses_batch)
        expected, one, two = both("grads_of_norm", *of_norm)
        for a, b in zip((*one[0], *one[1:]), (*two[0], *two[1:]), strict=True):
            assert torch.equal(a, b)
        y, *_ = reference_integer.map_sums(sums, factor, term, None, False, False, False)
        g = torch.where(y > 0, grad.float(), 0) if relu else grad.float()
        g = reference_integer.by_channel(g).double()
        centred = reference_integer.by_channel(sums).double() - mean.double().unsqueeze(1)
        spread = inverse.double() * scale.double()
        for found, exact, size in (
            (one[2], expected[2], g.abs().sum(1)),
            (one[1], expected[1], (g * centred).abs().sum(1) * spread),
        ):
            assert ((found.double() - exact.double()).abs() <= 2.0**-17 * size).all()
        if not uses_batch:
            assert not one[0][1].any()
            assert not one[0][2].any()
        found = both("grads_of_sums", grad, sums, factor, term, relu, mean, *expected[0])
        assert found[0].dtype == dtype
        for made in found[1:]:
            assert_same(made, found[0])

    check()


@needs_cpu
def test_convolve_sums(restore_threads):
    """Of the CPU's own kernel and of others, narrow and wide: with moments and without."""
    rng = np.random.default_rng(0)
    for shape, outputs, groups, kernel in (
        ((5, 16, 9, 20), 17, 1, 3),
        ((2, 3, 6, 5), 33, 1, 2),
        ((2, 8, 5, 5), 8, 8, 3),
        ((4, 3, 300), 5, 1, 3),
        ((2, 4, 4, 4, 4), 6, 2, 2),
    ):
        dims = len(shape) - 2
        x = codes_of(rng, shape, torch.uint8, "few bits")
        w = codes_of(rng, (outputs, shape[1] // groups, *[kernel] * dims), torch.int8, "few bits")
        how = [2] * dims, [1] * dims, [1] * dims, groups
        bound = w[0].numel() * 15 * 7
        for limit, measures in itertools.product((bound, 2**20), (False, True)):
            for zero in (None, torch.tensor(5, dtype=torch.uint8)):
                expected, *others = both("convolve_sums", x, zero, w, None, *how, limit, measures)
                for values, moments in others:
                    assert values.dtype == expected[0].dtype
                    assert_same(values, expected[0])
                    assert (moments is None) == (not measures)
                    for a, b in zip(moments or (), expected[1] or (), strict=True):
                        assert_same(a, b)


@needs_cpu
def test_fewer_threads_than_were_asked_for():
    """OpenMP may start fewer: then nothing is measured of those that did not run."""
    code = """
import torch
from noisyq_fast.backends import cpu_integer, reference_integer
torch.set_num_threads(2)
x = torch.randint(1, 3, (4, 16, 6, 6), dtype=torch.int8)
w = torch.ones(16, 16, 3, 3, dtype=torch.int8)
how = x, None, w, None, [1, 1], [0, 0], [1, 1], 1, 1000, True
for a, b in zip(cpu_integer.convolve_sums(*how)[1], reference_integer.convolve_sums(*how)[1]):
    assert torch.equal(a, b), (a, b)
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_batch_norm_of_sums_too_large_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="bound: got 2147483648, takes up to 2147483520"):
        operators.statistics_of_sums(torch.ones(2, 1), one, None, None, 1e-5, 2**31)


# Codes and what follows from them.


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_by_hand(exact_backend, kind):
    """The quantizing operators with a moving or a fixed range give the values, the average and
    the mask of the fake-quantizing operators."""
    grid = Grid(4, kind)

    @settings(max_examples=20)
    @given(st.data(), st.sampled_from([None, 0, 1, -1]), st.sampled_from(MASKED))
    def check(data, axis, masked):
        shape = data.draw(st.sampled_from([(3, 5), (2, 3, 4), (2, 8, 3, 3), (0, 3)]))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        x = torch.from_numpy(rng.standard_normal(shape)).to(
            data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        )
        x = in_memory(data.draw, x)
        if x.numel() and data.draw(st.booleans()):
            x = x.clone()
            x[(0,) * x.dim()] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        channels = [] if axis is None else [x.shape[axis]]
        running = torch.full([2, *channels] if grid.is_affine else channels, 0.5)
        if grid.is_affine:
            running[0] = -0.25
        observed = torch.full(channels, 0.5) if data.draw(st.booleans()) else None

        def averages():
            return [None if a is None else a.clone() for a in (running, observed)]

        def values(codes, scale, zero_point):
            zero_point = zero_point if grid.is_affine else None
            return operators.dequantize_on_grid(codes, scale, zero_point, axis).to(x.dtype)

        for_hand, for_codes = averages(), averages()
        options = (4, axis, 0.25, kind, masked)
        y, mask = operators.fake_quantize_ema_on_grid(x, *for_hand, *options)
        *codes, mask_ = operators.quantize_ema_on_grid(x, *for_codes, *options)
        assert codes[0].dtype == grid.code_dtype
        assert codes[0].stride() == torch.empty_like(x).stride()
        assert_same(values(*codes), y)
        assert_same(mask_, mask)
        for a, b in zip(for_codes, for_hand, strict=True):
            assert (a is None) or torch.equal(a, b)

        y, mask = operators.fake_quantize_fixed_range_on_grid(x, running, 4, axis, kind, masked)
        *codes, mask_ = operators.quantize_fixed_range_on_grid(x, running, 4, axis, kind, masked)
        made = values(*codes)
        of_group = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
        loud = x.isnan().sum(of_group, keepdim=True).bool().expand_as(x)
        assert made[loud].isnan().all()  # a group with a NaN, for which there is no code
        assert_same(made[~loud], y[~loud])
        assert_same(mask_, mask)

    check()


# Layers: what their products of codes are given.

INTEGER = {"arithmetic": "integer"}


ONE_SCALE = {"weight": noisyq_fast.AbsMax(4, None)}
AFFINE_SCALE = {"weight": noisyq_fast.AbsMax(4, None, "affine")}
TOKENS = {"activation_granularity": "token"}
LAYERS = {
    "linear": (noisyq_fast.QuantLinear, (8, 20), ONE_SCALE, (3, 8)),
    "conv": (noisyq_fast.QuantConv2d, (8, 20, 3), ONE_SCALE, (2, 8, 5, 5)),
    "transposed": (noisyq_fast.QuantConvTranspose2d, (8, 20, 3), AFFINE_SCALE, (2, 8, 5, 5)),
    "grouped": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), ONE_SCALE, (2, 3, 8)),
    "tokens of groups": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), TOKENS, (3, 3, 8)),
    "tokens of one": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), TOKENS, (1, 3, 8)),
    "a vector": (noisyq_fast.QuantLinear, (8, 20), {}, (8,)),
    "an image": (noisyq_fast.QuantConv2d, (8, 20, 3), {"activation_grid": "affine"}, (8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_one_scale_for_a_weight_or_without_a_batch(exact_backend, name):
    cls, sizes, options, x = LAYERS[name]
    integer, floating = cls(*sizes, **options, **INTEGER), cls(*sizes, **options)
    floating.load_state_dict(integer.state_dict())
    assert integer.why_float() is None
    inputs = [torch.randn(x).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    outputs = [layer(x) for layer, x in zip((integer, floating), inputs, strict=True)]
    assert outputs[0].shape == outputs[1].shape
    torch.testing.assert_close(*outputs)
    grad = torch.randn(outputs[0].shape)
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(integer.parameters(), floating.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_scales_that_do_not_leave_the_sum_compute_in_float():
    quantizer = noisyq_fast.MovingAbsMax(4, axis=1, ranges=8)
    options = {"arithmetic": "integer", "activation": quantizer}
    for layer, x in (
        (noisyq_fast.QuantConv2d(8, 20, 3, **options), torch.randn(2, 8, 5, 5)),
        (noisyq_fast.QuantLinear(8, 20, **options), torch.randn(3, 8)),
        (
            noisyq_fast.QuantLinear(8, 20, weight=noisyq_fast.AbsMax(4, axis=1), **INTEGER),
            torch.randn(3, 8),
        ),
    ):
        assert "has scales" in layer.why_float()
        assert layer(x).isfinite().all()


def test_a_value_without_a_code_is_loud_in_evaluation(exact_backend):
    """As in float: with the range of training, too, a NaN does not become the code 0."""
    layer = noisyq_fast.QuantLinear(8, 3, arithmetic="integer")
    x = torch.randn(4, 8)
    layer(x)
    layer.eval()
    assert layer(x).isfinite().all()
    x[0, 0] = float("nan")
    assert layer(x)[0].isnan().all()


def chain():
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1)
    )
    model = noisyq_fast.quantize_model_(layers, arithmetic="integer")
    return noisyq_fast.fuse_(model, torch.randn(2, 2, 5, 5))


def test_the_range_of_a_chain_is_that_of_its_values(exact_backend):
    """Of no values; of sums that were not measured where they were made; with a bias that has gaps
    in its memory."""
    model = chain()
    model(torch.randn(0, 2, 5, 5)).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())

    x = torch.randn(2, 2, 5, 5)
    model[0].bias = torch.nn.Parameter(torch.randn(8)[::2])
    expected = model(x)
    model[0].training = False  # with which only the convolution stops to measure
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        unfused = torch.nn.functional.relu(model[0](x) + 0)
        assert torch.equal(model[2](unfused), expected)


def test_a_chain_with_a_weight_that_is_not_finite_is_loud(exact_backend):
    model, x = chain(), torch.randn(2, 2, 5, 5)
    model(x)
    with torch.no_grad():
        model[0].weight[1] = float("nan")
    for training in (True, False):
        assert model.train(training)(x).isnan().all()
