"""Operators on a GPU, at the sizes of layers of ResNet-20 (batch 128) and ResNet-50 (batch 64), and
of a weight that no cache holds."""

from collections.abc import Callable

import peers
import pytest
import torch
from comparison import Comparison
from device import MARKS, by_backend, compare_on_device, one_after_another, our_name, rotated
from learned_peers import LEARNED
from passes import forward, forward_backward, name_of

from experiments.models import ResNet20
from noisyq_fast import fake_quantize, fake_quantize_ema, fake_quantize_many
from noisyq_fast.grid import AFFINE, FULL, UNSIGNED

pytestmark = MARKS

BITS = 4
ROUNDS = 25
COPY = "device-to-device copy"
WEIGHTS = [(64, 64, 3, 3), (512, 512, 3, 3), (8192, 4096)]
RESNET20 = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
RESNET50 = [(64, 256, 56, 56), (64, 512, 28, 28), (64, 2048, 7, 7)]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_other_grid = pytest.mark.parametrize("grid", [FULL, UNSIGNED, AFFINE])
each_layer = pytest.mark.parametrize("shape", RESNET20 + RESNET50, ids=str)


@each_dtype
@each_layer
def test_activation(benchmark, shape, dtype):
    compare_activation(benchmark, shape, dtype, forward)


@pytest.mark.parametrize("shape", [RESNET20[0], RESNET50[0]], ids=str)
def test_activation_with_backward(benchmark, shape):
    compare_activation(benchmark, shape, torch.float32, forward_backward)


def compare_activation(benchmark, shape, dtype, passes):
    running = torch.ones((), device="cuda")
    compare_operator(
        benchmark,
        f"activation {describe(shape, dtype)}, channels_last, moving average, {name_of(passes)}",
        lambda x: fake_quantize_ema(x, running, BITS),
        peers.ACTIVATION,
        activations(shape, dtype),
        passes,
    )


@each_dtype
@pytest.mark.parametrize("shape", [RESNET20[0], RESNET50[0]], ids=str)
def test_evaluation(benchmark, shape, dtype):
    running = torch.ones((), device="cuda")
    compare_operator(
        benchmark,
        f"activation {describe(shape, dtype)}, channels_last, evaluation with a given range",
        lambda x: fake_quantize_ema(x, running, BITS, training=False),
        peers.EVALUATION,
        activations(shape, dtype),
    )


@pytest.mark.parametrize("quantizer", LEARNED)
def test_learned(benchmark, quantizer):
    ours, others = LEARNED[quantizer]
    compare_operator(
        benchmark,
        f"{quantizer}, activation {describe(RESNET20[0], torch.float32)}, channels_last, "
        "forward + backward",
        ours().to("cuda"),
        others,
        [x.relu() for x in activations(RESNET20[0], torch.float32)],
        forward_backward,
    )


@each_other_grid
@pytest.mark.parametrize("shape", [RESNET20[0], RESNET50[0]], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["moving average", "given range"])
def test_activation_on_grid(benchmark, grid, shape, training):
    ranges = torch.tensor([-0.5, 1.0]) if grid == AFFINE else torch.tensor(1.0)
    running = ranges.to("cuda")
    compare_operator(
        benchmark,
        f"activation {describe(shape, torch.float32)}, channels_last, grid {grid}, "
        f"{'moving average' if training else 'given range'}, forward",
        lambda x: fake_quantize_ema(x, running, BITS, training=training, grid=grid),
        {},
        activations(shape, torch.float32),
    )


@each_other_grid
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_weight_on_grid(benchmark, grid, shape):
    compare_operator(
        benchmark,
        f"weight {describe(shape, torch.float32)}, per channel, grid {grid}, forward",
        lambda weight: fake_quantize(weight, BITS, axis=0, grid=grid),
        {},
        rotated(lambda: randn(shape, torch.float32), nbytes(shape, torch.float32)),
    )


@each_dtype
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_weight(benchmark, shape, dtype):
    weights = rotated(lambda: randn(shape, dtype), nbytes(shape, dtype))
    compare_operator(
        benchmark,
        f"weight {describe(shape, dtype)}, per channel, forward",
        lambda weight: fake_quantize(weight, BITS, axis=0),
        peers.WEIGHT,
        weights,
    )


@each_dtype
def test_all_weights(benchmark, dtype):
    shapes = [parameter.shape for parameter in ResNet20().parameters() if parameter.dim() > 1]
    total = sum(shape.numel() for shape in shapes)
    compare_operator(
        benchmark,
        f"all {len(shapes)} weights of ResNet-20 {describe((total,), dtype)}, per channel, forward",
        lambda weights: fake_quantize_many(weights, BITS, axis=0),
        peers.weights_together(len(shapes)),
        rotated(lambda: [randn(shape, dtype) for shape in shapes], nbytes((total,), dtype)),
        # One copy of as many bytes.
        copied=rotated(lambda: randn((total,), dtype), nbytes((total,), dtype)),
    )


def compare_operator(
    benchmark: Callable,
    title: str,
    ours: Callable,
    others: dict[str, peers.Make],
    inputs: list,
    passes: Callable = forward,
    copied: list | None = None,
) -> None:
    """Ours, by each backend, beside its peers and a copy of the same bytes."""

    def over_inputs(make, inputs=inputs, passes=passes):
        def make_call():
            call = make()
            return one_after_another([passes(call, x) for x in inputs])

        return make_call

    copied = copied or inputs
    candidates = {
        **by_backend(over_inputs(lambda: ours)),
        **{name: over_inputs(lambda make=make: make().to("cuda")) for name, make in others.items()},
        COPY: over_inputs(lambda: torch.clone, copied, forward),
    }
    moved = 2 * copied[0].nbytes if passes is forward else None
    comparison = Comparison(title, moved, our_name(), floor=COPY, unit="us")
    compare_on_device(benchmark, comparison, candidates, ROUNDS, calls=len(inputs))


def activations(shape, dtype):
    return rotated(
        lambda: randn(shape, dtype).to(memory_format=torch.channels_last), nbytes(shape, dtype)
    )


def randn(shape, dtype):
    return torch.randn(shape, dtype=dtype, device="cuda")


def nbytes(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize


def describe(shape, dtype):
    name = str(dtype).removeprefix("torch.")
    return f"{list(shape)} {name} ({nbytes(shape, dtype) / 1e6:.1f} MB)"
