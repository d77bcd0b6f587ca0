"""Bit-split and stitching (Wang et al., ICML 2020): codes that are optimized bit by bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noisyq_fast.calibration.post_training import LinearLayer, PostTraining, in_float32, shown
from noisyq_fast.grid import AFFINE, ODD

_BLOCK = 64
_SETTLED = 1e-9
_LEAST_BITS = 3
_MOST_BITS = 7
"""With more bits, the codes closest to the weights are good enough."""


@in_float32
def bitsplit(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    positions: int = 12000,
    epochs: int = 100,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a float network with codes and scales that minimise the squared error of the
    outputs of layers, layer by layer in the order of execution.

    A filter of ``b`` bits is ``a sum_m 2^-m B_m`` with ``b - 1`` planes ``B_m`` of -1, 0 and 1. It
    starts from the codes closest to the weights; then alternately ``a`` is optimized for the codes,
    and each entry of each plane for all others, until none changes. The error is the difference
    between ``X B``, with ``X`` the quantized input of the layer in the partly quantized network,
    and the output of the float network, so that later layers compensate errors of earlier ones.

    The scale of an input is optimized alternately with its codes, too. Layers of 8 bits (by default
    the first and the last ones) keep the codes closest to their weights. Batch norms are folded
    into the layers before them, and their statistics are not estimated again. Labels are not used.
    Only linear layers and convolutions are fitted; other layers have the weights of
    `quantize_model_` and the ranges of `calibrate`.

    Args:
        model: a float network; it is not changed.
        inputs: as for `calibrate`; all are kept in memory.
        positions: the number of output positions of a convolution, chosen at random over all
            inputs, that the fit uses.
        epochs: the largest number of passes over all planes.
        progress: whether to show a progress bar; ``None``: if stderr is a terminal.
        **options: of `quantize_model_`, except those of grids and quantizers of weights. Weights
            need 3 bits or more; inputs cannot have an affine or an odd grid.

    Returns:
        A quantized copy, in evaluation mode.

    Raises:
        TypeError, ValueError: as for `easyquant`, and for other bits and grids.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> noisyq_fast.bitsplit(model, [torch.randn(50, 8)], first_last_bits=4)[0]
        QuantLinear(in_features=8, out_features=8, bias=True, W4/A4)
    """
    both = PostTraining(model, inputs, options)
    for layer in shown(both.layers(), "bitsplit", progress):
        _check(layer)
        bits = layer.weight_quantizer.bits
        codes, scale = fit_weights(layer.weight, bits)
        of_float, x = layer.inputs(positions)
        _fit_input(layer, x)
        if bits <= _MOST_BITS:
            x, output = layer.quantized_inputs(x), of_float @ layer.weight.mT
            codes, scale = stitch(codes, scale, x, output, bits, epochs)
        scale = torch.where(codes.any(-1), scale, 1.0)
        layer.set_weight(codes * scale.unsqueeze(-1))
        layer.set_weight_scale(scale)
    return both.quantized


def _check(layer: LinearLayer) -> None:
    bits, quantizer = layer.weight_quantizer.bits, layer.quantized.input_quantizer
    if bits < _LEAST_BITS:
        raise ValueError(f"weight_bits: got {bits} for layer {layer.name!r}, takes 3..8")
    if quantizer is not None and quantizer.keeps_range and quantizer.grid_kind in (AFFINE, ODD):
        raise ValueError(
            f"activation_grid: got {quantizer.grid_kind!r} for layer {layer.name!r}, takes signed, "
            "full or unsigned"
        )


def _fit_input(layer: LinearLayer, x: Tensor) -> None:
    """Fits the input range of a layer to its input in the quantized network."""
    quantizer: Any = layer.quantized.input_quantizer
    if quantizer is None or not quantizer.keeps_range or not x.any():
        return
    grid = quantizer.grid
    x = x.flatten()
    first = x.abs().max() / grid.divisor
    _, scale = fit_scale(x, first, grid.code_min, grid.code_max)
    quantizer.set_range((scale * grid.divisor).reshape(quantizer.observed.shape))


def fit_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes ``[..., outputs, inputs]`` and scales ``[..., outputs]`` that minimise the squared
    error of the weights themselves."""
    most = (1 << bits - 1) - 1
    first = weight.abs().amax(-1) / most
    return fit_scale(weight, torch.where(first > 0, first, 1.0), -most, most)


def fit_scale(x: Tensor, scale: Tensor, code_min: int, code_max: int) -> tuple[Tensor, Tensor]:
    """Codes ``[..., n]`` and scales ``[...]``, optimized alternately."""
    codes, products = torch.empty_like(x), torch.empty_like(x)  # reused in all iterations
    for _ in range(1000):
        before = scale
        torch.div(x, scale.unsqueeze(-1), out=codes).round_().clamp_(code_min, code_max)
        squared = torch.square(codes, out=products).sum(-1)
        scale = torch.where(squared > 0, torch.mul(x, codes, out=products).sum(-1) / squared, scale)
        if not bool(((scale - before).abs() >= _SETTLED).any()):
            break
    return codes, scale


def stitch(
    codes: Tensor, scale: Tensor, x: Tensor, output: Tensor, bits: int, epochs: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales that reduce ``|output - x (codes scale)'|^2``.

    Args:
        codes, scale: the initial ones, as from `fit_weights`.
        x: ``[..., samples, inputs]``.
        output: ``[..., samples, outputs]``.
    """
    unit = 1 << bits - 2
    planes, gram, target = split(codes, bits), x.mT @ x, output.mT @ x
    left = torch.arange(planes.shape[-2], device=planes.device)  # filters that still change
    for _ in range(epochs):
        of_left = planes[..., left, :]
        targets, otherwise = target[..., left, :], scale[..., left] * unit
        before = of_left.clone()
        top = best_scale(joined(of_left), gram, targets, otherwise)
        update_planes_(of_left, top, gram, targets)
        planes[..., left, :] = of_left
        left = left[_filters_that_differ(before, of_left)]
        if not left.numel():
            break
    codes = joined(planes) * unit
    return codes, best_scale(codes, gram, target, scale)


def split(codes: Tensor, bits: int) -> Tensor:
    """Bit planes of codes, ``[bits - 1, ...]``: sign times bit, the most significant first."""
    places = torch.arange(bits - 2, -1, -1, device=codes.device).view(-1, *[1] * codes.dim())
    bit = codes.abs().long().unsqueeze(0) >> places & 1
    return bit * codes.sign()


def joined(planes: Tensor) -> Tensor:
    """The codes of bit planes, in units of the first plane."""
    powers = [planes[m] / (1 << m) for m in range(len(planes))]
    return torch.stack(powers).sum(0)


def best_scale(codes: Tensor, gram: Tensor, target: Tensor, otherwise: Tensor) -> Tensor:
    """The scale of each filter with the least squared error; ``otherwise`` if that is not
    positive."""
    squared = (codes @ gram * codes).sum(-1)
    best = (codes * target).sum(-1) / torch.where(squared > 0, squared, 1.0)
    return torch.where(best > 0, best, otherwise)


def update_planes_(planes: Tensor, top: Tensor, gram: Tensor, target: Tensor) -> None:
    """Sets each entry in turn to the best of -1, 0 and 1, given all others.

    With ``c`` the value of a plane's entries, half the squared error has, in entry ``n`` of a
    filter, the gradient ``c error_n`` with ``error = (codes top) gram - target``, and the second
    derivative ``c^2 gram_nn``. Blocks of entries are updated on the CPU; after each block the error
    of all entries is updated.
    """
    error = (joined(planes) * top.unsqueeze(-1)) @ gram - target
    for m in range(len(planes)):
        worth = (top / (1 << m)).unsqueeze(-1)
        for start in range(0, planes.shape[-1], _BLOCK):
            block = slice(start, start + _BLOCK)
            entries = planes[m, ..., block]
            parts = entries, error[..., block], gram[..., block, block], worth[..., 0]
            best = torch.from_numpy(_best_entries(*(x.cpu().numpy() for x in parts))).to(entries)
            changed = _filters_that_differ(entries, best)
            if bool(changed.any()):
                change = (worth * (best - entries))[..., changed, :]
                error[..., changed, :] += change @ gram[..., block, :]
                entries.copy_(best)


def _filters_that_differ(x: Tensor, y: Tensor) -> Tensor:
    """For ``[..., filters, inputs]``: bool ``[filters]``, whether a filter differs in any group or
    plane."""
    return (x != y).any(-1).reshape(-1, x.shape[-2]).any(0)


def _best_entries(
    entries: np.ndarray, error: np.ndarray, gram: np.ndarray, worth: np.ndarray
) -> np.ndarray:
    """The best entries of a block, ``[..., filters, block]``, one after the other."""
    found = np.moveaxis(entries, -1, 0).copy()
    error = np.moveaxis(error, -1, 0).copy()
    columns = np.moveaxis(gram, (-2, -1), (0, 1))[..., np.newaxis].copy()
    for n, before in enumerate(found):
        half = worth * columns[n, n] / 2
        without = error[n] - 2 * half * before
        best = (without <= -half).astype(found.dtype) - (without >= half)
        change = best - before
        if change.any():
            error[n + 1 :] += columns[n, n + 1 :] * (worth * change)
            found[n] = best
    return np.moveaxis(found, 0, -1)
