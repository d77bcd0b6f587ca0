"""Quantizers that learn in data-parallel training: they begin with the whole batch, and stay
equal."""

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noisyq_fast import AQD, DSQ, LSQ, PACT, QIL, SAT, constrain_, quantize_model_, sync_ranges_

QUANTIZERS = [
    *((quantizer, quantizer) for quantizer in (LSQ(4), AQD(4), DSQ(4), QIL(2))),
    (SAT(4), PACT(4, start=2.0)),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def learn(number, parts, together):
    """What was learned in two steps, by each rank from its part or by one process from all."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    weight, activation = QUANTIZERS[number]
    quantize_model_(net, weight=weight, activation=activation, first_last_bits=None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    constrain_(net, optimizer)
    forward = net
    x = torch.cat(parts)
    if together:
        forward = DistributedDataParallel(sync_ranges_(net))
        x = parts[dist.get_rank()]
    for _ in range(2):
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters() if "quantizer" in name}


@pytest.mark.filterwarnings("ignore:.*got values below 0")
@pytest.mark.parametrize("number", range(len(QUANTIZERS)))
def test_ranks_agree_with_each_other_and_with_one_process(ranks, number):
    parts = [torch.rand(6, 4), 3 * torch.rand(6, 4)]
    whole = learn(number, parts, False)
    first, second = ranks(learn, number, parts, True)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
