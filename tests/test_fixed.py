"""The quantizer whose scales are given."""

import copy
import pickle

import pytest
import torch

import noisyq_fast
from noisyq_fast import AbsMax, EvenlySpaced, Fixed, QuantConv2d
from noisyq_fast.grid import KINDS

W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def fixed(like, x=W):
    """With the scales that another quantizer takes from ``x``."""
    of = like.codes(x)
    options = like.bits, like.axis, like.grid_kind, like.group_size
    return Fixed(of.scale, *options, of.zero_point)


@pytest.mark.filterwarnings("ignore:.*below 0")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [{"axis": None}, {"axis": 0}, {"axis": 0, "group_size": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_codes_are_those_of_the_same_scales(kind, groups, dtype):
    dynamic = AbsMax(4, grid=kind, **groups)
    x = W.to(dtype)
    ours = fixed(dynamic, x)
    for mode in (True, False):
        ours.train(mode)
        assert torch.equal(ours(x), dynamic(x))
        assert ours(x).dtype == dtype
    given, expected = ours.codes(x), dynamic.codes(x)
    assert torch.equal(given.codes, expected.codes)
    assert given.largest == expected.largest
    assert torch.equal(ours(ours(x)), ours(x))
    assert (ours.scales(x), ours.width()) == (dynamic.scales(x), dynamic.width())


def test_larger_values_are_clipped_and_the_gradient_is_passed_on():
    quantizer = Fixed(torch.tensor(0.5), bits=3)
    x = torch.tensor([0.3, -9.0, 9.0, torch.nan], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([0.5, -1.5, 1.5, torch.nan]), equal_nan=True)
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1, 2, 3, 4]


def test_state():
    ours = fixed(AbsMax(4, grid="affine"))
    other = Fixed(torch.ones(6), 4, 0, "affine", zero_point=torch.zeros(6, dtype=torch.uint8))
    other.load_state_dict(ours.state_dict())
    for again in (other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.like()):
        assert torch.equal(again(W), ours(W))
    with pytest.raises(RuntimeError, match="checkpoint has 4 bits on the affine grid"):
        fixed(AbsMax(4)).load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="another kind of quantizer"):
        AbsMax(4).load_state_dict(fixed(AbsMax(4)).state_dict())


def test_in_a_layer_and_compiled():
    layer = QuantConv2d(4, 6, 3, weight=fixed(AbsMax(4)), activation=None)
    plain = QuantConv2d(4, 6, 3, weight=AbsMax(4), activation=None)
    for each in (layer, plain):
        each.weight.data.copy_(W)
        each.bias.data.zero_()
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(x), plain(x))
    assert layer.weight_bits == 4
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    assert noisyq_fast.summary(layer, x).size_in_bits == noisyq_fast.summary(plain, x).size_in_bits


@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        (torch.ones(2), {}, r"scale: got shape \[2\] with axis None, takes \[\]"),
        (torch.tensor(1.0), {"axis": 0}, r"scale: got shape \[\] with axis 0, takes \[n\]"),
        (torch.ones(2), {"axis": "token"}, "scale: got shape"),
        (torch.ones(2), {"axis": 0, "group_size": 2}, r"takes \[output channels, groups\]"),
        (torch.tensor(0.0), {}, "scale: got a value that is not positive and finite"),
        (torch.tensor(torch.inf), {}, "scale: got a value that is not positive and finite"),
        (torch.tensor(1.0), {"grid": "affine"}, "zero_point: got none on the affine grid"),
        (torch.tensor(1.0), {"zero_point": torch.tensor(0)}, "zero_point: got one on the signed"),
        (
            torch.tensor(1.0),
            {"grid": "affine", "zero_point": torch.tensor(16)},
            "codes from 0 to 15",
        ),
        (torch.tensor(1.0), {"grid": "affine", "zero_point": torch.tensor(0.5)}, "zero_point: got"),
        (torch.tensor(1.0), {"bits": 9}, "bits: got 9"),
        ([1.0], {}, "scale"),
    ],
)
def test_refused(scale, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Fixed(scale, **options)


def test_wrong_steps_and_offsets_of_evenly_spaced_values():
    one = torch.tensor(1.0)
    for step, offset, name in ((0 * one, one, "step"), (one, one / 0, "offset")):
        with pytest.raises(ValueError, match=f"{name}: got a value that is not .*finite"):
            EvenlySpaced(step, offset)
