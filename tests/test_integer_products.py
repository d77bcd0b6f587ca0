"""What layers give to their products of codes."""

import pytest
import torch

import noisyq_fast

INTEGER = {"arithmetic": "integer"}
ONE_SCALE = {"weight": noisyq_fast.AbsMax(4, None)}
AFFINE_SCALE = {"weight": noisyq_fast.AbsMax(4, None, "affine")}
TOKENS = {"activation_granularity": "token"}
LAYERS = {
    "linear": (noisyq_fast.QuantLinear, (8, 20), ONE_SCALE, (3, 8)),
    "conv": (noisyq_fast.QuantConv2d, (8, 20, 3), ONE_SCALE, (2, 8, 5, 5)),
    "transposed": (noisyq_fast.QuantConvTranspose2d, (8, 20, 3), AFFINE_SCALE, (2, 8, 5, 5)),
    "grouped": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), ONE_SCALE, (2, 3, 8)),
    "tokens of groups": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), TOKENS, (3, 3, 8)),
    "tokens of one": (noisyq_fast.QuantGroupedLinear, (3, 8, 5), TOKENS, (1, 3, 8)),
    "a vector": (noisyq_fast.QuantLinear, (8, 20), {}, (8,)),
    "an image": (noisyq_fast.QuantConv2d, (8, 20, 3), {"activation_grid": "affine"}, (8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_one_scale_for_a_weight_or_without_a_batch(exact_backend, name):
    cls, sizes, options, x = LAYERS[name]
    integer, floating = cls(*sizes, **options, **INTEGER), cls(*sizes, **options)
    floating.load_state_dict(integer.state_dict())
    assert integer.why_float() is None
    inputs = [torch.randn(x).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    outputs = [layer(x) for layer, x in zip((integer, floating), inputs, strict=True)]
    assert outputs[0].shape == outputs[1].shape
    torch.testing.assert_close(*outputs)
    grad = torch.randn(outputs[0].shape)
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(integer.parameters(), floating.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_scales_that_do_not_leave_the_sum_compute_in_float():
    quantizer = noisyq_fast.MovingAbsMax(4, axis=1, ranges=8)
    options = {"arithmetic": "integer", "activation": quantizer}
    for layer, x in (
        (noisyq_fast.QuantConv2d(8, 20, 3, **options), torch.randn(2, 8, 5, 5)),
        (noisyq_fast.QuantLinear(8, 20, **options), torch.randn(3, 8)),
        (
            noisyq_fast.QuantLinear(8, 20, weight=noisyq_fast.AbsMax(4, axis=1), **INTEGER),
            torch.randn(3, 8),
        ),
    ):
        assert "has scales" in layer.why_float()
        assert layer(x).isfinite().all()


def test_a_value_without_a_code_is_loud_in_evaluation(exact_backend):
    """As in float: with the range of training, too, a NaN does not become the code 0."""
    layer = noisyq_fast.QuantLinear(8, 3, arithmetic="integer")
    x = torch.randn(4, 8)
    layer(x)
    layer.eval()
    assert layer(x).isfinite().all()
    x[0, 0] = float("nan")
    assert layer(x)[0].isnan().all()


def chain():
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1)
    )
    model = noisyq_fast.quantize_model_(layers, arithmetic="integer")
    return noisyq_fast.fuse_(model, torch.randn(2, 2, 5, 5))


def test_the_range_of_a_chain_is_that_of_its_values(exact_backend):
    """Of no values; of sums that were not measured where they were made; with a bias that has gaps
    in its memory."""
    model = chain()
    model(torch.randn(0, 2, 5, 5)).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())

    x = torch.randn(2, 2, 5, 5)
    model[0].bias = torch.nn.Parameter(torch.randn(8)[::2])
    expected = model(x)
    model[0].training = False  # with which only the convolution stops to measure
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        unfused = torch.nn.functional.relu(model[0](x) + 0)
        assert torch.equal(model[2](unfused), expected)


def test_a_chain_with_a_weight_that_is_not_finite_is_loud(exact_backend):
    model, x = chain(), torch.randn(2, 2, 5, 5)
    model(x)
    with torch.no_grad():
        model[0].weight[1] = float("nan")
    for training in (True, False):
        assert model.train(training)(x).isnan().all()
