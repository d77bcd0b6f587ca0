"""The executable specification, in plain PyTorch: works on every device.

Other backends equal it to the last bit, so a change here changes what the project computes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from noisyq_fast.backends.backend import Backend

FLT_MIN = torch.finfo(torch.float32).tiny


backend = Backend("reference", device_types=None, unavailable=lambda: None)


@backend.register
def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax_of(x, axis), qmax, axis)


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
    absmax = absmax_of(x, axis)
    if x.numel() > 0:
        average_(running_absmax, observed, absmax, averaging_constant)
    return _fake_quantize(x, absmax, qmax, axis)


@backend.register
def fake_quantize_fixed_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize(x, absmax, qmax, axis)


@backend.register
def fake_quantize_fixed_range_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    rounded = _rounded(x, _scale(absmax, qmax), axis)
    clipped = torch.empty_like(x, dtype=torch.bool).copy_(rounded.abs() > qmax)
    return _fake_quantize(x, absmax, qmax, axis), pack(clipped)


@backend.register
def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    return torch.empty_like(grad).copy_(grad.masked_fill(unpack(clipped, grad), 0))


@backend.register
def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    scale = _scale(absmax_of(x, axis), qmax)
    codes = _rounded(x, scale, axis).clamp(-qmax, qmax).nan_to_num(nan=0.0)
    return torch.empty_like(x, dtype=torch.int8).copy_(codes), scale


@backend.register
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


def average_(
    running_absmax: Tensor, observed: Tensor | None, absmax: Tensor, averaging_constant: float
) -> None:
    """Moves the average, ``running_absmax / observed``, towards the batch's absmax. One that is NaN
    begins with it; an absmax that is not finite changes nothing."""
    known = running_absmax if observed is None else running_absmax / observed
    averaged = torch.where(known.isnan(), absmax, known + averaging_constant * (absmax - known))
    is_observation = absmax.isfinite()
    running_absmax.copy_(torch.where(is_observation, averaged, running_absmax))
    if observed is not None:
        observed.masked_fill_(is_observation, 1.0)


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


# One bit for each element of a dense tensor, in the order of its memory, eight to a byte.


def pack(mask: Tensor) -> Tensor:
    """The uint8 bytes of a dense bool tensor; the first element is the lowest bit.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True] + 6 * [False]))
        tensor([5, 0], dtype=torch.uint8)
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    return packed(F.pad(flat, (0, -mask.numel() % 8)))


def unpack(bytes_: Tensor, like: Tensor) -> Tensor:
    """The bool tensor of which the bytes were made, laid out like the dense tensor ``like``."""
    return unpacked(bytes_)[: like.numel()].as_strided(like.shape, like.stride())


def packed(bits: Tensor) -> Tensor:
    """Bytes, of a last axis whose size 8 divides."""
    eights = bits.to(torch.uint8).unflatten(-1, (bits.shape[-1] // 8, 8))
    return (eights << _positions(bits)).sum(-1, dtype=torch.uint8)


def unpacked(bytes_: Tensor) -> Tensor:
    return (bytes_.unsqueeze(-1) >> _positions(bytes_) & 1).flatten(-2).bool()


def _positions(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
