"""The Triton kernels of products of codes and of what follows, against the specification."""

import random

import pytest
import torch
from assert_same import assert_same
from strategies import DTYPES

from noisyq_fast import Grid
from noisyq_fast.backends import on_triton, reference
from noisyq_fast.backends.on_triton import launch, products
from noisyq_fast.backends.on_triton.tiling import TileLimits
from noisyq_fast.grid import KINDS

DEVICE = "cpu" if on_triton.INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(
    on_triton.unavailable() is not None, reason=str(on_triton.unavailable())
)

DRAWS = range(8)
LIMITS = TileLimits(processors=4, on_chip=32, streamed=64)
CODES = (torch.int8, torch.uint8)


def codes(shape, dtype):
    """Half of them at their extremes."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    drawn = torch.randint(low, high + 1, shape)
    ends = torch.where(torch.rand(shape) < 0.5, low, high)
    return torch.where(torch.rand(shape) < 0.5, drawn, ends).to(dtype).to(DEVICE)


def zeros(shape, dtype):
    """Zero points, if codes of the dtype may have them, or none."""
    return random.choice([None, codes(shape, torch.uint8)]) if dtype == torch.uint8 else None


def scales(shape):
    """Of many magnitudes, so that each rounding shows."""
    return torch.rand(shape).mul(torch.rand(shape).mul(-12).exp2()).to(DEVICE)


def both(name, *arguments):
    backends = reference.backend, on_triton.backend
    return [backend.functions[name](*arguments) for backend in backends]


def check(name, *arguments):
    expected, actual = both(name, *arguments)
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


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_convolutions(groups, draw, launches):
    torch.manual_seed(draw)
    random.seed(draw)
    dtype, weight_dtype = random.choice(CODES), random.choice(CODES)
    channels, outputs = random.choice([(1, 1), (1, 3), (3, 17), (16, 16), (19, 20)])
    window = random.choice([[1, 1], [3, 3], [2, 3]])
    padding = random.choice([[0, 0], [1, 1], [2, 1]])
    stride, dilation = ([random.randint(1, 2), random.randint(1, 2)] for _ in "sd")
    x = codes((2, channels * groups, 8, 7), dtype)
    w = codes((outputs * groups, channels, *window), weight_dtype)
    z, wz = zeros((), dtype), zeros((len(w),), weight_dtype)
    how = stride, padding, dilation, False, [0, 0], groups
    check("convolve_codes", x, z, w, wz, *how)
    bias = random.choice([None, scales((len(w),))])
    of_x, of_weight = (x, scales(()), z, None), (w, scales((len(w),)), wz, None)
    values = x.to(random.choice(DTYPES))
    check("integer_convolution", values, w, bias, *of_x, *of_weight, *how)
    few = groups > 1 and channels < 16
    assert launches == ["multiply_few" if few else "multiply"] * 2


@pytest.mark.parametrize("draw", DRAWS)
def test_linear_products(draw, launches):
    torch.manual_seed(draw)
    random.seed(draw)
    dtype, weight_dtype = random.choice(CODES), random.choice(CODES)
    terms, outputs = random.choice([(1, 1), (5, 10), (70, 33)])
    shape = random.choice([(), (2,), (2, 3)])  # one, of the first axis, of each row
    x, w = codes((2, 3, terms), dtype), codes((outputs, terms), weight_dtype)
    z, wz = zeros(shape, dtype), zeros((outputs,), weight_dtype)
    check("multiply_codes", x, z, w, wz)
    bias = random.choice([None, scales((outputs,))])
    of_x, of_weight = (x, scales(shape), z, None), (w, scales((outputs,)), wz, None)
    check("integer_linear", x.to(random.choice(DTYPES)), w, bias, *of_x, *of_weight)
    assert launches == ["multiply"] * 2


def test_sums_at_the_bound(launches, monkeypatch):
    """With one term more they would not fit into 32 bits: the specification computes those."""
    monkeypatch.setattr(products, "product_tile", lambda *sizes: (16, 16, 4096))
    most = (2**31 - 1) // 255**2
    for terms, kernels in ((most, ["multiply"]), (most + 1, [])):
        x = torch.full((1, terms), 255, dtype=torch.uint8, device=DEVICE)
        check("multiply_codes", x, None, x, None)
        assert launches == kernels
        launches.clear()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(scale):
    x, w = torch.zeros(2, 3, dtype=torch.int8, device=DEVICE), codes((2, 3), torch.int8)
    of_x, of_weight = (x, torch.tensor(scale, device=DEVICE)), (w, scales((2,)))
    expected, actual = both(
        "integer_linear", x.float(), w, None, *of_x, None, None, *of_weight, None, None
    )
    assert_same(actual, expected)
    assert actual.isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_that_the_specification_computes(dimensions, transposed, launches):
    x, w = (
        codes((2, 2, *[4] * dimensions), torch.int8),
        codes((2, 2, *[3] * dimensions), torch.int8),
    )
    one, none = [1] * dimensions, [0] * dimensions
    how = one, none, one, transposed, none, 1
    for batch in (x, x[:0]):
        check("convolve_codes", batch, None, w, None, *how)
    assert launches == (["multiply"] if dimensions == 2 and not transposed else [])


@pytest.mark.parametrize(("largest", "dtype"), [(1, torch.int16), (8, torch.float32)])
def test_sums_of_convolutions(largest, dtype):
    x, w = codes((2, 5, 4, 4), torch.int8), codes((3, 5, 3, 3), torch.int8) // 128 * largest
    bound = 45 * 128 * largest
    how = [1, 1], [1, 1], [1, 1], 1, bound
    check("convolve_sums", x, None, w, None, *how, True)
    expected, actual = both("convolve_sums", x, None, w, None, *how, False)
    assert_same(actual[0], expected[0])
    assert (actual[0].dtype, actual[1]) == (dtype, None)


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_several_tiles(groups):
    x, w = codes((3, 32, 7, 9), torch.int8) // 16, codes((36, 32 // groups, 1, 1), torch.int8) // 16
    bound = 32 * 8 * 8
    check("convolve_sums", x, None, w, None, [1, 1], [0, 0], [1, 1], groups, bound, True)


# What follows.

SUMS = [((2, 5, 3, 3), 2**15 - 1), ((1, 17, 4, 3), 2**30), ((7, 3), 300), ((3, 1, 2, 2), 2**20)]


@pytest.fixture(params=SUMS, ids=str)
def sums(request, monkeypatch):
    """Sums with their bound, walked in small tiles by several programs."""
    monkeypatch.setattr(launch, "limits", lambda device: LIMITS)
    shape, bound = request.param
    v = torch.randint(-bound, bound + 1, shape, device=DEVICE).float()
    v.view(-1)[:2] = torch.tensor([-bound, bound])
    return (v.to(memory_format=torch.channels_last) if v.dim() == 4 else v), bound


@pytest.fixture
def chain(sums):
    """Sums as they are kept; a factor and a term; and what the backward takes besides."""
    v, bound = sums
    kept, total, squares, _, _ = reference.sums.moments(v, bound)
    channels = len(total)
    scale, weight = scales((channels,)) / bound, torch.randn(channels).to(DEVICE)
    count = v.numel() // channels
    factor, term, mean, inverse, _, _ = reference.sums.normalization(
        total, squares, count, scale, weight, weight - 0.5, 1e-5
    )
    return kept, factor, term, (mean, inverse, scale, weight)


def test_moments(sums):
    check("moments", *sums)


@pytest.mark.parametrize(("eps", "affine"), [(1e-5, True), (0.0, False)])
def test_normalization(sums, eps, affine):
    v, bound = sums
    total, squares = reference.sums.moments(v, bound)[1:3]
    weight, bias = torch.randn(2, len(total), device=DEVICE) if affine else (None, None)
    count = v.numel() // len(total)
    check("normalization", total, squares, count, scales((len(total),)), weight, bias, eps)


@pytest.mark.parametrize("size", [2**7, 2**16, 2**28, 2**31 - 1])
@pytest.mark.parametrize("count", [3, 2**10 + 1, 2**20, 2**31 + 7])
def test_normalization_of_large_sums(count, size):
    """The sum of (v - p)^2 takes more than 64 bits, and is rounded once."""
    rng = random.Random(count)
    values = [rng.randint(-size, size - 1) for _ in range(8)]
    totals = [v * count // rng.choice([1, 3, -2]) + rng.randrange(count) for v in values]
    squares = [(abs(v) + 1) ** 2 * count + rng.randrange(size * count) for v in values]
    squares = torch.tensor([divmod(s, 2**32) for s in squares], device=DEVICE)
    totals = torch.tensor(totals, device=DEVICE)
    check("normalization", totals, squares, count, scales((8,)), None, None, 1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_maps(chain, relu):
    kept, factor, term, _ = chain
    other = torch.randn(kept.shape, device=DEVICE)
    for worst in (None, 0.0, float("nan"), -float("inf"), float("inf")):
        residual = None if worst is None else other.where(other < 1, worst)
        check("map_sums", kept, factor, term, residual, relu, True, True)
    check("map_sums", kept, factor, term, None, relu, False, False)


@pytest.mark.parametrize("kind", KINDS)
def test_codes(chain, kind):
    kept, factor, term, _ = chain
    range_ = torch.tensor([-0.5, 1.2] if kind == "affine" else 1.3, device=DEVICE)
    for relu in (False, True):
        check("codes_of_sums", kept, factor, term, relu, range_, Grid(4, kind))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(chain, dtype, relu):
    kept, factor, term, norm = chain
    grad = torch.randn(kept.shape, device=DEVICE).to(dtype)
    for uses_batch in (False, True):
        expected, actual = both("grads_of_norm", grad, kept, factor, term, relu, *norm, uses_batch)
        # Sums in another order.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        line, _, _ = expected
        check("grads_of_sums", grad, kept, factor, term, relu, norm[0], *line)
