"""The choice of a backend, what is said about it, and processes that fork."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import emulated_cuda
import pytest
import torch

import noisyq_fast
from noisyq_fast import backends
from noisyq_fast.backends import BACKENDS, kernel_arguments
from noisyq_fast.backends.backend import Backend, Operators


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_use_backend_as_function_and_as_context_manager():
    before = backends.requested()
    with noisyq_fast.use_backend("reference"):
        assert noisyq_fast.current_backend("cpu") == "reference"
        noisyq_fast.use_backend("auto")
        assert backends.requested() == "auto"
    assert backends.requested() == before


def test_the_backend_that_is_chosen_computes(monkeypatch):
    called = []
    monkeypatch.setitem(
        BACKENDS["reference"].functions,
        "fake_quantize",
        lambda x, qmax, axis: called.append(qmax) or x,
    )
    with noisyq_fast.use_backend("reference"):
        noisyq_fast.fake_quantize(torch.ones(2), 4)
    assert called == [7]


def test_a_thread_that_is_choosing_does_not_undo_a_later_choice(monkeypatch):
    """Asked for while another thread looks for the fastest backend."""
    looks, may_go_on = threading.Event(), threading.Event()

    def unavailable():
        looks.set()
        assert may_go_on.wait(30)

    with noisyq_fast.use_backend("auto"):
        monkeypatch.setattr(BACKENDS["cpu"], "unavailable", unavailable)
        thread = threading.Thread(target=backends.select, args=("fake_quantize", "cpu"))
        thread.start()
        assert looks.wait(30)
        with noisyq_fast.use_backend("reference"):
            may_go_on.set()
            thread.join()
            assert noisyq_fast.current_backend("cpu") == "reference"


def test_unknown_names_are_refused_and_change_nothing():
    before = backends.requested()
    with pytest.raises(ValueError, match="use_backend: got 'fast', takes one of auto, cpu, cuda"):
        noisyq_fast.use_backend("fast")
    assert backends.requested() == before


def test_a_backend_that_cannot_be_used_says_why(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "no library")
    backends._request(backends.AUTO)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used here: no library"):
        noisyq_fast.use_backend("cpu")
    with noisyq_fast.use_backend("auto"):
        assert noisyq_fast.current_backend("cpu") == "reference"
    assert noisyq_fast.info().backends["cpu"] == "no library"
    assert re.search("  cpu +not usable: no library", str(noisyq_fast.info()))


def test_a_device_that_the_backend_does_not_take():
    with (
        noisyq_fast.use_backend("cpu"),
        pytest.raises(ValueError, match="backend 'cpu' takes tensors on cpu, got one on cuda"),
    ):
        noisyq_fast.current_backend("cuda")


@pytest.fixture
def partial_backend():
    """One that computes a single operator on the CPU, before all others."""
    operators = Operators()

    @operators.register
    def dequantize(codes, scale, axis):
        return torch.full_like(codes, 42.0, dtype=torch.float32)

    backend = Backend("partial", ("cpu",), unavailable=lambda: None, functions=operators)
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"partial": backend, **others})
    yield
    BACKENDS.pop("partial")


@pytest.mark.parametrize("name", ["auto", "partial"])
def test_what_a_backend_leaves_out_is_computed_by_the_next(partial_backend, name):
    with noisyq_fast.use_backend(name):
        codes, scale = noisyq_fast.quantize(torch.tensor([3.0, -7.0]), 4)
        assert codes.tolist() == [3, -7]
        assert noisyq_fast.dequantize(codes, scale).tolist() == [42, 42]
        assert noisyq_fast.current_backend("cpu", "dequantize") == "partial"
        assert noisyq_fast.current_backend("cpu", "quantize") == "cpu"
        info = noisyq_fast.info()
        assert info.operators["dequantize"]["cpu"] == "partial"
        assert info.operators["quantize"]["cpu"] == "cpu"
        assert re.search("^  dequantize +partial", str(info), re.MULTILINE)
    with noisyq_fast.use_backend("reference"):
        assert noisyq_fast.dequantize(codes, scale).tolist() != [42, 42]


def test_the_reference_computes_every_operator():
    declared = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("noisyq::")
    }
    # What chains of integer layers consist of is called without an operator.
    of_chains = {"convolve_sums", "moments", "normalization", "map_sums", "codes_of_sums"}
    of_chains |= {"grads_of_norm", "grads_of_sums", "ends_of_line", "observe", "float_steps"}
    of_chains |= {"grads_of_convolution"}
    computed = set(BACKENDS["reference"].functions)
    assert computed == declared | of_chains
    for backend in BACKENDS.values():
        assert set(backend.functions) <= computed


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match="operator: got 'relu', takes one of fake_quantize, "):
        noisyq_fast.current_backend("cpu", "relu")


def test_environment_variable():
    code = "import noisyq_fast; print(noisyq_fast.current_backend())"
    assert run(code, NOISYQ_BACKEND="reference").stdout == "reference\n"
    assert "NOISYQ_BACKEND: got 'x', takes one of" in run(code, NOISYQ_BACKEND="x").stderr


def test_command_line_report():
    report = subprocess.run(
        [sys.executable, "-m", "noisyq_fast"], capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in report
    assert "  reference " in report
    table = dict(line.split() for line in report.split("operators")[1].splitlines()[1:])
    assert table["quantize"] == "cpu"
    assert table["quantize_on_grid"] == "cpu"
    assert set(table) == set(BACKENDS["reference"].functions)


def test_command_line_report_takes_no_options():
    refused = subprocess.run(
        [sys.executable, "-m", "noisyq_fast", "--backends"], capture_output=True, text=True
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--backends" in refused.stderr


@pytest.mark.parametrize(
    ("place", "status", "errors"),
    [("/dev/full", 1, "error: standard output: No space left on device\n"), (None, 0, "")],
)
def test_command_line_report_that_cannot_be_written(place, status, errors):
    if place is None:  # a pipe whose reader has gone
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(place, os.O_WRONLY)
    with open(write, "w") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "noisyq_fast"], stdout=output, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (status, errors)


def test_import_without_the_native_library_explains_itself():
    code = (
        "import sys; sys.modules['noisyq_fast._core'] = None\n"
        "import noisyq_fast, torch\n"
        "print(noisyq_fast.current_backend(), noisyq_fast.fake_quantize(torch.ones(2), 4))\n"
        "print(noisyq_fast.info().backends['cpu'])"
    )
    output = run(code).stdout
    assert "reference tensor([1., 1.])" in output
    assert "the native library was not compiled or does not load" in output


def test_a_checkout_that_was_not_installed_can_be_imported(tmp_path):
    """Without metadata and without a compiled library."""
    shutil.copytree(Path(noisyq_fast.__file__).parent, tmp_path / "noisyq_fast")
    code = (
        "from importlib import metadata\n"
        "import sys; sys.modules['noisyq_fast._core'] = None\n"
        "def version(name, known=metadata.version):\n"
        "    if name == 'noisyq_fast': raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "import noisyq_fast, torch\n"
        "print(noisyq_fast.__file__, noisyq_fast.__version__, noisyq_fast.current_backend())\n"
        "print(noisyq_fast.info())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"{tmp_path / 'noisyq_fast'}"), done.stderr
    assert "0+unknown reference\n" in done.stdout


@pytest.mark.parametrize("backend", ["cpu", "emulated-cuda"])
def test_kernels_name_their_arguments(backend):
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(reason)
    kernels = kernel_arguments.core if backend == "cpu" else emulated_cuda.PACKAGE.launch.kernels
    functions = {name: f for name, f in vars(kernels).items() if inspect.isbuiltin(f)}
    assert "zero_clipped" in functions
    assert not [name for name, f in functions.items() if "arg0" in f.__doc__]
    with pytest.raises(TypeError, match="elements: "):
        kernels.zero_clipped(0)


@pytest.mark.parametrize("source", ["bindings.cpp", "bindings_cuda.cpp"])
def test_names_of_arguments_are_those_of_the_parameters(source):
    """In their order: called by keyword, a kernel would take another for one that is not."""
    text = (Path(__file__).parents[1] / "csrc" / source).read_text()
    bindings = [part for part in text.split("m.def(")[1:] if "[](" in part]
    assert len(bindings) > 10
    for binding in bindings:
        parameters = re.sub("<.*?>", "", binding.split("[](")[1].split(") {")[0])
        assert re.findall(r'"(\w+)"_a', binding) == re.findall(r"(\w+)(?:,|$)", parameters), binding


def test_a_forked_child_does_not_wait_for_its_parents_threads():
    code = (
        "import os, torch, noisyq_fast\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(1 << 20)\n"
        "expected = noisyq_fast.fake_quantize(x, 4)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    y = noisyq_fast.fake_quantize(x, 4)\n"
        "    os._exit(0 if y.numpy().tobytes() == expected.numpy().tobytes() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert run(code).returncode == 0
