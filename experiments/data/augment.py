"""From uint8 images to what a network trains on, a whole batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class RandomCropFlip:
    """Random crops of zero-padded images, mirrored half of the time if `flip`, in one gather.

    No padding and no flip give the images as they are. Images and views live on one device.
    """

    def __init__(self, images: Tensor, padding: int, flip: bool) -> None:
        self.size = images.shape[1:3]
        self.padding = padding
        self.flip = flip
        self.padded = F.pad(images, (0, 0, padding, padding, padding, padding))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Views at random: int64 `[count, 3]`, the top, the left and whether it is mirrored."""
        ends = (2 * self.padding + 1, 2 * self.padding + 1, 1 + self.flip)
        return torch.stack([torch.randint(end, (count,), generator=generator) for end in ends], 1)

    def __call__(self, indices: Tensor, views: Tensor) -> Tensor:
        """The images at `indices` `[B]`, each in its view `[B, 3]`, as uint8 `[B, H, W, C]`."""
        height, width = self.size
        _, padded_height, padded_width, channels = self.padded.shape
        top, left, mirrored = views[:, :, None].unbind(1)

        column = torch.arange(width, device=views.device)
        rows = top + torch.arange(height, device=views.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - column, column)
        first_rows = indices[:, None] * padded_height
        pixels = (first_rows + rows)[:, :, None] * padded_width + columns[:, None, :]
        gathered = self.padded.view(-1, channels).index_select(0, pixels.flatten())
        return gathered.view(len(indices), height, width, channels)


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

    def to(self, device: torch.device) -> Normalize:
        """The same on another device."""
        return Normalize(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
