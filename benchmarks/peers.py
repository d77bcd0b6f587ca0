"""How others fake-quantize: 4 bits, symmetric, the same absmax scales wherever they allow it.

Each peer is a module on the CPU: `.to(device)` moves it. The tables at the end make them by name.
"""

from collections.abc import Callable

import optional_peers
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    disable_observer,
)

QMAX = 7
Make = Callable[[], nn.Module]


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-QMAX, QMAX) * scale


def eager(x: Tensor, per_channel: bool) -> Tensor:
    dims = tuple(range(1, x.dim())) if per_channel else None
    return rounded(x, x.abs().amax(dims, keepdim=per_channel) / QMAX)


class DetachForm(nn.Module):
    """Straight-through by x + (quantized - x).detach(), with a moving average if per tensor."""

    def __init__(self, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.register_buffer("running_absmax", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x)
        return x + (eager(x, self.per_channel) - x).detach()

    def observe(self, x: Tensor) -> None:
        if not self.per_channel:
            with torch.no_grad():
                self.running_absmax.lerp_(x.detach().abs().amax().float(), 0.01)


class FunctionForm(DetachForm):
    """Straight-through by torch.autograd.Function."""

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, per_channel):
            return eager(x, per_channel)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x)
        return self.StraightThrough.apply(x, self.per_channel)


class PerChannelAffine(nn.Module):
    """torch.fake_quantize_per_channel_affine with the scale of each channel's absmax."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(tuple(range(1, weight.dim()))) / QMAX
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -QMAX, QMAX)


class GivenRange(nn.Module):
    """The eager form of an evaluation, with a scale that was recorded before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / QMAX))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.scale)


class PerTensorAffine(GivenRange):
    """torch.fake_quantize_per_tensor_affine."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, -QMAX, QMAX)


class Each(nn.Module):
    """A module for each tensor of a list."""

    def __init__(self, make: Make, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(make() for _ in range(count))

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.each, tensors, strict=True)]


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


def eager_forms(per_channel: bool) -> dict[str, Make]:
    return {
        "detach": lambda: DetachForm(per_channel),
        "autograd.Function": lambda: FunctionForm(per_channel),
    }


def torch_ao_forms(per_channel: bool) -> dict[str, Make]:
    return {
        "torch.ao FusedMovingAvgObsFakeQuantize": lambda: torch_ao(
            FusedMovingAvgObsFakeQuantize, per_channel
        ),
        "torch.ao FakeQuantize": lambda: torch_ao(FakeQuantize, per_channel),
    }


def and_compiled(forms: dict[str, Make]) -> dict[str, Make]:
    """Eager forms as they are, and under torch.compile."""
    compiled = {
        f"torch.compile, {name}": lambda make=make: torch.compile(make(), fullgraph=True)
        for name, make in forms.items()
    }
    return {f"eager, {name}": make for name, make in forms.items()} | compiled


ACTIVATION = {
    **and_compiled(eager_forms(per_channel=False)),
    **torch_ao_forms(per_channel=False),
    **optional_peers.ACTIVATION,
}
_OTHER_WEIGHT = {
    "torch.fake_quantize_per_channel_affine": PerChannelAffine,
    **torch_ao_forms(per_channel=True),
    **optional_peers.WEIGHT,
}
WEIGHT = and_compiled(eager_forms(per_channel=True)) | _OTHER_WEIGHT
EVALUATION = {
    **and_compiled({"given scale": GivenRange}),
    "torch.fake_quantize_per_tensor_affine": PerTensorAffine,
    **{
        f"{name}, observer off": lambda make=make: make().apply(disable_observer)
        for name, make in torch_ao_forms(per_channel=False).items()
    },
}


def weights_together(count: int) -> dict[str, Make]:
    """`WEIGHT` for a list of weights; torch.compile sees them all at once."""

    def each(forms: dict[str, Make]) -> dict[str, Make]:
        return {name: lambda make=make: Each(make, count) for name, make in forms.items()}

    return and_compiled(each(eager_forms(per_channel=True))) | each(_OTHER_WEIGHT)
