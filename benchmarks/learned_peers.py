"""How others compute quantizers that learn: 4 bits, inputs without values below 0, in eager PyTorch
as popular implementations write it. Each is a module, made by name from `LEARNED`."""

from collections.abc import Callable

import torch
from peers import and_compiled
from torch import Tensor, nn

import noisyq_fast

N = 15


class Rounded(torch.autograd.Function):
    """rint, straight-through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def passed(x: Tensor) -> Tensor:
    """rint by x + (rounded - x).detach()."""
    return x + (x.round() - x).detach()


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied by a factor."""
    small = x * factor
    return (x - small).detach() + small


class Parameter(nn.Module):
    """With one parameter."""

    def __init__(self, start: float = 0.2) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(start))


class LSQDetach(Parameter):
    """As lsq-net."""

    def forward(self, x: Tensor) -> Tensor:
        step = scaled(self.p, 1 / (x.numel() * N) ** 0.5)
        return passed((x / step).clamp(0, N)) * step


class LSQFunction(Parameter):
    """As brevitas and MQBench: rounding by a Function."""

    def forward(self, x: Tensor) -> Tensor:
        step = scaled(self.p, 1 / (x.numel() * N) ** 0.5)
        return Rounded.apply((x / step).clamp(0, N)) * step


class LSQOfTorch(Parameter):
    """torch's own learnable fake-quantization."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / (x.numel() * N) ** 0.5
        zero = torch.zeros_like(self.p).reshape(1)
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.p.reshape(1), zero, 0, N, factor
        )


class PACTFunction(Parameter):
    """As popular implementations: a Function that saves the input and the level."""

    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.save_for_backward(x, alpha)
            scale = N / alpha
            return (x.clamp(0, alpha.item()) * scale).round() / scale

        @staticmethod
        def backward(ctx, grad):
            x, alpha = ctx.saved_tensors
            below, above = x < 0, x >= alpha
            return grad * ~(below | above), (grad * above).sum()

    def __init__(self) -> None:
        super().__init__(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.Clipped.apply(x, self.p)


class SATDetach(Parameter):
    """PACT with the gradient of SAT."""

    def __init__(self) -> None:
        super().__init__(2.0)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.minimum(x.relu(), self.p) / self.p
        return passed(share * N) / N * self.p


class QILDetach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.tensor(1.0))
        self.distance = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 / self.distance * x + (0.5 - 0.5 * self.center / self.distance)
        return passed(v.clamp(0, 1) * N) / N


class DSQDetach(nn.Module):
    """As MQBench, with a range that is learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.tensor(0.0))
        self.high = nn.Parameter(torch.tensor(2.0))
        self.alpha = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        step = (self.high - self.low) / N
        x = torch.maximum(torch.minimum(x, self.high), self.low)
        cell = ((x - self.low) / step).floor().clamp(max=N - 1).detach()
        place = (x - self.low) / step - cell - 0.5
        phi = torch.tanh(torch.log(2 / self.alpha - 1) * place) / (1 - self.alpha)
        sign = phi + (torch.where(phi >= 0, 1.0, -1.0) - phi).detach()
        return self.low + step * (cell + (sign + 1) / 2)


LEARNED: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[], nn.Module]]]] = {
    "LSQ": (
        lambda: noisyq_fast.LSQ(4),
        and_compiled({"detach": LSQDetach, "Function": LSQFunction})
        | {"torch._fake_quantize_learnable_per_tensor_affine": LSQOfTorch},
    ),
    "PACT": (
        lambda: noisyq_fast.PACT(4, start=2.0, gradient="pact"),
        {"eager, Function": PACTFunction},
    ),
    "SAT": (lambda: noisyq_fast.PACT(4, start=2.0), and_compiled({"detach": SATDetach})),
    "QIL": (lambda: noisyq_fast.QIL(4), and_compiled({"detach": QILDetach})),
    "DSQ": (lambda: noisyq_fast.DSQ(4), and_compiled({"detach": DSQDetach})),
}
"""Ours and the others, by the name of the quantizer."""
