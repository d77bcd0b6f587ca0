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
    """A deep copy, also of a model that holds non-leaf tensors, such as pruning and weight norm
    leave after a forward (`copy.deepcopy` alone refuses these). A ValueError on the device meta."""
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
    """A context in evaluation mode, without gradients and without using compiled graphs; everything
    is restored afterwards."""
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with left_as_it_was(model), torch.no_grad(), eager:
        model.eval()
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores, at its end, what a forward changes: modes, buffers (such as the statistics of batch
    norm), weights that an embedding with ``max_norm`` renormalizes, and PyTorch's random state.
    Inside, no parameter or buffer requires grad, so that the model may change them in place."""
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
    # Only devices in use: reading the random state of another would initialize it.
    accelerator = torch.accelerator.current_accelerator()
    devices = {x.device for x in [*model.parameters(), *model.buffers()]}
    used = [device for device in devices if accelerator and device.type == accelerator.type]
    try:
        with torch.random.fork_rng(used):
            yield
    finally:
        # Through .data, so that graphs whose backward is still to come see no change.
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
    """``x`` detached from the graph that a change in place has attached it to."""
    return x if x.grad_fn is None else x.detach_()


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested containers, also in mappings and dataclasses unknown to the pytree."""
    found = []
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(dict(leaf))
        elif hasattr(leaf, "__dataclass_fields__"):
            found += tensors_in(vars(leaf))
    return found
