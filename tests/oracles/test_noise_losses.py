"""Losses and procedures against noise_losses.npz, which was computed by others' code."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.losses import CrossEntropy
from experiments.methods.co_teaching import kept_mean, left_out, picks
from experiments.methods.elr import ELR
from experiments.methods.gce import GCE
from experiments.methods.mixup import mixed_inputs, mixed_loss
from experiments.methods.sam import climb_
from experiments.methods.sce import SCE
from experiments.training.procedure import Batch

ORACLE = {
    name: torch.from_numpy(np.asarray(value))
    for name, value in np.load(Path(__file__).with_name("noise_losses.npz")).items()
}
LABELS = ORACLE["labels"].long()
COUNT = len(LABELS)
INDICES = ORACLE["elr_index"].long()
CLASSES = ORACLE["logits"].shape[1]
TASK = SimpleNamespace(count=lambda part: int(INDICES.max()) + 1, classes=CLASSES)


def close(actual, name, tolerance=1e-12):
    torch.testing.assert_close(actual, ORACLE[name], rtol=tolerance, atol=tolerance)


def loss_of(method):
    return method.with_defaults().loss(CrossEntropy(), nn.Identity(), TASK).double()


def both(loss, logits, indices=INDICES):
    """The mean, the losses of the samples and the gradient of the mean."""
    logits = logits.clone().requires_grad_()
    mean = loss(logits, LABELS, indices)
    mean.backward()
    loss.eval()
    return mean.detach(), loss.samples(logits.detach(), LABELS, indices), logits.grad


@pytest.mark.parametrize(("q", "key"), [(None, "gce7"), (0.3, "gce3")])
def test_gce(q, key):
    mean, samples, gradient = both(loss_of(GCE(q)), ORACLE["logits"])
    close(samples, f"{key}_per_sample")
    close(gradient, f"{key}_dlogits")
    torch.testing.assert_close(mean, samples.mean())


def test_gce_chooses_what_it_keeps():
    name = next(name for name in ORACLE if name.startswith("gce7_truncated_keep"))
    loss = loss_of(GCE(0.7, 0.5))
    loss.kept = loss.kept[:COUNT]
    loss.choose(ORACLE["logits"], LABELS)
    assert torch.equal(loss.kept, ORACLE[name].bool())


@pytest.mark.parametrize("kept", [0, 3])
def test_truncated_gce_is_constant_where_it_keeps_nothing(kept):
    loss = loss_of(GCE(0.7, 0.5))
    loss.kept[INDICES[kept:]] = False
    _, samples, gradient = both(loss, ORACLE["logits"])
    torch.testing.assert_close(samples[:kept], ORACLE["gce7_per_sample"][:kept])
    torch.testing.assert_close(gradient[:kept], ORACLE["gce7_dlogits"][:kept])
    constant = torch.full_like(samples[kept:], (1 - 0.5**0.7) / 0.7)
    torch.testing.assert_close(samples[kept:], constant)
    assert not gradient[kept:].any()


@pytest.mark.parametrize(
    ("factors", "key"), [((None, None), "sce_a0p1_b1"), ((6.0, 0.1), "sce_a6_b0p1")]
)
def test_sce(factors, key):
    mean, samples, gradient = both(loss_of(SCE(*factors)), ORACLE["logits"])
    close(mean, f"{key}_loss")
    close(samples.mean(), f"{key}_loss")
    close(gradient, f"{key}_dlogits")


def test_elr_remembers_samples_by_their_indices():
    loss = loss_of(ELR())
    for step in range(
        sum(name.startswith("elr_step") and name.endswith("loss") for name in ORACLE)
    ):
        loss.train()
        key = f"elr_step{step}"
        mean, samples, gradient = both(loss, ORACLE[f"{key}_logits"])
        close(mean, f"{key}_loss")
        close(samples.mean(), f"{key}_loss")
        close(gradient, f"{key}_dlogits")
        close(loss.targets[INDICES], f"{key}_target")
    others = torch.ones(len(loss.targets), dtype=torch.bool)
    others[INDICES] = False
    assert not loss.targets[others].any()


@pytest.mark.parametrize("key", ["f25", "f40"])
def test_networks_of_co_teaching_learn_from_what_the_other_picks(key):
    share = int(key[1:]) / 100
    logits = [ORACLE[f"cot_logits_{n}"].clone().requires_grad_() for n in (1, 2)]
    losses = [F.cross_entropy(own, LABELS, reduction="none") for own in logits]
    picked = [picks(own.detach(), share) for own in losses]
    for number in (1, 2):
        mask, count = picked[2 - number]
        assert torch.equal(mask.nonzero().flatten(), ORACLE[f"cot_{key}_keep_for_{number}"])
        mean = kept_mean(losses[number - 1], mask, count)
        mean.backward()
        close(mean.detach(), f"cot_{key}_loss_{number}")
        close(logits[number - 1].grad, f"cot_{key}_d{number}")


def test_share_that_co_teaching_leaves_out_rises():
    schedule = ORACLE["cot_rate_schedule_045"]
    rates = [left_out(epoch, 0.45, 10) for epoch in range(len(schedule))]
    close(torch.tensor(rates, dtype=torch.float64), "cot_rate_schedule_045")
    assert [left_out(epoch, 0.45, 1) for epoch in range(3)] == [0.0, 0.45, 0.45]


def test_mixup():
    order, share = ORACLE["mixup_perm"].long(), ORACLE["mixup_lambda"]
    inputs = mixed_inputs(ORACLE["mixup_x"], share, order)
    close(inputs, "mixup_inputs")
    weight = ORACLE["mixup_w"].clone().requires_grad_()
    batch = Batch(torch.arange(COUNT), inputs, LABELS, 1.0)
    loss = mixed_loss(CrossEntropy(), inputs @ weight.T, batch, share, order)
    loss.backward()
    close(loss.detach(), "mixup_loss")
    close(weight.grad, "mixup_dw")


# The radius and the optimizer are those that the file was made with.
@pytest.mark.parametrize(("key", "rho", "adaptive"), [("std", 0.05, False), ("ada", 0.5, True)])
def test_sam(key, rho, adaptive):
    parameters = [ORACLE[f"sam_{name}0"].clone().requires_grad_() for name in ("w", "b")]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)

    def backward():
        optimizer.zero_grad()
        F.cross_entropy(ORACLE["mixup_x"] @ parameters[0].T + parameters[1], LABELS).backward()

    for step, expected in enumerate(ORACLE[f"sam_{key}_w_after_steps"]):
        before = [parameter.detach().clone() for parameter in parameters]
        backward()
        climb_(parameters, rho, adaptive)
        if step == 0:
            for parameter, name in zip(parameters, ("w", "b"), strict=True):
                close(parameter.detach(), f"sam_{key}_perturbed_{name}", 1e-10)
        backward()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        torch.testing.assert_close(parameters[0].detach(), expected, rtol=1e-10, atol=1e-10)
