"""One operator at a time: ResNet-20's largest activation, and a weight."""

import peers
import pytest
import torch
from comparison import OURS, compare
from passes import forward, forward_backward, name_of

from noisyq_fast import fake_quantize, fake_quantize_ema

BITS = 4


@pytest.mark.parametrize("passes", [forward, forward_backward])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_activation(benchmark, passes, layout):
    x = torch.randn(128, 16, 32, 32)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    running = torch.tensor(1.0)
    candidates = {
        OURS: passes(lambda x: fake_quantize_ema(x, running, BITS), x),
        **{name: passes(make(), x) for name, make in peers.ACTIVATION.items()},
    }
    if passes is forward:
        candidates["memcpy (clone)"] = forward(torch.clone, x)
    title = f"activation {list(x.shape)} (8 MB), {layout}, {name_of(passes)}"
    moved = 2 * x.nbytes if passes is forward else None
    compare(benchmark, title, candidates, rounds=100, bytes_moved=moved)


@pytest.mark.parametrize("passes", [forward, forward_backward])
def test_weight(benchmark, passes):
    weight = torch.randn(64, 64, 3, 3)
    candidates = {
        OURS: passes(lambda w: fake_quantize(w, BITS, axis=0), weight),
        **{name: passes(make(), weight) for name, make in peers.WEIGHT.items()},
    }
    title = f"weight {list(weight.shape)}, per channel, {name_of(passes)}"
    compare(benchmark, title, candidates, rounds=500)
