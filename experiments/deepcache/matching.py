"""Which blocks of a frame were in the frame before, and where."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_PEAK = 255.0
_NEARLY = 0.9
"""Of the threshold: how well blocks match that tell the motion of the frame."""


def psnr(mse: Tensor) -> Tensor:
    """The ratio of peak signal to noise in dB, of pixels up to 255; infinite for equal blocks."""
    return 10 * (_PEAK**2 / mse).log10()


def errors(
    previous: Tensor, current: Tensor, block: int, down: int, rights: Sequence[int]
) -> Tensor:
    """The mean square error of each block of a frame `[C, H, W]` against the pixels of the previous
    one that are an offset away, `down` and one of `rights`: `[R, H / block, W / block]`. Infinite
    where those are outside of it. Rows and columns that fill no block are left out."""
    height, width = current.shape[-2:]
    reach = max(map(abs, rights))
    padded = F.pad(previous, (reach, reach, abs(down), abs(down)), value=torch.inf)
    rows = padded[:, abs(down) + down :][:, :height]
    there = rows.unfold(2, width, 1)[:, :, [reach + right for right in rights]]
    squares = (there - current[:, :, None]).square().mean(0)
    return F.avg_pool2d(squares.transpose(0, 1), block)


def search(previous: Tensor, current: Tensor, block: int, radius: int) -> tuple[Tensor, Tensor]:
    """For each block the offset, up to `radius` along each axis, with the least error, int64
    `[..., 2]`, and that error. The nearest offset among equals. All offsets are tried, where the
    paper follows a diamond."""
    reach = range(-radius, radius + 1)
    every = torch.cat([errors(previous, current, block, down, reach) for down in reach])
    offsets = torch.cartesian_prod(*[torch.arange(-radius, radius + 1, device=every.device)] * 2)
    order = offsets.square().sum(1).argsort(stable=True)
    offsets, every = offsets[order], every[order]
    which = every.argmin(0)
    return offsets[which], every.gather(0, which[None])[0]


def global_offset(offsets: Tensor, ratios: Tensor, threshold: float) -> tuple[int, int] | None:
    """One motion for the frame: the rounded mean of the offsets of blocks whose ratio is above 0.9
    of the threshold, without those that are farther from a first mean than is usual (the root of
    the mean square). None if no block matches."""
    found = offsets[ratios > _NEARLY * threshold].double()
    if not len(found):
        return None
    distances = (found - found.mean(0)).square().sum(1)
    kept = found[distances <= distances.mean()]
    down, right = kept.mean(0).round().long().tolist()
    return down, right


def reusable(
    previous: Tensor, current: Tensor, block: int, offset: tuple[int, int], threshold: float
) -> Tensor:
    """Which blocks match at an offset, with a ratio above the threshold."""
    down, right = offset
    return psnr(errors(previous, current, block, down, [right])[0]) > threshold
