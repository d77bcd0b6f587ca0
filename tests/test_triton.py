"""What is particular to the Triton backend: how it is imported and chosen, and how it tiles."""

import os
import subprocess
import sys

import pytest
import torch
from strategies import DTYPES

from noisyq_fast.backends import geometry, reference, triton
from noisyq_fast.backends import select as select_backend

DEVICE = "cpu" if triton.INTERPRETED else "cuda"

usable = pytest.mark.skipif(triton.unavailable() is not None, reason=str(triton.unavailable()))

# Tiles of a few elements, so that small tensors are walked in every way: by programs that share a
# channel, by one program in a loop, and by one in a single tile.
MACHINES = [
    geometry.Machine(processors=1, on_chip=32, streamed=16),
    geometry.Machine(processors=4, on_chip=32, streamed=8),
]
SHAPES = [(), (3,), (50,), (3, 40), (2, 5, 3, 3), (40, 2)]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_machines_walk_in_every_way():
    tilings = [
        geometry.absmax_tiling(layout, 4, machine)
        for machine in MACHINES
        for layout in [(1, 1, 3), (1, 3, 40), (2, 5, 9)]
    ]
    assert {(t.tiles > 1, t.splits > 1) for t in tilings} == {
        (False, False),
        (True, False),
        (True, True),
    }


@usable
@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_tiles(dtype, shape, machine, monkeypatch):
    monkeypatch.setattr(triton, "_machine", lambda device: machine)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    for axis in (None, 0, 1)[: x.dim() + 1]:
        expected, actual = (operators(backend, x, axis) for backend in (reference, triton))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def operators(backend, x, axis, qmax=7):
    """All that the operators compute, from a range smaller than the absmax."""
    running = torch.full([] if axis is None else [x.shape[axis]], 0.7, device=x.device)
    codes, scale = backend.quantize(x, qmax, axis)
    results = [codes, scale, backend.dequantize(codes, scale, axis)]
    results += backend.fake_quantize_clipped(x, running, qmax, axis)
    results += [backend.fake_quantize_ema(x, running, qmax, axis, 0.3), running.clone()]
    for start in (running, torch.full_like(running, float("nan"))):
        y, clipped = backend.fake_quantize_delayed(x, start, qmax, axis, 0.3, True)
        results += [y, clipped, start, backend.zero_clipped(x, clipped)]
    return results


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import noisyq_fast, torch\n"
        "noisyq_fast.fake_quantize(torch.ones(2), 4)\n"
        "print(noisyq_fast.info().backends['triton'])"
    )
    assert "Triton does not work (" in python(code, TRITON_INTERPRET="1")


def test_triton_is_imported_where_it_computes_and_not_before():
    code = (
        "import sys, noisyq_fast, torch\n"
        "noisyq_fast.fake_quantize(torch.ones(2), 4)\n"
        "print('noisyq_fast.backends.triton_kernels' in sys.modules)"
    )
    assert python(code) == "False\n"


@pytest.mark.skipif(not triton.INTERPRETED, reason="the interpreter is off")
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_interpreter_is_not_chosen_by_itself(device_type, monkeypatch):
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(f"noisyq_fast.backends.{name}.unavailable", lambda: "not now")
    monkeypatch.setattr("noisyq_fast.backends._selected", {})
    assert select_backend(device_type) is reference
