"""The CUDA kernels as far as a machine without a GPU can tell: they compile for every architecture
that is named, without spills and without fused multiply-adds; their grids have sizes that fit; and
emulated they compute what the reference computes, within their tensors.

The tests of the operators run on the emulator too (the `backend` fixture)."""

import re
import shutil
import subprocess
from functools import partial, partialmethod
from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch
from assert_same import assert_same
from every_operator import every_learned_operator, every_operator, every_operator_on_grid, operators
from guarded_memory import guarded, guarded_like
from memory_layouts import TENSORS
from strategies import DTYPES, VALUES
from torch.utils._python_dispatch import TorchDispatchMode

from noisyq_fast import Grid
from noisyq_fast.backends import reference
from noisyq_fast.backends.native_cuda.blocks import (
    DeviceLimits,
    resident_blocks,
    splits_of_map,
    splits_of_reduction,
)
from noisyq_fast.backends.reference.masks import MASKED, NOTHING
from noisyq_fast.grid import AFFINE, FULL, SIGNED, UNSIGNED
from noisyq_fast.rules import Rule

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
KERNELS = sorted(path.name for path in SOURCES.glob("*.cu"))
OPTIONS = ["-std=c++17", "-O3", "-fmad=false"]
ARCHITECTURES = (80, 90, 100)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def nvcc(*arguments):
    result = subprocess.run(["nvcc", *OPTIONS, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS)
def test_machine_code_has_no_spills_and_few_registers(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    report = nvcc("-Xptxas", "-v", "-c", *targets, SOURCES / source, "-o", tmp_path / "out.o")
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in report
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert spills
    assert set(spills) == {"0"}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    # 65,536 registers a multiprocessor hold 4 blocks of 256 threads even at 64 a thread.
    assert max(registers) <= 64


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS)
def test_arithmetic_is_ieee_and_accesses_are_wide(source, tmp_path):
    nvcc("-ptx", "-arch=compute_80", SOURCES / source, "-o", tmp_path / "out.ptx")
    ptx = (tmp_path / "out.ptx").read_text()
    assert "fma.rn.f32" not in ptx
    assert "div.rn.f32" in ptx
    assert "div.approx" not in ptx
    assert ".ftz" not in ptx
    assert "cvt.rni.f32.f32" in ptx
    assert re.search(r"ld\.global\.v4\.[buf]32", ptx)
    assert re.search(r"st\.global\.v4\.[buf]32", ptx)


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("channels", [1, 2, 3, 64, 100_000])
@pytest.mark.parametrize("channel_bytes", [2, 16_383, 16_384, 16_385, 8 << 20, 1 << 40])
def test_blocks_fill_the_device_and_have_work(channel_bytes, channels, multiprocessors):
    sizes = channel_bytes, channels, DeviceLimits(multiprocessors)
    reduction, map_ = splits_of_reduction(*sizes), splits_of_map(*sizes)
    with_work, with_full_loads = -(-channel_bytes // 4096), -(-channel_bytes // 8192)
    assert 1 <= reduction <= with_work
    # One fewer would leave room on the device, or is as many as have work.
    assert channels * reduction >= 8 * multiprocessors or reduction == with_work
    # More only where each has full loads, and not without an end.
    assert reduction <= map_ <= max(reduction, with_full_loads)
    assert channels * map_ >= 64 * multiprocessors or map_ in (reduction, with_full_loads)
    assert channels * map_ < 2**31


@pytest.mark.parametrize("multiprocessors", [13, 132])
@pytest.mark.parametrize("tensor_bytes", [1, 16_384, 16_385, 200_000, 2 << 20])
def test_resident_blocks_all_run_at_once_and_keep_the_tensor(tensor_bytes, multiprocessors):
    limits = DeviceLimits(multiprocessors, kept_bytes=226 << 10)
    blocks = resident_blocks(tensor_bytes, limits)
    # A cooperative launch needs every block on the device; one that is alone has no work to share.
    assert 1 <= blocks <= multiprocessors
    assert blocks == multiprocessors or blocks == -(-tensor_bytes // 8192)
    packs = -(-tensor_bytes // 16)
    assert -(-packs // blocks) * 16 <= limits.kept_bytes


@pytest.mark.parametrize(
    "limits", [DeviceLimits(132), DeviceLimits(1, kept_bytes=226 << 10)], ids=str
)
def test_a_tensor_that_does_not_fit_on_chip(limits):
    assert resident_blocks(20 << 20, limits) is None


# The emulator runs the kernels themselves. These limits make it walk in every way: one block or
# several for a channel, on chip and not, in shares that 16-byte accesses fit and do not.
LIMITS = [
    DeviceLimits(1, access_bytes=8),
    DeviceLimits(4, access_bytes=8),
    DeviceLimits(4, access_bytes=16, kept_bytes=64),
    DeviceLimits(3, access_bytes=64, kept_bytes=1 << 16),
]
SHAPES = [(), (3,), (64,), (3, 40), (70, 2), (2, 5, 3, 3), (4, 3, 2, 8), (2, 8, 3, 3)]


@pytest.fixture
def emulated():
    reason = emulated_cuda.PACKAGE.backend.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return emulated_cuda.PACKAGE


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operator_however_it_is_launched(emulated, dtype, shape, limits, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: limits)
    x = torch.randn(shape).to(dtype)
    tensors = [x] if x.dim() < 4 else [x, x.to(memory_format=torch.channels_last)]
    if x.numel() > 1:
        tensors.append(x.flatten()[1:])  # not aligned
    for x in tensors:
        for axis in (None, 0, 1)[: x.dim() + 1]:
            expected = every_operator(reference, x, axis)
            assert_same(every_operator(emulated, x, axis), expected)


@pytest.mark.parametrize("limits", LIMITS[::3], ids=str)
@pytest.mark.parametrize("shape", [(), (64,), (70, 2), (2, 5, 3, 3), (4, 3, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_however_it_is_launched(emulated, dtype, shape, limits, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: limits)
    x = torch.randn(shape).to(dtype)
    arguments = [(x, axis) for axis in (None, 0, 1)[: x.dim() + 1]]
    arguments += [(x.flatten()[1:], None)] if x.numel() > 1 else []  # not aligned
    arguments += [(x.to(memory_format=torch.channels_last), 1)] if x.dim() == 4 else []
    for x, axis in arguments:
        actual, expected = (
            every_learned_operator(operators(module.backend), x, axis)
            for module in (emulated, reference)
        )
        assert_same(actual, expected)


KINDS = [SIGNED, FULL, UNSIGNED, AFFINE]
GRIDS = [Grid(4, AFFINE), Grid(8, UNSIGNED), Grid(3, FULL), Grid(8, AFFINE)]


@pytest.mark.parametrize("limits", LIMITS[::3], ids=str)
@pytest.mark.parametrize("shape", [(), (3, 40), (17, 2), (2, 5, 3, 3), (4, 3, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_grid_however_it_is_launched(emulated, dtype, shape, limits, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: limits)
    x = torch.randn(shape).to(dtype)
    arguments = [(x, axis) for axis in (None, 0, 1)[: x.dim() + 1]]
    arguments += [(x.flatten()[1:], None)] if x.numel() > 1 else []  # not aligned
    arguments += [(x.to(memory_format=torch.channels_last), 1)] if x.dim() == 4 else []
    for i, (x, axis) in enumerate(arguments):
        grid = GRIDS[(i + DTYPES.index(dtype) + LIMITS.index(limits)) % len(GRIDS)]
        expected = every_operator_on_grid(reference, x, axis, grid)
        assert_same(every_operator_on_grid(emulated, x, axis, grid), expected)


@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_grid_of_values_that_break_quantizers(emulated, kind, values, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: LIMITS[0])
    rng = np.random.default_rng(0)
    for bits, dtype, axis in zip((2, 4, 8), DTYPES, (0, None, 1), strict=True):
        with np.errstate(over="ignore"):
            x = np.asarray(values(rng, (4, 4), Grid(bits).qmax), np.float32)
        x = torch.from_numpy(x * np.float32([[1], [-1], [1], [-1]])).to(dtype)
        expected = every_operator_on_grid(reference, x, axis, Grid(bits, kind))
        assert_same(every_operator_on_grid(emulated, x, axis, Grid(bits, kind)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_that_are_given(emulated, kind):
    """Of any sign, upside down, without a width, not finite."""
    ends = [-2.0, -1e-45, 0.0, 1e-45, 0.7, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
    low, high = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends)).T.contiguous()
    grid = Grid(8, kind)
    ranges = torch.stack([low, high]) if grid.is_affine else high
    x = torch.randn(len(high), 3) * torch.tensor([1, 1e-40, 1e38])
    arguments = x, ranges, grid, 0, "clipped"
    expected = reference.fake_quantize_fixed_range_on_grid(*arguments)
    assert_same(emulated.fake_quantize_fixed_range_on_grid(*arguments), expected)


@pytest.mark.parametrize("limits", [DeviceLimits(132), DeviceLimits(4, 226 << 10)], ids=str)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_sizes_as_on_a_gpu(emulated, make, limits, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: limits)
    x = make(torch.randn)
    for axis in (None, *range(x.dim())):
        if axis is None or x.shape[axis] <= 5000:  # The emulator takes 0.1 ms for each block.
            assert_same(every_operator(emulated, x, axis), every_operator(reference, x, axis))


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_grids_of_sizes_as_on_a_gpu(emulated, make, monkeypatch):
    monkeypatch.setattr(emulated.launch, "_limits", lambda device: DeviceLimits(132))
    x, grid = make(torch.randn), GRIDS[0]
    for axis in (None, *range(x.dim())):
        if axis is None or x.shape[axis] <= 1000:
            for masked in MASKED[::2]:
                actual, expected = (
                    backend.fake_quantize_on_grid(x, grid, axis, masked)
                    for backend in (emulated, reference)
                )
                assert_same(actual, expected)


@pytest.mark.parametrize("place", ["before a page that is not there", "after one"])
@pytest.mark.parametrize("shape", [(3,), (64,), (3, 41), (70, 2), (2, 5, 3, 3), (4, 3, 2, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_a_tensor_is_touched(emulated, dtype, shape, place, monkeypatch):
    """Whatever reads or writes there ends the process."""
    at_end = place == "before a page that is not there"
    monkeypatch.setattr(torch, "empty_like", partial(guarded_like, at_end=at_end))
    monkeypatch.setattr(torch.Tensor, "new_empty", partialmethod(guarded, at_end=at_end))
    x = torch.empty_like(torch.empty(shape, dtype=dtype)).copy_(torch.randn(shape))
    for axis in (None, 0, 1)[: x.dim() + 1]:
        every_operator(emulated, x, axis)
        every_operator_on_grid(emulated, x, axis, GRIDS[0])
        every_learned_operator(emulated.learned, x, axis, ["qil_odd"])


@pytest.mark.parametrize("size", [13_001, 13_008])
def test_channels_that_do_not_fit_on_chip(emulated, size):
    x = torch.randn(2, size)
    assert_same(every_operator(emulated, x, 0), every_operator(reference, x, 0))
    expected = every_operator_on_grid(reference, x, 0, GRIDS[0])
    assert_same(every_operator_on_grid(emulated, x, 0, GRIDS[0]), expected)


@pytest.mark.parametrize(("shape", "axis"), [((12_300, 2), 0), ((2, 12_300), 1), ((12_300, 8), 0)])
def test_maxima_that_do_not_fit_on_chip(emulated, shape, axis):
    x = torch.randn(shape)
    ranges = [torch.linspace(0, 1, 12_300) for _ in range(2)]
    actual, expected = (
        backend.fake_quantize_ema(x, running, None, 7, axis, 0.3)
        for backend, running in zip((emulated, reference), ranges, strict=True)
    )
    assert_same(actual, expected)
    assert_same(*ranges)


def test_more_tensors_than_one_launch_takes(emulated):
    tensors = [torch.randn(1 + i % 3, 1 + i * 37 % 101) for i in range(200)]
    arguments = tensors, [7] * 200, [0] * 200
    actual, expected = (b.fake_quantize_many(*arguments) for b in (emulated, reference))
    assert_same(actual, expected)


@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.__name__)
def test_ranges_over_batches(emulated, values):
    """Of progress that is used again, as on one stream."""
    rng = np.random.default_rng(0)
    ranges = [torch.full((6,), float("nan")) for _ in range(2)]
    for i in range(4):
        with np.errstate(over="ignore"):
            x = torch.from_numpy(np.asarray(values(rng, (6, 50), 7), np.float32)) * (i + 1)
        actual, expected = (
            backend.fake_quantize_ema(x, running, None, 7, 0, 0.3)
            for backend, running in zip((emulated, reference), ranges, strict=True)
        )
        assert_same(actual, expected)
        assert_same(*ranges)


def test_progress_is_left_as_it_was_found(emulated, monkeypatch):
    counts = torch.zeros(15, dtype=torch.int32)
    for part in (emulated.signed, emulated.grids):
        monkeypatch.setattr(part, "progress", lambda device, size: counts)
    for _ in range(3):
        running = torch.tensor([0.5, float("nan"), 0.1, float("nan"), 2.0])
        emulated.fake_quantize_ema(torch.randn(20, 5, 3), running, None, 7, 1, 0.3)
        assert counts.tolist() == [0] * 15
        x = torch.randn(20, 5, 3)
        results = [backend.quantize_on_grid(x, GRIDS[0], 1) for backend in (emulated, reference)]
        assert_same(*results)
        assert counts.tolist() == [0] * 15


class Launches:
    """The kernels, and the names of those that were called."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.names = []

    def __getattr__(self, name):
        self.names.append(name)
        return getattr(self.kernels, name)


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize(("shape", "together"), [((6, 8), True), ((5, 9), False)])
def test_contiguous_channels_take_one_launch(emulated, masked, shape, together, monkeypatch):
    """Groups and tokens, unless channels share a byte of the mask."""
    launches = Launches(emulated.launch.kernels)
    monkeypatch.setattr(emulated.launch, "kernels", launches)
    emulated.fake_quantize_on_grid(torch.randn(shape), GRIDS[0], 0, masked)
    emulated.quantize_on_grid(torch.randn(shape), GRIDS[0], 0)
    fake_quantize = (
        "fake_quantize_channels_on_grid"
        if together or masked == NOTHING
        else "fake_quantize_on_grid"
    )
    assert launches.names == [fake_quantize, "quantize_channels_on_grid"]


class Calls(TorchDispatchMode):
    """The names of PyTorch's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_pytorch_only_allocates(emulated, axis):
    """The kernels do all else. Counters of blocks are zeros, once for each stream on a GPU."""
    x = torch.randn(3, 5, 7)
    running, observed = torch.ones(2, *([] if axis is None else [x.shape[axis]]))
    ends = torch.stack([-running, running])
    codes, scale = emulated.quantize(x, 7, axis)
    parameters, rule = running.unsqueeze(0), Rule("lsq", -8, 7)
    with Calls() as calls:
        emulated.fake_quantize(x, 7, axis)
        emulated.fake_quantize_many([x, x], [7, 7], [axis, None])
        emulated.fake_quantize_ema(x, running, observed, 7, axis, 0.3)
        emulated.fake_quantize_fixed_range(x, running, 7, axis)
        _, clipped = emulated.fake_quantize_fixed_range_clipped(x, running, 7, axis)
        emulated.zero_clipped(x, clipped)
        emulated.quantize(x, 7, axis)
        emulated.dequantize(codes, scale, axis)
        emulated.fake_quantize_on_grid(x, GRIDS[0], axis, "clipped")
        emulated.fake_quantize_ema_on_grid(x, ends, observed, GRIDS[0], axis, 0.3, "nothing")
        emulated.fake_quantize_fixed_range_on_grid(x, ends, GRIDS[0], axis, "negative")
        codes, scale, zero_point = emulated.quantize_on_grid(x, GRIDS[0], axis)
        emulated.dequantize_on_grid(codes, scale, zero_point, axis)
        emulated.learned.fake_quantize_learned(x, parameters, rule, axis)
        emulated.learned.quantize_learned(x, parameters, rule, axis)
        if axis != 1:  # channels that are spread are copied
            emulated.learned.fake_quantize_learned_backward(x, x, parameters, rule, axis, 0.3)
    assert calls.names - {"zeros"} == {"empty_like", "new_empty"}


def test_a_launch_that_fails_names_the_kernel_the_shape_and_the_device(emulated, monkeypatch):
    # More blocks than the emulator has multiprocessors cannot all run at once.
    monkeypatch.setattr(
        emulated.launch, "_limits", lambda device: DeviceLimits(5, 1 << 16, access_bytes=1)
    )
    running = torch.tensor(1.0)
    with pytest.raises(RuntimeError) as error:
        emulated.fake_quantize_ema(torch.ones(7, 11), running, None, 7, None, 0.3)
    assert str(error.value) == (
        "noisyq_fast: fake_quantize_resident of a torch.float32 tensor of shape [7, 11] could not "
        "be launched on cpu: too many blocks in cooperative launch"
    )
    assert running == 1
