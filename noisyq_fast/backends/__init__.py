"""The choice of the backend that computes an operator on a type of device.

It is the first usable one in the order of ``BACKENDS`` that implements the operator. A backend that
is requested by name is tried before all others.

Each backend is a folder, with files of the same names for the same operators. To add one, collect
its functions in `Operators`, list these in a `Backend` named ``backend`` in its ``__init__.py``,
and add it to ``BACKENDS``, in order of preference.
"""

import os
from collections.abc import Callable

import torch

from noisyq_fast.backends import native_cpu, native_cuda, on_triton, reference
from noisyq_fast.backends.backend import Backend

# In order of preference. The reference computes every operator on every device.
BACKENDS: dict[str, Backend] = {
    module.backend.name: module.backend
    for module in (native_cpu, native_cuda, on_triton, reference)
}
AUTO = "auto"


class _Choice:
    """The requested backend, and the functions chosen so far for each operator and device type.

    A new request creates a new object, so that a thread that is choosing writes to the old one.
    """

    def __init__(self, requested: str) -> None:
        self.requested = requested
        self.selected: dict[tuple[str, str], Callable] = {}


_choice = _Choice(os.environ.get("NOISYQ_BACKEND", AUTO))


class use_backend:
    """Computes operators with the backend ``name``, as a function or a context manager.

    Args:
        name: ``"auto"`` (the fastest that is usable for the tensors' device) or one of the names
            that `info` lists. Operators that it does not implement are computed by the next backend
            that does.

    The choice holds for the whole process; the environment variable ``NOISYQ_BACKEND`` sets it at
    start. Results do not depend on it: every backend gives the same bits.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot be used on this machine; the message says why.

    Example:
        >>> import torch, noisyq_fast
        >>> x = torch.tensor([0.1, -0.7, 0.26])
        >>> with noisyq_fast.use_backend("reference"):
        ...     noisyq_fast.fake_quantize(x, bits=4)
        tensor([ 0.1000, -0.7000,  0.3000])
    """

    def __init__(self, name: str) -> None:
        if name != AUTO:
            _usable(name, "use_backend")
        self._previous = _choice.requested
        _request(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _request(self._previous)


def current_backend(device_type: str = "cpu", operator: str = "fake_quantize") -> str:
    """The name of the backend that computes an operator on devices of type ``device_type``.

    Example:
        >>> import noisyq_fast
        >>> with noisyq_fast.use_backend("reference"):
        ...     noisyq_fast.current_backend("cpu")
        'reference'
    """
    if operator not in reference.backend.functions:
        takes = ", ".join(reference.backend.functions)
        raise ValueError(f"operator: got {operator!r}, takes one of {takes}")
    return _choose(_choice.requested, operator, device_type).name


def requested() -> str:
    """The name given to `use_backend` or ``NOISYQ_BACKEND``, or ``"auto"``."""
    return _choice.requested


def select(operator: str, device_type: str) -> Callable:
    """The function that computes an operator. The choice is cached."""
    choice = _choice
    function = choice.selected.get((operator, device_type))
    if function is None:
        backend = _choose(choice.requested, operator, device_type)
        function = choice.selected[operator, device_type] = backend.functions[operator]
    return function


def who_computes() -> dict[str, dict[str, str]]:
    """For each operator, the backend that computes it on each type of device of this machine;
    ``"none"`` if the requested one cannot."""
    device_types = ["cpu"]
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()):
        device_types.append(found.type)

    def name(operator: str, device_type: str) -> str:
        try:
            return current_backend(device_type, operator)
        except (RuntimeError, ValueError):
            return "none"

    return {
        operator: {device_type: name(operator, device_type) for device_type in device_types}
        for operator in reference.backend.functions
    }


def _request(name: str) -> None:
    global _choice
    _choice = _Choice(name)


def _choose(requested: str, operator: str, device_type: str) -> Backend:
    candidates = [backend for backend in BACKENDS.values() if backend.automatic]
    if requested != AUTO:
        backend = _usable(requested, "NOISYQ_BACKEND")
        if not backend.takes(device_type):
            taken = " or ".join(backend.device_types or ())
            raise ValueError(
                f"backend {requested!r} takes tensors on {taken}, got one on {device_type}"
            )
        candidates.insert(0, backend)
    return next(
        backend
        for backend in candidates
        if backend.computes(operator, device_type) and backend.unavailable() is None
    )


def _usable(name: str, where: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, takes one of {', '.join([AUTO, *BACKENDS])}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{where}: backend {name!r} cannot be used here: {reason}")
    return BACKENDS[name]
