"""Tensors of all sizes and layouts in memory that a kernel may meet."""

import torch


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


TENSORS = {
    "scalar": lambda randn: randn(()),
    "empty": lambda randn: randn(3, 0),
    "one": lambda randn: randn(1),
    "odd": lambda randn: randn(1025),
    "large and odd": lambda randn: randn(2**22 + 3),
    "channels kept on chip": lambda randn: randn(512, 4608),
    "channels too long to keep": lambda randn: randn(3, 100_003),
    "more channels than a grid is high": lambda randn: randn(70_000, 3),
    "weight": lambda randn: randn(64, 64, 3, 3),
    "odd weight": lambda randn: randn(5, 3, 3, 3),
    "channels_last weight": lambda randn: channels_last(randn(64, 32, 3, 3)),
    "activation": lambda randn: randn(16, 24, 17, 19),
    "channels_last activation": lambda randn: channels_last(randn(16, 24, 17, 19)),
    "channels_last, odd channels": lambda randn: channels_last(randn(16, 3, 31, 33)),
    "sliced": lambda randn: randn(8, 12, 9, 20)[:, ::2, :, 1:],
    "not aligned": lambda randn: randn(4097)[1:],
    "permuted": lambda randn: randn(7, 8, 40).permute(2, 0, 1),
    "expanded": lambda randn: randn(1, 33).expand(6, 33),
}
