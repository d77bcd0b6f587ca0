"""Batch norm in front of a linear layer for each group."""

from typing import Any

import torch
from torch import Tensor, nn

from experiments.training.data_parallel import batch_statistics
from noisyq_fast import GroupedLinear


class NormalizedLinear(nn.Module):
    """`linear(norm(x))`, from `[B, T, I]` to `[B, T, U]`.

    Args:
        norm: of `T * I` features: statistics and affine of its own for every group and input. Of
            `I` features: the groups share them, and count as so many more samples.
        linear: of `T` groups with `I` inputs.
    """

    def __init__(self, norm: nn.BatchNorm1d, linear: GroupedLinear) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.reshape(-1, self.norm.num_features)).view_as(x))


class FoldedNormLinear(NormalizedLinear):
    """The same function of the same parameters, for a norm of `T * I` features, but with the norm
    folded into the linear layer (Jacob et al. 2017, section 3.2, arXiv 1712.05877)::

        y = W' x + b',  W' = W gamma / sigma,  b' = b + W (beta - gamma mu / sigma)

    with the batch's statistics in training and the running ones in evaluation. A quantized layer
    quantizes `W'`, and the input as it is before the norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        if norm.training:
            mean, var = batch_statistics(norm, x.flatten(1))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, var = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(var + norm.eps)
        shift = norm.bias - mean * scale
        per_input = linear.groups, 1, linear.in_features
        weight = linear.weight * scale.view(per_input)
        own: Any = linear.bias
        bias = own + (linear.weight * shift.view(per_input)).sum(-1)
        # By name: a hook, such as that of dropout, may replace the positional arguments.
        return linear(x, parameters=(weight, bias))
