import importlib.util
import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run on the CPU, in Triton's interpreter. It is now or never:
# Triton decides when it is imported.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_cuda

import noisyq_fast
from noisyq_fast.backends import BACKENDS

BACKENDS["emulated-cuda"] = emulated_cuda.PACKAGE.backend

# How long an example takes says nothing on a machine that runs other tests too.
hypothesis.settings.register_profile("noisyq", deadline=None)
hypothesis.settings.load_profile("noisyq")


def pytest_configure(config):
    # The interpreter computes in NumPy, which warns of the values that these tests are about.
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning:triton")


# The backends that take the tensors of most tests; tests/test_gpu*.py are about the others.
ON_CPU = [name for name, backend in BACKENDS.items() if backend.takes("cpu")]


@pytest.fixture(params=ON_CPU)
def backend(request):
    """Runs a test once on each backend; one that cannot be used here is skipped with its reason."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpu", "reference"])
def exact_backend(request):
    """The same for products of codes, without the backends that take long on the CPU."""
    if BACKENDS[request.param].unavailable() is not None:
        pytest.skip(f"{request.param}: {BACKENDS[request.param].unavailable()}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    """Runs a test once on each backend of a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def no_waiting():
    """PyTorch raises where it would make the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


LEARNED = [name for name in ON_CPU if "fake_quantize_learned" in BACKENDS[name].functions]


@pytest.fixture(params=LEARNED)
def learned_backend(request):
    """The same for the operators of quantizers that learn, which some backends leave out."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["float", "integer"])
def both_arithmetics(request, monkeypatch):
    """What `quantize_model_` takes by default."""
    defaults = noisyq_fast.quantize_model_.__kwdefaults__
    monkeypatch.setitem(defaults, "arithmetic", request.param)
    yield
    torch.compiler.reset()  # which has a limit of compilations for all tests together


def pytest_collectstart(collector):
    # What a module draws when it is imported must not depend on the modules before it.
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
