"""The moving average of the absmax, over batches, resumes, evaluation and bad batches."""

import numpy as np
import numpy_specification as specification
import pytest
import torch
from assert_same import assert_same
from strategies import DTYPES

from noisyq_fast import QuantLinear, fake_quantize, fake_quantize_ema

UNSEEN = float("nan")
# Of averages that have seen nothing, that are as an update leaves them, and that were averaged with
# those of other models.
WEIGHTS = torch.tensor([0.0, 1.0, 0.25, 0.999])


def batches(count, shape=(4, 6)):
    return [torch.randn(shape) * (i + 1) for i in range(count)]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_follows_the_definition(backend, axis):
    running = torch.full([] if axis is None else [(4, 6)[axis]], UNSEEN)
    expected = running.numpy().copy()
    for x in batches(5):
        y = fake_quantize_ema(x, running, 4, axis, averaging_constant=0.1)
        absmax = specification.absmax(x.numpy(), axis)
        expected, _ = specification.averaged(expected, np.ones_like(expected), absmax, 0.1)
        assert np.array_equal(running.numpy(), expected)
        # In training the scale is the batch's own.
        assert torch.equal(y, fake_quantize(x, 4, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4, 6), 0), ((3, 4), 1), ((2, 4, 5, 3), 1)])
def test_a_sum_and_its_weight_follow_the_definition(backend, shape, axis, dtype):
    memory = torch.stack([WEIGHTS * torch.rand(4), WEIGHTS], 1)
    contiguous = [column.clone() for column in memory.T]
    strided = [memory[:, 0].clone(), memory[:, 1]]
    alone = [[column[i].clone() for column in memory.T] for i in range(4)]
    expected = tuple(column.numpy() for column in contiguous)
    for step, x in enumerate(batches(4, shape)):
        x = x.to(dtype)
        if step in (0, 2):
            x.select(axis, 1).flatten()[0] = float("inf")
            x.select(axis, 0).fill_(0.0)
        absmax = specification.absmax(x.float().numpy(), axis)
        expected = specification.averaged(*expected, absmax, 0.1)
        for running, observed in (contiguous, strided):
            y = fake_quantize_ema(x, running, 4, axis, 0.1, observed=observed)
            assert_same(y, fake_quantize(x, 4, axis))
            assert_same([running, observed], list(map(torch.from_numpy, expected)))
        for i, (running, observed) in enumerate(alone):  # per tensor
            fake_quantize_ema(x.select(axis, i), running, 4, None, 0.1, observed=observed)
            assert_same([running, observed], [contiguous[0][i], contiguous[1][i]])


def test_a_weight_of_one_changes_no_bit(backend):
    start = torch.tensor([UNSEEN, 0.0, 1e-42, 0.3, 3e38, float("inf")])
    running, with_observed, observed = start.clone(), start.clone(), torch.ones(6)
    for x in batches(3):
        y = fake_quantize_ema(x, running, 4, 1)
        assert torch.equal(fake_quantize_ema(x, with_observed, 4, 1, observed=observed), y)
        assert torch.equal(with_observed.view(torch.int32), running.view(torch.int32))
        assert observed.tolist() == [1] * 6
    ranges = running.nan_to_num(posinf=1.0)
    for ste in ("identity", "clipped"):
        y, expected = (
            fake_quantize_ema(x, ranges, 4, 1, training=False, ste=ste, observed=weight)
            for weight in (observed, None)
        )
        assert torch.equal(y, expected)


def test_a_range_of_zero_that_was_seen_is_a_range(backend):
    seen, unseen = ((torch.tensor(0.0), torch.tensor(weight)) for weight in (1.0, 0.0))
    for running, observed in (seen, unseen):
        fake_quantize_ema(torch.tensor([2.0]), running, 4, None, 0.5, observed=observed)
    assert seen[0] == 1.0
    assert unseen[0] == 2.0


def test_a_mean_of_models_is_the_mean_of_those_that_have_seen_something(backend):
    x = torch.tensor([1.2, -20.0, 0.3])
    models = [(torch.tensor(0.0), torch.tensor(0.0)) for _ in range(4)]
    for running, observed in models[1:3]:
        fake_quantize_ema(2 * x, running, 4, observed=observed)
    running, observed = (torch.stack(values).mean() for values in zip(*models, strict=True))
    y = fake_quantize_ema(x, running, 4, training=False, observed=observed)
    assert torch.equal(y, fake_quantize_ema(x, torch.tensor(40.0), 4, training=False))
    assert observed == 0.5


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
        for observed in (None, torch.tensor(0.25)):
            before = running.clone()
            fake_quantize_ema(torch.empty(0, 3), running, 4, observed=observed)
            assert_same(running, before)
            assert observed is None or observed == 0.25


def test_a_range_may_have_any_strides(backend):
    ranges = torch.full((4, 2), 2.0)
    x = torch.randn(4, 6)
    fake_quantize_ema(x, ranges[:, 0], 4, axis=0, averaging_constant=1.0)
    assert torch.equal(ranges[:, 0], x.abs().amax(1))
    assert torch.equal(ranges[:, 1], torch.full((4,), 2.0))


def test_the_range_counts_as_changed_for_autograd(backend):
    running = torch.tensor(1.0)
    observed = torch.tensor(0.5)
    versions = running._version, observed._version
    fake_quantize_ema(torch.ones(3), running, 4, observed=observed)
    assert running._version > versions[0]
    assert observed._version > versions[1]


def test_evaluation_without_a_range_is_an_error(backend):
    with pytest.raises(ValueError, match="running_absmax: got NaN"):
        fake_quantize_ema(torch.ones(3), torch.tensor(UNSEEN), 4, training=False)
    nothing = torch.zeros(2)
    with pytest.raises(ValueError, match="no batch was seen in training"):
        fake_quantize_ema(torch.ones(2), nothing, 4, 0, training=False, observed=nothing)


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
    assert torch.equal(whole.input_quantizer.range, resumed.input_quantizer.range)
