import pytest
import torch

from experiments.data.au.pool import FramePool

IMAGES = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 2, 2, 3).contiguous()
ROW = torch.arange(60).flip(0)


@pytest.mark.parametrize("streams", [False, True])
def test_batches_come_in_order_whether_read_ahead_or_not(streams):
    pool = FramePool(IMAGES, ROW, torch.device("cpu"))
    pool.streams = streams
    indices = torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(7)
    for expected, pictures in zip(indices, pool.batches(indices), strict=True):
        assert torch.equal(pictures, IMAGES[59 - expected])


def test_reading_ahead_stops_with_its_user():
    pool = FramePool(IMAGES, ROW, torch.device("cpu"))
    pool.streams = True
    batches = pool.batches(torch.arange(60).split(1))
    next(batches)
    batches.close()


def test_error_of_a_reader_reaches_the_user():
    pool = FramePool(IMAGES, ROW, torch.device("cpu"))
    pool.streams = True
    with pytest.raises(IndexError):
        list(pool.batches([torch.tensor([60])]))
