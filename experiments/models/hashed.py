"""Layers whose weights share values at random (HashedNets, Chen et al. 2015, arXiv 1504.04788)."""

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments.models.layers import LAYERS

_PRIMES = np.array([2246822519, 3266489917, 668265263, 374761393], dtype=np.uint32)
_SIGN = 0x9E3779B9
"""What makes the seed of the signs from that of the buckets."""


class HashedWeight(nn.Module):
    """``V[i] = sign(i) w[bucket(i)]``: many weights of few values, by two hashes of the index.

    Args:
        shape: of the weight V. The index i counts its elements in the order of memory, so for a
            convolution it is that of output, input, row and column.
        buckets: how many values w has.
        seed: of the hashes, another one for each layer.

    The gradient of a value is the sum over its weights, in the order of their index: the same bits
    on every run, on GPUs too. What belongs to which value is computed again wherever the layer is
    made, so checkpoints do not have it.
    """

    bucket: Tensor
    sign: Tensor
    order: Tensor
    counts: Tensor

    def __init__(self, shape: Sequence[int], buckets: int, seed: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        index = np.arange(int(np.prod(self.shape)), dtype=np.uint32)
        bucket = torch.from_numpy(in_range(xxh32(index, seed), buckets))
        odd = torch.from_numpy((xxh32(index, seed ^ _SIGN) & 1).astype(np.int8))
        self.set(bucket, 1 - 2 * odd, buckets)

    def set(self, bucket: Tensor, sign: Tensor, buckets: int) -> None:
        """Which value each weight has, and its sign."""
        self.buckets = buckets
        bucket = bucket.flatten().long()
        counts = torch.bincount(bucket, minlength=buckets)
        for name, value in (
            ("bucket", bucket),
            ("sign", sign.flatten().to(torch.int8)),
            ("order", torch.argsort(bucket, stable=True)),
            ("counts", counts),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return _Shared.apply(values, self.bucket, self.sign, self.order, self.counts).view(
            self.shape
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Values that are distributed like those of ``weight``: the first of them."""
        return weight.detach().flatten()[: self.buckets].clone()


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bucket: Tensor, sign: Tensor, order: Tensor, counts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(sign, order, counts)
        return values[bucket] * sign

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sign, order, counts = ctx.saved_tensors
        terms = (grad * sign)[order]
        # unsafe: the counts are ours, and a check of them would wait for a GPU.
        values = torch.segment_reduce(terms, "sum", lengths=counts, unsafe=True)
        return values, None, None, None, None


Layer = TypeVar("Layer", bound=LAYERS)


def hash_weight_(layer: Layer, compression: float, seed: int) -> Layer:
    """Gives the weight of a layer, which stays the same object, ``compression`` times fewer values.
    They start as the first of the weight's, and so distributed like it; the bias stays.

    Raises:
        ValueError: a weight that is smaller than ``compression``, or one below 1.
    """
    if not compression >= 1:
        raise ValueError(f"compression: got {compression:g}, takes a number from 1")
    weight = layer.weight
    buckets = round(weight.numel() / compression)
    if buckets < 1:
        raise ValueError(f"compression: got {compression:g}, takes up to {weight.numel()}")
    shared = HashedWeight(weight.shape, buckets, seed)
    parametrize.register_parametrization(layer, "weight", shared.to(weight.device))
    return layer


class HashedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with a hashed weight; ``compression`` and ``seed`` as for
    `hash_weight_`."""

    def __init__(self, *args: Any, compression: float = 8.0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hash_weight_(self, compression, seed)


class HashedLinear(nn.Linear):
    """`torch.nn.Linear` with a hashed weight; ``compression`` and ``seed`` as for
    `hash_weight_`."""

    def __init__(self, *args: Any, compression: float = 8.0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hash_weight_(self, compression, seed)


def layer_seed(name: str, seed: int) -> int:
    """That of a layer's hashes: of its name alone, not of random numbers."""
    return zlib.crc32(f"{seed}/{name}".encode())


def xxh32(words: np.ndarray, seed: int) -> np.ndarray:
    """xxHash (32 bits) of each uint32, as its four bytes, least first."""
    second, third, fourth, fifth = _PRIMES
    h = words * third + np.uint32((seed + int(fifth) + 4) % 2**32)
    h = _rotated(h, 17) * fourth
    h = (h ^ h >> 15) * second
    h = (h ^ h >> 13) * third
    return h ^ h >> 16


def _rotated(h: np.ndarray, bits: int) -> np.ndarray:
    return h << bits | h >> (32 - bits)


def in_range(hashes: np.ndarray, count: int) -> np.ndarray:
    """Each below ``count``, by the high bits of a product: of 2^32 hashes all numbers get as many,
    or one more."""
    return (hashes.astype(np.uint64) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
