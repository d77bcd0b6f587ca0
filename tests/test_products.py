"""Products of codes equal NumPy to the bit."""

import itertools

import numpy as np
import pytest
import torch
from assert_same import assert_same
from drawn_codes import code_dtypes, code_kinds, codes_of, in_memory, zero_kinds, zero_point_of
from hypothesis import given, settings
from hypothesis import strategies as st

operators = torch.ops.noisyq


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


# Convolutions and linears.


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
