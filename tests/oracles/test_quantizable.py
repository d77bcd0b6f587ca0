"""The losses of Quantizable DNNs and their gradients, in float64; mode 0 is float."""

import torch.nn.functional as F
from learned_values import load
from torch.testing import assert_close

from experiments.methods.many_widths import TARGETS, consistency

ORACLE = load("quantizable")
FORMS = {"labels of float": "", "labels of all": "_ce_in_every_mode"}


def loss_and_gradient(targets):
    logits = ORACLE["logits"].clone().requires_grad_()
    total = 0.0
    for mode in range(len(logits)):
        seen = [*logits[:mode].detach(), logits[mode]]
        total = total + sum(
            consistency(seen, lambda z: F.cross_entropy(z, ORACLE["labels"]), targets)
        )
    total.backward()
    return total.detach(), logits.grad


def test_losses_and_gradients():
    for targets, ending in FORMS.items():
        loss, gradient = loss_and_gradient(targets)
        assert_close(loss, ORACLE[f"loss{ending}"], rtol=0, atol=1e-12)
        assert_close(gradient, ORACLE[f"d_logits{ending}"], rtol=0, atol=1e-12)


def test_the_chain_of_any_precision_networks():
    assert {*FORMS, "chain"} == set(TARGETS)
    _, gradient = loss_and_gradient("chain")
    assert_close(gradient, ORACLE["d_logits_any_precision_chain"], rtol=0, atol=1e-12)
