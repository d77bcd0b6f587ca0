"""What PyTorch's dispatcher would find for a call of an operator.

It looks for everything that may want to see the call: modes, tensor subclasses, function
transforms, tracers and the profiler. For an operator that is written in Python that takes longer
than many a kernel. Where none of them is there, it only finds the operator's own gradient and
kernel, and `declare` calls these itself.

What PyTorch does not tell of sees no such calls: an execution trace observer, and kernels that
others have registered for these operators.
"""

from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C
_TYPES = (Tensor, torch.nn.Parameter)
_DEVICES = ("CPU", "CUDA", "XPU", "MPS", "PrivateUse1")


def _bits(*keys: str) -> int:
    """The bits that stand for dispatch keys in ``DispatchKeySet.raw_repr``."""
    bits = 0
    for key in keys:
        bits |= _C.DispatchKeySet(getattr(_C.DispatchKey, key)).raw_repr()
    return bits


_NOT_ALWAYS_ACTIVE = ~_bits("BackendSelect", "ADInplaceOrView")
_NOT_PLAIN = ~_bits(
    "ADInplaceOrView", *(of + device for of in ("", "Autograd", "Autocast") for device in _DEVICES)
)
_AUTOGRAD = _bits("AutogradOther")


def is_plain(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read, and nothing but our code sees what is done with
    them: not while it is traced or batched, on the device meta, or within a dispatch mode."""
    return not _is_mode_active() and _is_plain(x)


def may_bypass(arguments: tuple, positions: list[int]) -> bool:
    """Whether a call with ``arguments``, of which those at ``positions`` are tensors, lists of
    tensors or ``None``, would reach nothing but the operator."""
    if torch.compiler.is_compiling():
        return False
    if _is_mode_active() or _C._len_torch_function_stack():
        return False
    if torch.autograd.profiler._is_profiler_enabled or torch.autograd._profiler_enabled():
        return False
    for i in positions:
        value = arguments[i]
        if type(value) is list:
            if not all(map(_is_plain, value)):
                return False
        elif value is not None and not _is_plain(value):
            return False
    return True


def is_below_autograd() -> bool:
    """Whether the dispatcher would leave out the gradient: in inference mode, and within other
    operators."""
    return bool(_C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD)


def _is_mode_active() -> bool:
    return bool(_C._dispatch_tls_local_include_set().raw_repr() & _NOT_ALWAYS_ACTIVE)


def _is_plain(x: Tensor) -> bool:
    return type(x) in _TYPES and not _C._dispatch_keys(x).raw_repr() & _NOT_PLAIN
