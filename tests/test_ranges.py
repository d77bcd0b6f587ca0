"""Freezing, resetting and switching off the quantizers of a model."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from noisyq_fast import (
    AbsMax,
    MovingAbsMax,
    calibrate,
    disabled,
    fake_quantize_ema,
    freeze_ranges_,
    quantize_model_,
    reset_ranges_,
)

X = torch.randn(6, 4)


def make(**options):
    torch.manual_seed(0)
    return quantize_model_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), **options)


def trained():
    model = make()
    model(X)
    return model


def ranges(model):
    return [q.range.clone() for q in model.modules() if isinstance(q, MovingAbsMax)]


# Frozen.


def test_frozen_ranges_stay_in_training_while_weights_train():
    model = freeze_ranges_(trained())
    before = ranges(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(10 * X).square().mean().backward()
        optimizer.step()
    assert ranges(model) == before
    assert not torch.equal(model[0].weight, weight)
    y = model(10 * X)
    assert torch.equal(y, model.eval()(10 * X))


@pytest.mark.parametrize(("ste", "expected"), [("identity", [1, 1]), ("clipped", [1, 0])])
def test_a_frozen_quantizer_has_the_scale_and_the_gradient_of_evaluation(ste, expected):
    quantizer = MovingAbsMax(4, ste=ste)
    quantizer.set_range(1.0)
    quantizer.frozen = True
    x = torch.tensor([0.5, 3.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert x.grad.tolist() == expected
    assert torch.equal(y, fake_quantize_ema(x, torch.tensor(1.0), 4, training=False))


def test_frozen_ranges_ask_no_other_rank():
    model = freeze_ranges_(trained())
    for quantizer in model.modules():
        if isinstance(quantizer, MovingAbsMax):
            quantizer.range_of_ranks = lambda x, axis: pytest.fail("asked")
    model(X)


def test_ranges_move_again():
    model = freeze_ranges_(trained())
    before = ranges(model)
    freeze_ranges_(model, False)(10 * X)
    assert all(a > b for a, b in zip(ranges(model), before, strict=True))


def test_frozen_is_kept_in_copies_but_not_in_state_dicts():
    model = freeze_ranges_(trained())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(10 * X)
        assert ranges(other) == ranges(model)
    other = make()
    other.load_state_dict(model.state_dict())
    assert not other[0].input_quantizer.frozen
    model.load_state_dict(other.state_dict())
    assert model[0].input_quantizer.frozen
    assert "frozen" in repr(model[0].input_quantizer)


def test_quantizers_made_from_a_frozen_one_move():
    quantizer = MovingAbsMax(4)
    quantizer.frozen = True
    model = make(activation=quantizer)
    model(X)
    assert not any(r.isnan() for r in ranges(model))


def test_compiled_models_freeze_too():
    model = trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X)
    before = ranges(freeze_ranges_(model))
    compiled(10 * X)
    assert ranges(model) == before
    with disabled(compiled):
        expected = nn.functional.linear(X, model[0].weight, model[0].bias)
        expected = nn.functional.linear(expected, model[1].weight, model[1].bias)
        torch.testing.assert_close(compiled(X), expected)


def test_ranges_that_have_seen_nothing_are_not_frozen():
    with pytest.raises(ValueError, match=r"freeze_ranges_: .*seen nothing yet; train it .*calibr"):
        freeze_ranges_(make())
    model = make()
    model[0](X)  # the other layer may be one that is never called
    freeze_ranges_(model)
    with pytest.raises(ValueError, match=r"^1\.input_quantizer: .*calibrate\(model, batches\)"):
        model(X)


# Reset.


def test_reset_ranges_forget_and_move():
    model = freeze_ranges_(trained())
    assert reset_ranges_(model) is model
    assert all(r.isnan() for r in ranges(model))
    model(10 * X)
    assert ranges(model)[0] == (10 * X).abs().max()


def test_a_quantizer_that_keeps_no_range_is_not_reset():
    class Learned(AbsMax):
        def reset(self):
            pytest.fail("reset")

    model = make()
    model[0].weight_quantizer = Learned(4)
    model(X)
    freeze_ranges_(reset_ranges_(calibrate(model, [X])), False)


# Off.


def test_disabled_computes_in_float_and_restores():
    model = trained()
    model[1].input_quantizer.enabled = False
    before = ranges(model)
    float_model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    float_model.load_state_dict(model.state_dict(), strict=False)
    for mode in (True, False):
        with disabled(model.train(mode)):
            assert torch.equal(model(10 * X), float_model(10 * X))
            with disabled(model[0]):
                pass
            assert torch.equal(model(10 * X), float_model(10 * X))
    assert ranges(model) == before
    enabled = [q.enabled for layer in model for q in layer.quantizers().values()]
    assert enabled == [True, True, True, False]


def test_disabled_restores_after_an_error():
    model = make()
    with pytest.raises(RuntimeError, match="shapes"), disabled(model):
        model(torch.randn(2, 5))
    assert model[0].weight_quantizer.enabled


def test_contexts_that_overlap_in_two_threads():
    model = trained()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with disabled(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with disabled(model):
        thread.start()
        assert inside.wait(10)
    assert not model[0].input_quantizer.enabled  # the other thread is still inside
    leave.set()
    thread.join()
    assert model[0].input_quantizer.enabled


def test_nothing_is_kept_of_a_model_that_is_gone():
    from noisyq_fast import ranges as module

    with disabled(make()):
        pass
    assert len(module._off) == 0


@pytest.mark.parametrize(
    "function", [freeze_ranges_, reset_ranges_, lambda m: disabled(m).__enter__()]
)
def test_bad_models(function):
    with pytest.raises(TypeError, match="model: got int"):
        function(3)
    with pytest.raises(ValueError, match="model: got Linear without quantized layers"):
        function(nn.Linear(2, 2))


def test_frozen_is_a_bool():
    with pytest.raises(TypeError, match=r"frozen: got 1 \(int\), takes a bool"):
        freeze_ranges_(trained(), 1)
