"""The native kernels for CUDA (``csrc/cuda``), called with addresses, sizes and a stream.

Nothing here waits for the device, and nothing is allocated but outputs and, for activations, a few
kilobytes of partial maxima.
"""

from functools import cache

import torch
from torch import Tensor

from noisyq_fast.backends import native, packing, reference
from noisyq_fast.backends.layout import channel_layout
from noisyq_fast.backends.native import DTYPE_CODES, NULL, core
from noisyq_fast.backends.progress import progress

DEVICE_TYPES = ("cuda",)

# Blocks of 256 threads that a multiprocessor holds, and four loads of 16 bytes for each thread.
_BLOCKS_PER_MULTIPROCESSOR = 8
_BYTES_PER_BLOCK = 256 * 16 * 4


@cache
def unavailable() -> str | None:
    if native.missing is not None:
        return native.missing
    if not hasattr(core, "cuda"):
        return f"the native library has no CUDA kernels: {core.cuda_compiler}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        core.cuda.device_count()
    except RuntimeError as error:
        return f"kernels compiled by {core.cuda_compiler} do not run with this driver: {error}"
    return None


def fake_quantize(x: Tensor, qmax: int, axis: int | None) -> Tensor:
    (y,) = fake_quantize_many([x], [qmax], [axis])
    return y


def fake_quantize_many(
    tensors: list[Tensor], qmaxes: list[int], axes: list[int | None]
) -> list[Tensor]:
    outputs = []
    rows: dict[torch.dtype, list[tuple]] = {}
    for x, qmax, axis in zip(tensors, qmaxes, axes, strict=True):
        x, y = native.dense(x)
        outputs.append(y)
        outer, channels, inner = channel_layout(y, axis)
        if outer == 1:
            row = (x.data_ptr(), y.data_ptr(), NULL, channels, inner, qmax)
            # The input lives on in the row only as an address.
            rows.setdefault(x.dtype, []).append((row, x))
        elif outer > 1:
            _fake_quantize_spread(x, y, (outer, channels, inner), qmax, NULL, 0.0)
    with torch.cuda.device(tensors[0].device):
        for dtype, together in rows.items():
            core.cuda.fake_quantize_channels(
                DTYPE_CODES[dtype], [row for row, _ in together], _stream()
            )
    return outputs


def fake_quantize_ema(
    x: Tensor, running_absmax: Tensor, qmax: int, axis: int | None, averaging_constant: float
) -> Tensor:
    x, y = native.dense(x)
    layout = channel_layout(y, axis)
    if layout[0] == 0:
        return y
    running = running_absmax.contiguous()
    _fake_quantize_spread(x, y, layout, qmax, running.data_ptr(), averaging_constant)
    if running is running_absmax:
        torch.autograd.graph.increment_version(running)
    else:
        running_absmax.copy_(running)
    return y


def fake_quantize_range(x: Tensor, absmax: Tensor, qmax: int, axis: int | None) -> Tensor:
    return _fake_quantize_range(x, absmax, NULL, qmax, axis)


def fake_quantize_clipped(
    x: Tensor, absmax: Tensor, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    clipped = torch.empty_like(x, dtype=torch.bool)
    y = _fake_quantize_range(x, absmax, clipped.data_ptr(), qmax, axis)
    return y, packing.pack(clipped)


def fake_quantize_delayed(
    x: Tensor,
    running_absmax: Tensor,
    qmax: int,
    axis: int | None,
    averaging_constant: float,
    save_clipped: bool,
) -> tuple[Tensor, Tensor]:
    elements = x.numel()
    if elements == 0 or (axis is not None and x.shape[axis] > 1):
        # Several ranges: their elements lie mixed in memory, and the bits of clipped ones too.
        return reference.fake_quantize_delayed(
            x, running_absmax, qmax, axis, averaging_constant, save_clipped
        )
    x, y = native.dense(x)
    clipped = x.new_empty(-(-elements // 8) if save_clipped else 0, dtype=torch.uint8)
    with torch.cuda.device(x.device):
        core.cuda.fake_quantize_delayed(
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            clipped.data_ptr() if save_clipped else NULL,
            elements,
            _splits(x, (elements, 1, 1)),
            qmax,
            running_absmax.data_ptr(),
            averaging_constant,
            progress(x.device).data_ptr(),
            _stream(),
        )
    torch.autograd.graph.increment_version(running_absmax)
    return y, clipped


def zero_clipped(grad: Tensor, clipped: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    elements = grad.numel()
    if elements > 0:
        with torch.cuda.device(grad.device):
            core.cuda.zero_clipped(
                DTYPE_CODES[grad.dtype],
                grad.data_ptr(),
                out.data_ptr(),
                clipped.data_ptr(),
                elements,
                _splits(grad, (elements, 1, 1)),
                _stream(),
            )
    return out


def quantize(x: Tensor, qmax: int, axis: int | None) -> tuple[Tensor, Tensor]:
    x, codes = native.dense(x, torch.int8)
    outer, channels, inner = layout = channel_layout(codes, axis)
    shape = [] if axis is None else [channels]
    if outer == 0:
        return codes, x.new_full(shape, torch.finfo(torch.float32).tiny, dtype=torch.float32)
    scale = x.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(x.device):
        if outer == 1:
            row = (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), channels, inner, qmax)
            core.cuda.quantize_channels(DTYPE_CODES[x.dtype], [row], _stream())
        else:
            splits, partial = _partial(x, layout)
            core.cuda.quantize_spread(
                DTYPE_CODES[x.dtype],
                x.data_ptr(),
                codes.data_ptr(),
                scale.data_ptr(),
                *layout,
                splits,
                partial.data_ptr(),
                qmax,
                _stream(),
            )
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    codes, y = native.dense(codes, torch.float32)
    layout = channel_layout(y, axis)
    scale = scale.contiguous()
    if layout[0] > 0:
        with torch.cuda.device(y.device):
            core.cuda.dequantize(
                codes.data_ptr(),
                scale.data_ptr(),
                y.data_ptr(),
                *layout,
                _splits(codes, layout),
                _stream(),
            )
    return y


def _fake_quantize_spread(
    x: Tensor,
    y: Tensor,
    layout: tuple[int, int, int],
    qmax: int,
    running: int,
    averaging_constant: float,
) -> None:
    if layout[1] == 1 and _fits_on_chip(x):
        _fake_quantize_resident(x, y, qmax, running, averaging_constant)
        return
    splits, partial = _partial(x, layout)
    with torch.cuda.device(x.device):
        core.cuda.fake_quantize_spread(
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            *layout,
            splits,
            partial.data_ptr(),
            qmax,
            running,
            averaging_constant,
            _stream(),
        )


def _fits_on_chip(x: Tensor) -> bool:
    on_chip = _multiprocessors(x.device) * _resident_bytes_per_block(x.device)
    return x.numel() * x.element_size() <= on_chip


def _fake_quantize_resident(
    x: Tensor, y: Tensor, qmax: int, running: int, averaging_constant: float
) -> None:
    blocks = resident_blocks(x.numel() * x.element_size(), _multiprocessors(x.device))
    partial = torch.empty(blocks, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device):
        core.cuda.fake_quantize_resident(
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            x.numel(),
            blocks,
            partial.data_ptr(),
            qmax,
            running,
            averaging_constant,
            _stream(),
        )


def _fake_quantize_range(
    x: Tensor, absmax: Tensor, clipped: int, qmax: int, axis: int | None
) -> Tensor:
    x, y = native.dense(x)
    layout = channel_layout(y, axis)
    absmax = absmax.contiguous()
    if layout[0] > 0:
        with torch.cuda.device(x.device):
            core.cuda.fake_quantize_range(
                DTYPE_CODES[x.dtype],
                x.data_ptr(),
                absmax.data_ptr(),
                y.data_ptr(),
                clipped,
                *layout,
                _splits(x, layout),
                qmax,
                _stream(),
            )
    return y


def splits_per_channel(channel_bytes: int, channels: int, multiprocessors: int) -> int:
    """How many blocks share the elements of a channel: enough to fill the device, each with work.

    Example:
        >>> splits_per_channel(8 << 20, channels=1, multiprocessors=132)
        512
        >>> splits_per_channel(8 << 20, channels=64, multiprocessors=132)
        17
    """
    with_work = -(-channel_bytes // _BYTES_PER_BLOCK)
    to_fill = -(-_BLOCKS_PER_MULTIPROCESSOR * multiprocessors // channels)
    return max(1, min(with_work, to_fill))


def resident_blocks(tensor_bytes: int, multiprocessors: int) -> int:
    """How many blocks keep a tensor on chip: at most one for each multiprocessor, each with work.

    Example:
        >>> resident_blocks(8 << 20, multiprocessors=132), resident_blocks(100, multiprocessors=132)
        (132, 1)
    """
    return max(1, min(-(-tensor_bytes // _BYTES_PER_BLOCK), multiprocessors))


def _partial(x: Tensor, layout: tuple[int, int, int]) -> tuple[int, Tensor]:
    """How many blocks share a channel, and room for the absmax of each block."""
    splits = _splits(x, layout)
    return splits, torch.empty(layout[1] * splits, dtype=torch.int32, device=x.device)


def _splits(x: Tensor, layout: tuple[int, int, int]) -> int:
    outer, channels, inner = layout
    return splits_per_channel(
        outer * inner * x.element_size(), channels, _multiprocessors(x.device)
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _resident_bytes_per_block(device: torch.device) -> int:
    # A pack of 16 bytes may be left over for each block.
    return max(0, core.cuda.resident_bytes_per_block(device.index) - 16)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
