"""Freezing, resetting and switching off the quantizers of a model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.quantizers import Quantizer

_lock = threading.Lock()
_off: weakref.WeakKeyDictionary[Quantizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
"""For each quantizer, how many contexts keep it off, and its ``enabled`` before the first."""


def named_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a model by name; an error if there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    found = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns"
        )
    return found


def freeze_ranges_(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Keeps the input ranges fixed in training too; everything else trains on.

    In training the scale then comes from the range, as in evaluation, and values beyond it are
    clipped (with the gradient that the quantizer's ``ste`` names). Useful for the last epochs, so
    that the network trains with the scales that evaluation uses, or after `calibrate`.

    Like ``requires_grad``, this is not in the state dict: a script that resumes from a checkpoint
    has to freeze the ranges again. Copies and pickles of the model keep them frozen.

    Args:
        model: a module with quantized layers. Changed in place.
        frozen: ``False`` lets the ranges move again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``frozen`` not a bool.
        ValueError: a model without quantized layers, or one whose ranges have seen no data yet.

    Example:
        >>> import torch, noisyq_fast
        >>> model = noisyq_fast.QuantLinear(3, 2)
        >>> _ = model(torch.tensor([[0.1, -0.7, 0.2]]))
        >>> _ = noisyq_fast.freeze_ranges_(model)
        >>> _ = model(torch.tensor([[10.0, 0.0, 0.0]]))
        >>> model.input_quantizer.range
        tensor(0.7000)
    """
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen: got {frozen!r} ({type(frozen).__name__}), takes a bool")
    quantizers = [q for q in named_quantizers(model).values() if q.keeps_range]
    if frozen and quantizers and all(bool(q.range.isnan().all()) for q in quantizers):
        raise ValueError(
            "freeze_ranges_: got a model whose ranges have seen nothing yet; train it on a batch, "
            "call noisyq_fast.calibrate(model, batches), or load a checkpoint that has ranges"
        )
    for quantizer in quantizers:
        quantizer.frozen = frozen
    return model


def freeze_weights_(model: nn.Module) -> nn.Module:
    """Makes evaluation quantize each weight once, not at every call, until ``model.train()``.

    Outputs have the same bits. Evaluation is faster, above all with one image per batch, where most
    of the time is overhead; the codes take memory in addition to the weights. A weight is quantized
    again after an optimizer, `load_state_dict` or an operation in place has changed it, but not
    after a change through ``weight.data``: then call this function again. While gradients are
    recorded, nothing is cached. `load_integers` returns such a model.

    Args:
        model: a module with quantized layers, in evaluation mode. Changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without quantized layers, or one in training mode.

    Example:
        >>> import torch, noisyq_fast
        >>> model, x = noisyq_fast.QuantLinear(3, 2), torch.randn(4, 3)
        >>> y = noisyq_fast.calibrate(model, [x]).eval()(x)
        >>> with torch.no_grad():
        ...     torch.equal(noisyq_fast.freeze_weights_(model)(x), y)
        True
    """
    named_quantizers(model)
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    if any(layer.training for layer in layers):
        raise ValueError("freeze_weights_: got a model in training mode; call model.eval() first")
    for layer in layers:
        layer.made_of_weights = {}
    return model


def reset_ranges_(model: nn.Module) -> nn.Module:
    """Makes the quantizers forget what they have seen; frozen ranges move again.

    The next batch in training, or `calibrate`, sets the ranges anew.

    Args:
        model: a module with quantized layers. Changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without quantized layers.

    Example:
        >>> import torch, noisyq_fast
        >>> model = noisyq_fast.QuantLinear(3, 2)
        >>> _ = model(torch.tensor([[0.1, -0.7, 0.2]]))
        >>> noisyq_fast.reset_ranges_(model).input_quantizer.range
        tensor(nan)
    """
    for quantizer in named_quantizers(model).values():
        if quantizer.keeps_range:
            quantizer.reset()
            quantizer.frozen = False
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes in float: all its quantizers are off.

    No range moves. After the context, also after an error in it, each quantizer is on or off as it
    was before. Contexts may be nested, and may overlap in several threads: quantizers are off, for
    all threads, until the last context of their model ends. The quantizers of a copy of the model
    that is made inside stay off.

    Args:
        model: a module with quantized layers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without quantized layers.

    Example:
        >>> import torch, noisyq_fast
        >>> model, x = noisyq_fast.QuantLinear(3, 2), torch.randn(4, 3)
        >>> with noisyq_fast.disabled(model):
        ...     y = model(x)
        >>> torch.equal(y, torch.nn.functional.linear(x, model.weight, model.bias))
        True
    """
    quantizers = list(named_quantizers(model).values())
    with _lock:
        for quantizer in quantizers:
            contexts, before = _off.get(quantizer, (0, quantizer.enabled))
            _off[quantizer] = contexts + 1, before
            quantizer.enabled = False
    try:
        yield
    finally:
        with _lock:
            for quantizer in quantizers:
                contexts, before = _off.pop(quantizer)
                if contexts > 1:
                    _off[quantizer] = contexts - 1, before
                else:
                    quantizer.enabled = before
