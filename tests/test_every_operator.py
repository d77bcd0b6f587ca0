"""Every operator that is registered, on every backend."""

import pytest
import torch
from assert_same import assert_same
from every_operator import EVERY, RULES, operators

from noisyq_fast import rules
from noisyq_fast.backends import BACKENDS, reference


@pytest.mark.parametrize("family", EVERY)
def test_backends_give_the_same(backend, family):
    torch.manual_seed(0)
    expected = EVERY[family](operators(reference.backend), "cpu")
    torch.manual_seed(0)
    assert_same(EVERY[family](operators(BACKENDS[backend]), "cpu"), expected)


class Recorder:
    """The operators of the reference, and the names of those that were asked for."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return reference.backend.functions[name]


def test_none_is_left_out():
    recorder = Recorder()
    for every in EVERY.values():
        every(recorder, "cpu")
    assert recorder.names == set(reference.backend.functions)
    assert tuple(RULES) == rules.NAMES
