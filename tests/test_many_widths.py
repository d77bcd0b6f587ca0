"""One network of many bit widths: in integers too, and one width taken for itself."""

import pytest
import torch
from torch import nn

import noisyq_fast
from noisyq_fast import LSQ, PACT, SAT, AbsMax, ManyWidths, MovingAbsMax, set_bits, single_width
from noisyq_fast.integer.fusing import unfuse_
from noisyq_fast.widths import BatchNormOfWidths

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = [5, 4, 2]
KINDS = {
    "plain": (AbsMax(4), MovingAbsMax(4)),
    "lsq": (LSQ(4, axis=0), LSQ(4)),
    "pact": (SAT(4), PACT(4)),
}


def network(kind="plain", widths=WIDTHS, arithmetic="float"):
    torch.manual_seed(0)
    weight, activation = (ManyWidths(quantizer, widths) for quantizer in KINDS[kind])
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    options = {"weight": weight, "activation": activation, "arithmetic": arithmetic}
    noisyq_fast.quantize_model_(model, example=X, **options)
    noisyq_fast.split_norms_(model, widths)
    return noisyq_fast.fuse_(model, X) if arithmetic == "integer" else model


def train_(model, widths=WIDTHS):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noisyq_fast.constrain_(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        for width in widths:
            with set_bits(model.train(), width):
                model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_width_alone_gives_the_same_bits(kind, arithmetic):
    model = train_(network(kind, arithmetic=arithmetic))
    for width in WIDTHS:
        alone = single_width(model, width)
        assert not any(isinstance(m, ManyWidths) for m in alone.modules())
        assert alone[3].weight_bits == width
        with set_bits(model, width):
            assert torch.equal(alone(X), model(X))
            assert torch.equal(alone.train()(X), model.train()(X))
        model.eval()
    assert model[3].weight_quantizer.at == 5
    assert model[3].weight_quantizer.each["4"] is not single_width(model, 4)[3].weight_quantizer


def test_every_width_takes_exact_statistics_where_one_does():
    model = train_(network(arithmetic="integer"))
    for width in WIDTHS:
        rows = noisyq_fast.summary(single_width(model, width), X[:1]).layers
        assert [row.arithmetic for row in rows] == ["integer", "exact"] * 2 + ["integer"]
        with set_bits(model, width):
            exported = torch.export.export(model, (X,)).module()
            assert torch.equal(exported(X), model(X))
    unfuse_(model)
    assert {type(norm) for norm in model[1].norms()} == {nn.BatchNorm2d}


def test_a_width_alone_is_smaller():
    model = network()
    sizes = [noisyq_fast.summary(single_width(model, w), X[:1]).size_in_bits for w in WIDTHS]
    norms, ranges, weights = 2 * 4 * 8, 3, 8 * 8 * 9
    assert sizes[0] - sizes[1] == weights
    ends = 8 * (8 * 27 + 5 * 128)
    scales = 8 + 8 + 5
    assert sizes[2] == 2 * weights + ends + 32 * (scales + norms + ranges + 8 + 8 + 5)


def test_float_is_a_width():
    model = train_(network(widths=[32, 4]), [32, 4])
    alone = single_width(model, 32)
    assert alone[3].weight_quantizer is None
    with set_bits(model, 32):
        assert torch.equal(alone(X), model(X))


def test_batch_norms_in_several_places_stay_one():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Sequential(norm), norm)
    noisyq_fast.split_norms_(model, [4, 2])
    assert isinstance(model[1], BatchNormOfWidths)
    assert model[1] is model[2][0] is model[3]
    assert isinstance(noisyq_fast.split_norms_(norm, [4, 2]), BatchNormOfWidths)


@pytest.mark.parametrize("assign", [False, True])
def test_statistics_that_are_loaded_for_all_widths_are_their_own(assign):
    norm = nn.BatchNorm1d(3)
    split = noisyq_fast.split_norms_(nn.BatchNorm1d(3), [4, 2])
    split.load_state_dict(norm.state_dict(), assign=assign)
    with set_bits(split, 2):
        split(torch.rand(5, 3))
    assert torch.equal(split.each["4"].running_mean, torch.zeros(3))
    assert torch.equal(norm.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ManyWidths(PACT(4), [5, 32.0]), "widths: got 32.0, takes"),
        (lambda: ManyWidths({4: PACT(4)}, [4, 2]), "widths: got .4, 2., takes none"),
        (lambda: set_bits(network(), 4.0).__enter__(), "bits: got 4.0 .float., takes an int"),
    ],
)
def test_widths_that_are_no_whole_numbers_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_what_has_one_width_is_refused():
    with pytest.raises(ValueError, match="model: got Linear of one width"):
        single_width(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="bits: got 3, takes one of 5, 4, 2"):
        single_width(network(), 3)
    assert isinstance(single_width(ManyWidths(AbsMax(4), [4, 2]), 2), AbsMax)
