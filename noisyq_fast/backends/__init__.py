"""The choice among backends.

A backend is a module of this package that offers

- ``DEVICE_TYPES``: the device types it computes on, or ``None`` for every one;
- ``unavailable()``: ``None`` where it can be used on this machine, otherwise the reason;
- ``AUTOMATIC``, where it is not true: whether it may be chosen without being asked for by name;
- one function for each operator of `noisyq_fast.ops`. Arguments have been checked; ``axis`` is
  ``None`` or counted from the front.

To add one, write the module and name it in ``BACKENDS``, before every backend it should precede.
"""

import os
from types import ModuleType

from noisyq_fast.backends import cpu, cuda, reference, triton

# In order of preference.
BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
AUTO = "auto"


class _Choice:
    """The backend that was asked for, and what was chosen so far for each device type.

    Another choice is another object: a thread that is choosing meanwhile writes to the old one.
    """

    def __init__(self, requested: str) -> None:
        self.requested = requested
        self.selected: dict[str, ModuleType] = {}


_choice = _Choice(os.environ.get("NOISYQ_BACKEND", AUTO))


class use_backend:
    """Computes every operator with the backend ``name``, as a function or a context manager.

    Args:
        name: ``"auto"`` (the fastest that is usable for the tensors' device) or one of the names
            that `info` lists.

    The choice holds for the whole process; the environment variable ``NOISYQ_BACKEND`` sets it at
    start. Results do not depend on it: every backend gives the same bits.

    Raises:
        ValueError: there is no backend of that name.
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


def current_backend(device_type: str = "cpu") -> str:
    """The name of the backend that computes on devices of type ``device_type``.

    Example:
        >>> import noisyq_fast
        >>> with noisyq_fast.use_backend("reference"):
        ...     noisyq_fast.current_backend("cpu")
        'reference'
    """
    module = select(device_type)
    return next(name for name, backend in BACKENDS.items() if backend is module)


def requested() -> str:
    """The name given to `use_backend` or ``NOISYQ_BACKEND``, or ``"auto"``."""
    return _choice.requested


def select(device_type: str) -> ModuleType:
    """The backend for a device type; the choice is made once and then remembered."""
    choice = _choice
    backend = choice.selected.get(device_type)
    if backend is None:
        backend = choice.selected[device_type] = _choose(choice.requested, device_type)
    return backend


def _request(name: str) -> None:
    global _choice
    _choice = _Choice(name)


def _choose(requested: str, device_type: str) -> ModuleType:
    if requested != AUTO:
        backend = _usable(requested, "NOISYQ_BACKEND")
        if not _computes_on(backend, device_type):
            raise ValueError(
                f"backend {requested!r} takes tensors on {' or '.join(backend.DEVICE_TYPES)}, "
                f"got one on {device_type}"
            )
        return backend
    return next(
        backend
        for backend in BACKENDS.values()
        if getattr(backend, "AUTOMATIC", True)
        and _computes_on(backend, device_type)
        and backend.unavailable() is None
    )


def _computes_on(backend: ModuleType, device_type: str) -> bool:
    return backend.DEVICE_TYPES is None or device_type in backend.DEVICE_TYPES


def _usable(name: str, where: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, takes one of {', '.join([AUTO, *BACKENDS])}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{where}: backend {name!r} cannot be used here: {reason}")
    return BACKENDS[name]
