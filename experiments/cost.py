"""What a network costs to store and to run."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from noisyq_fast.layers import QuantLayer

_FLOAT_BITS = 32


def parameters(model: nn.Module) -> int:
    """How many numbers were trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_in_bits(model: nn.Module) -> int:
    """The bits that inference needs to store: a quantized layer's weight at its width with one
    float32 scale per output channel and one for its input, everything else in float32; buffers
    that only count batches, or tell whether there were any, left out."""
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.endswith(".observed")
    }
    bits = _FLOAT_BITS * sum(tensor.numel() for tensor in tensors.values())
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            saved = _FLOAT_BITS - layer.weight_bits
            bits += _FLOAT_BITS * len(layer.by_channel(layer.weight)) - saved * layer.weight.numel()
    return bits


@torch.inference_mode()
def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for `example`, one input."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2
