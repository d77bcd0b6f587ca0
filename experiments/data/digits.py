"""Handwritten digits: 1,797 real images of 8x8 that come with scikit-learn."""

from pathlib import Path

import torch

from experiments.data.dataset import Dataset


def load(data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Every fifth image is a test image. Needs neither a directory nor a download."""
    from sklearn.datasets import load_digits  # takes a second to import

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)  # 0..16
    images = (levels * 255 / 16).round().to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    is_test = torch.arange(len(labels)) % 5 == 4
    return Dataset(
        name="digits",
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        train_indices=torch.arange(int((~is_test).sum())),
        test_images=images[is_test],
        test_labels=labels[is_test],
        class_names=tuple(str(digit) for digit in range(10)),
        # Those of MNIST in Patrini et al. 2017, arXiv 1609.03683.
        asymmetric_flips={2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
        crop_padding=1,
        flip=False,
    )
