"""The native kernels for the CPU (``csrc/cpu``), called with addresses and sizes."""

import os

import torch
from torch import Tensor

from noisyq_fast.backends.layout import channel_layout

try:
    from noisyq_fast import _core
except ImportError as error:
    _core = None
    _import_error = error

DEVICE_TYPES = ("cpu",)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NULL = 0

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


# The threads of an OpenMP team do not survive a fork: a child that waits for them waits forever.
os.register_at_fork(after_in_child=_mark_forked)


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def unavailable() -> str | None:
    if _core is None:
        return f"the native library was not compiled or does not load ({_import_error})"
    return None


def compiler() -> str | None:
    """What compiled the native library, and whether it runs on several threads."""
    if _core is None:
        return None
    return f"{_core.compiler}, {'OpenMP' if _core.openmp else 'without OpenMP: one thread'}"


def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, _NULL, qmax, axis, 0.0)


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    running = running_absmax.contiguous()
    y = _fake_quantize(x, running.data_ptr(), qmax, axis, averaging_constant)
    if running is running_absmax:
        torch.autograd.graph.increment_version(running)
    else:
        running_absmax.copy_(running)
    return y


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_range(x, absmax, _NULL, qmax, axis)


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    clipped = torch.empty_like(x, dtype=torch.bool)
    return _fake_quantize_range(x, absmax, clipped.data_ptr(), qmax, axis), clipped


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8)
    if codes.stride() != x.stride():
        x = x.clone()
    outer, channels, inner = channel_layout(codes, axis)
    scale = torch.empty([] if axis is None else [channels])
    _core.quantize(
        _DTYPE_CODES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        outer,
        channels,
        inner,
        qmax,
        _threads(),
    )
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    y = torch.empty_like(codes, dtype=torch.float32)
    if y.stride() != codes.stride():
        codes = codes.clone()
    scale = scale.contiguous()
    _core.dequantize(
        codes.data_ptr(), scale.data_ptr(), y.data_ptr(), *channel_layout(y, axis), _threads()
    )
    return y


def _fake_quantize(
    x: Tensor, running: int, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    x, y = _dense(x)
    _core.fake_quantize(
        _DTYPE_CODES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        *channel_layout(y, axis),
        qmax,
        running,
        averaging_constant,
        _threads(),
    )
    return y


def _fake_quantize_range(
    x: Tensor, absmax: Tensor, clipped: int, qmax: int, axis: int | None
) -> Tensor:
    x, y = _dense(x)
    absmax = absmax.contiguous()
    _core.fake_quantize_range(
        _DTYPE_CODES[x.dtype],
        x.data_ptr(),
        absmax.data_ptr(),
        y.data_ptr(),
        clipped,
        *channel_layout(y, axis),
        qmax,
        _threads(),
    )
    return y


def _dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and an output with its strides.

    empty_like() keeps the strides of a tensor exactly when it is dense. One that is not (a slice,
    an expanded tensor) is copied into the output, which is then quantized in place.
    """
    y = torch.empty_like(x)
    return (x, y) if y.stride() == x.stride() else (y.copy_(x), y)
