"""Bad arguments: the error names the argument, what it got, and what it takes."""

from functools import partial

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
BUFFER = torch.randn(30)
INT8 = torch.zeros(4, 5, dtype=torch.int8)


def freed(*shape, dtype=torch.float32):
    """As sharded training leaves a parameter between forwards."""
    x = torch.ones(shape, dtype=dtype)
    x.untyped_storage().resize_(0)
    return x


def of_inference():
    with torch.inference_mode():
        return torch.tensor(1.0)


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
    (
        lambda: fake_quantize_ema(X, torch.ones([], requires_grad=True), 4),
        ValueError,
        "running_absmax: got a tensor that requires grad",
    ),
    (
        lambda: fake_quantize_ema(X, torch.ones([], requires_grad=True), 4, training=False),
        ValueError,
        "running_absmax: got a tensor that requires grad",
    ),
    (
        lambda: fake_quantize_ema(BUFFER[4:24].view(4, 5), BUFFER[9], 4),
        ValueError,
        "running_absmax: got a tensor that overlaps x in memory",
    ),
    (
        lambda: fake_quantize_ema(BUFFER[:20].view(4, 5), BUFFER[18:23], 4, axis=1),
        ValueError,
        "running_absmax: got a tensor that overlaps x in memory",
    ),
    (
        lambda: fake_quantize_ema(X, ONE.expand(4), 4, axis=0),
        ValueError,
        "running_absmax: got an expanded tensor",
    ),
    *(
        (partial(fake_quantize_ema, X, ONE, 4, training=training, observed=observed), *expected)
        for training in (True, False)
        for observed, *expected in [
            (1.0, TypeError, "observed: got float, takes a torch.Tensor"),
            (ONE.half(), TypeError, "observed: got torch.float16, takes torch.float32"),
            (torch.ones(1), ValueError, r"observed: got shape \[1\], takes .* \[\]"),
            (ONE.to("meta"), ValueError, "observed: got a tensor on meta, takes one on cpu"),
            (freed(), ValueError, "observed: got .* memory was freed"),
            (
                torch.ones([], requires_grad=True),
                ValueError,
                "observed: got a tensor that requires grad",
            ),
        ]
    ),
    (
        lambda: fake_quantize_ema(X, freed(4), 4, 0, training=False, observed=torch.ones(4)),
        ValueError,
        "running_absmax: got .* memory was freed",
    ),
    (
        lambda: fake_quantize_ema(X, torch.ones(4), 4, axis=0, observed=ONE.expand(4)),
        ValueError,
        "observed: got an expanded tensor",
    ),
    (
        lambda: fake_quantize_ema(BUFFER[:20].view(4, 5), ONE, 4, observed=BUFFER[19]),
        ValueError,
        "observed: got a tensor that overlaps x in memory",
    ),
    (
        lambda: fake_quantize_ema(X, BUFFER[:4], 4, axis=0, observed=BUFFER[3:7]),
        ValueError,
        "observed: got a tensor that overlaps running_absmax in memory",
    ),
    (
        lambda: fake_quantize_ema(X, of_inference(), 4),
        ValueError,
        "running_absmax: got a tensor made in inference mode",
    ),
    (
        lambda: fake_quantize_ema(X, ONE.clone(), 4, observed=of_inference()),
        ValueError,
        "observed: got a tensor made in inference mode",
    ),
    (lambda: fake_quantize(freed(4, 5), 4), ValueError, r"x: got .* \[4, 5\] whose memory"),
    (lambda: fake_quantize(freed(4, 5, dtype=torch.half), 4, 1), ValueError, "x: got .* freed"),
    (lambda: fake_quantize_many([X, freed(2)], 4), ValueError, r"tensors\[1\]: got .* freed"),
    (
        lambda: fake_quantize_ema(X, freed(), 4),
        ValueError,
        "running_absmax: got .* memory was freed",
    ),
    (
        lambda: fake_quantize_ema(X, freed(4), 4, axis=0, training=False),
        ValueError,
        "running_absmax: got .* memory was freed",
    ),
    (lambda: dequantize(INT8, freed()), ValueError, "scale: got .* memory was freed"),
    (
        lambda: torch.ops.noisyq.zero_clipped(X, torch.zeros(3, dtype=torch.uint8, device="meta")),
        ValueError,
        "clipped: got a tensor on meta, takes one on cpu",
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
        torch.ops.noisyq.fake_quantize_ema(X, torch.ones(3), None, 4, 0, 0.01)
    with pytest.raises(ValueError, match="bits: got 40"):
        torch.ops.noisyq.fake_quantize(X, 40, None)


def test_a_bad_call_leaves_the_range(backend):
    running = ONE.clone()
    with pytest.raises(ValueError, match="bits"):
        noisyq_fast.fake_quantize_ema(X, running, 99)
    assert running == 1


def test_a_range_beside_x_in_one_buffer_is_fine(backend):
    buffer = torch.randn(21)
    buffer[20] = float("nan")
    fake_quantize_ema(buffer[:20].view(4, 5), buffer[20], 4)
    assert buffer[20] == buffer[:20].abs().max()


def test_tensors_without_elements_have_no_memory_to_lose(backend):
    assert fake_quantize(torch.empty(0, 3), 4).shape == (0, 3)
