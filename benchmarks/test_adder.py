"""The convolutions of AdderNet in ResNet-20, beside PyTorch's own convolution of the same shape."""

import pytest
import torch
import torch.nn.functional as F
from comparison import OURS, compare
from passes import forward, forward_backward, name_of
from torch import Tensor

import noisyq_fast  # noqa: F401  registers the operators


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.noisyq.adder_conv2d(x, weight, [1, 1], [1, 1])


def with_cdist(x: Tensor, weight: Tensor) -> Tensor:
    windows = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    distances = torch.cdist(windows, weight.flatten(1), p=1)
    return -distances.unflatten(0, (len(x), -1)).mT.unflatten(2, x.shape[2:])


def with_unfold(x: Tensor, weight: Tensor) -> Tensor:
    windows = F.unfold(x, 3, padding=1).unsqueeze(1)
    return -(weight.flatten(1).unsqueeze(2) - windows).abs().sum(2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("passes", [forward, forward_backward])
@pytest.mark.parametrize(("channels", "side"), [(16, 32), (32, 16), (64, 8)])
def test_convolution(benchmark, passes, channels, side):
    # So few that the unfolded differences fit into memory.
    x = torch.randn(4, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3)
    candidates = {
        OURS: passes(lambda x: ours(x, weight), x),
        "convolution": passes(lambda x: F.conv2d(x, weight, padding=1), x),
        "unfold, cdist": passes(lambda x: with_cdist(x, weight), x),
        "unfold, subtract": passes(lambda x: with_unfold(x, weight), x),
    }
    title = f"3x3 of {list(x.shape)}, {name_of(passes)}"
    compare(benchmark, title, candidates, rounds=5)
