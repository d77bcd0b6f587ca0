import pickle

import numpy as np
import pytest
import torch

from experiments.data.cifar10 import BATCH_MD5, FOLDER
from noisyq_fast import backends, use_backend


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_backend_afterwards():
    """A run chooses one for its whole process."""
    requested = backends.requested()
    yield
    use_backend(requested)


@pytest.fixture(scope="session")
def cifar10_batches():
    """What the files of the release hold; nearly all images have one level and compress well."""
    generator = np.random.default_rng(0)
    batches = {}
    for name in BATCH_MD5:
        data = np.repeat(generator.integers(256, size=(10_000, 1), dtype=np.uint8), 3072, axis=1)
        data[:20] = generator.integers(256, size=(20, 3072))
        labels = generator.integers(10, size=10_000).tolist()
        batches[name] = {b"data": data, b"labels": labels}
    return batches


@pytest.fixture(scope="session")
def cifar10_folder(cifar10_batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10") / FOLDER
    folder.mkdir()
    for name, batch in cifar10_batches.items():
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    return folder
