"""One operator at a time: ResNet-20's largest activation, a weight, and a matrix of 4096 x 4096."""

from functools import partial

import optional_peers
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


# As torchao's Int8DynActInt4Weight, and what the signed grid costs there.
MATRIX = {
    "inputs, affine, for each token": (
        partial(fake_quantize, bits=8, axis="token", grid="affine"),
        partial(fake_quantize, bits=8, axis="token"),
        optional_peers.TOKEN,
    ),
    "weights, full, for each group of 32": (
        partial(fake_quantize, bits=4, group_size=32, grid="full"),
        partial(fake_quantize, bits=4, group_size=32),
        optional_peers.GROUP,
    ),
}


@pytest.mark.parametrize("passes", [forward, forward_backward])
@pytest.mark.parametrize("kind", MATRIX)
def test_matrix(benchmark, kind, passes):
    x = torch.randn(4096, 4096)
    ours, signed, others = MATRIX[kind]
    candidates = {
        OURS: passes(ours, x),
        "noisyq_fast, signed": passes(signed, x),
        **{name: passes(make(), x) for name, make in others.items()},
    }
    compare(benchmark, f"[4096, 4096], {kind}, {name_of(passes)}", candidates, rounds=20)


@pytest.mark.parametrize("passes", [forward, forward_backward])
def test_grids(benchmark, passes):
    """After a ReLU, and with values below 0, where the unsigned grid needs a mask."""
    x = torch.randn(128, 16, 32, 32).to(memory_format=torch.channels_last)
    candidates = {
        OURS if grid == "signed" else f"{OURS}, {grid}{about}": passes(
            partial(fake_quantize, bits=BITS, grid=grid), values
        )
        for values, about in ((x.relu(), ""), (x, ", some below 0"))
        for grid in ("signed", "full", "unsigned", "affine")
        if not about or grid == "unsigned"
    }
    title = f"grids on {list(x.shape)} (8 MB), channels_last, {name_of(passes)}"
    compare(benchmark, title, candidates, rounds=50)
