"""Common code of the backends with kernels: the compiled library ``noisyq_fast._core``, and tensors
in the form that kernels take, dense and divided into channels."""

from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.reference.masks import MASKED, NOTHING
from noisyq_fast.grid import KINDS
from noisyq_fast.operators import checks

core: Any = None
missing: str | None = None
try:
    from noisyq_fast import _core  # type: ignore[attr-defined]  # compiled

    core = _core
except ImportError as error:
    missing = f"the native library was not compiled or does not load ({error})"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
MASK_CODES = {masked: code for code, masked in enumerate(MASKED)}
NULL = 0


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
    if axis is None or channels == 1:
        return elements, 1, 1
    inner = x.stride(axis)
    return elements // (channels * inner), channels, inner


def dense(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``x`` as a dense tensor, and an empty output with the same layout.

    empty_like() keeps the strides of dense tensors only. Other tensors (a slice, an expanded
    tensor) are copied, into the output if the dtype allows it: kernels may work in place.
    """
    y = torch.empty_like(x, dtype=dtype)
    if y.stride() == x.stride():
        return x, y
    return (y.copy_(x) if y.dtype == x.dtype else x.clone()), y


def like(x: Tensor, dense: Tensor) -> Tensor:
    """``x``, copied if its memory layout is not that of ``dense``."""
    if x.stride() == dense.stride():
        return x
    return torch.empty_like(dense, dtype=x.dtype).copy_(x)


def channels_last_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` ``[N, C, ...]`` with the channels last in memory, the number of rows, and of channels.

    Example:
        >>> import torch
        >>> x, rows, channels = channels_last_rows(torch.empty(2, 3, 4, 5))
        >>> x.stride(), rows, channels
        ((60, 1, 15, 3), 40, 3)
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels = x.shape[1]
    return x, x.numel() // channels if channels else 0, channels


def mask_of(x: Tensor, masked: str) -> Tensor:
    """An empty mask with one bit per element; empty if nothing is masked."""
    return x.new_empty(0 if masked == NOTHING else checks.packed_size(x), dtype=torch.uint8)


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` if it is contiguous, else a copy, for a kernel to write to."""
    return None if x is None else x.contiguous()


def floats(x: Tensor | None) -> Tensor | None:
    """Contiguous, in float32."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def address(x: Tensor | None) -> int:
    return NULL if x is None else x.data_ptr()


def write_back(written: Tensor | None, x: Tensor | None) -> None:
    """Copies back what a kernel has written to ``contiguous(x)``."""
    if written is None or x is None:
        return
    if written is x:
        torch.autograd.graph.increment_version(x)
    else:
        x.copy_(written)


def launch_failed(kernel: str, x: Tensor, error: Exception) -> RuntimeError:
    """The error to raise if a GPU kernel could not be launched for ``x``."""
    return RuntimeError(
        f"noisyq_fast: {kernel} of a {x.dtype} tensor of shape {list(x.shape)} could not be "
        f"launched on {x.device}: {error}"
    )
