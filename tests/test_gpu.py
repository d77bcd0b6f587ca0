"""What only a GPU can show of operators: streams, graphs, and that nothing waits."""

import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from assert_same import assert_same
from captured import captured
from every_operator import EVERY, operators
from memory_layouts import TENSORS, channels_last
from strategies import DTYPES, VALUES

import noisyq_fast
from noisyq_fast import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)
from noisyq_fast.backends import BACKENDS
from noisyq_fast.grid import AFFINE, FULL, UNSIGNED
from noisyq_fast.operators.learned import fake_quantize_learned, quantize_learned

pytestmark = pytest.mark.usefixtures("gpu_backend")

DEVICE = "cuda"
UNSEEN = float("nan")


def range_for(x, axis):
    """Smaller than the absmax, so that an evaluation clips."""
    return torch.full([] if axis is None else [x.shape[axis]], 1.25, device=x.device)


# Operators of a tensor and of a range that fits it, as functions of both and of an axis.
OPERATORS = {
    "fake_quantize": lambda x, r, axis: fake_quantize(x, 4, axis),
    "fake_quantize_many": lambda x, r, axis: fake_quantize_many([x, 2 * x, x.half()], 3, axis),
    "fake_quantize_ema": lambda x, r, axis: fake_quantize_ema(x, r, 4, axis, 0.3),
    "with observed": lambda x, r, axis: fake_quantize_ema(
        x, r, 4, axis, 0.3, observed=torch.full_like(r, 0.25)
    ),
    "evaluation": lambda x, r, axis: fake_quantize_ema(x, r, 4, axis, training=False),
    "evaluation, clipped": lambda x, r, axis: fake_quantize_ema(
        x, r, 4, axis, training=False, ste="clipped"
    ),
    "quantize": lambda x, r, axis: quantize(x, 8, axis),
    "dequantize": lambda x, r, axis: dequantize(x.to(torch.int8), r, axis),
    "learned": lambda x, r, axis: fake_quantize_learned(x, r.unsqueeze(0), "lsq", -8, 7, axis),
    "learned, codes": lambda x, r, axis: quantize_learned(x, r.unsqueeze(0), "sat", 0, 15, axis),
}


def operators_on_grid(kind):
    def ema(x, r, axis, **options):
        range_ = torch.stack([-r, r]) if kind == AFFINE else r
        return fake_quantize_ema(x, range_, 4, axis, 0.3, grid=kind, **options), range_

    def codes_and_values(x, r, axis):
        codes, scale, *zero_point = quantize(x, 8, axis, grid=kind)
        zero = {"zero_point": zero_point[0]} if zero_point else {}
        return codes, scale, *zero_point, dequantize(codes, scale, axis, **zero)

    return {
        kind: lambda x, r, axis: fake_quantize(x, 4, axis, grid=kind),
        f"{kind}, clipped": lambda x, r, axis: fake_quantize(x, 3, axis, grid=kind, ste="clipped"),
        f"{kind}, training": ema,
        f"{kind}, with observed": lambda x, r, axis: ema(
            x, r, axis, observed=torch.full_like(r, 0.25)
        ),
        f"{kind}, evaluation": lambda x, r, axis: ema(x, r, axis, training=False),
        f"{kind}, evaluation, clipped": lambda x, r, axis: ema(
            x, r, axis, training=False, ste="clipped"
        ),
        f"{kind}, codes and values": codes_and_values,
    }


for kind in (FULL, UNSIGNED, AFFINE):
    OPERATORS |= operators_on_grid(kind)
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def results(operator, x, axis):
    """All that an operator computes: its outputs, the range after it, and a gradient."""
    running = range_for(x, axis)
    leaf = x.detach().requires_grad_()
    outputs = operator(leaf, running, axis)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if outputs[0].requires_grad:
        outputs += torch.autograd.grad(outputs[0].sum(), leaf)
    return [*outputs, running]


def assert_like_reference(x, axis):
    for operator in OPERATORS.values():
        with noisyq_fast.use_backend("reference"):
            expected = results(operator, x, axis)
        actual = results(operator, x, axis)
        assert_same(actual, expected)
        assert [y.stride() for y in actual] == [y.stride() for y in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_equals_the_reference(make, dtype):
    x = make(partial(torch.randn, dtype=dtype, device=DEVICE))
    for axis in [None, *range(x.dim())]:
        assert_like_reference(x, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.__name__)
def test_equals_the_reference_on_values_that_break_quantizers(values, dtype):
    with np.errstate(over="ignore"):
        x = np.asarray(values(np.random.default_rng(0), (6, 1000), 7), np.float32)
    x = torch.from_numpy(x).to(DEVICE, dtype)
    for axis in (None, 0, 1):
        assert_like_reference(x, axis)


@each_operator
def test_equals_the_cpu(operator):
    x = channels_last(torch.randn(8, 12, 15, 17))
    with noisyq_fast.use_backend("reference"):
        expected = results(operator, x, 1)
    assert_same([y.cpu() for y in results(operator, x.to(DEVICE), 1)], expected)


@pytest.mark.parametrize("family", EVERY)
def test_every_operator_equals_the_cpu(gpu_backend, family):
    found = []
    for name, device in (("reference", "cpu"), (gpu_backend, DEVICE)):
        torch.manual_seed(0)
        outputs = EVERY[family](operators(BACKENDS[name]), device)
        found.append([y.cpu() for y in outputs])
    assert_same(*found)


def test_more_than_2_to_the_31_elements():
    shape, needed = (2, 2**30 + 50), 16 << 30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, got {free >> 30}")
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0], x[1, -2], x[1, -1] = -1.2, 2.4, 7.0
    for axis, first in ((None, -1), (0, -7)):
        codes, scale = quantize(x, 4, axis)
        assert scale.flatten()[-1] == 1
        assert codes[1, -3:].tolist() == [0, 2, 7]
        assert codes[0, :2].tolist() == [first, 0]
        del codes
        running = range_for(x, axis)
        y = fake_quantize_ema(x, running, 4, axis, averaging_constant=1.0)
        assert y[1, -3:].tolist() == [0, 2, 7]
        assert running.flatten()[-1] == 7
        del y
    torch.cuda.empty_cache()


@each_operator
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_never_waits_for_the_device(operator, axis, no_waiting):
    results(operator, torch.ones(6, 5, 8, device=DEVICE).transpose(1, 2)[1:], axis)
    results(operator, torch.ones(64, 5, 8, device=DEVICE), axis)


def test_an_unseen_range_in_evaluation_gives_nan(no_waiting):
    x, unseen = torch.ones(5, device=DEVICE), torch.full((), UNSEEN, device=DEVICE)
    outputs = [
        fake_quantize_ema(x, unseen, 4, training=False, ste=ste) for ste in ("identity", "clipped")
    ]
    torch.cuda.set_sync_debug_mode("default")
    for y in outputs:
        assert y.isnan().all()


@each_operator
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_replayed_operator_computes_anew(operator, axis):
    x = torch.randn(16, 24, 31, device=DEVICE)
    running = range_for(x, axis)
    graph, outputs = captured(lambda: operator(x, running, axis))
    if operator is OPERATORS["fake_quantize_ema"]:
        running.fill_(UNSEEN)
    expected_running = running.clone()
    for i in range(3):
        x.copy_(torch.randn(x.shape) * (i + 1))
        graph.replay()
        assert_same(outputs, operator(x, expected_running, axis))
        assert_same(running, expected_running)


@each_operator
def test_work_goes_to_the_current_stream(operator):
    x, new = torch.randn(2, 64, 33, device=DEVICE).unbind()
    running = range_for(x, 0)
    expected = operator(new, running.clone(), 0)
    operator(x, running.clone(), 0)  # Compiles, if anything does.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # Work on any other stream would be done before `copy_`.
        x.copy_(new)
        actual = operator(x, running, 0)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@each_operator
def test_a_second_device(operator):
    x = torch.randn(16, 24, 31)
    expected = results(operator, x.to("cuda:0"), 1)
    assert torch.cuda.current_device() == 0
    actual = results(operator, x.to("cuda:1"), 1)
    assert torch.cuda.current_device() == 0
    assert {str(y.device) for y in actual} == {"cuda:1"}
    assert_same([y.cpu() for y in actual], [y.cpu() for y in expected])


BAD_CALLS = [
    lambda x, one: fake_quantize(x.double(), 4),
    lambda x, one: fake_quantize(x.to_sparse(), 4),
    lambda x, one: fake_quantize(x, 1),
    lambda x, one: fake_quantize(x, 4.0),
    lambda x, one: fake_quantize(x, 4, 2),
    lambda x, one: fake_quantize_many([], 4),
    lambda x, one: fake_quantize_many([x, x.int()], 4),
    lambda x, one: fake_quantize_many([x], [4, 4]),
    lambda x, one: fake_quantize_many([x, x.to("meta")], 4),
    lambda x, one: fake_quantize_ema(x, one.half(), 4),
    lambda x, one: fake_quantize_ema(x, one.reshape(1), 4),
    lambda x, one: fake_quantize_ema(x, one.expand(4), 4, axis=1),
    lambda x, one: fake_quantize_ema(x, one.to("meta"), 4),
    lambda x, one: fake_quantize_ema(x, one, 4, averaging_constant=1.5),
    lambda x, one: fake_quantize_ema(x, one, 4, ste="none"),
    lambda x, one: quantize(x, 9),
    lambda x, one: dequantize(x, one),
    lambda x, one: dequantize(x.to(torch.int8), one, 0),
]


@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_those_of_the_cpu_and_come_before_a_launch(call, monkeypatch):
    monkeypatch.setattr(
        "noisyq_fast.operators.declare.select", lambda *_: pytest.fail("reached a backend")
    )
    errors = []
    for device in ("cpu", "cuda:0"):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(torch.ones(4, 5, device=device), torch.ones((), device=device))
        errors.append((caught.type, str(caught.value).replace(device, "DEVICE")))
    assert errors[0] == errors[1]


def test_a_range_on_the_wrong_device():
    with pytest.raises(ValueError, match="got a tensor on cpu, takes one on cuda:0"):
        fake_quantize_ema(torch.ones(3, device="cuda:0"), torch.tensor(1.0), 4)


SANITIZED = """
import torch
from torch import nn
from noisyq_fast import *
from noisyq_fast.operators.learned import fake_quantize_learned
for shape in ((5, 1027), (3, 20_001), (4, 6, 9, 11)):
    for dtype in (torch.float32, torch.bfloat16):
        for axis in (None, 0, 1):
            x = torch.linspace(-3, 3, torch.Size(shape).numel()).reshape(shape).to(dtype).cuda()
            running = torch.ones([] if axis is None else [shape[axis]]).cuda()
            fake_quantize_many([x, x[:2]], 4, axis)
            fake_quantize_ema(x, running, 4, axis)
            leaf = x.clone().requires_grad_()
            y = fake_quantize_ema(leaf, running, 4, axis, training=False, ste="clipped")
            y.sum().backward()
            dequantize(*quantize(x, 4, axis), axis)
            for grid in ("full", "unsigned", "affine"):
                fake_quantize(x.clone().requires_grad_(), 4, axis, grid=grid, ste="clipped")
                quantize(x, 4, axis, grid=grid)
            for rule, count in (("lsq", 1), ("sat", 1), ("qil", 2), ("dsq", 3)):
                parameters = torch.full((count, *running.shape), 0.7).cuda().requires_grad_()
                y = fake_quantize_learned(x.clone().requires_grad_(), parameters, rule, 0, 15, axis)
                y.sum().backward()
layers = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 7, 3)
model = quantize_model_(nn.Sequential(*layers), arithmetic="integer").cuda()
images = torch.linspace(-2, 2, 3 * 3 * 11 * 9).reshape(3, 3, 11, 9).cuda()
fuse_(model, images)(images).sum().backward()
linear = quantize_model_(nn.Linear(37, 29), arithmetic="integer").cuda()
linear(torch.ones(5, 37).cuda()).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(gpu_backend, tool):
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    command += ["--target-processes", "application-only"]
    if tool == "memcheck":  # PyTorch probes the driver with calls that may fail.
        command += ["--report-api-errors", "no"]
    environment = {"NOISYQ_BACKEND": gpu_backend, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(
        [*command, sys.executable, "-c", SANITIZED],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    report = run.stdout + run.stderr
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, report[-4000:]
