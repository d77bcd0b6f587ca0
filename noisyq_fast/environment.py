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
        backends: for each backend, ``None`` if it is usable, otherwise the reason why not.
        requested: the backend asked for with `use_backend` or ``NOISYQ_BACKEND``, or ``"auto"``.
        operators: for each operator, the backend that computes it on each type of device.
        threads: how many threads operators on the CPU use.
        products: how products of codes are computed on the CPU.
    """

    versions: dict[str, str]
    backends: dict[str, str | None]
    requested: str
    operators: dict[str, dict[str, str]]
    threads: int
    products: dict[str, str]

    def __str__(self) -> str:
        rows = [("versions", "")]
        rows += [(f"  {name}", version) for name, version in self.versions.items()]
        rows += [("backends", f"(requested: {self.requested})")]
        rows += [
            (f"  {name}", "usable" if reason is None else f"not usable: {reason}")
            for name, reason in self.backends.items()
        ]
        rows += [("threads", str(self.threads))]
        rows += [("integer products", "(on the CPU)")]
        rows += [(f"  {name}", how) for name, how in self.products.items()]
        device_types = next(iter(self.operators.values()))
        rows += [("operators", "".join(f"{name:<12}" for name in device_types))]
        rows += [
            (f"  {operator}", "".join(f"{name:<12}" for name in by_device.values()))
            for operator, by_device in self.operators.items()
        ]
        width = max(18, *(len(name) + 2 for name, _ in rows))
        return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


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
    versions["torch"] = str(
        torch.__version__
    )  # with the CUDA version, which metadata may leave out
    if (compiler := backends.native_cpu.compiler()) is not None:
        versions["native kernels"] = compiler
    return Info(
        versions=versions,
        backends={name: b.unavailable() for name, b in backends.BACKENDS.items()},
        requested=backends.requested(),
        operators=backends.who_computes(),
        threads=torch.get_num_threads(),
        products=backends.native_cpu.products.routes(),
    )
