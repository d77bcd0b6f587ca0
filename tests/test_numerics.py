"""Every backend equals the reference to the last bit; the reference equals NumPy."""

import os

import numpy as np
import numpy_specification as specification
import pytest
import torch
from assert_same import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, axes, bits, tensors

import noisyq_fast
from noisyq_fast.backends import BACKENDS
from noisyq_fast.backends.reference.levels import FLT_MIN

ROUND_TO = {
    torch.float32: lambda x: x,
    torch.bfloat16: specification.round_to_bfloat16,
    torch.float16: specification.round_to_float16,
}
# The backends other than the reference that take tensors on the CPU.
OTHERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
    for name, reason in noisyq_fast.info().backends.items()
    if "cpu" in (BACKENDS[name].device_types or [])
]


def assert_like(y, x):
    """The output's memory is laid out as PyTorch lays out any elementwise result."""
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(x).stride()


def front(axis, x):
    return None if axis is None else axis % x.dim()


def examples(name, count):
    """Fewer for kernels of a GPU, which take milliseconds interpreted or emulated."""
    return settings(max_examples=count if name == "cpu" else count // 5)


@settings(max_examples=300)
@given(data=st.data(), x=tensors(), bits=bits)
def test_reference_equals_numpy(data, x, bits):
    axis = data.draw(axes(x))
    values, channel = x.float().numpy(), front(axis, x)
    scale = specification.scale(specification.absmax(values, channel), bits)
    codes = specification.codes(values, scale, bits, channel)
    rounded = ROUND_TO[x.dtype](specification.values(codes, scale, channel))

    with noisyq_fast.use_backend("reference"):
        y = noisyq_fast.fake_quantize(x, bits, axis)
        codes_, scale_ = noisyq_fast.quantize(x, bits, axis)
    assert_same(y.float(), torch.from_numpy(np.asarray(rounded)))
    assert_same(codes_.float(), torch.from_numpy(np.asarray(np.nan_to_num(codes, nan=0.0))))
    assert_same(scale_, torch.from_numpy(np.asarray(scale)))


@pytest.mark.parametrize("name", OTHERS)
def test_backend_equals_reference(name):
    @examples(name, 500)
    @given(data=st.data(), x=tensors(), bits=bits)
    def check(data, x, bits):
        axis = data.draw(axes(x))
        with noisyq_fast.use_backend("reference"):
            expected = noisyq_fast.fake_quantize(x, bits, axis)
            codes, scale = noisyq_fast.quantize(x, bits, axis)
            values = noisyq_fast.dequantize(codes, scale, axis)
        with noisyq_fast.use_backend(name):
            y = noisyq_fast.fake_quantize(x, bits, axis)
            codes_, scale_ = noisyq_fast.quantize(x, bits, axis)
            values_ = noisyq_fast.dequantize(codes, scale, axis)
        for actual, wanted in ((y, expected), (codes_, codes), (scale_, scale), (values_, values)):
            assert_same(actual, wanted)
        for output in (y, codes_, values_):
            assert_like(output, x)

    check()


@pytest.mark.parametrize("name", OTHERS)
def test_backend_equals_reference_with_a_running_range(name):
    @examples(name, 300)
    @given(data=st.data(), x=tensors(), bits=bits, training=st.booleans(), ste=st.booleans())
    def check(data, x, bits, training, ste):
        axis = data.draw(axes(x))
        shape = [] if axis is None else [x.shape[axis]]
        # Smaller than most values, so that they clip.
        ranges = tensors(st.just(tuple(shape)), st.just(torch.float32)).map(lambda r: r.abs() / 2)
        start = data.draw(ranges)
        if not training:
            start = start.nan_to_num(nan=1.0)
        weight = data.draw(st.sampled_from([None, *([0.0] if training else []), 1.0, 0.25, 0.999]))
        results = []
        for backend in ("reference", name):
            running = start.clone()
            observed = None if weight is None else torch.full_like(running, weight)
            leaf = x.detach().clone().requires_grad_()
            with noisyq_fast.use_backend(backend):
                y = noisyq_fast.fake_quantize_ema(
                    leaf,
                    running,
                    bits,
                    axis,
                    averaging_constant=0.3,
                    training=training,
                    ste="clipped" if ste else "identity",
                    observed=observed,
                )
            y.backward(torch.ones_like(y))
            results.append((y.detach(), running, leaf.grad, *([observed] if weight else [])))
        for actual, wanted in zip(*reversed(results), strict=True):
            assert_same(actual, wanted)

    check()


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_is_kept(backend, dtype, axis):
    x = torch.randn(3, 16, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    y = noisyq_fast.fake_quantize(x, 4, axis)
    codes, _ = noisyq_fast.quantize(x, 4, axis)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, noisyq_fast.fake_quantize(x.contiguous(), 4, axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_not_finite_is_nan_and_others_are_not(backend, dtype, bad):
    x = torch.randn(3, 50, dtype=dtype)
    x[1, 7] = bad
    y = noisyq_fast.fake_quantize(x, 4, axis=0)
    codes, scale = noisyq_fast.quantize(x, 4, axis=0)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert (codes[1] == 0).all()
    assert not scale[1].isfinite()
    assert noisyq_fast.dequantize(codes, scale, 0)[1].isnan().all()
    assert noisyq_fast.fake_quantize(x, 4).isnan().all()


def test_the_default_dtype_changes_nothing(backend):
    tensors = [torch.randn(3, 4), torch.empty(0, 4)]
    expected = [noisyq_fast.quantize(x, 4, axis=1) for x in tensors]
    torch.set_default_dtype(torch.float64)
    try:
        for x, (codes, scale) in zip(tensors, expected, strict=True):
            codes_, scale_ = noisyq_fast.quantize(x, 4, axis=1)
            assert_same(codes_, codes)
            assert_same(scale_, scale)
            y = noisyq_fast.fake_quantize_ema(x, torch.full((4,), torch.nan).float(), 4, axis=1)
            assert_same(y, noisyq_fast.dequantize(codes, scale, axis=1))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_many_tensors_are_like_each(backend, axis):
    tensors = [torch.randn(5, 3, dtype=dtype) for dtype in DTYPES]
    tensors += [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(6)[::2]]
    bits = [2, 3, 4, 5, 8]
    together = noisyq_fast.fake_quantize_many(tensors, bits, axis)
    for y, x, b in zip(together, tensors, bits, strict=True):
        assert_same(y, noisyq_fast.fake_quantize(x, b, axis))
        assert_like(y, x)


def test_midpoints_round_half_to_even(backend):
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5])
    codes, scale = noisyq_fast.quantize(x, 4)
    assert codes.tolist() == [7, 0, 2, 2, 0, -2, 6]
    assert scale == 1


@pytest.mark.parametrize(("dtype", "bit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("odd", [1, 3])
def test_results_halfway_between_16_bit_values_round_to_even(backend, dtype, bit, odd):
    scale = torch.tensor(1 + odd * bit)
    codes = torch.arange(-7.0, 8.0)
    y = noisyq_fast.fake_quantize_ema(codes.to(dtype), 7 * scale, 4, training=False)
    assert_same(y.float(), torch.from_numpy(ROUND_TO[dtype]((codes * scale).numpy())))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
def test_scalars_and_empty_tensors(backend, shape):
    x = torch.full(shape, -3.0)
    assert_same(noisyq_fast.fake_quantize(x, 4), x)
    codes, scale = noisyq_fast.quantize(x, 4)
    assert_same(codes, torch.full(shape, -7, dtype=torch.int8))
    assert_same(scale, torch.tensor(3.0) / 7 if x.numel() else torch.tensor(FLT_MIN))
    if x.numel() == 0:
        _, scale = noisyq_fast.quantize(x, 4, axis=0)
        assert_same(scale, torch.full(shape[:1], FLT_MIN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(backend, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    pairs = every[every.isfinite()]
    with noisyq_fast.use_backend("reference"):
        expected = noisyq_fast.fake_quantize(pairs.unsqueeze(1), 8, axis=0)
    assert_same(noisyq_fast.fake_quantize(pairs.unsqueeze(1), 8, axis=0), expected)
    # A range of 1 reaches the whole of the conversions, subnormals and clipped values too.
    one = torch.tensor(1.0)
    with noisyq_fast.use_backend("reference"):
        expected = noisyq_fast.fake_quantize_ema(every, one, 8, training=False)
    assert_same(noisyq_fast.fake_quantize_ema(every, one, 8, training=False), expected)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, axis, restore_threads):
    x = torch.randn(5, 37, 2000, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        running = torch.full([] if axis is None else [x.shape[axis]], 2.0)
        y = noisyq_fast.fake_quantize_ema(x, running, 4, axis)
        results.append((y, running, *noisyq_fast.quantize(x, 4, axis)))
    with noisyq_fast.use_backend("reference"):
        assert_same(results[0][0], noisyq_fast.fake_quantize(x, 4, axis))
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            assert torch.equal(actual, wanted)


def test_more_than_2_to_the_31_elements():
    elements, needed = 2**31 + 100, 12 << 30
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, got {available >> 30}")
    x = torch.zeros(elements, dtype=torch.bfloat16)
    x[-1], x[-2] = 7.0, 2.4
    with noisyq_fast.use_backend("cpu"):  # the reference would need four times the memory
        codes, scale = noisyq_fast.quantize(x, 4)
    assert scale == 1
    assert codes[-3:].tolist() == [0, 2, 7]
    assert codes[0] == 0
