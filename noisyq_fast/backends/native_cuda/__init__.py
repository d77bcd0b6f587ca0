"""The native kernels for CUDA (``csrc/cuda``), called with addresses, sizes and a stream.

Nothing here synchronizes with the device. Only outputs are allocated and, for activations, a few
kilobytes of maxima or ranges.
"""

from functools import cache

import torch

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.kernel_arguments import core, missing
from noisyq_fast.backends.native_cuda import grids, launch, learned, signed
from noisyq_fast.backends.native_cuda.grids import (
    dequantize_on_grid,
    fake_quantize_ema_on_grid,
    fake_quantize_fixed_range_on_grid,
    fake_quantize_on_grid,
    quantize_on_grid,
)
from noisyq_fast.backends.native_cuda.signed import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_fixed_range,
    fake_quantize_fixed_range_clipped,
    fake_quantize_many,
    quantize,
    zero_clipped,
)


@cache
def unavailable() -> str | None:
    if missing is not None:
        return missing
    if launch.kernels is None:
        return f"the native library has no CUDA kernels: {core.cuda_compiler}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        launch.kernels.device_count()
    except RuntimeError as error:
        return f"kernels compiled by {core.cuda_compiler} do not run with this driver: {error}"
    return None


backend = Backend(
    "cuda",
    device_types=("cuda",),
    unavailable=unavailable,
    functions=signed.operators | grids.operators | learned.operators,
)
