"""Quantization-aware training (Tallec et al. 2023, arXiv 2303.11803, section 3.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.checks import Choice, require, require_choice, require_whole
from experiments.methods.method import Method
from noisyq_fast.grid import KINDS, SIGNED, most_bits
from noisyq_fast.layers.grouped import PER_GROUP
from noisyq_fast.layers.layer import ARITHMETICS, FLOAT, INTEGER


@dataclass(frozen=True)
class Quant(Method):
    """Quantizes weights and activations in every layer; the first and the last keep 8 bits."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"weight_bits": 4, "activation_bits": 4}
    REPLACES: ClassVar[str | None] = "quantizer"
    LEGACY: ClassVar[Mapping[str, Any]] = {
        "weight_grid": SIGNED,
        "activation_grid": SIGNED,
        "arithmetic": FLOAT,
    }

    weight_bits: int | None = None
    """Bits of the weights, 2 to 8; always 8 in the first and the last layer."""

    activation_bits: int | None = None
    """Bits of each layer's input, 2 to 8; always 8 in the first and the last layer."""

    averaging_constant: float = 0.01
    """Weight of a batch in the moving average of each input's range."""

    weight_grid: Choice[str, KINDS] = SIGNED
    """Which levels weights have. signed: the paper's, as many below 0 as above. full: one more
    below. unsigned: from 0. affine: from the least to the largest value. odd: as many below 0 as
    above, without 0, of 2 to 7 bits; the first and the last layer stay signed."""

    activation_grid: Choice[str, KINDS] = SIGNED
    """The same for inputs. After a ReLU unsigned has twice the levels of signed: its b bits are b +
    1 signed ones. The first layer stays signed where the others are unsigned."""

    arithmetic: Choice[str, ARITHMETICS] = FLOAT
    """How products are computed. float: of fake-quantized floats. integer: of codes, exactly, with
    exact statistics of batch norms: the same forward on every machine, and faster."""

    def __post_init__(self) -> None:
        require_choice("arithmetic", self.arithmetic, ARITHMETICS)
        for what in ("weight", "activation"):
            bits, grid = getattr(self, f"{what}_bits"), getattr(self, f"{what}_grid")
            require_choice(f"{what}_grid", grid, KINDS)
            require_whole(f"{what}_bits", bits, 2, 8)
            most = most_bits(grid)
            few_enough = bits is None or bits <= most
            require(f"{what}_bits", bits, few_enough, f"2 to {most} on the {grid} grid")
        constant = self.averaging_constant
        require("averaging_constant", constant, 0 < constant <= 1, "a number above 0, up to 1")

    @property
    def label(self) -> str:
        label = f"quant-w{self.weight_bits}a{self.activation_bits}"
        if self.activation_grid != SIGNED:
            label += f"-{self.activation_grid}"
        if self.weight_grid != SIGNED:
            label += f"-{self.weight_grid}-weights"
        return label if self.arithmetic == FLOAT else f"{label}-{self.arithmetic}"

    def evaluation_options(self) -> dict[str, Any]:
        options = self.without_legacy()
        del options["averaging_constant"]
        return options

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        model = noisyq_fast.quantize_model_(
            model,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            averaging_constant=self.averaging_constant,
            weight_grid=self.weight_grid,
            activation_grid=self.activation_grid,
            example=example,
            arithmetic=self.arithmetic,
            input_ranges=getattr(model, "input_ranges", PER_GROUP),
        )
        if self.arithmetic == INTEGER and example is not None:
            noisyq_fast.fuse_(model, example)
        return model
