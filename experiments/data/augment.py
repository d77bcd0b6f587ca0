"""From uint8 images to what a network trains on, a whole batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class RandomCropFlip:
    """Random crops of zero-padded images, mirrored half of the time if `flip`, in one gather.

    No padding and no flip give the images as they are.
    """

    def __init__(self, images: Tensor, padding: int, flip: bool) -> None:
        self.size = images.shape[1:3]
        self.padding = padding
        self.flip = flip
        self.padded = F.pad(images, (0, 0, padding, padding, padding, padding))

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """The images at `indices` as uint8 `[B, H, W, C]`."""
        height, width = self.size
        _, padded_height, padded_width, channels = self.padded.shape
        count = len(indices)
        top = torch.randint(2 * self.padding + 1, (count, 1), generator=generator)
        left = torch.randint(2 * self.padding + 1, (count, 1), generator=generator)
        mirrored = torch.randint(1 + self.flip, (count, 1), generator=generator).bool()

        column = torch.arange(width)
        rows = top + torch.arange(height)
        columns = left + torch.where(mirrored, width - 1 - column, column)
        first_rows = indices[:, None] * padded_height
        pixels = (first_rows + rows)[:, :, None] * padded_width + columns[:, None, :]
        gathered = self.padded.view(-1, channels).index_select(0, pixels.flatten())
        return gathered.view(count, height, width, channels)


@dataclass(frozen=True, eq=False)
class Normalize:
    """Makes float `[B, C, H, W]` in channels_last memory, each channel with mean 0 and std 1."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Normalize:
        """Uses the statistics of `images`, exactly: from a histogram of their 256 levels."""
        levels = torch.arange(256, dtype=torch.float64)
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]
        )
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]).square()).sum(1)
        return cls(mean.float(), variance.sqrt().float())

    def __call__(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
