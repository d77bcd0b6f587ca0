"""The choice of a backend, what is said about it, and processes that fork."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import noisyq_fast
from noisyq_fast import backends


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
    monkeypatch.setattr(
        backends.reference, "fake_quantize", lambda x, qmax, axis: called.append(qmax) or x
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
        monkeypatch.setattr(backends.cpu, "unavailable", unavailable)
        thread = threading.Thread(target=backends.select, args=("cpu",))
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
    monkeypatch.setattr(backends.cpu, "unavailable", lambda: "no library")
    backends._request(backends.AUTO)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used here: no library"):
        noisyq_fast.use_backend("cpu")
    with noisyq_fast.use_backend("auto"):
        assert noisyq_fast.current_backend("cpu") == "reference"
    assert noisyq_fast.info().backends["cpu"] == "no library"
    assert "  cpu             not usable: no library" in str(noisyq_fast.info())


def test_a_device_that_the_backend_does_not_take():
    with (
        noisyq_fast.use_backend("cpu"),
        pytest.raises(ValueError, match="backend 'cpu' takes tensors on cpu, got one on cuda"),
    ):
        noisyq_fast.current_backend("cuda")


def test_environment_variable():
    code = "import noisyq_fast; print(noisyq_fast.current_backend())"
    assert run(code, NOISYQ_BACKEND="reference").stdout == "reference\n"
    assert "NOISYQ_BACKEND: got 'x', takes one of" in run(code, NOISYQ_BACKEND="x").stderr


def test_command_line_report():
    report = subprocess.run(
        [sys.executable, "-m", "noisyq_fast"], capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in report
    assert "  reference       usable" in report


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
