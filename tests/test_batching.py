"""torch.vmap equals a loop over the samples to the bit. Its rules call the operators, whichever
backend computes them."""

import pytest
import torch
from assert_same import assert_same

from noisyq_fast import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)

INF = float("inf")
BATCH = 3
# Of one sample, with the axes that are tried.
SAMPLES = [((), [None]), ((5,), [None, 0]), ((4, 6), [None, 0, -1]), ((2, 3, 5), [None, 1])]
EACH_SAMPLE = [(shape, axis) for shape, axes in SAMPLES for axis in axes]


def batch(shape, dim):
    """Samples of very different size, one of which is not finite, along an axis."""
    x = torch.randn(BATCH, *shape) * torch.tensor([1.0, 100.0, 0.01]).reshape(-1, *[1] * len(shape))
    x[1].flatten()[-1:] = INF
    return x.movedim(0, dim)


def ranges_for(shape, axis):
    return torch.rand(BATCH, *([] if axis is None else [shape[axis]])) + 0.1


def looped(f, in_dims, *arguments):
    samples = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(BATCH)
    ]
    if isinstance(samples[0], tuple | list):
        return [torch.stack(outputs) for outputs in zip(*samples, strict=True)]
    return torch.stack(samples)


def check(f, in_dims, *arguments):
    actual = torch.vmap(f, in_dims)(*arguments)
    expected = looped(f, in_dims, *arguments)
    assert_same(list(actual) if isinstance(actual, tuple) else actual, expected)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(("shape", "axis"), EACH_SAMPLE)
def test_a_scale_for_each_sample(shape, axis, dim):
    x = batch(shape, dim)
    check(lambda x: fake_quantize(x, 4, axis), (dim,), x)
    check(lambda x: quantize(x, 4, axis), (dim,), x)
    check(lambda x: fake_quantize(x, 4, axis), (dim,), x.half())


@pytest.mark.parametrize("axis", [None, 0])
def test_many_tensors_of_which_some_are_batched(axis):
    tensors = [batch((4, 6), 1), torch.randn(2, 3), batch((5,), 0)]
    check(lambda *xs: fake_quantize_many(xs, [2, 4, 8], axis), (1, None, 0), *tensors)


@pytest.mark.parametrize("dims", [(0, 0), (-1, None), (None, 0), (0, -1)], ids=str)
@pytest.mark.parametrize(("shape", "axis"), EACH_SAMPLE)
def test_given_ranges(shape, axis, dims):
    x_dim, range_dim = dims
    x = torch.randn(shape) if x_dim is None else batch(shape, x_dim)
    ranges = ranges_for(shape, axis)
    ranges = ranges[0] if range_dim is None else ranges.movedim(0, range_dim)
    codes = torch.randint(-7, 8, x.shape, dtype=torch.int8)
    observed = torch.full_like(ranges, 0.25)
    check(lambda c, r: dequantize(c, r, axis), dims, codes, ranges)

    def gradient(x, running, observed, ste):
        x, running, observed = x.detach(), running.detach(), observed.detach()

        def energy(x):
            y = fake_quantize_ema(x, running, 4, axis, training=False, ste=ste, observed=observed)
            return y.nan_to_num().square().sum(), y

        return torch.func.grad(energy, has_aux=True)(x)

    for ste in ("identity", "clipped"):
        check(
            lambda x, r, o, ste=ste: gradient(x, r, o, ste),
            (x_dim, range_dim, range_dim),
            x,
            ranges,
            observed,
        )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gradients_of_a_batch_inside_and_outside_of_vmap(backend, layout):
    x = torch.randn(BATCH, 3, 5)
    if layout == "transposed":
        x = x.transpose(1, 2)
    running = torch.tensor(0.5)

    def f(x):
        return fake_quantize_ema(x, running, 4, training=False, ste="clipped")

    weight = torch.randn(x.shape)
    expected = weight.masked_fill((x * 14).round().abs() > 7, 0)

    def energy(x, w):
        return (f(x) * w).sum()

    assert_same(torch.vmap(torch.func.grad(energy))(x, weight), expected)
    assert_same(torch.func.grad(lambda x: torch.vmap(energy)(x, weight).sum())(x), expected)
    _, vjp = torch.func.vjp(f, x[0])
    assert_same(torch.vmap(vjp)(weight)[0], weight.masked_fill((x[0] * 14).round().abs() > 7, 0))
    leaf = x.clone().requires_grad_()
    torch.vmap(f)(leaf).backward(weight)
    assert_same(leaf.grad, expected)


def test_gradients_of_each_sample():
    weight, x = torch.randn(4, 6), torch.randn(BATCH, 6)

    def loss(weight, x):
        return (fake_quantize(weight, 4, 0) * fake_quantize(x, 4)).square().sum()

    check(torch.func.grad(loss), (None, 0), weight, x)


def test_nested():
    x = torch.randn(2, 4, BATCH, 5)
    for f in (lambda x: fake_quantize(x, 4, 0), lambda x: quantize(x, 4)[0]):
        actual = torch.vmap(torch.vmap(f, 1, 1))(x)
        expected = torch.stack([looped(f, (1,), y) for y in x]).transpose(1, 2)
        assert_same(actual, expected)

    def clipped(x):
        return fake_quantize_ema(x, torch.tensor(0.5), 4, training=False, ste="clipped").sum()

    gradient = torch.vmap(torch.vmap(torch.func.grad(clipped)))(x)
    assert_same(gradient, ((x * 14).round().abs() <= 7).float())


def test_nothing_batched_is_an_ordinary_call():
    y = torch.randn(3)
    assert_same(
        torch.vmap(lambda x: x + fake_quantize(y, 4))(torch.zeros(BATCH, 3)),
        fake_quantize(y, 4).expand(BATCH, 3),
    )


def test_a_range_cannot_follow_every_sample():
    running = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"training=True, .* Call model.eval\(\) first"):
        torch.vmap(lambda x: fake_quantize_ema(x, running, 4))(torch.ones(BATCH, 3))
    assert running == 1.0


def test_bad_arguments_are_those_of_a_sample():
    with pytest.raises(ValueError, match=r"axis: got 1 for a tensor of shape \[4\], takes -1..0"):
        torch.vmap(lambda x: fake_quantize(x, 4, 1))(torch.ones(BATCH, 4))
    with pytest.raises(ValueError, match="bits: got 9"):
        torch.vmap(lambda x: fake_quantize(x, 9))(torch.ones(BATCH, 4))
