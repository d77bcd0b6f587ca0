"""How others fake-quantize: 4 bits, symmetric, the same absmax scales wherever they allow it."""

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.nn.utils import parametrize

QMAX = 7


def eager(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    scale = x.abs().amax(dims, keepdim=dims is not None) / QMAX
    return (x / scale).round().clamp(-QMAX, QMAX) * scale


class DetachForm(nn.Module):
    """Straight-through by x + (quantized - x).detach(), with a moving average if per tensor."""

    def __init__(self, dims: tuple[int, ...] | None) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("running_absmax", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.dims is None:
            with torch.no_grad():
                self.running_absmax.lerp_(x.detach().abs().amax(), 0.01)
        return x + (eager(x, self.dims) - x).detach()


class FunctionForm(DetachForm):
    """Straight-through by torch.autograd.Function."""

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dims):
            return eager(x, dims)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    def forward(self, x: Tensor) -> Tensor:
        if self.dims is None:
            with torch.no_grad():
                self.running_absmax.lerp_(x.detach().abs().amax(), 0.01)
        return self.StraightThrough.apply(x, self.dims)


class PerChannelAffine(nn.Module):
    """torch.fake_quantize_per_channel_affine with the scale of each channel's absmax."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(tuple(range(1, weight.dim()))) / QMAX
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -QMAX, QMAX)


def torch_ao(kind: type[nn.Module], per_channel: bool) -> nn.Module:
    """A module of torch.ao for weights (per channel) or activations (per tensor)."""
    if per_channel:
        options = {
            "observer": MovingAveragePerChannelMinMaxObserver,
            "qscheme": torch.per_channel_symmetric,
            "ch_axis": 0,
        }
    else:
        options = {
            "observer": MovingAverageMinMaxObserver,
            "qscheme": torch.per_tensor_symmetric,
        }
    return kind(quant_min=-QMAX - 1, quant_max=QMAX, dtype=torch.qint8, **options)


ACTIVATION = {
    "eager, detach": lambda: DetachForm(None),
    "eager, autograd.Function": lambda: FunctionForm(None),
    "torch.compile, detach": lambda: torch.compile(DetachForm(None), fullgraph=True),
    "torch.compile, autograd.Function": lambda: torch.compile(FunctionForm(None), fullgraph=True),
    "torch.ao FusedMovingAvgObsFakeQuantize": lambda: torch_ao(
        FusedMovingAvgObsFakeQuantize, per_channel=False
    ),
    "torch.ao FakeQuantize": lambda: torch_ao(FakeQuantize, per_channel=False),
}
WEIGHT = {
    "eager, detach": lambda: DetachForm((1, 2, 3)),
    "eager, autograd.Function": lambda: FunctionForm((1, 2, 3)),
    "torch.compile, detach": lambda: torch.compile(DetachForm((1, 2, 3)), fullgraph=True),
    "torch.compile, autograd.Function": lambda: torch.compile(
        FunctionForm((1, 2, 3)), fullgraph=True
    ),
    "torch.fake_quantize_per_channel_affine": PerChannelAffine,
    "torch.ao FusedMovingAvgObsFakeQuantize": lambda: torch_ao(
        FusedMovingAvgObsFakeQuantize, per_channel=True
    ),
    "torch.ao FakeQuantize": lambda: torch_ao(FakeQuantize, per_channel=True),
}


def quantize_with(model: nn.Module, activation: type, convolution: type, linear: type) -> nn.Module:
    """Quantizes the inputs and weights of every layer with modules of a peer."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = convolution if isinstance(layer, nn.Conv2d) else linear
            parametrize.register_parametrization(layer, "weight", weight())
            layer.quantize_input = activation()
            layer.register_forward_pre_hook(lambda layer, args: layer.quantize_input(*args))
    return model
