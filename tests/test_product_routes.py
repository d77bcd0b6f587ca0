"""Every way in which the CPU computes products of codes gives the same bits."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from assert_same import assert_same
from drawn_codes import codes_of, needs_cpu

from noisyq_fast.backends.native_cpu import products
from noisyq_fast.backends.reference.products import convolve_codes, multiply_codes


@contextlib.contextmanager
def route(name):
    """Forces one."""
    never = mock.Mock(return_value=False)
    with contextlib.ExitStack() as stack:
        replaced = {
            "own kernel": (),
            "oneDNN": ("has_own_kernel",),
            "floats": ("has_own_kernel", "is_exact_in_8_bits", "has_exact_products"),
        }
        for function in replaced[name.removesuffix(", oneDNN off").replace("doubles", "floats")]:
            stack.enter_context(mock.patch.object(products, function, never))
        if name == "doubles":
            stack.enter_context(mock.patch.object(products, "_EXACT_FLOAT", 0))
        if name.endswith("off"):
            enabled = torch.backends.mkldnn.enabled
            stack.callback(torch._C._set_mkldnn_enabled, enabled)
            torch._C._set_mkldnn_enabled(False)
        yield


ROUTES = ["own kernel", "oneDNN", "floats", "doubles", "floats, oneDNN off"]
SHAPES = {
    "3x3": ((16, 16, 9, 7), (16, 16, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "odd": ((3, 5, 11, 9), (19, 5, 3, 2), ([2, 1], [1, 0], [1, 2], False, [0, 0], 1)),
    "1x1": ((2, 48, 6, 5), (33, 48, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "depthwise": ((4, 12, 8, 8), (12, 1, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 12)),
    "groups": ((2, 8, 8, 8), (12, 4, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "first": ((2, 3, 15, 15), (16, 3, 7, 7), ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)),
}


@needs_cpu
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_route_of_the_cpu(name, shape, restore_threads):
    sizes, kernel, how = SHAPES[shape]
    rng = np.random.default_rng(0)
    for dtype, kind, zero in (
        (torch.int8, "few bits", None),
        (torch.int8, "extremes", None),
        (torch.uint8, "any", torch.tensor(3, dtype=torch.uint8)),
        (torch.uint8, "extremes", torch.tensor(255, dtype=torch.uint8)),
    ):
        x, w = codes_of(rng, sizes, dtype, kind), codes_of(rng, kernel, torch.int8, kind)
        expected = convolve_codes(x, zero, w, None, *how)
        for threads, last in ((1, False), (2, True)):
            torch.set_num_threads(threads)
            format_ = torch.channels_last if last else torch.contiguous_format
            with route(name):
                sums = products.convolve_codes(
                    x.contiguous(memory_format=format_), zero, w, None, *how
                )
            assert_same(sums, expected)
            assert sums.is_contiguous(memory_format=format_)


@needs_cpu
@pytest.mark.parametrize("name", ["own kernel", "floats", "doubles"])
def test_every_route_of_a_matrix(name):
    rng = np.random.default_rng(0)
    x, w = (codes_of(rng, (n, 75), torch.int8, "extremes") for n in (33, 18))
    u = codes_of(rng, (33, 75), torch.uint8, "extremes")
    for codes, zero in ((x, None), (u, None), (u, torch.tensor(255, dtype=torch.uint8))):
        for rows in (codes, codes.T.contiguous().T, codes[::2, :], codes[:1].expand(9, 75)):
            with route(name):
                sums = products.multiply_codes(rows, zero, w, None)
            assert_same(sums, multiply_codes(rows, zero, w, None))


@needs_cpu
@pytest.mark.parametrize("broken", ["wrong", "raises", "gone"])
def test_a_product_of_pytorch_that_is_not_exact_is_not_used(broken):
    x = torch.randint(-128, 128, (2, 4, 5, 5), dtype=torch.int8)
    w = torch.randint(-128, 128, (3, 4, 3, 3), dtype=torch.int8)
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def convolve(*arguments):
        sums = original(*arguments)
        sums.view(-1)[-1] += 1
        return sums

    def multiply(x, w):
        sums = product(x, w)
        sums[-1, -1] += 1
        return sums

    original, product = products._convolve_8_bits, torch._int_mm
    if broken != "wrong":
        error = RuntimeError("no such primitive") if broken == "raises" else AttributeError("gone")
        convolve = multiply = mock.Mock(side_effect=error)
    try:
        products._passes.cache_clear()
        products.has_exact_products.cache_clear()
        with (
            mock.patch.object(products, "_convolve_8_bits", convolve),
            mock.patch.object(torch, "_int_mm", multiply),
            route("oneDNN"),
        ):
            assert not products.is_exact_in_8_bits(36, w.shape, *how[:3], 1)
            assert not products.has_exact_products()
            assert_same(
                products.convolve_codes(x, None, w, None, *how),
                convolve_codes(x, None, w, None, *how),
            )
            rows = x.view(2, 100), None, w.view(3, 36).repeat(1, 3)[:, :100], None
            assert_same(products.multiply_codes(*rows), multiply_codes(*rows))
    finally:
        products._passes.cache_clear()
        products.has_exact_products.cache_clear()


@needs_cpu
@pytest.mark.parametrize("name", ["own kernel", "oneDNN", "floats"])
def test_neither_autocast_nor_low_precision_nor_a_default_dtype_changes_a_sum(name):
    x = torch.randint(0, 256, (2, 3, 7, 7), dtype=torch.uint8)
    w = torch.randint(-128, 128, (5, 3, 3, 3), dtype=torch.int8)
    operands = torch.tensor(9, dtype=torch.uint8), w, None
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    rows = x.view(2, -1), operands[0], w.view(-1, 27).repeat(1, 6)[:, :147], None
    expected = convolve_codes(x, *operands, *how)
    of_rows = multiply_codes(*rows)
    precision = torch.get_float32_matmul_precision()
    for dtype in (torch.float64, torch.float16):
        try:
            torch.set_float32_matmul_precision("medium")
            torch.set_default_dtype(dtype)
            products._passes.cache_clear()
            with torch.autocast("cpu"), route(name):
                sums = products.convolve_codes(x, *operands, *how)
                of_matrices = products.multiply_codes(*rows)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision(precision)
        assert_same(sums, expected)
        assert_same(of_matrices, of_rows)
