"""The executable specification, in plain PyTorch: works on every device.

Other backends equal it to the last bit, so a change here changes what the project computes.
"""

import torch
from torch import Tensor

from noisyq_fast.backends import packing

DEVICE_TYPES = None

FLT_MIN = torch.finfo(torch.float32).tiny


def unavailable() -> str | None:
    return None


def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax_of(x, axis), qmax, axis)


def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    return [fake_quantize(*arguments) for arguments in zip(tensors, qmaxes, axes, strict=True)]


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    absmax = absmax_of(x, axis)
    if x.numel() > 0:
        average_(running_absmax, absmax, averaging_constant)
    return _fake_quantize(x, absmax, qmax, axis)


def fake_quantize_delayed(
    x: Tensor,
    running_absmax: Tensor,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
    save_clipped: bool,
) -> tuple[Tensor, Tensor]:
    absmax = absmax_of(x, axis)
    known = torch.where(running_absmax.isnan(), absmax, running_absmax)
    if save_clipped:
        y, clipped = fake_quantize_clipped(x, known, qmax, axis)
    else:
        y, clipped = _fake_quantize(x, known, qmax, axis), x.new_empty(0, dtype=torch.uint8)
    if x.numel() > 0:
        average_(running_absmax, absmax, averaging_constant)
    return y, clipped


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax, qmax, axis)


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    rounded = _rounded(x, _scale(absmax, qmax), axis)
    clipped = torch.empty_like(x, dtype=torch.bool).copy_(rounded.abs() > qmax)
    return _fake_quantize(x, absmax, qmax, axis), packing.pack(clipped)


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    return torch.empty_like(grad).copy_(grad.masked_fill(packing.unpack(clipped, grad), 0))


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    scale = _scale(absmax_of(x, axis), qmax)
    codes = _rounded(x, scale, axis).clamp(-qmax, qmax).nan_to_num(nan=0.0)
    return torch.empty_like(x, dtype=torch.int8).copy_(codes), scale


def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    values = codes.float() * _along_axis(scale, codes, axis)
    return torch.empty_like(codes, dtype=torch.float32).copy_(values)


def absmax_of(x: Tensor, axis: int | None) -> Tensor:
    """lambda: the largest magnitude of each group, in float32; 0 for a group without elements."""
    shape = [] if axis is None else [x.shape[axis]]
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    others = [d for d in range(x.dim()) if d != axis]
    magnitudes = x.abs()
    return (magnitudes.amax(others) if others else magnitudes).float().reshape(shape)


def average_(running_absmax: Tensor, absmax: Tensor, averaging_constant: float) -> None:
    """Moves the average towards the batch's absmax; one that is NaN begins with it, and one that
    is not finite changes nothing."""
    averaged = running_absmax + averaging_constant * (absmax - running_absmax)
    averaged = torch.where(running_absmax.isnan(), absmax, averaged)
    running_absmax.copy_(torch.where(absmax.isfinite(), averaged, running_absmax))


def _scale(absmax: Tensor, qmax: int) -> Tensor:
    # Divided by a tensor: on CUDA, PyTorch turns division by a number into multiplication by its
    # reciprocal. And maximum() keeps a NaN.
    scale = absmax / torch.full_like(absmax, qmax)
    return scale.maximum(torch.full_like(scale, FLT_MIN))


def _rounded(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return (x.float() / _along_axis(scale, x, axis)).round()


def _fake_quantize(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    scale = _scale(absmax, qmax)
    values = _rounded(x, scale, axis).clamp(-qmax, qmax) * _along_axis(scale, x, axis)
    return torch.empty_like(x).copy_(values)


def _along_axis(per_channel: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return per_channel
    return per_channel.reshape([-1 if d == axis else 1 for d in range(x.dim())])
