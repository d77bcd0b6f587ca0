"""The public functions take part in __torch_function__: torch.fx records them as calls."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from noisyq_fast import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)


class Everything(nn.Module):
    """Calls every public function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("running_absmax", torch.tensor(0.0))
        self.register_buffer("observed", torch.tensor(0.0))

    def forward(self, x):
        weight, same = fake_quantize_many([self.weight, x], bits=[4, 8], axis=0)
        x = fake_quantize_ema(
            x, self.running_absmax, 4, training=self.training, observed=self.observed
        )
        codes, scale = quantize(x, 3)
        return fake_quantize(x @ weight.T, 8, axis=-1), dequantize(codes, scale) + same


FUNCTIONS = {fake_quantize_many, fake_quantize_ema, quantize, fake_quantize, dequantize}


def symbolic_trace(module):
    """As torch.fx does it, but the outputs of the functions are unpacked by index."""

    class Tracer(torch.fx.Tracer):
        def iter(self, proxy):
            return iter([proxy[0], proxy[1]])

    return torch.fx.GraphModule(module, Tracer().trace(module))


def test_a_traced_module_calls_the_functions_and_gives_the_same_bits():
    module = Everything()
    traced = symbolic_trace(module)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert called >= FUNCTIONS
    for _ in range(2):
        x = torch.randn(3, 6)
        before = [buffer.clone() for buffer in module.buffers()]
        expected = module(x)
        after = [buffer.clone() for buffer in module.buffers()]
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
        for y, wanted in zip(traced(x), expected, strict=True):
            assert torch.equal(y, wanted)
        assert list(traced.buffers()) == after
    traced.recompile()
    assert torch.equal(traced(x)[1], module(x)[1])


BYTES = torch.ones(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fake_quantize(x, 4),
        lambda x: fake_quantize_many([torch.ones(3), x], 4)[1],
        lambda x: fake_quantize_ema(x, torch.tensor(1.0), 4),
        lambda x: fake_quantize_ema(x, torch.tensor(1.0), 4, training=False, ste="clipped"),
        lambda x: quantize(x, 4)[0],
        lambda x: dequantize(torch.ones(3, dtype=torch.int8), x.sum()),
        lambda x: dequantize(BYTES, torch.tensor(1.0), zero_point=x.relu().byte().amax()),
    ],
)
def test_subclasses_and_modes_see_the_call(call):
    class Subclass(torch.Tensor):
        pass

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            seen.append(function)
            return function(*arguments, **(keywords or {}))

    seen = []
    x = torch.randn(3)
    expected = call(x)
    y = call(x.as_subclass(Subclass))
    assert type(y) is Subclass
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    with Mode():
        assert torch.equal(call(x), expected)
    assert FUNCTIONS & set(seen)
