"""torch.library's own checks, and torch.compile without a graph break."""

import copy

import pytest
import torch
from torch import nn

import noisyq_fast
from noisyq_fast import fake_quantize_ema

X = torch.randn(3, 4)
IMAGES = torch.randint(0, 256, (2, 3, 5, 3), dtype=torch.uint8)
IMAGES = IMAGES.to(memory_format=torch.channels_last)
ZERO = torch.tensor(7, dtype=torch.uint8)
KERNEL = torch.randint(-128, 128, (4, 3, 3, 3), dtype=torch.int8)
GEOMETRY = ([2, 1], [1, 1], [1, 1], False, [0, 0], 1)
SUMS = torch.randint(-100, 101, (2, 4, 3, 2)).float()
WINDOWS = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), [2, 1], [1, 0]
OPERATORS = {
    "fake_quantize": lambda: (X.clone().requires_grad_(), 4, 0),
    "fake_quantize_many": lambda: ([X.clone().requires_grad_(), torch.randn(2, 3)], [4, 8], 0),
    "fake_quantize_ema": lambda: (X.clone().requires_grad_(), *torch.ones(2, 4), 4, 1, 0.01),
    "fake_quantize_fixed_range": lambda: (X.clone().requires_grad_(), torch.ones(4), 4, 1),
    "fake_quantize_fixed_range_clipped": lambda: (
        X.clone().requires_grad_(),
        torch.tensor(1.0),
        4,
        None,
    ),
    "zero_clipped": lambda: (X.clone().requires_grad_(), torch.tensor([3, 5], dtype=torch.uint8)),
    "quantize": lambda: (X.clone(), 4, None),
    "dequantize": lambda: (torch.ones(3, 4, dtype=torch.int8), torch.ones(4).requires_grad_(), 1),
    "fake_quantize_on_grid": lambda: (X.clone().requires_grad_(), 4, 0, "unsigned", "negative"),
    "fake_quantize_ema_on_grid": lambda: (
        X.clone().requires_grad_(),
        torch.tensor([[-1.0] * 4, [1.0] * 4]),
        torch.ones(4),
        4,
        1,
        0.01,
        "affine",
        "nothing",
    ),
    "fake_quantize_fixed_range_on_grid": lambda: (
        X.clone().requires_grad_(),
        torch.tensor([-1.0, 1.0]),
        4,
        None,
        "affine",
        "clipped",
    ),
    "fake_quantize_learned": lambda: (
        X.clone().requires_grad_(),
        torch.tensor([[0.3, 0.2, 0.4, 0.3]]).requires_grad_(),
        "lsq",
        -8,
        7,
        1,
        0.5,
    ),
    "fake_quantize_learned_backward": lambda: (
        torch.ones(3, 4),
        X.clone(),
        torch.tensor([0.0, 1.0, 0.3]),
        "dsq",
        0,
        15,
        None,
        1.0,
    ),
    "quantize_learned": lambda: (X.clone(), torch.tensor([0.5]), "sat", 0, 15, None),
    "quantize_on_grid": lambda: (X.clone(), 4, 1, "affine"),
    "dequantize_on_grid": lambda: (
        torch.ones(3, 4, dtype=torch.uint8),
        torch.ones(4).requires_grad_(),
        torch.ones(4, dtype=torch.uint8),
        1,
    ),
    "quantize_ema_on_grid": lambda: (
        X.clone(),
        torch.tensor([[-1.0] * 4, [1.0] * 4]),
        torch.ones(4),
        4,
        1,
        0.01,
        "affine",
        "clipped",
    ),
    "quantize_fixed_range_on_grid": lambda: (
        X.clone(),
        torch.tensor(1.0),
        4,
        None,
        "unsigned",
        "negative",
    ),
    "convolve_codes": lambda: (IMAGES, ZERO, KERNEL, None, *GEOMETRY),
    "multiply_codes": lambda: (IMAGES.flatten(0, 2), ZERO, KERNEL[0, :, 0], None),
    "integer_convolution": lambda: (
        torch.randn(IMAGES.shape).to(memory_format=torch.channels_last).requires_grad_(),
        torch.randn(KERNEL.shape, requires_grad=True),
        torch.randn(4, requires_grad=True),
        *(IMAGES, torch.tensor(0.5), ZERO, None),
        *(KERNEL, torch.rand(4), None, None),
        *GEOMETRY,
    ),
    "integer_linear": lambda: (
        torch.randn(6, 3, requires_grad=True),
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, requires_grad=True),
        *(IMAGES.flatten(0, 2)[:6], torch.tensor(0.5), ZERO, None),
        *(KERNEL[:, 0, 0], torch.rand(4), None, None),
    ),
    "statistics_of_sums": lambda: (SUMS, torch.rand(4), torch.rand(4), torch.rand(4), 1e-5, 100),
    "norm_of_sums": lambda: (
        torch.randn(SUMS.shape, requires_grad=True),
        torch.rand(4, requires_grad=True),
        torch.rand(4, requires_grad=True),
        *(SUMS, *torch.rand(5, 4), True),
    ),
    "grads_of_norm_of_sums": lambda: (
        torch.randn(SUMS.shape),
        torch.rand(4),
        *(SUMS, *torch.rand(5, 4), True),
    ),
    "adder_conv2d": lambda: (
        torch.randn(2, 3, 5, 5, requires_grad=True),
        torch.randn(4, 3, 3, 3, requires_grad=True),
        [2, 1],
        [1, 0],
    ),
    "adder_conv2d_input_gradient": lambda: (torch.randn(2, 4, 3, 3), *WINDOWS),
    "adder_conv2d_weight_gradient": lambda: (torch.randn(2, 4, 3, 3), *WINDOWS),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend, name):
    torch.library.opcheck(getattr(torch.ops.noisyq, name), OPERATORS[name]())


def test_opcheck_without_observed(backend):
    x, running, _, *others = OPERATORS["fake_quantize_ema"]()
    torch.library.opcheck(torch.ops.noisyq.fake_quantize_ema, (x, running, None, *others))


def test_every_operator_is_checked():
    declared = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("noisyq::")
    }
    assert declared == set(OPERATORS)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_compiles_to_one_graph_with_the_same_numbers(training):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )
    noisyq_fast.quantize_model_(model)
    model(torch.randn(2, 3, 8, 8))
    eager = copy.deepcopy(model).train(training)
    compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        outputs = [m(x) for m in (eager, compiled)]
        assert torch.equal(*outputs)
        for y in outputs:
            y.square().sum().backward()
    for (name, a), b in zip(eager.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("training", [True, False])
def test_a_sum_and_its_weight_compile(training):
    def f(x, running, observed):
        return fake_quantize_ema(x, running, 4, 0, training=training, observed=observed)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    averages = [torch.tensor([[0.5, 3.0], [0.25, 0.5]]) for _ in range(2)]
    for _ in range(2):
        x = torch.randn(2, 3)
        assert torch.equal(
            *(g(x, *average) for g, average in zip((f, compiled), averages, strict=True))
        )
        assert torch.equal(*averages)


def test_the_clipped_estimator_compiles():
    def f(x, running):
        return fake_quantize_ema(x, running, 4, training=False, ste="clipped").sum()

    x = torch.tensor([0.5, 3.0], requires_grad=True)
    torch.compile(f, fullgraph=True, backend="aot_eager")(x, torch.tensor(1.0)).backward()
    assert x.grad.tolist() == [1, 0]


def test_inductor_keeps_the_numbers():
    layer = noisyq_fast.QuantLinear(16, 8)
    x = torch.randn(4, 16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
