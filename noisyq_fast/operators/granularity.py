"""Scales for groups of channels and for tokens: views of a tensor with the groups along the first
axis, so that operators only need scales along an axis.

*group*: for each index of axis 0 (output channels), each ``G`` consecutive indices of axis 1 (input
channels) with all later axes (kernel positions)::

    [O, I, *kernel]  ->  [O * (I / G), G * kernel]          scales [O, I / G]

*token*: for each index of all axes but the last::

    [*leading, I]    ->  [leading, I]                       scales [*leading]
"""

import math

import torch
from torch import Tensor

from noisyq_fast.operators import checks

TOKEN = "token"
Axis = int | str | None


class Groups:
    """A tensor with its groups along axis 0.

    Attributes:
        x: the tensor as ``[groups, elements]``.
        shape: of the scales, whose number is that of the groups.

    Example:
        >>> import torch
        >>> groups = Groups(torch.zeros(8, 64, 3, 3), None, group_size=32)
        >>> groups.x.shape, groups.shape
        (torch.Size([16, 288]), torch.Size([8, 2]))
        >>> Groups(torch.zeros(2, 5, 7), "token", None).shape
        torch.Size([2, 5])
    """

    def __init__(self, x: Tensor, axis: Axis, group_size: int | None) -> None:
        checks.strided("x", x)
        self.whole = x
        if axis == TOKEN:
            self.shape = _tokens(x, group_size)
        else:
            self.shape = _groups(x, axis, group_size)
        count = math.prod(self.shape)
        self.x = x.reshape(count, x.numel() // count if count else 0)

    def restored(self, y: Tensor) -> Tensor:
        """``y`` ``[groups, elements]``, in the shape and memory format of the original tensor."""
        y = y.reshape(self.whole.shape)
        if y.stride() == self.whole.stride():
            return y
        like = torch.empty_like(self.whole, dtype=y.dtype, requires_grad=False)
        return y if like.stride() == y.stride() else like.copy_(y)

    def flat(self, name: str, value: Tensor | None) -> Tensor | None:
        """A tensor with one value for each group, flattened."""
        if value is not None and value.shape != self.shape:
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, takes {list(self.shape)} for a tensor of "
                f"shape {list(self.whole.shape)}"
            )
        return None if value is None else value.flatten()


def by_group(axis: Axis, group_size: int | None) -> bool:
    """Whether scales belong to groups or tokens."""
    return group_size is not None or axis == TOKEN


def check_group_size(value: object, name: str = "group_size") -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes an int or None")
    if not 1 <= value < 2**18:
        raise ValueError(f"{name}: got {value}, takes 1..262143")


def _tokens(x: Tensor, group_size: int | None) -> torch.Size:
    if group_size is not None:
        raise ValueError(f"group_size: got {group_size} with axis 'token', takes one of the two")
    if x.dim() == 0:
        raise ValueError("axis: got 'token' for a tensor of shape [], takes None")
    return x.shape[:-1]


def _groups(x: Tensor, axis: Axis, group_size: int | None) -> torch.Size:
    check_group_size(group_size)
    assert group_size is not None  # see `by_group`
    if axis not in (None, 0):
        raise ValueError(f"axis: got {axis!r} with group_size {group_size}, takes 0 or None")
    if x.dim() < 2:
        raise ValueError(
            f"group_size: got {group_size} for a tensor of shape {list(x.shape)}, takes one of "
            "shape [output channels, input channels, ...]"
        )
    channels = x.shape[1]
    if channels % group_size:
        raise ValueError(
            f"group_size: got {group_size} for a tensor of shape {list(x.shape)}, whose {channels} "
            f"input channels leave a remainder of {channels % group_size}; takes a divisor of "
            f"{channels}"
        )
    return torch.Size([x.shape[0], channels // group_size])
