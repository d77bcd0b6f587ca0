"""The moving average of the absmax, over batches, resumes, evaluation and bad batches."""

import numpy as np
import numpy_specification as specification
import pytest
import torch

from noisyq_fast import QuantLinear, fake_quantize, fake_quantize_ema

UNSEEN = float("nan")


def batches(count, shape=(4, 6)):
    return [torch.randn(shape) * (i + 1) for i in range(count)]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_follows_the_definition(backend, axis):
    running = torch.full([] if axis is None else [(4, 6)[axis]], UNSEEN)
    expected = running.numpy().copy()
    for x in batches(5):
        y = fake_quantize_ema(x, running, 4, axis, averaging_constant=0.1)
        absmax = specification.absmax(x.numpy(), axis)
        expected = specification.averaged(expected, absmax, 0.1)
        assert np.array_equal(running.numpy(), expected)
        # In training the scale is the batch's own.
        assert torch.equal(y, fake_quantize(x, 4, axis))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_delayed_quantizes_with_the_range_before_the_batch(backend, axis):
    running = torch.full([] if axis is None else [(4, 6)[axis]], UNSEEN)
    for x in batches(4):
        range_before = running.clone()
        expected_running = running.clone()
        expected = fake_quantize_ema(x, expected_running, 4, axis, averaging_constant=0.3)
        if not range_before.isnan().any():
            expected = fake_quantize_ema(x, range_before, 4, axis, training=False)
        y = fake_quantize_ema(x, running, 4, axis, averaging_constant=0.3, delayed=True)
        assert torch.equal(y, expected)
        assert torch.equal(running, expected_running)


def test_the_first_batch_sets_the_range(backend):
    running = torch.tensor(UNSEEN)
    x = torch.tensor([0.5, -3.0])
    fake_quantize_ema(x, running, 4)
    assert running == 3.0


def test_evaluation_uses_the_range_and_leaves_it(backend):
    running = torch.tensor(7.0)
    x = torch.tensor([1.2, -20.0, float("inf"), float("nan")])
    y = fake_quantize_ema(x, running, 4, training=False)
    assert y[:3].tolist() == [1.0, -7.0, 7.0]
    assert y[3].isnan()
    assert running == 7.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("start", [UNSEEN, 2.0])
def test_a_batch_that_is_not_finite_is_no_observation(backend, bad, start):
    running = torch.full((3,), start)
    x = torch.ones(2, 3)
    x[0, 1] = bad
    y = fake_quantize_ema(x, running, 4, axis=1)
    expected = torch.full((3,), 1.0 if start != start else 2.0 + 0.01 * (1.0 - 2.0))
    expected[1] = start
    torch.testing.assert_close(running, expected, equal_nan=True)
    assert y[:, 1].isnan().all()


def test_an_empty_batch_is_no_observation(backend):
    for running in (torch.tensor(UNSEEN), torch.tensor(2.0)):
        before = running.clone()
        fake_quantize_ema(torch.empty(0, 3), running, 4)
        torch.testing.assert_close(running, before, rtol=0, atol=0, equal_nan=True)


def test_a_range_may_have_any_strides(backend):
    ranges = torch.full((4, 2), 2.0)
    x = torch.randn(4, 6)
    fake_quantize_ema(x, ranges[:, 0], 4, axis=0, averaging_constant=1.0)
    assert torch.equal(ranges[:, 0], x.abs().amax(1))
    assert torch.equal(ranges[:, 1], torch.full((4,), 2.0))


def test_the_range_counts_as_changed_for_autograd(backend):
    running = torch.tensor(1.0)
    version = running._version
    fake_quantize_ema(torch.ones(3), running, 4)
    assert running._version > version


def test_evaluation_without_a_range_is_an_error(backend):
    with pytest.raises(ValueError, match="running_absmax: got NaN"):
        fake_quantize_ema(torch.ones(3), torch.tensor(UNSEEN), 4, training=False)


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_a_resumed_layer_continues_exactly(backend, seen):
    data = batches(6, (4, 5))
    whole = QuantLinear(5, 3)
    for x in data[:seen]:
        whole(x)
    resumed = QuantLinear(5, 3)
    resumed.load_state_dict(whole.state_dict())
    for x in data[seen:]:
        assert torch.equal(whole(x), resumed(x))
    assert torch.equal(whole.running_absmax, resumed.running_absmax)
