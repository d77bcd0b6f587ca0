"""Whole training steps, channels_last, Adam."""

from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch
import torch.nn.functional as F
from comparison import Call
from torch import Tensor, nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize
from torch.nn.utils import parametrize

from experiments.models import ActionUnitNetwork, PerAUHead, ResNet20, SmallEncoder
from experiments.tasks.au_loss import au_loss
from noisyq_fast import GroupedLinear

AUS = 12


@dataclass(frozen=True)
class Work:
    """What is trained, and on what.

    Attributes:
        title: in words.
        network: makes it.
        batch: makes the inputs and what `loss` takes beside the network's outputs.
    """

    title: str
    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]


CLASSIFICATION = Work(
    "ResNet-20 training step, batch 128",
    ResNet20,
    lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
    F.cross_entropy,
)
ACTION_UNITS = Work(
    f"{AUS} action units on faces of 64x64, small encoder, training step, batch 64",
    lambda: ActionUnitNetwork(SmallEncoder(), PerAUHead(SmallEncoder.features, AUS, norm="per-au")),
    lambda: (torch.randn(64, 3, 64, 64), torch.rand(64, AUS).round(), torch.ones(AUS)),
    au_loss,
)


def step_of(
    work: Work, model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Call:
    """A step of ``model``, in ``dtype`` as torch.autocast has it; it can be captured on a GPU."""
    model = model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=device == "cuda")
    images, *targets = (tensor.to(device) for tensor in work.batch())
    images = images.to(memory_format=torch.channels_last)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step():
        optimizer.zero_grad()
        with mixed:
            loss = work.loss(model(images), *targets)
        loss.backward()
        optimizer.step()

    return step


def quantized_eagerly(model: nn.Module) -> nn.Module:
    return quantized_with(model, peers.DetachForm)


def quantized_by_torch_ao(model: nn.Module) -> nn.Module:
    return quantized_with(
        model, lambda per_channel: peers.torch_ao(FusedMovingAvgObsFakeQuantize, per_channel)
    )


def quantized_with(model: nn.Module, make: Callable[[bool], nn.Module]) -> nn.Module:
    """Quantizes the inputs and weights of every layer with modules of a peer, which are made per
    channel or per tensor."""
    for layer in list(model.modules()):
        if isinstance(layer, GroupedLinear):
            quantize_layer(layer, weight=ByRow(make(True)), activation=ByGroup(make(True)))
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            quantize_layer(layer, weight=make(True), activation=make(False))
    return model


def quantize_layer(layer: nn.Module, weight: nn.Module, activation: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", weight)
    layer.quantize_input = activation
    layer.register_forward_pre_hook(lambda layer, args: layer.quantize_input(*args))


class ByRow(nn.Module):
    """A weight `[T, U, I]` with a scale for each `(T, U)`."""

    def __init__(self, quantize: nn.Module) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize(weight.flatten(0, 1)).view_as(weight)


class ByGroup(nn.Module):
    """An input `[B, T, I]` with a range for each `T`."""

    def __init__(self, quantize: nn.Module) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x.transpose(0, 1)).transpose(0, 1)
