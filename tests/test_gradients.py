"""The straight-through estimators."""

import pytest
import torch
from torch.autograd import forward_ad

from noisyq_fast import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)
from noisyq_fast.operators.checks import STRAIGHT_THROUGH_ESTIMATORS


def test_identity_passes_the_very_gradient_and_saves_nothing(backend):
    x = torch.randn(4, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fake_quantize(x, 4, axis=0)
        z = fake_quantize_ema(x, torch.tensor(1.0), 4)
    assert saved == []
    for output in (y, z):
        grad = torch.randn(4, 5)
        (received,) = torch.autograd.grad(output, x, grad)
        assert received.data_ptr() == grad.data_ptr()


def test_gradients_of_many_tensors_do_not_wait_for_each_other(backend):
    tensors = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    first, second = fake_quantize_many(tensors, 4)
    first.sum().backward()
    assert torch.equal(tensors[0].grad, torch.ones(3))
    assert tensors[1].grad is None
    second.sum().backward()
    assert torch.equal(tensors[1].grad, torch.ones(2, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
def test_clipped_zeroes_the_gradient_only_where_a_value_was_clipped(backend, training, ste):
    # With a scale of 1: 7.5 rounds to 8 (half to even) and is clipped, 7.49 is not.
    x = torch.tensor([1.0, 7.0, 7.49, 7.5, -9.0, float("inf"), 0.0])
    x = (x.nan_to_num(posinf=9.0) if training else x).requires_grad_()
    y = fake_quantize_ema(x, torch.tensor(7.0), 4, training=training, ste=ste)
    y.backward(torch.arange(1.0, 8.0))
    expected = torch.arange(1.0, 8.0)
    if not training and ste == "clipped":
        expected[3:6] = 0
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@pytest.mark.parametrize("shape", [(3,), (8,), (2, 3, 5), (2, 4, 3, 3)])
def test_clipped_saves_a_bit_for_each_element_and_identity_nothing(backend, ste, shape):
    x = torch.randn(shape)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fake_quantize_ema(x, torch.tensor(0.5), 4, training=False, ste=ste)
    assert sum(t.nbytes for t in saved) == ((x.numel() + 7) // 8 if ste == "clipped" else 0)
    grad = torch.randn(shape)
    y.backward(grad)
    # With a scale of 1/14, codes beyond 7.5 are clipped.
    clipped = (x.detach() * 14).round().abs() > 7
    assert clipped.any()
    expected = grad.masked_fill(clipped, 0) if ste == "clipped" else grad
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("elements", [8, 40])
def test_bits_may_have_any_strides(backend, elements):
    grad, bits = torch.randn(elements), torch.randint(256, (elements // 8, 3), dtype=torch.uint8)
    expected = torch.ops.noisyq.zero_clipped(grad, bits[:, 1].clone())
    assert torch.equal(torch.ops.noisyq.zero_clipped(grad, bits[:, 1]), expected)
    same = bits[:1, 1].expand(elements // 8)
    expected = torch.ops.noisyq.zero_clipped(grad, same.clone())
    assert torch.equal(torch.ops.noisyq.zero_clipped(grad, same), expected)


def test_clipped_survives_a_change_of_the_range_before_backward(backend):
    running = torch.tensor(7.0)
    x = torch.tensor([1.0, 9.0], requires_grad=True)
    y = fake_quantize_ema(x, running, 4, training=False, ste="clipped")
    fake_quantize_ema(x.detach(), running, 4)
    y.sum().backward()
    assert x.grad.tolist() == [1, 0]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_dequantize_is_differentiable_in_the_scale(backend, axis):
    codes = torch.randint(-7, 8, (3, 4), dtype=torch.int8)
    scale = torch.rand([] if axis is None else [(3, 4)[axis]], requires_grad=True)
    grad = torch.randn(3, 4)
    dequantize(codes, scale, axis).backward(grad)
    others = [d for d in (0, 1) if d != axis]
    torch.testing.assert_close(scale.grad, (grad * codes).sum(others))


def test_quantize_is_not_differentiable(backend):
    codes, scale = quantize(torch.randn(3, requires_grad=True), 4)
    assert not codes.requires_grad
    assert not scale.requires_grad


def test_no_gradient_is_asked_for(backend):
    x = torch.randn(3)
    assert not fake_quantize(x, 4).requires_grad
    with torch.no_grad():
        assert not fake_quantize(x.requires_grad_(), 4).requires_grad


def test_second_derivatives_of_a_straight_line_are_none(backend):
    x = torch.randn(3, requires_grad=True)
    (first,) = torch.autograd.grad((fake_quantize(x, 8) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full((3,), 2.0))


RANGE = torch.tensor(7.0)
CODES = torch.tensor([1, 2, 3], dtype=torch.int8)
# Each with its derivative at x, where a code of 8 is clipped.
DIFFERENTIABLE = {
    "fake_quantize": (lambda x: fake_quantize(x, 4, axis=0), [1, 1, 1]),
    "fake_quantize_many": (lambda x: fake_quantize_many([x, 2 * x], 4)[1], [2, 2, 2]),
    "fake_quantize_ema": (lambda x: fake_quantize_ema(x, RANGE.clone(), 4), [1, 1, 1]),
    "given range": (lambda x: fake_quantize_ema(x, RANGE, 4, training=False), [1, 1, 1]),
    "clipped": (
        lambda x: fake_quantize_ema(x, RANGE, 4, training=False, ste="clipped"),
        [1, 1, 0],
    ),
    "dequantize": (
        lambda x: dequantize(torch.tensor([1, 2, 3], dtype=torch.int8), x, 0),
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize(("f", "derivative"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode(backend, f, derivative, grad_enabled):
    tangent = torch.tensor([1.0, 10.0, 100.0])
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        y = f(forward_ad.make_dual(torch.tensor([1.0, -2.0, 8.0]), tangent))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, tangent * torch.tensor(derivative))


@pytest.mark.parametrize(("f", "derivative"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_transforms_of_torch_func(backend, f, derivative):
    x = torch.tensor([1.0, -2.0, 8.0])
    derivative = torch.tensor(derivative).float()
    jacobian = torch.diag(derivative)
    assert torch.equal(torch.func.jacrev(f)(x), jacobian)
    assert torch.equal(torch.func.jacfwd(f)(x), jacobian)

    def energy(x):
        return f(x).square().sum()

    (expected,) = torch.autograd.grad(energy(x.requires_grad_()), x)
    x = x.detach()
    assert torch.equal(torch.func.grad(energy)(x), expected)
    second = torch.diag(2 * derivative.square())
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.equal(outer(inner(energy))(x), second)


def test_no_grad_inside_a_transform_is_heeded(backend):
    def energy(x):
        with torch.no_grad():
            y = fake_quantize(x, 4)
        return (x * y).sum()

    x = torch.tensor([1.0, -2.0, 7.0])
    assert torch.equal(torch.func.grad(energy)(x), x)
