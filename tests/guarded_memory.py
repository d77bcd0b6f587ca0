"""Tensors in memory that ends the process when something beyond them is touched."""

import ctypes
import mmap
from math import prod

import torch

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(like, shape, dtype=None, *, at_end):
    """A tensor right before a page that cannot be accessed (``at_end``), or right after one.

    ``shape`` is an int or a sequence; the dtype is that of ``like`` unless it is given.
    """
    dtype = dtype or like.dtype
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count, page = prod(shape), mmap.PAGESIZE
    used = -(-count * dtype.itemsize // page) * page
    memory = mmap.mmap(-1, used + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for closed in (address, address + page + used):
        if _libc.mprotect(ctypes.c_void_p(closed), page, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    offset = page + (used - count * dtype.itemsize if at_end else 0)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def guarded_like(x, dtype=None, *, at_end):
    """Laid out like ``x``, which is dense."""
    return guarded(x, x.numel(), dtype, at_end=at_end).as_strided(x.shape, x.stride())
