"""The backend `cuda` without a GPU: its kernels, compiled for the host, run in `cuda_emulator`.

Everything else is what runs on a GPU: the backend's package, the bindings, the kernels' sources.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import filelock
import pybind11

from noisyq_fast.backends.native_cuda.blocks import DeviceLimits

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
SOURCES = [
    EMULATOR / "emulator.cpp",
    ROOT / "csrc" / "bindings_cuda.cpp",
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"),
    # As on a GPU a misaligned access ends the process; so does what else is undefined in C++.
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
    # Fortified, longjmp() refuses to change stacks.
    "-U_FORTIFY_SOURCE",
]

# Small, so that tensors of a few elements are shared by several blocks. The emulator runs at most 4
# blocks of a cooperative launch at once.
LIMITS = DeviceLimits(multiprocessors=4, kept_bytes=64, access_bytes=8)


def make_package() -> ModuleType:
    """The package of the backend `cuda`, once more, for tensors on the CPU."""
    package = imported_again("noisyq_fast.backends.native_cuda")
    package.launch._limits = lambda device: LIMITS
    package.launch._stream = lambda device: 0

    @cache
    def unavailable() -> str | None:
        name = os.environ.get("CXX", "c++")
        compiler = shutil.which(name)
        if compiler is None:
            return f"the emulator needs a C++ compiler, and there is none named {name}"
        package.launch.kernels = load(build(compiler)).cuda
        return None

    package.backend.name = "emulated-cuda"
    package.backend.device_types = ("cpu",)
    package.backend.unavailable = unavailable
    package.backend.automatic = False
    return package


def imported_again(name: str) -> ModuleType:
    """A second copy of a package that is imported already, and of all its modules."""
    parent, _, child = name.rpartition(".")
    with mock.patch.dict(sys.modules), mock.patch.object(sys.modules[parent], child):
        for module in [key for key in sys.modules if f"{key}.".startswith(f"{name}.")]:
            del sys.modules[module]
        return importlib.import_module(name)


def build(compiler: str) -> Path:
    """The compiled emulator, made anew where a source has changed."""
    includes = [EMULATOR, ROOT / "csrc", sysconfig.get_paths()["include"], pybind11.get_include()]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    read = sorted([*(ROOT / "csrc").rglob("*.*"), *EMULATOR.iterdir()])
    contents = b"".join(path.read_bytes() for path in read)
    name = sha256(contents + " ".join([compiler, sys.version, *flags]).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    with filelock.FileLock(folder / "lock"):  # the tests run in several processes
        if not library.exists():
            for outdated in folder.glob("*.so"):
                outdated.unlink()
            with TemporaryDirectory(dir=folder) as scratch:
                link(compiler, flags, Path(scratch)).rename(library)
    return library


def link(compiler: str, flags: list[str], folder: Path) -> Path:
    def compile(source: Path) -> Path:
        made = folder / f"{source.name}.o"
        run(compiler, *flags, "-x", "c++", "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, SOURCES))
    library = folder / "emulated.so"
    run(compiler, "-shared", *flags, *objects, "-o", library)
    return library


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator of CUDA does not compile:\n{done.stderr[:4000]}")


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKAGE = make_package()
