import dataclasses
import itertools

import pytest
import torch
from scipy.stats import truncnorm

from experiments import data
from experiments.data.noise import (
    NOISE_KINDS,
    _truncated_normal,
    asymmetric,
    instance,
    pair,
    symmetric,
    symmetric_exclusive,
)

LABELS = torch.arange(10).repeat(2000)
UNEVEN = torch.arange(10).repeat_interleave(torch.arange(10) * 37 + 3)
COUNTED = [symmetric, symmetric_exclusive, pair]
RATES = [0.0, 0.00003, 0.1, 0.4, 0.77777, 1.0]

every_kind = pytest.mark.parametrize("kind", NOISE_KINDS.values(), ids=NOISE_KINDS)
counted = pytest.mark.parametrize("kind", COUNTED, ids=lambda kind: kind.__name__)


def made_up(labels, images=None):
    if images is None:
        generator = torch.Generator().manual_seed(0)
        shape = (len(labels), 4, 4, 3)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return dataclasses.replace(
        data.load("digits"),
        train_images=images,
        train_labels=labels,
        train_indices=torch.arange(len(labels)),
    )


@pytest.fixture(scope="module")
def dataset():
    return made_up(LABELS)


def transitions(noisy):
    """How many labels went from class `i` to class `j`."""
    return torch.bincount(noisy.true * 10 + noisy.given, minlength=100).view(10, 10)


def chi_squared(counts):
    expected = counts.double().mean()
    return ((counts - expected).square() / expected).sum().item()


@every_kind
@pytest.mark.parametrize("rate", RATES)
def test_only_redrawn_labels_can_differ(dataset, kind, rate):
    noisy = kind(dataset, rate, 0)
    assert torch.equal(noisy.true, LABELS)
    assert noisy.given.dtype == torch.int64
    assert torch.equal(noisy.flipped, noisy.given != LABELS)
    assert (noisy.redrawn.diff() > 0).all()
    kept = torch.ones(len(LABELS), dtype=torch.bool)
    kept[noisy.redrawn] = False
    assert torch.equal(noisy.given[kept], LABELS[kept])
    if kind is not symmetric:
        assert noisy.flipped[noisy.redrawn].all()


@every_kind
def test_no_noise_at_rate_0(dataset, kind):
    assert len(kind(dataset, 0.0, 0).redrawn) == 0


@every_kind
def test_seed_alone_decides(dataset, kind):
    torch.manual_seed(1)
    first = kind(dataset, 0.4, 3)
    torch.manual_seed(2)
    assert torch.equal(first.given, kind(dataset, 0.4, 3).given)
    other = kind(dataset, 0.4, 4)
    assert not torch.equal(first.redrawn, other.redrawn)


@every_kind
def test_higher_rate_adds_to_the_noise_of_a_lower_one(dataset, kind):
    rates = [0.0, 0.001, 0.0015, 0.05, 0.2, 0.21, 0.6, 0.95, 1.0]
    runs = [kind(dataset, rate, 0) for rate in rates]
    for low, high in itertools.pairwise(runs):
        assert len(low.redrawn) < len(high.redrawn)
        assert torch.isin(low.redrawn, high.redrawn).all()
        assert torch.equal(low.given[low.redrawn], high.given[low.redrawn])


@every_kind
def test_leaves_the_data_set_alone(kind):
    dataset = made_up(LABELS.clone())
    before = data.Dataset.checksum.func(dataset)
    kind(dataset, 1.0, 0)
    assert data.Dataset.checksum.func(dataset) == before


@counted
@pytest.mark.parametrize("rate", RATES)
def test_redraws_exactly_the_share_asked_for(dataset, kind, rate):
    assert len(kind(dataset, rate, 0).redrawn) == round(rate * len(LABELS))


def test_symmetric_draws_the_labels_it_always_drew():
    noisy = symmetric(made_up(torch.arange(10).repeat(3)), 0.4, 7)
    assert noisy.redrawn.tolist() == [0, 7, 12, 14, 15, 17, 23, 25, 26, 27, 28, 29]
    assert noisy.given[noisy.redrawn].tolist() == [0, 3, 7, 6, 8, 1, 6, 9, 5, 5, 0, 6]


def test_symmetric_is_uniform_over_all_classes(dataset):
    noisy = symmetric(dataset, 0.5, 0)
    pairs = LABELS[noisy.redrawn] * 10 + noisy.given[noisy.redrawn]
    # 99 degrees of freedom: 1 in 10,000 on either side
    assert 50 < chi_squared(torch.bincount(pairs, minlength=100)) < 160
    assert noisy.flipped.double().mean().item() == pytest.approx(0.45, abs=0.01)


def test_symmetric_exclusive_is_uniform_over_the_other_classes(dataset):
    counts = transitions(symmetric_exclusive(dataset, 1.0, 0))
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(10, dtype=torch.bool)]
    # 80 degrees of freedom, as each row sums to 2000: 1 in 10,000 on either side
    assert 40 < chi_squared(others) < 135


def test_pair_moves_to_the_next_class(dataset):
    noisy = pair(dataset, 0.3, 0)
    assert torch.equal(noisy.given[noisy.redrawn], (LABELS[noisy.redrawn] + 1) % 10)
    assert transitions(noisy)[9, 0] > 0


@pytest.mark.parametrize("rate", RATES)
def test_asymmetric_moves_the_same_share_of_each_source_class(rate):
    dataset = made_up(UNEVEN)
    sizes = torch.bincount(UNEVEN)
    expected = torch.diag(sizes)
    for source, target in {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}.items():
        moved = round(rate * sizes[source].item())
        expected[source, source] -= moved
        expected[source, target] += moved
    assert torch.equal(transitions(asymmetric(dataset, rate, 0)), expected)


def test_asymmetric_chooses_within_a_class_at_random(dataset):
    noisy = asymmetric(dataset, 0.5, 0)
    first_half = noisy.redrawn[noisy.redrawn < len(LABELS) // 2]
    assert len(first_half) / len(noisy.redrawn) == pytest.approx(0.5, abs=0.05)


def test_asymmetric_needs_to_know_which_classes_look_alike(dataset):
    unknown = dataclasses.replace(dataset, asymmetric_flips={})
    with pytest.raises(ValueError, match="got digits, takes a data set with asymmetric_flips"):
        asymmetric(unknown, 0.4, 0)


def test_asymmetric_copes_with_a_class_that_has_no_images():
    noisy = asymmetric(made_up(torch.full((10,), 3)), 1.0, 0)
    assert (noisy.given == 8).all()


@pytest.mark.parametrize(
    ("rate", "share"), [(0.01, 0.084), (0.2, 0.2055), (0.4, 0.4), (0.6, 0.6), (1.0, 0.9202)]
)
def test_instance_has_the_expected_share_of_wrong_labels(dataset, rate, share):
    flipped = instance(dataset, rate, 0).flipped.view(-1, 10).double()  # a column is a class
    assert flipped.mean().item() == pytest.approx(share, abs=0.015)
    assert flipped.mean(0).tolist() == pytest.approx([share] * 10, abs=0.05)


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.5, 0.97, 1.0])
def test_truncated_normal_has_the_quantiles_of_scipy(rate):
    rank = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    expected = truncnorm.ppf(rank, -rate / 0.1, (1 - rate) / 0.1, loc=rate, scale=0.1)
    torch.testing.assert_close(_truncated_normal(rank, rate, 0.1), torch.from_numpy(expected))


def instance_targets(image, label=4):
    """Shares of the ten classes among the wrong labels of many copies of one image."""
    labels = torch.full((20_000,), label)
    noisy = instance(made_up(labels, image.expand(len(labels), *image.shape)), 0.6, 0)
    targets = noisy.given[noisy.redrawn]
    return torch.bincount(targets, minlength=10).double() / len(targets)


IMAGE = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
WRONG = torch.arange(10) != 4


def test_instance_draws_from_the_softmax_of_a_projection():
    shares, negative = instance_targets(IMAGE), instance_targets(255 - IMAGE)
    scores, negative_scores = shares[WRONG].log(), negative[WRONG].log()
    assert shares[4] == negative[4] == 0
    # The scores are standard normal, and those of the negative are their negatives.
    assert 0.4 < scores.std().item() < 1.8
    assert (scores + negative_scores).std().item() < 0.15


def test_instance_depends_on_the_image_and_its_class():
    shares = instance_targets(IMAGE)
    other_image = instance_targets(IMAGE.flip(0))
    assert (shares - other_image).abs().sum() > 0.2
    other_class = instance_targets(IMAGE, label=5)
    third = WRONG & (torch.arange(10) != 5)
    assert (shares - other_class)[third].abs().sum() > 0.2


def test_instance_ignores_brightness_and_contrast():
    torch.testing.assert_close(instance_targets(IMAGE), instance_targets(IMAGE * 3 + 50))


def test_instance_is_uniform_for_an_image_that_shows_nothing():
    shares = instance_targets(torch.full_like(IMAGE, 77))
    assert shares[WRONG].tolist() == pytest.approx([1 / 9] * 9, abs=0.015)
