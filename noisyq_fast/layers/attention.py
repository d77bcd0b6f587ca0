"""Multi-head attention with quantized projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisyq_fast.grid import UNSIGNED
from noisyq_fast.integer import products
from noisyq_fast.integer.codes import Codes
from noisyq_fast.layers import usage
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.layers.linear import QuantLinear
from noisyq_fast.operators import checks
from noisyq_fast.quantizers import Quantizer


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fake-quantized weights and inputs of its projections.

    The products of queries, keys and values with each other stay float. Key and value have
    quantizers of their own, which are not used where they are the same tensor as the query.
    Arguments as for `QuantLayer`; calls as for the float layer, without nested tensors.

    Attributes:
        weight_quantizer: of the projections that come in.
        input_quantizer, key_quantizer, value_quantizer: of query, key and value.
        out_proj: a `QuantLinear`.
    """

    def __init__(self, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)
        out_proj: Any = self.out_proj
        out_proj.__class__ = QuantLinear
        out_proj.arithmetic = self.arithmetic
        out_proj.set_quantizers_(self.weight_quantizer, self.input_quantizer)

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().set_quantizers_(weight, activation)
        for name in ("key", "value"):
            setattr(self, f"{name}_quantizer", None)
            if activation is not None:
                quantizer = activation.like().for_input().to(self.weights()[0].device)
                setattr(self, f"{name}_quantizer", quantizer.train(self.training))

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What `torch.nn.TransformerEncoderLayer` asks before it leaves all its layers out and
        computes by itself, in float. While the layer is made, what the float layer has."""
        return vars(self)["_qkv_same_embed_dim"] and not self._modules

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        for weight in self.weights():
            nn.init.xavier_uniform_(weight)
        bias: Tensor | None
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def reset_parameters(self) -> None:
        self._reset_parameters()
        for quantizer in self.quantizers().values():
            quantizer.reset()

    def weights(self) -> list[Tensor]:
        if (weight := self.in_proj_weight) is not None:
            return [weight]
        return [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        usage.called(self)
        checks.padded(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: got True without attn_mask, which it is a hint about")
        is_batched = query.dim() == 3
        q, k, v = (self._batch_first(x, is_batched) for x in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        attended, weights = self._attend(q, k, v, mask, need_weights)

        y = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        if not is_batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, still laid out like the input."""
        if self.computes_in_integers():
            return self.compute_integers(query, key, value)
        q = self.quantized_input(query)
        k = q if key is query else self._quantized("key", key)
        v = q if value is query else k if value is key else self._quantized("value", value)
        weights: Sequence[Tensor] = [self.quantized_weight(weight) for weight in self.weights()]
        if len(weights) == 1 and q is k is v:
            return F.linear(q, weights[0], self.in_proj_bias).chunk(3, -1)
        if len(weights) == 1:
            weights = weights[0].chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (q, k, v), weights, biases))

    def compute_integers(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        q = self.input_codes(query)
        k = q if key is query else self._codes("key", key)
        v = q if value is query else k if value is key else self._codes("value", value)
        weights = [self.weight_codes(weight) for weight in self.weights()]
        if len(weights) == 1 and q is k is v:
            return products.linear(q, weights[0], self.in_proj_bias).chunk(3, -1)
        if len(weights) == 1:
            weights = _thirds(weights[0])
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(products.linear, (q, k, v), weights, biases))

    def why_float(self) -> str | None:
        if self.weight_quantizer and self.weight_quantizer.grid_kind == UNSIGNED:
            return "an unsigned weight of three projections has no product of codes"
        return super().why_float()

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, f"{name}_quantizer")
        return x if quantizer is None else quantizer(x)

    def _codes(self, name: str, x: Tensor) -> Codes:
        return getattr(self, f"{name}_quantizer").codes(x)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.widths()}"

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """The mask to add to the scores ``[N, heads, L, S]``; None if there is none."""
        added = []
        if attn_mask is not None:
            mask = _as_float(attn_mask, q.dtype)
            added.append(
                mask if mask.dim() == 2 else mask.view(len(q), self.num_heads, *mask.shape[1:])
            )
        if padding is not None:
            added.append(_as_float(padding, q.dtype).view(len(q), 1, 1, -1))
        if not added:
            return None
        total: Any = sum(added)
        return F.pad(total, (0, k.shape[2] - total.shape[-1]))  # appended keys are not masked

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ v, weights


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; ``True`` in a bool mask becomes -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _thirds(weight: Codes) -> list[Codes]:
    """The codes of the three projections in one weight."""
    zeros = [None] * 3 if weight.zero_point is None else weight.zero_point.chunk(3)
    parts = (weight.codes.chunk(3), weight.scale.chunk(3), zeros, weight.source.chunk(3))
    return [
        Codes(codes, scale, zero, weight.largest, source)
        for codes, scale, zero, source in zip(*parts, strict=True)
    ]
