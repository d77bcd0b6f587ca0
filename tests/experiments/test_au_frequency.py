import pytest
import torch

from experiments.data.au.frequency import frequency_weights


def test_weights_by_hand():
    """Of positives 2 of 4, 1 of 4 and 1 of 2: 1/f is 2, 4 and 2."""
    given = torch.tensor([[1, 0, 9], [1, 1, 9], [0, 0, 1], [0, 0, 0]], dtype=torch.int8)
    weights = frequency_weights(given)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0.75, 1.5, 0.75])


def test_an_action_unit_without_positives_counts_half_of_one():
    """1/f is 4 / 1 and 4 / 0.5."""
    given = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.int8)
    assert frequency_weights(given).tolist() == pytest.approx([2 / 3, 4 / 3])


def test_an_action_unit_without_labels_has_a_finite_weight():
    given = torch.tensor([[1, 9], [0, 9]], dtype=torch.int8)
    assert frequency_weights(given).tolist() == pytest.approx([1, 1])
