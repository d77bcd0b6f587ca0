"""The operators of quantizers that learn: equal to the bit in every backend, whatever the layout,
the dtype and the number of threads; sums in the order that is stated."""

import pytest
import torch
from assert_same import assert_same
from every_operator import RULES

from noisyq_fast import use_backend
from noisyq_fast.backends import on_triton
from noisyq_fast.backends.reference import elementary
from noisyq_fast.backends.reference.learned import sum_of_groups
from noisyq_fast.operators.learned import fake_quantize_learned, quantize_learned

EVERY_SIZE = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -3e38, 1.3, -1.3]
SMALL = [
    ((70,), None, torch.float32, "contiguous"),
    ((2, 3, 4, 5), 1, torch.bfloat16, "channels_last"),
    ((2, 3, 4, 5), 0, torch.float16, "sliced"),
    ((4, 5), None, torch.float32, "sliced"),
    ((0, 3), 1, torch.float32, "contiguous"),
    ((), None, torch.float32, "contiguous"),
]
LARGE = [
    ((3, 5000), 0, torch.float32, "contiguous"),
    ((2, 3, 64, 65), 1, torch.float32, "channels_last"),
    ((2, 3, 64, 65), 1, torch.bfloat16, "contiguous"),
    ((90, 50), None, torch.float16, "sliced"),
]


def made(shape, axis, dtype, layout, parameters):
    x = torch.randn(shape)
    if x.numel() > len(EVERY_SIZE):
        x.view(-1)[: len(EVERY_SIZE)] = torch.tensor(EVERY_SIZE)
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[..., ::2]
    p = torch.tensor(parameters)
    if axis is not None:
        p = p[:, None] * torch.linspace(0.8, 1.2, max(x.shape[axis], 1))[: x.shape[axis]]
    return x.requires_grad_(), p.requires_grad_(), torch.randn(x.shape).to(dtype)


def results(x, p, grad, name, low, high, axis):
    x.grad = p.grad = None
    y = fake_quantize_learned(x, p, name, low, high, axis, 0.3)
    y.backward(grad)
    return (
        y.detach(),
        x.grad,
        p.grad,
        quantize_learned(x.detach(), p.detach(), name, low, high, axis),
    )


def compare(name, backend, tensor):
    parameters, low, high = RULES[name]
    x, p, grad = made(*tensor, parameters)
    axis = tensor[1]
    with use_backend("reference"):
        expected = results(x, p, grad, name, low, high, axis)
    with use_backend(backend):
        actual = results(x, p, grad, name, low, high, axis)
    assert_same(actual, expected)
    assert actual[0].stride() == torch.empty_like(x).stride()
    finite = [part for part in actual[:2] if part.numel()]
    assert all(part.isfinite().any() for part in finite)


@pytest.mark.parametrize("tensor", SMALL, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equal_to_the_bit(name, tensor, learned_backend):
    compare(name, learned_backend, tensor)


@pytest.mark.parametrize("backend", ["cpu", "emulated-cuda"])
@pytest.mark.parametrize("tensor", LARGE, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equal_to_the_bit_over_several_chunks(name, tensor, backend):
    compare(name, backend, tensor)


def test_equal_to_the_bit_over_chunks_of_chunks():
    x = torch.randn(4097, 4096)
    p = torch.tensor([0.17])
    arguments = x, x, p, "lsq", -8, 7, None, 0.3
    found = []
    for backend in ("reference", "cpu", "emulated-cuda"):
        with use_backend(backend):
            found.append(torch.ops.noisyq.fake_quantize_learned_backward(*arguments)[1])
    assert_same(found[1:], found[:1] * 2)


def test_a_gradient_of_another_dtype(learned_backend):
    x, p = torch.randn(3, 70).bfloat16().T, torch.tensor([[0.17, 0.2, 0.3]])
    arguments = torch.randn(70, 3), x, p, "lsq", -8, 7, 1, 0.3
    actual = torch.ops.noisyq.fake_quantize_learned_backward(*arguments)
    with use_backend("reference"):
        assert_same(actual, torch.ops.noisyq.fake_quantize_learned_backward(*arguments))


@pytest.mark.skipif(not on_triton.INTERPRETED, reason="the interpreter is off")
def test_triton_over_several_chunks():
    compare("lsq", "triton", ((5, 1700), None, torch.float32, "contiguous"))
    compare("qil_odd", "triton", ((2, 2, 50, 50), 1, torch.float32, "contiguous"))


def test_the_order_of_a_sum_is_the_stated_one():
    x = torch.randn(3, 5000)

    def of_chunk(values):
        lanes = [torch.zeros(()) for _ in range(64)]
        for i, value in enumerate(values):
            lanes[i % 64] = lanes[i % 64] + value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        return lanes[0]

    for axis, values in ((None, [x.flatten()]), (0, x.unbind())):
        sums = [of_chunk(torch.stack([of_chunk(c) for c in v.split(4096)])) for v in values]
        expected = sums[0] if axis is None else torch.stack(sums)
        assert torch.equal(sum_of_groups(x, x, axis), expected)


def test_numbers_do_not_depend_on_threads(restore_threads):
    x, p = torch.randn(40, 50, 50), torch.tensor([0.1], requires_grad=True)
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        p.grad = None
        fake_quantize_learned(x, p, "lsq", -8, 7).backward(x)
        sums.append(p.grad)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_elementary_functions_are_close_to_those_of_float64():
    x = torch.linspace(-12, 12, 10001)
    v = torch.logspace(-7, 0, 10001)
    for ours, theirs, at in (
        (elementary.tanh, torch.tanh, x),
        (elementary.exp, torch.exp, 7 * x),
        (elementary.log, torch.log, v[:-1]),
    ):
        torch.testing.assert_close(ours(at).double(), theirs(at.double()), rtol=3e-7, atol=0)
    assert elementary.tanh(torch.tensor([float("inf"), -float("inf")])).tolist() == [1, -1]
    assert elementary.tanh(torch.tensor(float("nan"))).isnan()


def test_a_gradient_that_is_not_finite_stays_outside_the_range():
    x = torch.tensor([0.1, 99.0], requires_grad=True)
    p = torch.tensor([0.5], requires_grad=True)
    fake_quantize_learned(x, p, "lsq", -8, 7).backward(torch.tensor([1.0, float("inf")]))
    assert x.grad.tolist() == [1, 0]


def test_forward_mode():
    x, p = torch.randn(4, 3), torch.tensor([[0.2, 0.3, 0.4]])
    tangents = torch.randn(4, 3), torch.randn(1, 3)

    def f(x, p):
        return fake_quantize_learned(x, p, "lsq", -8, 7, 1)

    _, tangent = torch.func.jvp(f, (x, p), tangents)
    by_x, by_p = torch.autograd.functional.jacobian(f, (x, p))
    expected = (by_x * tangents[0]).sum((2, 3)) + (by_p * tangents[1]).sum((2, 3))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_vmap_is_a_loop(axis):
    x = torch.randn(3, 4, 6).transpose(1, 2)
    p = torch.rand(3, 3, *([] if axis is None else [x.shape[1 + axis]])) + 0.2
    for dims in ((0, 0), (0, None), (1, None)):
        batch = x.movedim(0, dims[0])
        given = p if dims[1] == 0 else p[0]

        def gradients(x, p):
            def loss(x, p):
                y = fake_quantize_learned(x, p, "qil_odd", -7, 7, axis)
                return (y * torch.arange(y.numel()).reshape(y.shape)).sum(), y

            grads, y = torch.func.grad(loss, (0, 1), has_aux=True)(x, p)
            return *grads, y, quantize_learned(x, p, "qil_odd", -7, 7, axis)

        actual = torch.vmap(gradients, dims)(batch, given)
        each = [gradients(x[i], p[i] if dims[1] == 0 else p[0]) for i in range(3)]
        assert_same(list(actual), [torch.stack(parts) for parts in zip(*each, strict=True)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "rule: got 'best', takes one of lsq, pact"),
        ({"low": 1}, ValueError, "low, high: got 1, 7, takes"),
        ({"parameters": torch.ones(2)}, ValueError, r"parameters: got shape \[2\], takes \[1\]"),
        ({"parameters": torch.ones(1).half()}, TypeError, "parameters: got torch.float16"),
        ({"x": torch.ones(2).double()}, TypeError, "x: got torch.float64"),
        ({"axis": 3}, ValueError, "axis: got 3"),
        ({"x": 1}, TypeError, "x: got int"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": torch.ones(2), "parameters": torch.ones(1), "rule": "lsq", "low": -8, "high": 7}
    with pytest.raises(error, match=message):
        fake_quantize_learned(**given | change)
