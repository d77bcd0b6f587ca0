"""EasyQuant (Wu et al. 2020, arXiv 2006.16669): scales that maximise the cosine between the outputs
of quantized and of float layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast.calibration.post_training import LinearLayer, PostTraining, in_float32, shown

RATIOS = torch.linspace(0.5, 2, 100, dtype=torch.float64).tolist()
"""Candidates: the initial scale is divided by these."""
_ROUNDS = 3


@in_float32
def easyquant(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    positions: int = 1024,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a float network with searched scales, layer by layer in the order of execution,
    with all earlier layers already quantized.

    Let ``O`` be the output of a layer in the float network, and ``O'`` its output with quantized
    weights and quantized input, both without bias. Alternately, until nothing changes but at most
    three times::

        weights  for each channel the scale s0 / r that maximises cos(O, O') over all samples
        input    the scale s0 / r that maximises cos(O, O') over samples and channels

    with ``r`` in 100 steps from 0.5 to 2 (the first of equal ones), and ``s0`` the scale from the
    largest value. Batch norms are folded into the layers before them. Labels are not used.

    The search covers linear layers and convolutions; other layers have the weights of
    `quantize_model_` and the ranges of `calibrate`.

    Args:
        model: a float network; it is not changed.
        inputs: as for `calibrate`; all are kept in memory. 50 images are usual.
        positions: the number of output positions of a convolution, chosen at random over all
            inputs, that the search uses.
        progress: whether to show a progress bar; ``None``: if stderr is a terminal.
        **options: of `quantize_model_`, except those of grids and quantizers of weights.

    Returns:
        A quantized copy, in evaluation mode.

    Raises:
        TypeError: wrong type of an argument, or an unknown option.
        ValueError: no inputs, inputs on which the model does not run, a model that is quantized
            already, or an option out of range.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> noisyq_fast.easyquant(model, [torch.randn(50, 8)], weight_bits=4)[0]
        QuantLinear(in_features=8, out_features=8, bias=True, W8/A8)
    """
    both = PostTraining(model, inputs, options)
    for layer in shown(both.layers(), "easyquant", progress):
        _search(layer, positions)
    return both.quantized


def _search(layer: LinearLayer, positions: int) -> None:
    weight, bits = layer.weight, layer.weight_quantizer.bits
    quantizer = layer.quantized.input_quantizer
    ranged = quantizer if quantizer is not None and quantizer.keeps_range else None
    of_float, x = layer.inputs(positions)
    output = of_float @ weight.mT
    first = first_scale(weight, bits)
    ratios = torch.tensor(RATIOS, dtype=first.dtype, device=first.device)

    found, ratio = None, 1.0
    for _ in range(_ROUNDS):
        before = found, ratio
        quantized = layer.quantized_inputs(x, 1 / ratio)
        found = weight_cosines(output, quantized, weight, first, bits).argmax(-1)
        scale = first / ratios[found]
        if ranged is None:
            break
        rounded = to_grid(weight, scale, bits)
        candidates = (layer.quantized_inputs(x, 1 / r) for r in RATIOS)
        ratio = RATIOS[input_cosines(output, candidates, rounded).argmax()]
        if before[0] is not None and torch.equal(before[0], found) and before[1] == ratio:
            break
    layer.set_weight_scale(scale)
    if ranged is not None:
        ranged.set_bounds(*(end / ratio for end in layer.range))


def first_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each channel from its largest value; 1 if all are 0."""
    scale = weight.abs().amax(-1) / ((1 << bits - 1) - 1)
    return torch.where(scale > 0, scale, 1.0)


def to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``weight``, ``[..., outputs, inputs]``, quantized with a scale for each output."""
    most = (1 << bits - 1) - 1
    scale = scale.unsqueeze(-1)
    return (weight / scale).round().clamp(-most, most) * scale


def weight_cosines(output: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The cosine between float and quantized output of each channel, for each of `RATIOS`.

    Args:
        output: ``[..., samples, outputs]``, from the float network.
        x: ``[..., samples, inputs]``, quantized.
        weight: ``[..., outputs, inputs]``, float.
        scale: ``[..., outputs]``; it is divided by the ratios.

    Returns:
        ``[..., outputs, ratios]``.
    """
    found = [cosine(output, x @ to_grid(weight, scale / r, bits).mT, dim=-2) for r in RATIOS]
    return torch.stack(found, -1)


def input_cosines(output: Tensor, candidates: Iterable[Tensor], weight: Tensor) -> Tensor:
    """The cosine over all channels together, for each of several quantized inputs."""
    return torch.stack([cosine(output.flatten(), (x @ weight.mT).flatten()) for x in candidates])


def cosine(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """The cosine between ``a`` and ``b`` along ``dim``; 0 if either is all 0."""
    norms = a.norm(dim=dim) * b.norm(dim=dim)
    return (a * b).sum(dim) / torch.where(norms > 0, norms, 1.0)
