"""Operators are called past PyTorch's dispatcher only where nothing else could see them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from noisyq_fast import MovingAbsMax, fake_quantize, fake_quantize_ema, fake_quantize_many
from noisyq_fast.operators import dispatch

X = torch.randn(3, 4)


class SeesDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


def may_bypass(*values):
    return dispatch.may_bypass(values, list(range(len(values))))


def test_plain_tensors_bypass_the_dispatcher():
    assert may_bypass(X, torch.nn.Parameter(X), None, [X, X])
    assert may_bypass(X.clone().requires_grad_() * 2)
    with torch.no_grad():
        assert may_bypass(X)
    with torch.inference_mode():
        assert may_bypass(X, torch.ones(2))
    with torch.autocast("cpu"):
        assert may_bypass(X)


@pytest.mark.parametrize(
    "value",
    [
        X.as_subclass(Subclass),
        torch.empty(3, device="meta"),
        torch._neg_view(X),
        torch._efficientzerotensor((3,)),
        X.to_sparse(),
        "a string",
    ],
    ids=["subclass", "meta", "negated", "zeros", "sparse", "no tensor"],
)
def test_other_values_do_not(value):
    assert not may_bypass(X, value)
    assert not may_bypass([X, value])


def test_modes_see_operators():
    with SeesDispatch() as mode:
        fake_quantize(X, 4)
    assert mode.seen == ["noisyq.fake_quantize.default"]
    with SeesFunctions() as mode:
        fake_quantize_many([X], 4)
    assert any("fake_quantize_many" in name for name in mode.seen)


def test_the_profiler_sees_operators():
    with torch.profiler.profile() as profiled:
        fake_quantize(X, 4)
    assert "noisyq::fake_quantize" in {event.key for event in profiled.key_averages()}
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profiled:
        fake_quantize(X, 4)
    assert "noisyq::fake_quantize" in {event.name for event in profiled.events()}


def quantized(x):
    return fake_quantize(x, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_tracers_see_operators():
    assert "noisyq::fake_quantize" in str(torch.jit.trace(quantized, X).graph)
    assert "noisyq.fake_quantize" in make_fx(quantized)(X).code


@pytest.mark.parametrize("transform", [torch.vmap, lambda call: lambda x: torch.func.vjp(call, x)])
def test_transforms_see_operators(transform):
    seen = []

    def call(x):
        seen.append(may_bypass(x))
        return quantized(x)

    transform(call)(X)
    assert seen == [False]


@pytest.mark.parametrize("value", [torch._neg_view(X), torch._efficientzerotensor((3, 4))])
def test_values_that_the_dispatcher_makes_plain(value):
    assert torch.equal(fake_quantize(value, 4), fake_quantize(value.clone(), 4))


def test_no_gradient_where_the_dispatcher_leaves_it_out():
    x = X.clone().requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        assert not fake_quantize(x, 4).requires_grad
    with torch.inference_mode():
        assert fake_quantize(x, 4).is_inference()
    assert fake_quantize(x, 4).requires_grad


def test_an_int_for_a_float():
    moved = []
    for constant in (1, 1.0):
        running, observed = torch.zeros(()), torch.zeros(())
        fake_quantize_ema(X, running, 4, averaging_constant=constant, observed=observed)
        moved.append((running, observed))
    assert moved[0] == moved[1]


def test_an_attribute_that_is_no_float():
    quantizer = MovingAbsMax(4)
    quantizer.averaging_constant = "0.1"
    with pytest.raises(RuntimeError, match="averaging_constant"):
        quantizer.codes(X)


def test_averages_are_changed_in_place_once_for_autograd():
    running = torch.ones(())
    before = running._version
    fake_quantize_ema(X, running, 4)
    assert running._version > before
