"""The Triton kernels, launched on dense memory.

With ``TRITON_INTERPRET=1`` in the environment they run in NumPy, on the CPU too: for tests without
a GPU, and very slowly, so this backend then has to be requested by name.
"""

import os

import torch

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.on_triton import grids, learned, products, sums
from noisyq_fast.backends.on_triton.grids import (
    dequantize,
    dequantize_on_grid,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_ema_on_grid,
    fake_quantize_fixed_range,
    fake_quantize_fixed_range_clipped,
    fake_quantize_fixed_range_on_grid,
    fake_quantize_many,
    fake_quantize_on_grid,
    quantize,
    quantize_ema_on_grid,
    quantize_fixed_range_on_grid,
    quantize_on_grid,
    zero_clipped,
)
from noisyq_fast.backends.reference import composed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        import triton

        if not INTERPRETED:
            _ = triton.runtime.driver.active  # Compiled when first used: needs a C compiler.
    except Exception as error:
        return f"Triton does not work ({error})"
    return None


backend = Backend(
    "triton",
    device_types=("cuda", "cpu") if INTERPRETED else ("cuda",),
    unavailable=unavailable,
    functions=grids.operators
    | products.operators
    | sums.operators
    | composed.convolution_gradients(products.float_steps, sums.grads_of_sums)
    | composed.norm(sums.operators)
    | learned.operators,
    automatic=not INTERPRETED,
)
