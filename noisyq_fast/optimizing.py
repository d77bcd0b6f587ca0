"""Learned quantizers in an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from noisyq_fast.quantizers import LearnedQuantizer


def parameter_groups(model: nn.Module, learned_lr: float, **options: Any) -> list[dict[str, Any]]:
    """The parameters of a model as groups for an optimizer: the parameters of quantizers form a
    group with a learning rate of its own and without weight decay.

    Args:
        model: a module, such as `quantize_model_` returns.
        learned_lr: the learning rate of the quantizers' parameters, such as a tenth of the
            weights'.
        options: of the group of all other parameters, such as ``weight_decay``.

    Returns:
        Two groups, the second with the parameters of quantizers; only the first if there are none.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch, noisyq_fast
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> q = noisyq_fast.LSQ(4)
        >>> model = noisyq_fast.quantize_model_(model, weight=q, activation=q)
        >>> groups = noisyq_fast.parameter_groups(model, learned_lr=1e-3, weight_decay=1e-4)
        >>> optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        >>> noisyq_fast.constrain_(model, optimizer)  # doctest: +ELLIPSIS
        <torch.utils.hooks.RemovableHandle object at ...>
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [4, 4]
    """
    learned = learned_parameters(model)
    is_learned = {id(parameter) for parameter in learned}
    others = [p for p in model.parameters() if id(p) not in is_learned]
    groups = [{"params": others, **options}]
    if learned:
        groups.append({"params": learned, "lr": learned_lr, "weight_decay": 0.0})
    return groups


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's quantizers."""
    return list(dict.fromkeys(p for q in _learned(model) for p in q.parameters()))


def constrain_(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """After every step of an optimizer, moves the parameters of quantizers back to valid values,
    such as step sizes and clipping levels above 0.

    Args:
        model: a module with quantized layers.
        optimizer: the optimizer of its parameters.

    Returns:
        A handle; its ``remove()`` ends this.

    Example:
        >>> import torch, noisyq_fast
        >>> layer = noisyq_fast.QuantLinear(3, 2, weight=noisyq_fast.LSQ(4))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> handle = noisyq_fast.constrain_(layer, optimizer)
        >>> layer.weight_quantizer.step.grad = torch.tensor(1e3)
        >>> optimizer.step()
        >>> layer.weight_quantizer.step.data > 0
        tensor(True)
    """
    quantizers = list(_learned(model))

    def constrain(*_: object) -> None:
        with torch.no_grad():
            for quantizer in quantizers:
                quantizer.constrain()

    return optimizer.register_step_post_hook(constrain)


def _learned(model: nn.Module) -> list[LearnedQuantizer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    return [module for module in model.modules() if isinstance(module, LearnedQuantizer)]
