import pytest
import torch
from sklearn.datasets import load_digits

from experiments import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_every_fifth_image_is_a_test_image(digits):
    bunch = load_digits()
    assert digits.train_images.shape == (1438, 8, 8, 1)
    assert digits.test_images.shape == (359, 8, 8, 1)
    assert digits.test_labels.tolist() == bunch.target[4::5].tolist()
    assert digits.train_indices.tolist() == list(range(1438))
    assert digits.train_labels[:5].tolist() == bunch.target[[0, 1, 2, 3, 5]].tolist()


def test_images_span_the_whole_range_of_a_byte(digits):
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 255
    original = torch.from_numpy(load_digits().images[4::5])
    torch.testing.assert_close(
        digits.test_images.squeeze(-1).double() * 16 / 255, original, atol=0.04, rtol=0
    )


def test_smaller_training_sets_are_parts_of_the_larger(digits):
    small, large = digits.with_train_size(50), digits.with_train_size(200)
    assert torch.equal(small.train_images, large.train_images[:50])
    assert torch.equal(small.train_labels, large.train_labels[:50])
    assert torch.equal(small.train_images, digits.train_images[small.train_indices])
    assert torch.equal(small.train_labels, digits.train_labels[small.train_indices])
    again = large.with_train_size(9)
    assert torch.equal(again.train_images, digits.train_images[again.train_indices])
    assert len(large.train_labels.unique()) == 10
    assert torch.equal(large.test_images, digits.test_images)
    assert digits.with_train_size(None) is digits


def test_training_set_cannot_grow(digits):
    with pytest.raises(ValueError, match="--train-size: got 1439, takes 1 to 1438 for digits"):
        digits.with_train_size(1439)


def test_checksum_tells_copies_apart(digits):
    assert digits.checksum == data.load("digits").checksum
    assert digits.checksum != digits.with_train_size(1437).checksum
