from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.models.latent_classifier import codes
from experiments.training.retrieval import hamming, nearest, packed


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("hash_codes.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.mark.parametrize("of", ["", "_query"])
def test_codes(oracle, of):
    expected = oracle[f"codes{of}"]
    assert torch.equal(codes(oracle[f"latent{of}"]), expected.bool())
    bytes_ = np.packbits(expected.numpy(), axis=1)
    assert torch.equal(packed(expected), torch.from_numpy(bytes_))


def test_hamming_distances(oracle):
    distances = hamming(packed(oracle["codes_query"]), packed(oracle["codes"]))
    assert torch.equal(distances, oracle["hamming"].int())


def test_nearest_of_the_short_list(oracle):
    found = nearest(
        packed(oracle["codes"]),
        oracle["deep"],
        packed(oracle["codes_query"]),
        oracle["deep_query"],
        threshold=oracle["threshold"].item(),
        count=oracle["top"].shape[1],
    )
    assert torch.equal(found, oracle["top"])
