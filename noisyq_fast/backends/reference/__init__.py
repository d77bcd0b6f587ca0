"""The executable specification, in plain PyTorch, for every device.

Other backends equal it to the last bit, so a change here changes all results.
"""

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.reference import adder, composed, grids, learned, products, sums
from noisyq_fast.backends.reference.grids import (
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

backend = Backend(
    "reference",
    device_types=None,
    unavailable=lambda: None,
    functions=grids.operators
    | products.operators
    | sums.operators
    | composed.operators
    | adder.operators
    | learned.operators,
)
