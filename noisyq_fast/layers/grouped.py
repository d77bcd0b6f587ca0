"""One linear layer per group, computed as one batched matrix product: the heads of a network that
predicts many labels, such as the facial action units of arXiv 2303.11803, section 3.2."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast.grid import AFFINE, UNSIGNED
from noisyq_fast.integer import products
from noisyq_fast.layers import usage
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.operators import checks
from noisyq_fast.operators.granularity import TOKEN
from noisyq_fast.quantizers import MovingAbsMax, Quantizer

PER_GROUP = "per-group"
INPUT_RANGES = (PER_GROUP, "shared")

Parameters = tuple[Tensor, Tensor | None]
"""A weight and a bias."""


class GroupedLinear(nn.Module):
    """One `torch.nn.Linear` per group: ``y[t] = weight[t] @ x[t] + bias[t]``.

    Args:
        groups: the number of linear layers, T.
        in_features: size of a group's input, I.
        out_features: size of a group's output, U.
        bias: whether to add a bias.
        device, dtype: of the parameters.

    Attributes:
        weight: ``[T, U, I]``, and ``bias``: ``[T, U]`` or ``None``. Each group is initialised like
            a `torch.nn.Linear`, with the same bits as T of them constructed one after the other.

    Takes ``[..., T, I]`` (such as ``[batch, T, I]``), returns ``[..., T, U]``, both of the dtype of
    the parameters. In memory the groups of the output lie one after the other.

    ``layer(x, parameters=(weight, bias))`` uses these instead of the layer's own, such as weights
    with a folded batch norm.

    An input ``[batch, I]`` that all groups share can be passed as
    ``x.unsqueeze(-2).expand(-1, T, -1)``. ``torch.nn.Linear(I, T * U)`` and then
    ``.unflatten(-1, (T, U))`` is the same function, quantized too (with the same scales), and
    faster.

    Raises:
        TypeError: a size that is not an int, an input that is not a tensor.
        ValueError: a size below 1, an input whose last two sizes are not ``T, I``.

    Example:
        >>> import torch, noisyq_fast
        >>> heads = noisyq_fast.GroupedLinear(groups=12, in_features=64, out_features=16)
        >>> heads
        GroupedLinear(groups=12, in_features=64, out_features=16, bias=True)
        >>> heads(torch.randn(8, 12, 64)).shape
        torch.Size([8, 12, 16])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(groups=groups, in_features=in_features, out_features=out_features)
        self.groups = groups
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.empty(groups, out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.register_parameter(
            "bias", nn.Parameter(weight.new_empty(groups, out_features)) if bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new parameters, group after group, in the order of `torch.nn.Linear`."""
        bound = 1 / math.sqrt(self.in_features)
        for group in range(self.groups):
            nn.init.kaiming_uniform_(self.weight[group], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias[group], -bound, bound)

    def forward(self, x: Tensor, *, parameters: Parameters | None = None) -> Tensor:
        self.check_input(x)
        self.check_parameters(parameters)
        return _grouped_linear(x, *(parameters or (self.weight, self.bias)))

    def check_parameters(self, parameters: Parameters | None) -> None:
        if parameters is None:
            return
        weight, bias = parameters
        shape = self.weight.shape
        for name, given, own in (("weight", weight, shape), ("bias", bias, shape[:2])):
            if given is not None and given.shape != own:
                got = f"got a {name} of shape {list(given.shape)}"
                raise ValueError(f"parameters: {got}, takes {list(own)}")

    def check_input(self, x: Tensor) -> None:
        checks.tensors(x=x)
        if x.shape[-2:] != (self.groups, self.in_features):
            takes = f"[..., {self.groups}, {self.in_features}]"
            raise ValueError(f"x: got shape {list(x.shape)}, takes {takes}")

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class QuantGroupedLinear(QuantLayer, GroupedLinear):
    """`GroupedLinear` on fake-quantized weights and inputs.

    Every output of every group has a scale for its weights, every group a range for its input::

        s_w[t, u] = max_i |weight[t, u, i]| / qmax
        s_x[t]    = max_{b, i} |x[b, t, i]| / qmax

    so that no group loses resolution to the outliers of another, and the outputs have the same bits
    as those of a `QuantLinear` for each group (arXiv 2303.11803, section 3.2: scales per action
    unit).

    Args:
        *args, **kwargs: as for `GroupedLinear`, and as for `QuantLayer`.
        input_ranges: ``"per-group"``: T ranges of the input; ``"shared"``: one for all groups. Does
            not affect the scales of the weights, nor a quantizer given as ``activation``.

    Raises:
        TypeError: wrong type of an argument or of the input.
        ValueError: an argument out of range, or an input whose last two sizes are not ``T, I``.

    Example:
        >>> import torch, noisyq_fast
        >>> heads = noisyq_fast.QuantGroupedLinear(2, 3, 5, weight_bits=4, activation_bits=8)
        >>> x = torch.tensor([[[0.1, -0.7, 0.2], [10.0, 5.2, -70.0]]])
        >>> heads(x).shape, heads.input_quantizer.range
        (torch.Size([1, 2, 5]), tensor([ 0.7000, 70.0000]))
    """

    integer_axes = (None, TOKEN, -2)
    was_given_parameters: bool = False
    has_stored_weight: bool = False

    def __init__(
        self,
        *args: Any,
        input_ranges: str = PER_GROUP,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        check_input_ranges(input_ranges)
        self.input_ranges = input_ranges
        super().__init__(*args, device=device, **kwargs)

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        if self.input_ranges == PER_GROUP and type(activation) is MovingAbsMax:
            activation = MovingAbsMax(
                activation.bits,
                axis=-2,
                ranges=self.groups,
                averaging_constant=activation.averaging_constant,
                ste=activation.ste,
                grid=activation.grid_kind,
            )
        super().set_quantizers_(weight, activation)

    def forward(self, x: Tensor, *, parameters: Parameters | None = None) -> Tensor:
        usage.called(self)
        self.check_input(x)
        self.check_parameters(parameters)
        self._note(parameters)
        weight, bias = parameters or (None, self.bias)
        if self.computes_in_integers():
            return self.compute_integers(x, weight, bias)
        return _grouped_linear(self.quantized_input(x), self.quantized_weight(weight), bias)

    def _note(self, parameters: Parameters | None) -> None:
        """Records, for integer files, that the layer was called with parameters."""
        if parameters is None or torch.compiler.is_compiling():
            return
        if self.has_stored_weight:
            raise ValueError(
                "parameters: got some for a layer whose own weight was read from an integer file, "
                "with the scales of that one; run the network on a batch before save_integers, "
                "which then keeps this weight in float"
            )
        if not self.was_given_parameters:
            self.was_given_parameters = True

    def compute_integers(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        leading = x.shape[:-2]
        by_group = x.reshape(-1, *x.shape[-2:])
        codes, weights = self.input_codes(by_group), self.weight_codes(weight)
        turned = replace(
            codes,
            codes=codes.codes.transpose(0, 1),
            scale=codes.scale.T if codes.scale.dim() == 2 else codes.scale,  # of tokens
            source=codes.source.transpose(0, 1),
        )
        weights = replace(weights, scale=weights.scale.view(self.groups, -1))
        y = products.linear(turned, weights, bias)
        return y.transpose(0, 1).reshape(*leading, self.groups, self.out_features)

    def why_float(self) -> str | None:
        quantizers = self.quantizers().values()
        if any(quantizer.grid_kind in (UNSIGNED, AFFINE) for quantizer in quantizers):
            return "its groups have no product of codes on a grid that is unsigned or affine"
        return super().why_float()

    def by_channel(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, 1)

    def from_channels(self, by_channel: Tensor, weight: Tensor) -> Tensor:
        return by_channel.view_as(weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input_ranges={self.input_ranges}"


def check_input_ranges(name: str) -> None:
    if name not in INPUT_RANGES:
        raise ValueError(f"input_ranges: got {name!r}, takes {' or '.join(INPUT_RANGES)}")


def _check_sizes(**sizes: int) -> None:
    checks.integers(**sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, takes 1 or more")


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y[..., t, u] = sum_i weight[t, u, i] x[..., t, i] + bias[t, u]``."""
    by_group = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)
    if bias is None:
        y = torch.bmm(by_group, weight.mT)
    else:
        y = torch.baddbmm(bias.unsqueeze(1), by_group, weight.mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[1])
