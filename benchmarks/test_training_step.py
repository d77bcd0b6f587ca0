"""Whole training steps on the CPU, all of a network's in turns."""

import copy
from functools import partial

import pytest
import torch
from comparison import compare
from training_step import (
    ACTION_UNITS,
    CLASSIFICATION,
    FORMS,
    FUSED,
    INTEGER,
    OURS,
    RECOMPUTE,
    RESNET18,
    TRANSFORMER,
    step_of,
)

BFLOAT16 = ["float", OURS, FUSED, "eager, detach"]  # torch.ao's takes no bfloat16
COMPILED = ["float", OURS, "eager, detach"]


@pytest.mark.parametrize(
    "work", [CLASSIFICATION, ACTION_UNITS], ids=["classification", "action_units"]
)
def test_step(benchmark, work, compiled_afresh):
    make = maker(work)
    candidates = {
        **{name: step_of(work, make(name)) for name in FORMS},
        **{
            f"{name}, bf16 autocast": step_of(work, make(name), dtype=torch.bfloat16)
            for name in BFLOAT16
        },
        **{f"torch.compile, {name}": step_of(work, torch.compile(make(name))) for name in COMPILED},
        **{
            f"torch.compile, {name}, bf16 autocast": step_of(
                work, torch.compile(make(name)), dtype=torch.bfloat16
            )
            for name in COMPILED
        },
    }
    compare(benchmark, work.title, candidates, rounds=20, ours="float")


@pytest.mark.parametrize("work", [RESNET18, TRANSFORMER], ids=["resnet18", "transformer"])
def test_larger_step(benchmark, work):
    make = maker(work)
    # Only convolutions are fused.
    names = ["float", OURS, INTEGER, *([FUSED, RECOMPUTE] if work is RESNET18 else [])]
    candidates = {name: step_of(work, make(name)) for name in names}
    compare(benchmark, work.title, candidates, rounds=10, ours="float")


def maker(work):
    """Makes forms of one model, which begin with the same weights."""
    return partial(made, work.network(), work.example())


def made(model, example, name):
    return FORMS[name](copy.deepcopy(model), example)
