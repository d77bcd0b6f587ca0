"""What is usable on this machine, and why something is not. Also ``python -m noisyq_fast``."""

import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import torch

from noisyq_fast import backends

PACKAGES = ("noisyq_fast", "torch", "triton", "numpy")


@dataclass(frozen=True)
class Info:
    """What `info` found.

    Attributes:
        versions: of Python, of the packages, and of the compiler of the native kernels.
        backends: for each backend, ``None`` where it is usable, otherwise the reason why not.
        requested: the backend asked for with `use_backend` or ``NOISYQ_BACKEND``, or ``"auto"``.
        threads: how many threads operators on the CPU use.
    """

    versions: dict[str, str]
    backends: dict[str, str | None]
    requested: str
    threads: int

    def __str__(self) -> str:
        rows = [("versions", "")]
        rows += [(f"  {name}", version) for name, version in self.versions.items()]
        rows += [("backends", f"(requested: {self.requested})")]
        rows += [
            (f"  {name}", "usable" if reason is None else f"not usable: {reason}")
            for name, reason in self.backends.items()
        ]
        rows += [("threads", str(self.threads))]
        return "\n".join(f"{name:<18}{value}".rstrip() for name, value in rows)


def info() -> Info:
    """Versions, and which backends are usable here or why not. Print it to read it.

    Example:
        >>> import noisyq_fast
        >>> noisyq_fast.info().backends["reference"] is None
        True
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if (compiler := backends.cpu.compiler()) is not None:
        versions["native kernels"] = compiler
    return Info(
        versions=versions,
        backends={name: module.unavailable() for name, module in backends.BACKENDS.items()},
        requested=backends.requested(),
        threads=torch.get_num_threads(),
    )
