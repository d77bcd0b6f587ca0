"""Gradients of convolutions of codes: of the CPU's own kernel and of parts, beside float64."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from guarded_memory import guarded_like
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noisyq_fast import fuse_, quantize_model_, use_backend
from noisyq_fast.backends import native_cpu, reference, select
from noisyq_fast.backends.kernel_arguments import DTYPE_CODES, core
from noisyq_fast.backends.native_cpu.convolution_gradients import _multiplies, grads_of_convolution
from noisyq_fast.backends.reference.products import float_steps
from noisyq_fast.backends.reference.sums import GradOfSums
from noisyq_fast.integer.deferred_gradient import DeferredGradient

pytestmark = pytest.mark.skipif(core is None, reason="the native library was not compiled")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def has_kernel(dtype):
    return core.has_products(DTYPE_CODES[dtype])


@st.composite
def cases(draw, most=20, dtypes=tuple(TOLERANCES)):
    """Arguments of ``grads_of_convolution``, of shapes that the kernel takes."""
    channels, outputs = draw(st.sampled_from([16, 32, 48])), draw(st.sampled_from([16, 32]))
    kernel = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    stride, padding = (
        draw(st.tuples(*[st.integers(1, 3)] * 2)),
        draw(st.tuples(*[st.integers(0, 3)] * 2)),
    )
    sizes = [
        draw(st.integers(max(1, k - 2 * p), most)) for k, p in zip(kernel, padding, strict=True)
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    images = draw(st.integers(0, 3))
    last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    rand = functools.partial(torch.randint, generator=generator)
    randn = functools.partial(torch.randn, generator=generator)
    is_affine = draw(st.booleans())
    dtype = torch.uint8 if is_affine else torch.int8
    low, high = (0, 256) if is_affine else (-127, 128)
    codes = last(rand(low, high, (images, channels, *sizes)).to(dtype))
    zero = torch.tensor(draw(st.integers(0, 255)), dtype=torch.uint8) if is_affine else None
    weight = randn(outputs, channels, *kernel)
    weight = last(weight) if draw(st.booleans()) else weight
    out = [
        (size + 2 * p - k) // s + 1
        for size, k, s, p in zip(sizes, kernel, stride, padding, strict=True)
    ]
    compute_dtype = draw(st.sampled_from(dtypes))
    grad = last(randn(images, outputs, *out)).to(compute_dtype)
    if draw(st.booleans()):
        sums = rand(-900, 900, grad.shape).to(draw(st.sampled_from([torch.int16, torch.float32])))
        line = [randn(outputs) for _ in range(6)]
        line[5] /= 1000
        relu = draw(st.booleans())
        grad = GradOfSums(grad, last(sums), *line[:2], relu, *line[2:])
    geometry = list(stride), list(padding), [1, 1], False, [0, 0], 1
    return grad, codes, torch.tensor(0.3), zero, weight, compute_dtype, geometry


def exact(grad, codes, scale, zero, weight, dtype, geometry):
    """In float64, of the values that are multiplied."""
    if isinstance(grad, GradOfSums):
        grad = reference.sums.grads_of_sums(*grad)
    x = float_steps(codes, zero, torch.float64)
    grad, weight = grad.double(), weight.to(dtype).double()
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, [True, True, False]
    )
    return dx, dw * scale


def difference(found, expected):
    norm = expected.norm()
    return float((found.double() - expected).norm() / norm if norm > 0 else found.double().norm())


@given(case=cases())
def test_the_kernel_is_equal_to_float64(case):
    grad, codes, _, _, weight, dtype, geometry = case
    if has_kernel(dtype):  # or else it is left to the parts
        given = grad[0] if isinstance(grad, GradOfSums) else grad
        assert _multiplies(codes, weight, given, dtype, *geometry)
    found = grads_of_convolution(*case[:6], True, True, *geometry)
    for one, other, tolerance in zip(
        found, exact(*case), (TOLERANCES[dtype], TOLERANCES[torch.float32]), strict=True
    ):
        assert one.shape == other.shape
        assert difference(one, other) <= tolerance


@pytest.mark.parametrize("of", [native_cpu, reference], ids=lambda of: of.backend.name)
@given(case=cases(dtypes=[torch.float32]))  # of bfloat16 PyTorch's are wrong in rare shapes
def test_the_parts_are_equal_to_float64(of, case):
    parts = reference.composed.convolution_gradients(float_steps, of.sums.grads_of_sums)
    found = parts["grads_of_convolution"](*case[:6], True, True, *case[6])
    for one, other in zip(found, exact(*case), strict=True):
        assert one.shape == other.shape
        assert difference(one, other) <= TOLERANCES[torch.float32]


@given(case=cases())
def test_what_is_not_asked_for_is_not_made(case):
    grad, codes, scale, zero, weight, dtype, geometry = case
    operands = grad, codes, scale, zero, weight, dtype
    both = grads_of_convolution(*operands, True, True, *geometry)
    dx, none = grads_of_convolution(*operands, True, False, *geometry)
    assert none is None
    assert torch.equal(dx, both[0])
    none, dw = grads_of_convolution(*operands, False, True, *geometry)
    assert none is None
    assert torch.equal(dw, both[1])


@pytest.mark.parametrize("at_end", [True, False])
@given(case=cases(most=9))
def test_nothing_beyond_the_tensors_is_touched(at_end, case):
    grad, codes, scale, zero, weight, dtype, geometry = case

    def moved(x):
        return guarded_like(x, at_end=at_end).copy_(x) if isinstance(x, torch.Tensor) else x

    grad = GradOfSums(*map(moved, grad)) if isinstance(grad, tuple) else moved(grad)
    operands = grad, moved(codes), moved(scale), zero, moved(weight), dtype, True, True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty_like", functools.partial(guarded_like, at_end=at_end))
        grads_of_convolution(*operands, *geometry)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_so(value):
    codes = torch.ones(1, 16, 5, 5, dtype=torch.int8)
    weight = torch.ones(16, 16, 3, 3)
    grad = torch.ones(1, 16, 5, 5)
    grad[0, 3, 2, 2] = value
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    how = torch.float32, True, True, *geometry
    dx, dw = grads_of_convolution(grad, codes, torch.ones([]), None, weight, *how)
    assert (~dx.isfinite()).sum() == 9 * 16
    assert not dw[3].isfinite().any()
    assert dw[4].isfinite().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(
    core is None or not has_kernel(torch.float32), reason="has no kernel of its own"
)
def test_few_large_images_at_once_are_held_as_floats():
    """Also where each has a single pixel of the output."""
    codes = torch.zeros(64, 64, 64, 64, dtype=torch.int8).to(memory_format=torch.channels_last)
    grad, weight = torch.ones(64, 16, 1, 1), torch.ones(16, 64, 1, 1)
    geometry = [64, 64], [0, 0], [1, 1], False, [0, 0], 1
    how = torch.float32, False, True, *geometry
    status = Path("/proc/self/status")

    def bytes_of(name):
        return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = bytes_of("VmRSS")
    grads_of_convolution(grad, codes, torch.ones([]), None, weight, *how)
    assert bytes_of("VmHWM") - before < 2**25  # 64 images: 2^27


def test_large_layers_are_left_to_pytorch():
    codes = torch.empty(1, 16, 256, 256, dtype=torch.int8, device="meta")
    weight = torch.empty(16, 16, 3, 3, device="meta")
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    assert not _multiplies(codes, weight, codes, torch.float32, *geometry)
    small = codes[..., :8, :8]
    assert _multiplies(small, weight, small, torch.float32, *geometry) == has_kernel(torch.float32)
    for changed in ({2: [2, 2]}, {3: True}, {5: 2}):
        other = [changed.get(k, x) for k, x in enumerate(geometry)]
        assert not _multiplies(small, weight, small, torch.float32, *other)
    assert not _multiplies(small, weight, small, torch.float16, *geometry)


@pytest.fixture
def deferred():
    torch.manual_seed(0)
    grad, sums = torch.randn(2, 16, 4, 4), torch.randint(-99, 99, (2, 16, 4, 4)).to(torch.int16)
    line = torch.rand(6, 16)
    grad, sums = (x.to(memory_format=torch.channels_last) for x in (grad, sums))
    made_of = GradOfSums(grad, sums, *line[:2], True, *line[2:])
    return DeferredGradient.of(made_of), reference.sums.grads_of_sums(*made_of)


def test_whatever_reads_a_deferred_gradient_gets_its_values(deferred):
    gradient, values = deferred
    assert isinstance(gradient, DeferredGradient)
    assert gradient.shape == values.shape
    assert gradient.dtype == values.dtype
    for read in (
        lambda x: x + 0,
        lambda x: 1 * x,
        lambda x: torch.stack([x, x])[1],
        lambda x: x.clone(),
        lambda x: x.double().float(),
        lambda x: x[:],
        lambda x: x.detach().contiguous(),
    ):
        found = read(gradient)
        assert type(found) is torch.Tensor
        assert torch.equal(found, values)
    assert gradient.sum() == values.sum()
    assert gradient.current() is gradient.values()


def block():
    model = nn.Sequential(
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 16, 1),
    )
    model = quantize_model_(model, first_last_bits=None, arithmetic="integer")
    return fuse_(model.to(memory_format=torch.channels_last), torch.randn(2, 16, 8, 8))


def gradients(model):
    torch.manual_seed(1)
    x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    F.mse_loss(y, torch.ones_like(y)).backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def test_layers_use_it(monkeypatch):
    torch.manual_seed(0)
    model = block()
    expected = gradients(model)
    calls = []
    compute = select("grads_of_convolution", "cpu")
    monkeypatch.setitem(
        native_cpu.backend.functions,
        "grads_of_convolution",
        lambda *args: calls.append(args[0]) or compute(*args),
    )
    with use_backend("cpu"):
        found = gradients(model)
    assert [type(x) for x in calls] == [torch.Tensor, *[GradOfSums] * 2]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_hook_sees_the_gradient_of_the_sums():
    """Of a convolution with a bias, its sum over pixels is that of the bias."""
    torch.manual_seed(0)
    model, seen = block(), []
    expected = gradients(model)

    def watch(y):
        y.register_hook(lambda grad: seen.append(grad.sum((0, 2, 3))))
        return y

    model[3].register_forward_hook(lambda *args: watch(args[-1]))
    found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other.double()) < 1e-5
    of_bias = next(
        g for g, (k, _) in zip(found[1:], model.named_parameters(), strict=True) if k == "3.bias"
    )
    torch.testing.assert_close(seen[0], of_bias)


class Watched(torch.autograd.Function):
    """Keeps the gradient that it gets, as NumPy, which reads memory."""

    @staticmethod
    def forward(ctx, x, keep):
        ctx.keep = keep
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.keep(grad.numpy())
        return grad, None


WATCHERS = {
    "a hook of a tensor": lambda y, keep: y.register_hook(lambda g: keep(g.numpy())),
    "a hook of a node": lambda y, keep: y.grad_fn.register_prehook(lambda g: keep(g[0].numpy())),
    "a hook of some": lambda y, keep: torch.autograd.graph.register_multi_grad_hook(
        [y], lambda g: keep(g[0].numpy())
    ),
    "a function": lambda y, keep: Watched.apply(y, keep),
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS)
@pytest.mark.parametrize("layer", [0, 5])  # a batch norm follows, or a ReLU alone
def test_what_reads_the_gradient_of_sums_gets_memory(layer, watch):
    seen = []

    def forward_hook(*args):
        found = watch(args[-1], lambda g: seen.append(g.copy()))
        return found if isinstance(found, torch.Tensor) else None

    def seen_by(backend):
        with use_backend(backend):
            model = chains()
            model[layer].register_forward_hook(forward_hook)
            return gradients(model), seen.pop()

    (found, read), (expected, other) = seen_by("auto"), seen_by("reference")
    assert difference(torch.from_numpy(read), torch.from_numpy(other).double()) < 1e-5
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other.double()) < 1e-5


def chains():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.ReLU()),
        nn.Conv2d(16, 16, 1),
    )
    model = quantize_model_(model, first_last_bits=None, arithmetic="integer")
    return fuse_(model, torch.randn(2, 16, 8, 8))


@pytest.mark.parametrize("of", [lambda y: y, torch.autograd.graph.get_gradient_edge])
def test_the_gradients_of_sums_that_are_asked_for_have_memory(of):
    model, asked = chains(), []
    for layer in (0, 5):
        model[layer].register_forward_hook(lambda *args: asked.append(of(args[-1])))
    y = model(torch.randn(2, 16, 8, 8))
    for grad in torch.autograd.grad(y.square().sum(), asked):
        assert grad.numpy().any()


def test_a_gradient_that_a_hook_keeps_does_not_change():
    model, kept = chains()[:2], []
    model[0].register_forward_hook(lambda *args: args[-1].register_hook(kept.append) and None)
    y = model(torch.randn(2, 16, 8, 8))
    buffer = torch.randn_like(y)
    y.backward(buffer)
    buffer.zero_()  # for the next step
    assert kept[0].any()


def test_gradients_in_a_batch_are_those_of_each():
    torch.manual_seed(0)
    layer = quantize_model_(nn.Conv2d(16, 16, 3), first_last_bits=None, arithmetic="integer")
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    y, of = layer(x), [x, layer.weight, layer.bias]
    several = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, of, several, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(several):
        expected = torch.autograd.grad(y, of, grad, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            assert difference(one[i], other.double()) < 1e-5


def test_a_chain_refuses_gradients_in_a_batch():
    model = chains()
    y = model(torch.randn(2, 16, 8, 8))
    several = torch.randn(2, *y.shape)
    with pytest.raises(RuntimeError, match="takes one at a time"):
        torch.autograd.grad(y, model[0].weight, several, is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_detecting_anomalies_reads_it():
    torch.manual_seed(0)
    model = block()
    expected = gradients(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other.double()) < 1e-5
