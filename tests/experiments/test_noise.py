import pytest
import torch

from experiments.data.noise import symmetric

LABELS = torch.arange(10).repeat(2000)


@pytest.mark.parametrize("rate", [0.0, 0.00003, 0.1, 0.4, 0.77777, 1.0])
def test_redraws_exactly_the_share_asked_for(rate):
    noisy = symmetric(LABELS, rate, 10, seed=0)
    assert len(noisy.redrawn) == round(rate * len(LABELS))
    assert len(noisy.redrawn.unique()) == len(noisy.redrawn)
    kept = torch.ones(len(LABELS), dtype=torch.bool)
    kept[noisy.redrawn] = False
    assert torch.equal(noisy.given[kept], LABELS[kept])


def test_redraws_uniformly_over_all_classes():
    noisy = symmetric(LABELS, 0.5, 10, seed=0)
    counts = torch.bincount(LABELS[noisy.redrawn] * 10 + noisy.given[noisy.redrawn], minlength=100)
    expected = len(noisy.redrawn) / 100
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert 50 < chi_squared < 160  # 99 degrees of freedom: 1 in 10,000 on either side
    assert noisy.flipped.double().mean().item() == pytest.approx(0.45, abs=0.01)


def test_flipped_is_where_the_given_label_is_wrong():
    noisy = symmetric(LABELS, 0.3, 10, seed=0)
    assert torch.equal(noisy.true, LABELS)
    assert torch.equal(noisy.flipped, noisy.given != noisy.true)
    assert set(noisy.flipped.nonzero().flatten().tolist()) < set(noisy.redrawn.tolist())


def test_seed_alone_decides():
    torch.manual_seed(1)
    first = symmetric(LABELS, 0.4, 10, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.given, symmetric(LABELS, 0.4, 10, seed=3).given)
    assert not torch.equal(first.given, symmetric(LABELS, 0.4, 10, seed=4).given)


def test_higher_rate_adds_to_the_noise_of_a_lower_one():
    low, high = symmetric(LABELS, 0.2, 10, seed=0), symmetric(LABELS, 0.6, 10, seed=0)
    assert torch.isin(low.redrawn, high.redrawn).all()
    assert torch.equal(low.given[low.redrawn], high.given[low.redrawn])


def test_leaves_the_labels_passed_in_alone():
    labels = LABELS.clone()
    symmetric(labels, 1.0, 10, seed=0)
    assert torch.equal(labels, LABELS)
