"""Quantizers that learn, forward and backward, beside how others compute them. All differentiate by
the input and by what is learned."""

import pytest
import torch
from comparison import OURS, compare
from learned_peers import LEARNED
from passes import forward, forward_backward, name_of

from noisyq_fast import LSQ, fake_quantize, fake_quantize_ema


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("passes", [forward, forward_backward])
@pytest.mark.parametrize("quantizer", LEARNED)
def test_input(benchmark, quantizer, passes):
    x = torch.randn(128, 16, 32, 32).relu().to(memory_format=torch.channels_last)
    ours, others = LEARNED[quantizer]
    running = torch.tensor(1.0)
    candidates = {
        OURS: passes(ours(), x),
        "noisyq_fast, plain": passes(lambda x: fake_quantize_ema(x, running, 4), x),
        **{name: passes(make(), x) for name, make in others.items()},
    }
    title = f"{quantizer}, input {list(x.shape)} (8 MB), channels_last, {name_of(passes)}"
    compare(benchmark, title, candidates, rounds=50)


@pytest.mark.parametrize("passes", [forward, forward_backward])
def test_weight(benchmark, passes):
    weight = torch.randn(64, 64, 3, 3)
    candidates = {
        OURS: passes(LSQ(4).for_weight(weight), weight),
        "noisyq_fast, plain": passes(lambda w: fake_quantize(w, 4, axis=0), weight),
    }
    _, others = LEARNED["LSQ"]
    candidates |= {name: passes(make(), weight) for name, make in others.items()}
    compare(benchmark, f"LSQ, weight {list(weight.shape)}, {name_of(passes)}", candidates, 200)
