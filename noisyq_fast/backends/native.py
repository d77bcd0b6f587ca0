"""The compiled library, ``noisyq_fast._core``, and how tensors are handed to it."""

import torch
from torch import Tensor

try:
    from noisyq_fast import _core as core

    missing = None
except ImportError as error:
    core = None
    missing = f"the native library was not compiled or does not load ({error})"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NULL = 0


def dense(
    x: Tensor, dtype: torch.dtype | None = None, in_place: bool = True
) -> tuple[Tensor, Tensor]:
    """``x`` in memory without gaps, and an empty output that is laid out like it.

    empty_like() keeps the strides of a tensor exactly when it is dense. One that is not (a slice,
    an expanded tensor) is copied, into the output where the dtype allows it: most kernels may work
    in place.
    """
    y = torch.empty_like(x, dtype=dtype)
    if y.stride() == x.stride():
        return x, y
    return (y.copy_(x) if in_place and y.dtype == x.dtype else x.clone()), y


def write_back(running_absmax: Tensor, running: Tensor) -> None:
    """After a kernel wrote to ``running``: ``running_absmax`` itself, or a contiguous copy."""
    if running is running_absmax:
        torch.autograd.graph.increment_version(running)
    else:
        running_absmax.copy_(running)


def launch_failed(kernel: str, x: Tensor, error: Exception) -> RuntimeError:
    """What to raise where a kernel of a GPU could not be launched for ``x``."""
    return RuntimeError(
        f"noisyq_fast: {kernel} of a {x.dtype} tensor of shape {list(x.shape)} could not be "
        f"launched on {x.device}: {error}"
    )
