"""Fast, exact quantization-aware training for PyTorch."""

from importlib.metadata import version as _version

from noisyq_fast.backends import current_backend, use_backend
from noisyq_fast.convert import quantize_model_
from noisyq_fast.distributed import sync_ranges_
from noisyq_fast.grouped import GroupedLinear, QuantGroupedLinear
from noisyq_fast.info import info
from noisyq_fast.layers import QuantConv2d, QuantLinear
from noisyq_fast.ops import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)

__version__ = _version("noisyq_fast")

__all__ = [
    "GroupedLinear",
    "QuantConv2d",
    "QuantGroupedLinear",
    "QuantLinear",
    "current_backend",
    "dequantize",
    "fake_quantize",
    "fake_quantize_ema",
    "fake_quantize_many",
    "info",
    "quantize",
    "quantize_model_",
    "sync_ranges_",
    "use_backend",
]
