"""Layers that a model does not call, or calls several times, are told once; nothing is stored."""

import copy
import functools
import gc
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisyq_fast import quantize_model_
from noisyq_fast.layers import usage

pytestmark = pytest.mark.usefixtures("both_arithmetics")


class ReadsWeight(nn.Module):
    """Multiplies by a layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.qkv = nn.Linear(4, 12)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        q, _, v = F.linear(self.first(x), self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.last(q * v)


class Twice(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return self.last(checkpoint(self.shared, x, use_reentrant=False))
        return self.last(self.shared(self.shared(x)))


def make_layers():
    return nn.Linear(4, 4), nn.Linear(4, 4)


def converted(model, **options):
    return quantize_model_(model, first_last_bits=None, **options)


def warnings_of(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(w.message) for w in caught]


def train(model, forwards=1):
    for _ in range(forwards):
        model.train()(torch.randn(3, 4)).sum().backward()


def test_a_layer_whose_weight_is_read_directly_is_named_once():
    model = converted(ReadsWeight())
    assert warnings_of(train, model) == []
    (message,) = warnings_of(train, model)
    assert message.startswith("quantized layers not called so far: qkv. ")
    assert warnings_of(train, model, 3) == []
    assert warnings_of(model.eval(), torch.randn(3, 4)) == []


def test_with_an_example_it_is_named_at_conversion():
    model = ReadsWeight()
    (message,) = warnings_of(lambda: converted(model, example=torch.randn(3, 4)))
    assert message.startswith("quantized layers that the model does not call on the example: qkv. ")
    assert warnings_of(train, model, 4) == []


def test_evaluation_is_not_counted():
    model = converted(ReadsWeight())
    train(model)
    assert warnings_of(model.eval(), torch.randn(3, 4)) == []
    (message,) = warnings_of(train, model)
    assert "qkv" in message


def test_a_layer_that_is_used_in_the_second_forward_is_not_named():
    class Grows(ReadsWeight):
        steps = 0

        def forward(self, x):
            self.steps += 1
            return self.last(self.qkv(self.first(x))[:, :4] if self.steps > 1 else self.first(x))

    assert warnings_of(train, converted(Grows()), 4) == []


@pytest.mark.parametrize("forwards", [1, 3])
def test_a_layer_that_is_called_several_times_is_named_once(forwards):
    (message,) = warnings_of(train, converted(Twice()), forwards)
    assert message.startswith("layer 'shared' is called several times in one forward")


def test_a_layer_called_once_in_each_of_many_forwards_is_not():
    model = converted(nn.Sequential(*make_layers()))
    outputs = []
    assert warnings_of(lambda: outputs.extend(model(torch.randn(3, 4)) for _ in range(4))) == []


def test_calls_outside_a_forward_of_the_model_are_not_counted():
    model = converted(ReadsWeight())
    x = torch.randn(3, 4)
    assert warnings_of(lambda: [model.first(x) for _ in range(4)]) == []
    assert warnings_of(train, model) == []
    assert len(warnings_of(train, model)) == 1


def test_activation_checkpointing_is_one_call():
    assert warnings_of(train, converted(Twice(checkpointed=True)), 3) == []


def test_inside_another_module():
    model = converted(ReadsWeight())
    outer = nn.Sequential(nn.Linear(4, 4), model)
    assert warnings_of(train, outer) == []
    assert len(warnings_of(train, outer)) == 1


def test_hooks_change_nothing():
    model = converted(Twice())
    model.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    assert len(warnings_of(train, model, 3)) == 1


@pytest.mark.parametrize("bound", [True, False])
def test_the_forward_of_the_model_may_be_replaced(bound):
    def replaced(model):
        old = model.forward
        model.forward = old if bound else functools.partial(lambda x: old(x))
        return model

    assert warnings_of(train, replaced(converted(nn.Sequential(*make_layers()))), 4) == []
    assert len(warnings_of(train, replaced(converted(ReadsWeight())), 4)) == 1
    assert len(warnings_of(train, replaced(converted(Twice())), 4)) == 1


def test_forwards_in_several_threads_are_apart():
    model = converted(nn.Sequential(*make_layers()))
    both = threading.Barrier(2, timeout=10)

    def wait(*_):
        both.wait()

    hook = model[0].register_forward_hook(wait)
    threads = [threading.Thread(target=model, args=(torch.randn(3, 4),)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    hook.remove()
    assert model[1].input_quantizer.range > 0
    assert model[0] not in usage._watches  # both were counted


def test_a_failed_forward_does_not_count_its_layers_with_those_of_the_next():
    model = converted(nn.Sequential(*make_layers()))

    def fail(*_):
        raise KeyboardInterrupt

    hook = model[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 4))
    hook.remove()
    assert warnings_of(train, model, 3) == []


def state_of(model):
    return [
        {k: v for k, v in vars(m).items() if k not in ("_parameters", "_buffers", "_modules")}
        for m in model.modules()
    ]


def test_nothing_of_it_is_stored_in_the_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = converted(ReadsWeight())
        unwatched = converted(ReadsWeight(), example=torch.randn(3, 4))
        assert state_of(model) == state_of(unwatched)
        before, size = state_of(copy.deepcopy(model)), len(pickle.dumps(model))
        for _ in range(3):
            train(model)
            model.zero_grad()
            assert state_of(model) == before
            assert len(pickle.dumps(model)) == size
        pickle.loads(pickle.dumps(model))
        copied = copy.deepcopy(model)
    assert warnings_of(train, copied, 3) == []


def test_nothing_is_kept_alive():
    gc.collect()
    before = len(usage._watches)
    model = converted(ReadsWeight())
    train(model)
    assert len(usage._watches) > before
    del model
    gc.collect()
    assert len(usage._watches) == before
    model = converted(nn.Sequential(*make_layers()))
    train(model, 2)
    assert len(usage._watches) == before
