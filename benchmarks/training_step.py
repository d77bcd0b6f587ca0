"""Whole training steps, channels_last, Adam."""

from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, Call
from torch import Tensor, nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize
from torch.nn.utils import parametrize

from experiments.models import ActionUnitNetwork, PerAUHead, ResNet18Cifar, ResNet20, SmallEncoder
from experiments.tasks.au_loss import au_loss
from noisyq_fast import LSQ, GroupedLinear, fuse_, quantize_model_

AUS = 12
INTEGER = f"{OURS}, integer"
FUSED = f"{OURS}, integer, fused"
RECOMPUTE = f"{OURS}, integer, fused, recompute"
LSQ_STEPS = f"{OURS}, LSQ"
LSQ_FUSED = f"{OURS}, LSQ, integer, fused"


@dataclass(frozen=True)
class Work:
    """What is trained, and on what.

    Attributes:
        subject: the network, on what.
        size: of a batch.
        network: makes it.
        batch: makes so many inputs, and what `loss` takes beside the network's outputs.
    """

    subject: str
    size: int
    network: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]

    @property
    def title(self) -> str:
        return f"{self.subject}, training step, batch {self.size}"

    def example(self) -> Tensor:
        """Two inputs, in the memory format of a step."""
        return in_format(self.batch(2)[0])


def in_format(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def resnet18() -> nn.Module:
    """ResNet-18 with the first layers that it has for images of 224 pixels."""
    model = ResNet18Cifar(num_classes=1000)
    model.conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    model.stage1 = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), *model.stage1)
    return model


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=1024, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 6), nn.Linear(256, 10))


CLASSIFICATION = Work(
    "ResNet-20",
    128,
    ResNet20,
    lambda size: (torch.randn(size, 3, 32, 32), torch.randint(10, (size,))),
    F.cross_entropy,
)
ACTION_UNITS = Work(
    f"{AUS} action units on faces of 64x64, small encoder",
    64,
    lambda: ActionUnitNetwork(SmallEncoder(), PerAUHead(SmallEncoder.features, AUS, norm="per-au")),
    lambda size: (torch.randn(size, 3, 64, 64), torch.rand(size, AUS).round(), torch.ones(AUS)),
    au_loss,
)
RESNET18 = Work(
    "ResNet-18 at 224 pixels",
    16,
    resnet18,
    lambda size: (torch.randn(size, 3, 224, 224), torch.randint(1000, (size,))),
    F.cross_entropy,
)
TRANSFORMER = Work(
    "Transformer encoder, 6 layers of width 256, sequences of 128",
    16,
    transformer,
    lambda size: (torch.randn(size, 128, 256), torch.randint(10, (size,))),
    lambda tokens, labels: F.cross_entropy(tokens.mean(1), labels),
)


def step_of(
    work: Work, model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Call:
    """A step of ``model``, in ``dtype`` as torch.autocast has it; it can be captured on a GPU."""
    model = model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=device == "cuda")
    images, *targets = (tensor.to(device) for tensor in work.batch(work.size))
    images = in_format(images)
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step():
        optimizer.zero_grad()
        with mixed:
            loss = work.loss(model(images), *targets)
        loss.backward()
        optimizer.step()

    return step


def quantized(model: nn.Module, example: Tensor, arithmetic: str = "float") -> nn.Module:
    return quantize_model_(model, example=example, arithmetic=arithmetic)


def learned(model: nn.Module, example: Tensor, arithmetic: str = "float") -> nn.Module:
    learned = {"weight": LSQ(4), "activation": LSQ(4)}
    return quantize_model_(model, example=example, arithmetic=arithmetic, **learned)


def fused(model: nn.Module, example: Tensor, recompute: bool = False) -> nn.Module:
    return fuse_(quantized(model, example, "integer"), example, recompute=recompute)


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


FORMS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float": lambda model, _: model,
    OURS: quantized,
    LSQ_STEPS: learned,
    INTEGER: lambda model, example: quantized(model, example, "integer"),
    FUSED: fused,
    RECOMPUTE: lambda model, example: fused(model, example, recompute=True),
    LSQ_FUSED: lambda model, example: fuse_(learned(model, example, "integer"), example),
    "eager, detach": lambda model, _: quantized_eagerly(model),
    "torch.ao fused": lambda model, _: quantized_by_torch_ao(model),
}
"""What a model is made into, from itself and an input, to train it: W4/A4 but for the float one."""
