"""Training steps of a whole network give the same weights on every backend."""

import torch
import torch.nn.functional as F
from assert_same import assert_same

from experiments.models import ResNet20
from noisyq_fast import quantize_model_, use_backend


def test_training_steps_are_the_same_to_the_bit(backend):
    with use_backend("reference"):
        expected = two_steps()
    assert_same(two_steps(), expected)


def two_steps():
    """The parameters, ranges and momentum of ResNet-20, W4/A4, and what it then predicts."""
    torch.manual_seed(0)
    model = quantize_model_(ResNet20()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    for batch in (images, 2 * images):
        F.cross_entropy(model(batch), torch.tensor([3, 5])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        predicted = model(images)
    state = optimizer.state_dict()["state"].values()
    return [*model.state_dict().values(), *(s["momentum_buffer"] for s in state), predicted]
