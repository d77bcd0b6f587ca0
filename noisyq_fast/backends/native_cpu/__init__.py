"""The native kernels for the CPU (``csrc/cpu``), called with addresses and sizes."""

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.kernel_arguments import core, missing
from noisyq_fast.backends.native_cpu import (
    adder,
    convolution_gradients,
    grids,
    learned,
    products,
    sums,
)
from noisyq_fast.backends.native_cpu.grids import (
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

backend = Backend(
    "cpu",
    device_types=("cpu",),
    unavailable=lambda: missing,
    functions=grids.operators
    | products.operators
    | sums.operators
    | composed.products(products.convolve, products.multiply_codes, sums.map_sums)
    | convolution_gradients.operators
    | composed.norm(sums.operators)
    | adder.operators
    | learned.operators,
)


def compiler() -> str | None:
    """The compiler of the native library, and whether the library uses several threads."""
    if core is None:
        return None
    return f"{core.compiler}, {'OpenMP' if core.openmp else 'without OpenMP: one thread'}"
