"""Bad arguments: the error names the argument, what it got, and what it takes."""

import pytest
import torch

import noisyq_fast
from noisyq_fast import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)

X = torch.randn(4, 5)
ONE = torch.tensor(1.0)
INT8 = torch.zeros(4, 5, dtype=torch.int8)

CASES = [
    (lambda: fake_quantize([1.0], 4), TypeError, "x: got list, takes a torch.Tensor"),
    (lambda: fake_quantize(X.double(), 4), TypeError, "x: got torch.float64, takes torch.float32"),
    (lambda: fake_quantize(X.int(), 4), TypeError, "x: got torch.int32"),
    (lambda: fake_quantize(X.to_sparse(), 4), ValueError, "x: got a tensor of layout"),
    (lambda: fake_quantize(X, 4.0), TypeError, r"bits: got 4.0 \(float\), takes an int"),
    (lambda: fake_quantize(X, True), TypeError, "bits: got True"),
    (lambda: fake_quantize(X, 1), ValueError, "bits: got 1, takes 2..8"),
    (lambda: quantize(X, 9), ValueError, "bits: got 9, takes 2..8"),
    (lambda: fake_quantize(X, 4, "0"), TypeError, "axis: got '0'"),
    (lambda: fake_quantize(X, 4, 2), ValueError, r"axis: got 2 .* \[4, 5\], takes -2..1 or None"),
    (lambda: quantize(ONE, 4, 0), ValueError, r"axis: got 0 .* \[\], takes None"),
    (lambda: fake_quantize_many([], 4), ValueError, "tensors: got none"),
    (lambda: fake_quantize_many([X, 1], 4), TypeError, r"tensors\[1\]: got int"),
    (lambda: fake_quantize_many([X, X.int()], 4), TypeError, r"tensors\[1\]: got torch.int32"),
    (lambda: fake_quantize_many([X], [4, 4]), ValueError, "bits: got 2 for 1 tensors"),
    (lambda: fake_quantize_many([X], [4.0]), TypeError, r"bits\[0\]: got 4.0"),
    (
        lambda: fake_quantize_many([X, X.to("meta")], 4),
        ValueError,
        r"tensors\[1\]: got a tensor on meta, takes one on cpu",
    ),
    (lambda: fake_quantize_ema(X, 1.0, 4), TypeError, "running_absmax: got float"),
    (lambda: fake_quantize_ema(X, ONE.half(), 4), TypeError, "running_absmax: got torch.float16"),
    (
        lambda: fake_quantize_ema(X, torch.ones(1), 4),
        ValueError,
        r"running_absmax: got shape \[1\], takes \[\]",
    ),
    (
        lambda: fake_quantize_ema(X, torch.ones(4), 4, axis=1),
        ValueError,
        r"running_absmax: got shape \[4\], takes \[5\]",
    ),
    (
        lambda: fake_quantize_ema(X, ONE.to("meta"), 4),
        ValueError,
        "running_absmax: got a tensor on meta, takes one on cpu",
    ),
    (
        lambda: fake_quantize_ema(X, ONE, 4, averaging_constant=1.5),
        ValueError,
        "averaging_constant: got 1.5, takes 0..1",
    ),
    (
        lambda: fake_quantize_ema(X, ONE, 4, averaging_constant=float("nan")),
        ValueError,
        "averaging_constant: got nan",
    ),
    (
        lambda: fake_quantize_ema(X, ONE, 4, averaging_constant="a"),
        TypeError,
        "averaging_constant: got str",
    ),
    (
        lambda: fake_quantize_ema(X, ONE, 4, ste="none"),
        ValueError,
        "ste: got 'none', takes identity or clipped",
    ),
    (lambda: dequantize(X, ONE), TypeError, "codes: got torch.float32, takes torch.int8"),
    (lambda: dequantize(INT8, 1.0), TypeError, "scale: got float"),
    (lambda: dequantize(INT8, ONE, 0), ValueError, r"scale: got shape \[\], takes \[4\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2] for case in CASES])
def test_bad_arguments_are_named(backend, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_operators_check_without_their_python_functions():
    """A wrong shape must not reach a kernel through torch.ops either."""
    with pytest.raises(ValueError, match="running_absmax: got shape"):
        torch.ops.noisyq.fake_quantize_ema(X, torch.ones(3), 4, 0, 0.01)
    with pytest.raises(ValueError, match="bits: got 40"):
        torch.ops.noisyq.fake_quantize(X, 40, None)


def test_a_bad_call_leaves_the_range(backend):
    running = ONE.clone()
    with pytest.raises(ValueError, match="bits"):
        noisyq_fast.fake_quantize_ema(X, running, 99)
    assert running == 1
