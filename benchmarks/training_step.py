"""A whole training step: ResNet-20 on a batch of 128 images, channels_last, Adam."""

from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from comparison import Call
from torch import nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize
from torch.nn.utils import parametrize

BATCH = 128


def step_of(model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """A step of ``model``, in ``dtype`` as torch.autocast has it; it can be captured on a GPU."""
    model = model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=device == "cuda")
    images = torch.randn(BATCH, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,)).to(device)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step():
        optimizer.zero_grad()
        with mixed:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def quantized_eagerly(model: nn.Module) -> nn.Module:
    return quantized_with(
        model,
        activation=lambda: peers.DetachForm(per_channel=False),
        weight=lambda: peers.DetachForm(per_channel=True),
    )


def quantized_by_torch_ao(model: nn.Module) -> nn.Module:
    return quantized_with(
        model,
        activation=lambda: peers.torch_ao(FusedMovingAvgObsFakeQuantize, per_channel=False),
        weight=lambda: peers.torch_ao(FusedMovingAvgObsFakeQuantize, per_channel=True),
    )


def quantized_with(model: nn.Module, activation: Callable, weight: Callable) -> nn.Module:
    """Quantizes the inputs and weights of every layer with modules of a peer."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", weight())
            layer.quantize_input = activation()
            layer.register_forward_pre_hook(lambda layer, args: layer.quantize_input(*args))
    return model
