"""Running a model on an example without changing it."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def copy_of(model: nn.Module) -> nn.Module:
    """Also of a model on which a forward has left tensors with a history, as pruning and weight
    norm do, which cannot be copied otherwise. A ValueError where there are no values to copy."""
    check_has_values(model)
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


def check_has_values(model: nn.Module) -> None:
    if any(x.is_meta for x in [*model.parameters(), *model.buffers()]):
        raise ValueError(
            "model: got parameters on the device 'meta', which have no values; takes a model that "
            "was built or loaded on another device"
        )


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Runs what is inside in evaluation mode, without gradients and without graphs compiled
    before, and leaves all as it was."""
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with left_as_it_was(model), torch.no_grad(), eager:
        model.eval()
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward changes: modes, buffers (such as the statistics of batch norm),
    weights that an embedding with ``max_norm`` makes smaller, and PyTorch's random state. Until
    then nothing requires grad, so that the model may change it as without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), buffer.requires_grad)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    weights = [
        (module.weight, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    model.requires_grad_(False)
    for _, _, buffer, _, _ in buffers:
        buffer.requires_grad_(False)
    # Of other devices not even the state is asked for, which would initialize them.
    accelerator = torch.accelerator.current_accelerator()
    devices = {x.device for x in [*model.parameters(), *model.buffers()]}
    used = [device for device in devices if accelerator and device.type == accelerator.type]
    try:
        with torch.random.fork_rng(used):
            yield
    finally:
        # Through .data: graphs that wait for their backward take it for no change.
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in parameters:
            _as_leaf(parameter).requires_grad_(requires_grad)
        for weight, before in weights:
            weight.data.copy_(before)
        for module, name, buffer, before, requires_grad in buffers:
            buffer = _as_leaf(buffer)
            buffer.data.copy_(before)
            setattr(module, name, buffer.requires_grad_(requires_grad))


def _as_leaf(x: Tensor) -> Tensor:
    """Without the history that a change in place has given it."""
    return x if x.grad_fn is None else x.detach_()


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def tensors_in(values: Any) -> list[Tensor]:
    """All that are in containers, also in those that the pytree does not know."""
    found = []
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(dict(leaf))
        elif hasattr(leaf, "__dataclass_fields__"):
            found += tensors_in(vars(leaf))
    return found
