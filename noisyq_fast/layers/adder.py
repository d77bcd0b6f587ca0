"""AdderNet (Chen et al. 2019, arXiv 1912.13200): convolutions and linear layers that sum absolute
differences in place of products, and so compute without multiplications::

    y[o, n] = -sum_k |weight[o, k] - x[k, n]|

over the elements ``k`` of each window of the zero-padded input (the padding counts too). Their
gradients are not the derivatives, which are signs, but those that the paper found to train well::

    dx[k, n]      = sum_o clip(weight[o, k] - x[k, n], -1, 1) dy[o, n]
    dweight[o, k] = sum_n (x[k, n] - weight[o, k]) dy[o, n]

The order of the sums is fixed (`noisyq_fast/backends/reference/adder.py`): every backend gives the
same bits, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import register_decomposition

from noisyq_fast.backends.reference.adder import Pair, channels_last, windows
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.declare import declare


def _like_output(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    size = checks.output_size(x, weight, stride, padding)
    return channels_last([len(x), len(weight), *size], x)


_OPTIONS = "Tensor x, Tensor weight, int[2] stride, int[2] padding) -> Tensor"
_adder_conv2d = declare(
    f"adder_conv2d({_OPTIONS}", prepare=checks.adder, shape=_like_output, gradient=gradients.Adder
)


@register_decomposition(torch.ops.noisyq.adder_conv2d.default)
def _in_plain_operators(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The decomposition that `torch.onnx.export` writes: a difference, absolute values and a sum
    for each element of the kernel. It sums in another order."""
    size = checks.output_size(x, weight, stride, padding)
    sums: Any = sum(
        (weight[:, :, i, j, None, None] - window[:, None]).abs().sum(2)
        for i, j, window in windows(x, weight, size, stride, padding)
    )
    return -sums


declare(
    f"adder_conv2d_input_gradient(Tensor grad, {_OPTIONS}",
    prepare=checks.adder_gradient,
    shape=lambda grad, x, *_: channels_last(list(x.shape), x),
    gradient=None,
)
declare(
    f"adder_conv2d_weight_gradient(Tensor grad, {_OPTIONS}",
    prepare=checks.adder_gradient,
    shape=lambda grad, x, weight, *_: torch.empty_like(weight),
    gradient=None,
)


class _Normalized(torch.autograd.Function):
    """The identity, whose gradient is scaled to the norm ``sqrt(numel) / 5``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(grad).clamp_min(1e-12)
        return grad * (math.sqrt(grad.numel()) / 5 / length)


class _AdderLayer(nn.Module):
    """Base of the two layers: initial weights from the normal distribution, as in the paper, and
    the normalised gradient of the weight."""

    weight: Tensor
    bias: Any  # Tensor | None, as the float layer declares it
    compute: Callable[..., Tensor]

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.normalized_weight(), self.bias)

    def normalized_weight(self) -> Tensor:
        return _Normalized.apply(self.weight)


class AdderConv2d(_AdderLayer, nn.Conv2d):
    """`torch.nn.Conv2d` of AdderNet: ``-sum |weight - x|`` over each window of the input.

    Args:
        *args, **kwargs: as for `torch.nn.Conv2d`, without groups or dilation, and with zero padding
            only. The weight is drawn from the normal distribution, the bias starts as 0.

    All outputs are negative and large, so a batch norm has to follow. In the backward the gradient
    of the weight is scaled to the norm ``sqrt(weight.numel()) / 5``, whatever the scale of the
    loss. With micro-batches or several processes, each gradient is normalised before they are
    summed. Computes in float32 (under autocast too) or float64.

    Raises:
        ValueError: groups, a dilation or a padding that the layer does not support.

    Example:
        >>> import torch, noisyq_fast
        >>> layer = noisyq_fast.AdderConv2d(1, 1, 2, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> layer(torch.tensor([[[[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]]])).detach()
        tensor([[[[-1., -3.]]]])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check(self)

    @staticmethod
    def check(layer: nn.Conv2d) -> None:
        """Raises ValueError for options that AdderNet does not support."""
        for name, takes in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(layer, name) != takes:
                raise ValueError(f"{name}: got {getattr(layer, name)!r}, takes {takes!r}")
        if isinstance(layer.padding, str):
            raise ValueError(f"padding: got {layer.padding!r}, takes numbers")

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() not in (3, 4):
            raise ValueError(f"input: got shape {list(x.shape)}, takes [N, C, H, W] or [C, H, W]")
        images = x if x.dim() == 4 else x.unsqueeze(0)
        y = _adder_conv2d(_full(images), _full(weight), self.stride, self.padding)
        y = y if bias is None else y + bias[:, None, None]
        return y if x.dim() == 4 else y.squeeze(0)


class AdderLinear(_AdderLayer, nn.Linear):
    """`torch.nn.Linear` of AdderNet: ``-sum |weight - x|`` over the features of the input.

    Arguments, initial weights and gradients as for `AdderConv2d`.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.AdderLinear(64, 10)(torch.randn(8, 64)).shape
        torch.Size([8, 10])
    """

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"input: got {list(x.shape)}, takes [..., {self.in_features}]")
        rows = _full(x).reshape(-1, self.in_features, 1, 1)
        y = _adder_conv2d(rows, _full(weight)[:, :, None, None], (1, 1), (0, 0))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias


def _full(x: Tensor) -> Tensor:
    """``x`` in float32 or float64: sums of many absolute values need at least float32."""
    return x if x.dtype in checks.ADDER_DTYPES else x.float()


class _QuantAdderLayer(QuantLayer, _AdderLayer):
    """The gradient is normalised as in the float layer, after the quantizer's backward."""

    def quantized_weight(self, weight: Tensor | None = None) -> Tensor:
        return super().quantized_weight(self.normalized_weight() if weight is None else weight)


class QuantAdderConv2d(_QuantAdderLayer, AdderConv2d):
    """`AdderConv2d` on fake-quantized weights and inputs. Arguments as for `QuantLayer`."""

    compute = AdderConv2d.compute


class QuantAdderLinear(_QuantAdderLayer, AdderLinear):
    """`AdderLinear` on fake-quantized weights and inputs. Arguments as for `QuantLayer`."""

    compute = AdderLinear.compute
