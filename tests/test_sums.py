"""Passes over the sums of products: on the CPU to the bit as in the reference."""

import itertools
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from assert_same import assert_same
from drawn_codes import codes_of, in_memory, needs_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyq_fast
from noisyq_fast.backends import BACKENDS
from noisyq_fast.backends.reference.masks import pack
from noisyq_fast.backends.reference.sums import (
    by_channel,
    channel_axis,
    map_sums,
    moments,
    normalization,
)
from noisyq_fast.grid import KINDS, Grid

operators = torch.ops.noisyq


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
        for c, of_channel in enumerate(by_channel(sums)):
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
        count = by_channel(sums).shape[1]
        if count == 0:
            return
        _, total, squares, _, _ = BACKENDS["reference"].functions["moments"](sums, bound)
        scale = torch.rand(len(total)) * 2.0**-20 + 1e-9
        affine = (torch.randn(len(total)), torch.randn(len(total))) if has_affine else (None, None)
        factor, term, _mean, inverse, of_batch, variance = assert_equal_to_the_bit(
            "normalization", total, squares, count, scale, *affine, eps
        )
        for c, of_channel in enumerate(by_channel(sums)):
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
        channels = sums.shape[channel_axis(sums)]
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
        y, *_ = map_sums(sums, factor, term, None, relu, False, False)
        within = torch.tensor([-0.7, 2.0]) if grid.is_affine else torch.tensor(2.0)
        codes, scale, zero = assert_equal_to_the_bit(
            "codes_of_sums", sums, factor, term, relu, within, grid
        )
        steps = codes.float() - zero.float() * grid.is_affine
        fake = noisyq_fast.fake_quantize_ema(y, within, bits, training=False, grid=kind)
        if not (factor.isfinite().all() and term.isfinite().all()):
            assert scale.isnan()  # of a NaN there is no code: all is loud
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
        is_zero = pack(torch.empty_like(y, dtype=torch.bool).copy_(~(y > 0)))
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
        channels = sums.shape[channel_axis(sums)]
        weight = channel_values(rng, channels, False) if data.draw(st.booleans()) else None
        scale = torch.rand(channels) / bound + 1e-9
        _, total, squares, _, _ = moments(sums, bound)
        count = sums.numel() // channels
        factor, term, mean, inverse, _, _ = normalization(
            total, squares, count, scale, weight, None, 1e-5
        )
        grad = torch.from_numpy(rng.standard_normal(sums.shape)).to(dtype)
        grad = in_memory(data.draw, grad)
        of_norm = (grad, sums, factor, term, relu, mean, inverse, scale, weight, uses_batch)
        expected, one, two = both("grads_of_norm", *of_norm)
        for a, b in zip((*one[0], *one[1:]), (*two[0], *two[1:]), strict=True):
            assert torch.equal(a, b)
        y, *_ = map_sums(sums, factor, term, None, False, False, False)
        g = torch.where(y > 0, grad.float(), 0) if relu else grad.float()
        g = by_channel(g).double()
        centred = by_channel(sums).double() - mean.double().unsqueeze(1)
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
                for values, measured in others:
                    assert values.dtype == expected[0].dtype
                    assert_same(values, expected[0])
                    assert (measured is None) == (not measures)
                    for a, b in zip(measured or (), expected[1] or (), strict=True):
                        assert_same(a, b)


@needs_cpu
def test_fewer_threads_than_were_asked_for():
    """OpenMP may start fewer: then nothing is measured of those that did not run."""
    code = """
import torch
from noisyq_fast.backends import native_cpu, reference
torch.set_num_threads(2)
x = torch.randint(1, 3, (4, 16, 6, 6), dtype=torch.int8)
w = torch.ones(16, 16, 3, 3, dtype=torch.int8)
how = x, None, w, None, [1, 1], [0, 0], [1, 1], 1, 1000, True
for a, b in zip(*(b.products.convolve_sums(*how)[1] for b in (native_cpu, reference))):
    assert torch.equal(a, b), (a, b)
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_batch_norm_of_sums_too_large_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="bound: got 2147483648, takes up to 2147483520"):
        operators.statistics_of_sums(torch.ones(2, 1), one, None, None, 1e-5, 2**31)
