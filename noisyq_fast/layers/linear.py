"""Linear layers and embeddings on fake-quantized weights and inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisyq_fast.grid import UNSIGNED
from noisyq_fast.integer import products
from noisyq_fast.layers import usage
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.quantizers import Quantizer


class QuantLinear(QuantLayer, nn.Linear):
    """`torch.nn.Linear` on fake-quantized weights and inputs. Arguments as for `QuantLayer`.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.QuantLinear(64, 10, weight_bits=8, activation_bits=8)
        QuantLinear(in_features=64, out_features=10, bias=True, W8/A8)
    """

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def compute_integers(self, x: Tensor) -> Tensor:
        return products.linear(*self.coded(x))


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`torch.nn.Embedding` with a fake-quantized weight, one scale for each row. Its input,
    indices, is not quantized. Arguments as for `QuantLayer`."""

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().set_quantizers_(weight, None)

    def check_granularity(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().check_granularity(weight, activation)
        # Sparse gradients can pass unchanged, but can be neither split into groups nor masked.
        if self.sparse and weight and (weight.group_size or weight.grid_kind == UNSIGNED):
            raise ValueError(
                f"weight: got {weight} for an embedding with sparse gradients; takes a grid that "
                "is not unsigned and one scale for each row, or sparse=False"
            )

    def forward(self, input: Tensor) -> Tensor:
        usage.called(self)
        weight = self.weight
        if self.max_norm is not None:
            torch.embedding_renorm_(weight.detach(), input, self.max_norm, self.norm_type)
        return F.embedding(
            input,
            self.quantized_weight(weight),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )


class QuantTransposedLinear(QuantLayer):
    """The linear layer of GPT-2 in Hugging Face transformers (`Conv1D`), whose weight is
    ``[in, out]``, on fake-quantized weights and inputs. Made by `quantize_model_`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def by_channel(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def from_channels(self, by_channel: Tensor, weight: Tensor) -> Tensor:
        return by_channel.transpose(0, 1)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.transpose(0, 1), bias)

    def compute_integers(self, x: Tensor) -> Tensor:
        weight = self.weight_codes()
        turned = replace(weight, codes=weight.codes.T, source=weight.source.T)
        return products.linear(self.input_codes(x), turned, self.bias)
