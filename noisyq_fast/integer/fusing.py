"""Fusing layers into chains that compute without float tensors in between, and undoing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from noisyq_fast.integer.batch_norm import LARGEST_SUM, ExactBatchNorm
from noisyq_fast.integer.chain import Record, recording
from noisyq_fast.integer.deferred import Deferred
from noisyq_fast.integer.norm_classes import can_be_exact, exact
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.quantizers import Quantizer
from noisyq_fast.running import arguments, left_as_it_was, tensors_in
from noisyq_fast.widths import NormOfWidths

_MOST_TERMS = LARGEST_SUM // 255**2


def fuse_(model: nn.Module, example: Any, *, recompute: bool = False) -> nn.Module:
    """Fuses each convolution that computes in integers with the operations after it into a chain: a
    batch norm, an addition, a ReLU and the quantizer of the next layer.

    Such a convolution passes on its exact sums. A batch norm after it computes exact statistics
    from them (`noisyq_fast.integer.batch_norm`), and the quantizer computes its codes from them in
    one pass; no float tensor is written in between unless something else reads it. A forward then
    gives the same bits on every backend and with every number of threads, in training too. The mean
    over all pixels of a tensor in a chain is summed in a fixed order. Operations that a chain does
    not support (another activation) are PyTorch's.

    torchvision's `FrozenBatchNorm2d` is a batch norm too. A subclass keeps its own forward; within
    it ``super().forward`` or `torch.nn.functional.batch_norm` is exact
    (`noisyq_fast.integer.norm_classes`). A batch norm stays PyTorch's if its forward does something
    else with its input, or if something else reads the output of the convolution.

    The model's own forward is called as before, so it may depend on its mode, on Python state and
    on shapes. Any code that reads a tensor within a chain (another layer, a hook) gets its values.
    Modules, parameters, hooks and the names of the state dict do not change. A
    `torch.nn.SyncBatchNorm` adds the sums of all ranks, exactly. Batch norms of `split_norms_` are
    in the chain at every width.

    While a graph is traced (`torch.compile`, `torch.export`, `torch.func`) nothing can be deferred:
    the convolution computes its batch norm too, with the same bits, and the graph has to use the
    two as the model does on the example. The mean over pixels and a `SyncBatchNorm` are then
    PyTorch's.

    Args:
        model: a model from ``quantize_model_(..., arithmetic="integer")``. Changed in place.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments). The model is run on it, in evaluation and in training, to find the chains;
            ranges, statistics, modes and PyTorch's random state do not change.
        recompute: save only codes for the backward, and compute the sums of a convolution again
            there: less memory, more time.

    Returns:
        ``model``. `summary` shows the chain of each layer.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without layers that compute in integers, or an example on which it does
            not run.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        >>> model = noisyq_fast.quantize_model_(nn.Sequential(*layers), arithmetic="integer")
        >>> x = torch.randn(2, 3, 8, 8)
        >>> print(noisyq_fast.fuse_(model, x)[0].followed_by)
        batch norm, ReLU, quantizer
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantLayer) and layer.can_defer and layer.computes_in_integers()
        if layer.weights()[0][0].numel() <= _MOST_TERMS
    ]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without convolutions that compute in integers, "
            'takes one of quantize_model_(model, arithmetic="integer")'
        )
    unfuse_(model)
    norms: list[Any] = [norm for norm in model.modules() if can_be_exact(norm)]
    try:
        for layer in layers:
            layer.defers, layer.recomputes = True, recompute
        for norm in norms:
            norm.__class__ = exact(type(norm))
        seen = [_seen(model, example, training) for training in (False, True)]
        _pair(layers, norms, seen)
        _treat_widths_alike(model)
    except BaseException:
        unfuse_(model)
        raise
    return model


def unfuse_(model: nn.Module) -> None:
    """Undoes `fuse_`; does nothing if it was not called."""
    for module in model.modules():
        if isinstance(module, QuantLayer):
            for name in ("defers", "recomputes", "norm", "followed_by"):
                vars(module).pop(name, None)
        elif isinstance(module, ExactBatchNorm):
            exact_norm: Any = module
            exact_norm.__class__ = exact_norm.float_class
            vars(module).pop("follows", None)


def how_fused(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The chains that `fuse_` has formed, by layer name, as `fuse_as_` takes them."""
    names = {module: name for name, module in model.named_modules()}
    return {
        name: {
            "norm": [names[norm] for norm in layer.norm],
            "followed_by": layer.followed_by,
            "recompute": layer.recomputes,
        }
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and layer.defers
    }


def fuse_as_(model: nn.Module, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Forms the chains that `how_fused` found in a model with the same modules, without an
    example."""
    for name, about in found.items():
        layer = model.get_submodule(name)
        norms: list[Any] = [model.get_submodule(norm) for norm in about["norm"]]
        if not (isinstance(layer, QuantLayer) and layer.can_defer):
            raise ValueError(f"{name}: a convolution in the file, {type(layer).__name__} here")
        layer.defers, layer.recomputes = True, bool(about["recompute"])
        layer.followed_by = str(about["followed_by"])
        layer.norm = tuple(norms)
        for norm in norms:
            if not can_be_exact(norm):
                raise ValueError(f"{name}: a batch norm in the file, {type(norm).__name__} here")
            norm.__class__ = exact(type(norm))
            norm.follows = (layer,)


def _seen(model: nn.Module, example: Any, training: bool) -> Record:
    positional, named = arguments(example)
    with left_as_it_was(model), torch.no_grad(), recording() as found:
        model.train(training)
        for quantizer in model.modules():
            if isinstance(quantizer, Quantizer):
                quantizer.train()  # ranges may have seen no data yet
        try:
            for output in tensors_in(model(*positional, **named)):
                if isinstance(output, Deferred):
                    output.values()
        except Exception as error:
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"example: the model does not run on it in {mode}: {type(error).__name__}: {error}"
            ) from error
    return found


def _pair(layers: list[QuantLayer], norms: list[Any], seen: list[Record]) -> None:
    for layer in layers:
        of_modes = [found.norms.get(layer, []) for found in seen]
        of_layer: dict[int, Any] = {id(norm): norm for norms in of_modes for norm in norms}
        read = any(layer in found.reads for found in seen)
        runs = [found.runs[layer] for found in seen]  # 0 in a mode that does without it
        steps = list(dict.fromkeys(step for found in seen for step in found.steps.get(layer, [])))
        refused = any(norm in found.refused for found in seen for norm in of_layer.values())
        once = len(of_layer) == 1 and [*map(len, of_modes)] == runs
        one_norm = once and not read and not refused
        if (of_layer and not one_norm) or not {"batch norm", "quantizer"} & set(steps):
            layer.defers = False
            continue
        layer.followed_by = ", ".join(steps)
        layer.norm = tuple(of_layer.values())
        for norm in of_layer.values():
            norm.follows = (*norm.follows, layer)
    for norm in norms:
        if len(norm.follows) != 1:
            for layer in norm.follows:
                layer.defers, layer.norm, layer.followed_by = False, (), ""
            vars(norm).pop("follows", None)
            norm.__class__ = norm.float_class


def _treat_widths_alike(model: nn.Module) -> None:
    """Makes the batch norms of all widths exact if the one that ran on the example is."""
    for several in model.modules():
        if isinstance(several, NormOfWidths) and isinstance(several.active, ExactBatchNorm):
            norms: list[Any] = several.norms()
            for norm in norms:
                if not isinstance(norm, ExactBatchNorm):
                    norm.__class__ = exact(type(norm))
                    norm.follows = several.active.follows
