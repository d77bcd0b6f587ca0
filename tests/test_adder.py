"""AdderNet's operators, equal in every backend, and its layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._decomp import decomposition_table

import noisyq_fast
from noisyq_fast import AdderConv2d, AdderLinear, QuantAdderConv2d, QuantAdderLinear
from noisyq_fast.backends import native_cpu, reference
from noisyq_fast.backends.kernel_arguments import core
from noisyq_fast.operators import checks

OPERATORS = ("adder_conv2d", "adder_conv2d_input_gradient", "adder_conv2d_weight_gradient")
# Images, channels, rows, columns; outputs and the kernel; stride; padding. Also channels that fill
# no vector, strides that skip inputs, and borders that are wider than the kernel.
SHAPES = [
    ((2, 5, 7, 9), (3, 3, 3), (1, 1), (1, 1)),
    ((3, 16, 8, 8), (16, 3, 3), (2, 2), (1, 1)),
    ((2, 33, 7, 6), (20, 1, 1), (2, 2), (0, 0)),
    ((2, 17, 9, 8), (33, 3, 2), (2, 3), (2, 0)),
    ((1, 4, 5, 5), (4, 5, 5), (1, 1), (4, 3)),
    ((4, 8, 1, 1), (10, 1, 1), (1, 1), (0, 0)),
    ((2, 3, 11, 11), (7, 2, 2), (3, 3), (0, 1)),
    ((0, 3, 4, 4), (2, 3, 3), (1, 1), (1, 1)),
]


def case(x_shape, weight_shape, stride, padding, dtype=torch.float32):
    """An output's gradient, an input, a weight, and the options."""
    x = torch.randn(x_shape, dtype=dtype)
    outputs, *kernel = weight_shape
    weight = torch.randn(outputs, x_shape[1], *kernel, dtype=dtype)
    size = checks.output_size(x, weight, stride, padding)
    return torch.randn(len(x), outputs, *size, dtype=dtype), x, weight, stride, padding


def results(module, grad, x, weight, *options):
    return [
        module.adder_conv2d(x, weight, *options),
        *(getattr(module, name)(grad, x, weight, *options) for name in OPERATORS[1:]),
    ]


def require_kernels():
    if core is None:
        pytest.skip("the native library was not compiled")


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_equal_the_specification(shapes, threads, restore_threads):
    require_kernels()
    torch.set_num_threads(threads)
    arguments = case(*shapes)
    for kernel, expected in zip(
        results(native_cpu.adder, *arguments), results(reference.adder, *arguments), strict=True
    ):
        assert torch.equal(kernel, expected)
        assert kernel.stride() == expected.stride()


def test_several_threads_share_a_convolution(restore_threads):
    require_kernels()
    arguments = case((4, 32, 16, 16), (32, 3, 3), (1, 1), (1, 1))
    torch.set_num_threads(1)
    one = results(native_cpu.adder, *arguments)
    torch.set_num_threads(3)
    assert all(map(torch.equal, one, results(native_cpu.adder, *arguments)))


def test_memory_layouts_give_the_same_bits(backend):
    grad, x, weight, *options = case(*SHAPES[1])
    expected = torch.ops.noisyq.adder_conv2d(x, weight, *options)
    wide = torch.randn(3, 32, 8, 16)
    wide[:, ::2, :, ::2] = x
    for other in (x.to(memory_format=torch.channels_last), wide[:, ::2, :, ::2]):
        assert torch.equal(torch.ops.noisyq.adder_conv2d(other, weight, *options), expected)
        for name in OPERATORS[1:]:
            operator = getattr(torch.ops.noisyq, name)
            ours = operator(grad, x, weight, *options)
            assert torch.equal(operator(grad, other, weight, *options), ours)


@pytest.mark.parametrize("shapes", SHAPES)
def test_plain_operators_compute_the_same(shapes):
    _, *arguments = case(*shapes, torch.float64)
    operator = torch.ops.noisyq.adder_conv2d.default
    torch.testing.assert_close(decomposition_table[operator](*arguments), operator(*arguments))


@pytest.mark.parametrize("shapes", SHAPES[:5])
def test_specification_is_the_formulas(shapes):
    """With every term in memory, as sums over unfolded windows."""
    grad, x, weight, stride, padding = case(*shapes, dtype=torch.float64)
    windows = F.unfold(x, weight.shape[2:], padding=padding, stride=stride).unsqueeze(1)
    difference = weight.flatten(1)[None, :, :, None] - windows  # [N, O, K, positions]
    g = grad.flatten(2).unsqueeze(2)
    of_windows = (difference.clamp(-1, 1) * g).sum(1)
    dx = F.fold(of_windows, x.shape[2:], weight.shape[2:], padding=padding, stride=stride)
    expected = [
        -difference.abs().sum(2).view_as(grad),
        dx,
        (-difference * g).sum((0, 3)).view_as(weight),
    ]
    for ours, theirs in zip(
        results(reference.adder, grad, x, weight, stride, padding), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_nan_and_infinity_go_through(backend):
    grad, x, weight, *options = case((1, 3, 5, 5), (2, 3, 3), (1, 1), (1, 1))
    x[0, 1, 2, 2] = float("nan")
    x[0, 0, 4, 4] = float("inf")
    y = torch.ops.noisyq.adder_conv2d(x, weight, *options)
    dx = torch.ops.noisyq.adder_conv2d_input_gradient(grad, x, weight, *options)
    assert y[0, :, 1:4, 1:4].isnan().all()
    assert (y[0, :, 4, 4] == -float("inf")).all()
    assert dx.isnan().nonzero().tolist() == [[0, 1, 2, 2]]


def test_samples_under_vmap(backend):
    _, x, weight, *options = case((3, 4, 5, 5), (2, 3, 3), (1, 1), (1, 1))

    def of_one(image, scale):
        return torch.ops.noisyq.adder_conv2d(image[None], weight * scale, *options)[0]

    scales = torch.rand(3)
    one_by_one = torch.stack([of_one(*pair) for pair in zip(x, scales, strict=True)])
    assert torch.equal(torch.vmap(of_one)(x, scales), one_by_one)


# The layers.


def test_linear_is_a_convolution_of_one_pixel():
    linear, convolution = AdderLinear(5, 4), AdderConv2d(5, 4, 1)
    with torch.no_grad():
        linear.bias.copy_(torch.randn(4))
        convolution.weight.copy_(linear.weight[:, :, None, None])
        convolution.bias.copy_(linear.bias)
    x = torch.randn(2, 3, 5)
    expected = convolution(x.reshape(6, 5, 1, 1)).reshape(2, 3, 4)
    assert torch.equal(linear(x), expected)
    expected = -(linear.weight - x.unsqueeze(2)).abs().sum(-1) + linear.bias
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_gradient_of_a_weight_has_its_length_whatever_the_loss(quantized, scale):
    model = nn.Sequential(AdderConv2d(2, 4, 3), nn.Flatten(), AdderLinear(16, 3))
    if quantized:
        noisyq_fast.quantize_model_(model)
        assert [type(model[i]) for i in (0, 2)] == [QuantAdderConv2d, QuantAdderLinear]
    (model(torch.randn(2, 2, 4, 4)).square().sum() * scale).backward()
    for layer in (model[0], model[2]):
        expected = layer.weight.numel() ** 0.5 / 5
        assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_quantized_layer_adds_quantized_values():
    layer = QuantAdderConv2d(3, 4, 3, padding=1, weight_bits=3, activation_bits=5)
    x = torch.randn(2, 3, 6, 6)
    weight = noisyq_fast.fake_quantize(layer.weight, 3, 0)
    expected = torch.ops.noisyq.adder_conv2d(
        noisyq_fast.fake_quantize(x, 5), weight, [1, 1], [1, 1]
    )
    assert torch.equal(layer(x), expected + layer.bias[:, None, None])


def test_conversion_and_back_keeps_the_layers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), AdderConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 3))
    x = torch.randn(2, 2, 8, 8)
    expected = model(x)
    noisyq_fast.quantize_model_(model, example=x)
    assert str(model[1]).endswith("padding=(1, 1), W4/A4)")
    assert not torch.equal(model(x), expected)
    noisyq_fast.dequantize_model_(model)
    assert type(model[1]) is AdderConv2d
    assert torch.equal(model(x), expected)


def test_summary_counts_the_additions():
    model = nn.Sequential(AdderConv2d(2, 4, 3), nn.Flatten(), AdderLinear(16, 3))
    counted = noisyq_fast.summary(model, torch.randn(1, 2, 4, 4))
    assert [layer.macs for layer in counted.layers] == [2 * 2 * 4 * 2 * 9, 16 * 3]
    assert counted.additions == counted.macs
    model.append(nn.Linear(3, 2))
    noisyq_fast.quantize_model_(model)
    found = noisyq_fast.summary(model, torch.randn(1, 2, 4, 4))
    assert (found.quantized_macs, found.additions) == (counted.macs + 6, counted.macs)
    assert "additions without a multiplication: 98.2% of the MACs" in str(found)
    assert found.to_dict()["additions"] == counted.macs


def test_autocast_sums_in_full_precision():
    layer = AdderConv2d(8, 4, 3)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, layer(x.bfloat16().float()), rtol=0, atol=0)


def test_layers_compile_to_one_graph():
    model = nn.Sequential(AdderConv2d(2, 4, 3), nn.Flatten(), AdderLinear(16, 3))
    x = torch.randn(2, 2, 4, 4)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert model[0].weight.grad.norm() > 0


X, W = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.half(), W, [1], [0]), "x: got torch.float16, takes torch.float32 or torch.float64"),
        ((X, W.double(), [1], [0]), "weight: got torch.float64, takes torch.float32, that of x"),
        ((X[0], W, [1], [0]), r"x: got shape \[3, 4, 4\], takes four sizes"),
        ((X, W[:, :2], [1], [0]), "weight: got 2 input channels, takes 3, those of x"),
        ((X, W[:0], [1], [0]), r"weight: got shape \[0, 3, 3, 3\], takes sizes from 1"),
        ((X, W, [0], [0]), r"got stride \(0, 0\) and padding \(0, 0\), takes a stride from 1"),
        ((X[:, :, :2], W, [1], [0]), r"x: got \[2, 4\] with padding \(0, 0\), takes at least"),
    ],
)
def test_bad_arguments_are_named(backend, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.noisyq.adder_conv2d(*arguments)


def test_a_gradient_of_another_shape_does_not_reach_a_kernel(backend):
    for name in OPERATORS[1:]:
        with pytest.raises(ValueError, match=r"grad: got shape \[1, 2, 4, 4\], takes \[1, 2, 2, 2"):
            getattr(torch.ops.noisyq, name)(torch.zeros(1, 2, 4, 4), X, W, [1], [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups: got 2, takes 1"),
        ({"dilation": 2}, r"dilation: got \(2, 2\), takes \(1, 1\)"),
        ({"padding_mode": "reflect"}, "padding_mode: got 'reflect', takes 'zeros'"),
        ({"padding": "same"}, "padding: got 'same', takes numbers"),
    ],
)
def test_convolutions_without_an_adder_form_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdderConv2d(4, 4, 3, **options)
