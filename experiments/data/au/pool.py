"""Pictures on their way to the device that trains on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_RESIDENT_BYTES = 4 << 30
_WORKERS = 4


class FramePool:
    """Gathers frames' pictures, which are rows of uint8 `[M, S, S, 3]`, on a device: those that fit
    are moved there once, others, which may lie in a file, are read by threads ahead of their use.
    """

    def __init__(self, images: Tensor, row: Tensor, device: torch.device) -> None:
        self.row = row
        self.device = device
        self.streams = device.type != "cpu" and images.numel() > _RESIDENT_BYTES
        self.images = images if self.streams else images.to(device)

    def __call__(self, indices: Tensor) -> Tensor:
        """The pictures of the frames at `indices`, on the device."""
        pictures = self.images[self.row[indices].to(self.images.device)]
        if not self.streams or self.device.type == "cpu":
            return pictures
        return pictures.pin_memory().to(self.device, non_blocking=True)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pictures of each of `indices`, in order."""
        if not self.streams:
            yield from map(self, indices)
            return
        with ThreadPoolExecutor(_WORKERS) as workers:
            ahead: deque[Future[Tensor]] = deque()
            for batch in indices:
                ahead.append(workers.submit(self, batch))
                if len(ahead) > _WORKERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
