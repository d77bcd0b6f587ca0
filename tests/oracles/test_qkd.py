import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.losses import imitation


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("qkd.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def test_losses_and_gradients_of_student_and_teacher(oracle):
    found = [re.fullmatch(r"T([\d.]+)_loss_student", name) for name in oracle]
    temperatures = [match[1] for match in found if match]
    assert temperatures
    for temperature in temperatures:
        for own, other in (("student", "teacher"), ("teacher", "student")):
            logits = oracle[f"logits_{own}"].clone().requires_grad_()
            others = oracle[f"logits_{other}"].clone().requires_grad_()
            loss = F.cross_entropy(logits, oracle["labels"])
            loss = loss + imitation(logits, others, float(temperature))
            loss.backward()
            for name, value in (("loss", loss.detach()), ("d", logits.grad)):
                expected = oracle[f"T{temperature}_{name}_{own}"]
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
            assert others.grad is None
