"""The native kernels for the CPU (``csrc/cpu``), called with addresses and sizes."""

import os

import torch
from torch import Tensor

from noisyq_fast.backends import native, packing, reference
from noisyq_fast.backends.layout import channel_layout
from noisyq_fast.backends.native import DTYPE_CODES, NULL, core

DEVICE_TYPES = ("cpu",)

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


# The threads of an OpenMP team do not survive a fork: a child that waits for them waits forever.
os.register_at_fork(after_in_child=_mark_forked)


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def unavailable() -> str | None:
    return native.missing


def compiler() -> str | None:
    """What compiled the native library, and whether it runs on several threads."""
    if core is None:
        return None
    return f"{core.compiler}, {'OpenMP' if core.openmp else 'without OpenMP: one thread'}"


def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, NULL, qmax, axis, 0.0)


def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    running = running_absmax.contiguous()
    y = _fake_quantize(x, running.data_ptr(), qmax, axis, averaging_constant)
    native.write_back(running_absmax, running)
    return y


# Delayed scales spare a GPU one of two passes; a CPU has the second pass in its cache.
fake_quantize_delayed = reference.fake_quantize_delayed
zero_clipped = reference.zero_clipped


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_range(x, absmax, NULL, qmax, axis)


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    clipped = torch.empty_like(x, dtype=torch.bool)
    y = _fake_quantize_range(x, absmax, clipped.data_ptr(), qmax, axis)
    return y, packing.pack(clipped)


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = native.dense(x, torch.int8)
    outer, channels, inner = channel_layout(codes, axis)
    scale = torch.empty([] if axis is None else [channels], dtype=torch.float32)
    core.quantize(
        DTYPE_CODES[x.dtype],
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
    codes, y = native.dense(codes, torch.float32)
    scale = scale.contiguous()
    core.dequantize(
        codes.data_ptr(), scale.data_ptr(), y.data_ptr(), *channel_layout(y, axis), _threads()
    )
    return y


def _fake_quantize(
    x: Tensor, running: int, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    x, y = native.dense(x)
    core.fake_quantize(
        DTYPE_CODES[x.dtype],
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
    x, y = native.dense(x)
    absmax = absmax.contiguous()
    core.fake_quantize_range(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        absmax.data_ptr(),
        y.data_ptr(),
        clipped,
        *channel_layout(y, axis),
        qmax,
        _threads(),
    )
    return y
