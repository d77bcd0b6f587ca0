import hypothesis
import pytest
import torch

import noisyq_fast
from noisyq_fast.backends import BACKENDS

# How long an example takes says nothing on a machine that runs other tests too.
hypothesis.settings.register_profile("noisyq", deadline=None)
hypothesis.settings.load_profile("noisyq")


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """Runs a test once on each backend; one that cannot be used here is skipped with its reason."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with noisyq_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
