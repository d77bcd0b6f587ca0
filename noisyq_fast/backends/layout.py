"""How the memory of a dense tensor splits into channels. Shared by the native backends."""

from torch import Tensor


def channel_layout(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """The memory of ``x`` (dense, any order of its axes) as ``(outer, channels, inner)``.

    Element ``i`` of the memory belongs to channel ``(i // inner) % channels``.

    Example:
        >>> import torch
        >>> x = torch.empty(2, 3, 4, 5)
        >>> channel_layout(x, 1)
        (2, 3, 20)
        >>> channel_layout(x.to(memory_format=torch.channels_last), 1)
        (40, 3, 1)
        >>> channel_layout(x, None)
        (120, 1, 1)
    """
    elements = x.numel()
    channels = 1 if axis is None else x.shape[axis]
    if elements == 0:
        return 0, channels, 1
    if channels == 1:
        return elements, 1, 1
    inner = x.stride(axis)
    return elements // (channels * inner), channels, inner
