"""What is timed of an operator: its forward alone, or with its backward."""

from collections.abc import Callable

import torch
from comparison import Call
from torch import Tensor, nn


def forward(call: Callable, x: object) -> Call:
    def run():
        with torch.no_grad():
            return call(x)

    return run


def forward_backward(call: Callable, x: Tensor) -> Call:
    """Differentiates by ``x``, and by the parameters of a module."""
    x = x.clone().requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *(call.parameters() if isinstance(call, nn.Module) else [])]

    # Not backward(): accumulating into x.grad would add the same copy to every candidate.
    def run():
        return torch.autograd.grad(call(x), inputs, grad)

    return run


def name_of(passes: Callable) -> str:
    return passes.__name__.replace("_", " + ")
