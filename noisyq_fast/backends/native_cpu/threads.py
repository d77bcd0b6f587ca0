"""The number of threads that kernels use."""

import os

import torch

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


# The threads of an OpenMP team do not survive a fork: a child that waits for them waits forever.
os.register_at_fork(after_in_child=_mark_forked)


def threads() -> int:
    return 1 if _forked else torch.get_num_threads()
