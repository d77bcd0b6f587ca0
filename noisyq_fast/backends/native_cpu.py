"""The native kernels for the CPU (``csrc/cpu``), called with addresses and sizes."""

import os

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Backend
from noisyq_fast.backends.kernel_arguments import (
    DTYPE_CODES,
    NULL,
    address,
    channel_layout,
    contiguous,
    core,
    dense,
    missing,
    write_back,
)
from noisyq_fast.backends.reference import pack

backend = Backend("cpu", device_types=("cpu",), unavailable=lambda: missing)

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


# The threads of an OpenMP team do not survive a fork: a child that waits for them waits forever.
os.register_at_fork(after_in_child=_mark_forked)


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def compiler() -> str | None:
    """What compiled the native library, and whether it runs on several threads."""
    if core is None:
        return None
    return f"{core.compiler}, {'OpenMP' if core.openmp else 'without OpenMP: one thread'}"


@backend.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, qmax, axis, NULL, NULL, 0.0)


@backend.register
def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


@backend.register
def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
) -> Tensor:
    running, weight = running_absmax.contiguous(), contiguous(observed)
    y = _fake_quantize(x, qmax, axis, running.data_ptr(), address(weight), averaging_constant)
    write_back(running, running_absmax)
    write_back(weight, observed)
    return y


@backend.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_fixed_range(x, absmax, NULL, qmax, axis)


@backend.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    clipped = torch.empty_like(x, dtype=torch.bool)
    y = _fake_quantize_fixed_range(x, absmax, clipped.data_ptr(), qmax, axis)
    return y, pack(clipped)


@backend.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = dense(x, torch.int8)
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


@backend.register
def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    codes, y = dense(codes, torch.float32)
    scale = scale.contiguous()
    core.dequantize(
        codes.data_ptr(), scale.data_ptr(), y.data_ptr(), *channel_layout(y, axis), _threads()
    )
    return y


def _fake_quantize(
    x: Tensor,
    qmax: int,
    axis: int | None,
    running_absmax: int,
    observed: int,
    averaging_constant: float,
) -> Tensor:
    x, y = dense(x)
    core.fake_quantize(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        *channel_layout(y, axis),
        qmax,
        running_absmax,
        observed,
        averaging_constant,
        _threads(),
    )
    return y


def _fake_quantize_fixed_range(
    x: Tensor, absmax: Tensor, clipped: int, qmax: int, axis: int | None
) -> Tensor:
    x, y = dense(x)
    absmax = absmax.contiguous()
    core.fake_quantize_fixed_range(
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
