"""What is particular to the Triton backend: how it is imported and chosen, and how it tiles."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assert_same import assert_same
from every_operator import every_code_on_grid, every_operator, every_operator_on_grid
from strategies import DTYPES, VALUES

import noisyq_fast
from noisyq_fast import Grid
from noisyq_fast.backends import BACKENDS, on_triton, reference
from noisyq_fast.backends.native_cuda.blocks import progress
from noisyq_fast.backends.on_triton import grid_launches, launch
from noisyq_fast.backends.on_triton.tiling import TileLimits, absmax_tiling
from noisyq_fast.backends.reference.masks import CLIPPED, MASKED, NOTHING
from noisyq_fast.grid import AFFINE, FULL, SIGNED, UNSIGNED

DEVICE = "cpu" if on_triton.INTERPRETED else "cuda"

usable = pytest.mark.skipif(
    on_triton.unavailable() is not None, reason=str(on_triton.unavailable())
)

# Tiles of a few elements, so that small tensors are walked in every way: by programs that share a
# channel, by one program in a loop, and by one in a single tile.
LIMITS = [
    TileLimits(processors=1, on_chip=32, streamed=16),
    TileLimits(processors=4, on_chip=32, streamed=8),
]
SHAPES = [(), (3,), (50,), (3, 40), (2, 5, 3, 3), (2, 3, 2, 8), (40, 2)]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_limits_walk_in_every_way():
    tilings = [
        absmax_tiling(layout, 4, limits)
        for limits in LIMITS
        for layout in [(1, 1, 3), (1, 3, 40), (2, 5, 9)]
    ]
    assert {(t.tiles > 1, t.splits > 1) for t in tilings} == {
        (False, False),
        (True, False),
        (True, True),
    }


@usable
@pytest.mark.parametrize(
    ("dtype", "limits"),
    [*((dtype, LIMITS[0]) for dtype in DTYPES), (torch.float32, LIMITS[1])],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_the_tiles(dtype, shape, limits, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: limits)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    for axis in (None, 0, 1)[: x.dim() + 1]:
        expected, actual = (every_operator(backend, x, axis) for backend in (reference, on_triton))
        assert_same(actual, expected)


# Each kind meets tiles of both sizes, and each dtype.
GRIDS = [
    (Grid(3, FULL), torch.float16, LIMITS[0]),
    (Grid(2, FULL), torch.float32, LIMITS[1]),
    (Grid(4, UNSIGNED), torch.bfloat16, LIMITS[0]),
    (Grid(8, UNSIGNED), torch.float32, LIMITS[1]),
    (Grid(4, AFFINE), torch.float32, LIMITS[0]),
    (Grid(8, AFFINE), torch.bfloat16, LIMITS[1]),
]


@usable
@pytest.mark.parametrize(("grid", "dtype", "limits"), GRIDS, ids=str)
def test_grids_do_not_depend_on_the_tiles(grid, dtype, limits, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: limits)
    images = torch.randn(2, 3, 2, 2, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    matrix = torch.randn(2, 20, device=DEVICE).to(dtype)
    for x, axis in ((images, 1), (matrix, 0), (matrix[0, ::3], None), (matrix[:, :0], 0)):
        for every in (every_operator_on_grid, every_code_on_grid):
            expected, actual = (every(backend, x, axis, grid) for backend in (reference, on_triton))
            assert_same(actual, expected)


@usable
@pytest.mark.parametrize("kind", [SIGNED, FULL, UNSIGNED, AFFINE])
@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.__name__)
def test_grids_of_values_that_break_quantizers(values, kind):
    with np.errstate(over="ignore"):
        x = np.asarray(values(np.random.default_rng(0), (5, 13), 127), np.float32)
    x = torch.from_numpy(x).to(DEVICE)
    for every in (every_operator_on_grid, every_code_on_grid):
        expected, actual = (
            every(backend, x, 0, Grid(8, kind)) for backend in (reference, on_triton)
        )
        assert_same(actual, expected)


@usable
@pytest.mark.parametrize("kind", [SIGNED, FULL, UNSIGNED, AFFINE])
def test_ranges_that_are_given(kind):
    """Of any sign, upside down, without a width, not finite."""
    ends = [-2.0, -1e-45, 0.0, 1e-45, 0.7, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
    low, high = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends)).to(DEVICE).T
    grid = Grid(8, kind)
    ranges = torch.stack([low, high]) if kind == AFFINE else high
    x = torch.randn(len(high), 3, device=DEVICE)
    x *= torch.tensor([1.0, 1e-40, 1e38], device=DEVICE)
    for masked in (NOTHING, CLIPPED):
        for name in ("fake_quantize_fixed_range_on_grid", "quantize_fixed_range_on_grid"):
            expected, actual = (
                getattr(backend, name)(x, ranges, grid, 0, masked)
                for backend in (reference, on_triton)
            )
            assert_same(actual, expected)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    original = launch.launch

    def recorded(x, kernel, *arguments):
        names.append(kernel.fn.__name__)
        original(x, kernel, *arguments)

    monkeypatch.setattr(launch, "launch", recorded)
    return names


def model(make):
    """Weights of a small network: in one tile, in several, and with few or many channels."""
    shapes = [(9, 3, 2, 2), (9, 40), (1, 7), (20, 3), (0, 5), (5, 0), (), (3, 1), (8, 17)]
    dtypes = [DTYPES[i % len(DTYPES)] for i in range(len(shapes))]
    weights = [
        make(shape).to(dtype).to(DEVICE) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    weights.append(weights[0].to(memory_format=torch.channels_last))
    weights.append(weights[1][:, 1::2])
    qmaxes = [127, *[7, 1, 3] * 3, 127]
    axes = [None if x.dim() == 0 else 0 for x in weights]
    return weights, qmaxes, axes


@usable
@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.__name__)
def test_all_weights_of_a_model_take_one_launch(values, launches, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: LIMITS[0])
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        arguments = model(
            lambda shape: torch.from_numpy(np.asarray(values(rng, shape, 7), np.float32))
        )
    actual = on_triton.fake_quantize_many(*arguments)
    assert launches == ["quantize_channels"]
    assert_same(actual, reference.fake_quantize_many(*arguments))


@usable
def test_tensors_whose_channels_programs_share_take_their_own_launches(launches, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: LIMITS[0])
    weights, qmaxes, axes = model(torch.randn)
    shared = [torch.randn(100, device=DEVICE), torch.randn(20, 30, device=DEVICE)]
    arguments = [*weights, *shared], [*qmaxes, 7, 127], [*axes, None, 1]
    actual = on_triton.fake_quantize_many(*arguments)
    assert launches == [*["reduce_partially", "quantize_reduced"] * 2, "quantize_channels"]
    assert_same(actual, reference.fake_quantize_many(*arguments))


@usable
@pytest.mark.parametrize("masked", MASKED)
def test_a_mask_takes_a_launch_more(masked, launches, monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda device: LIMITS[0])
    last = [] if masked == NOTHING else ["quantize_masked"]
    for shape, first in (
        ((2, 9), ["quantize_tensor"]),
        ((2, 100), ["reduce_partially", "quantize_reduced"]),
    ):
        x = torch.randn(shape, device=DEVICE)
        on_triton.fake_quantize_on_grid(x, Grid(4, "affine"), 0, masked)
        assert launches == [*first, *last]
        launches.clear()


@usable
def test_more_tensors_than_one_launch_takes(launches, monkeypatch):
    monkeypatch.setattr(grid_launches, "_TENSORS_PER_LAUNCH", 4)
    arguments = model(torch.randn)
    weights, _, _ = arguments
    assert sum(x.numel() > 0 for x in weights) == 9
    actual = on_triton.fake_quantize_many(*arguments)
    assert launches == ["quantize_channels"] * 3
    assert_same(actual, reference.fake_quantize_many(*arguments))


def test_a_launch_that_fails_names_the_kernel_the_shape_and_the_device():
    def too_large(*arguments, **options):
        raise ValueError("out of resource: shared memory")

    class Kernel:
        fn = SimpleNamespace(__name__="dequantize")

        def __getitem__(self, grid):
            return too_large

    with pytest.raises(RuntimeError) as error:
        launch.launch(torch.ones(7, 11), Kernel(), (1,), 4)
    assert str(error.value) == (
        "noisyq_fast: dequantize of a torch.float32 tensor of shape [7, 11] could not be launched "
        "on cpu: out of resource: shared memory"
    )


def test_progress_belongs_to_a_stream_or_to_a_graph(monkeypatch):
    device, streams = torch.device("cuda", 0), [SimpleNamespace(cuda_stream=object()) for _ in "ab"]
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: object())

    def counts(stream, is_capturing):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
        return progress(device, 2)

    one, other = (counts(stream, False) for stream in streams)
    assert one is not other
    assert counts(streams[0], False) is one
    captured = counts(streams[0], True)
    assert captured not in (one, other, counts(streams[0], True))


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
        "print('noisyq_fast.backends.on_triton.grid_kernels' in sys.modules)"
    )
    assert python(code) == "False\n"


@pytest.mark.skipif(not on_triton.INTERPRETED, reason="the interpreter is off")
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_interpreter_is_not_chosen_by_itself(device_type, monkeypatch):
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda: "not now")
    with noisyq_fast.use_backend("auto"):
        assert noisyq_fast.current_backend(device_type) == "reference"
