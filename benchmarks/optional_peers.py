"""Peers that are timed where they are installed: NVIDIA Model-Optimizer and torchao."""

from contextlib import suppress

import torch
from torch import Tensor, nn

ACTIVATION = {}
WEIGHT = {}
# int8 affine for each token, and int4 for each group of 32: torchao's Int8DynActInt4Weight.
TOKEN = {}
GROUP = {}

with suppress(ImportError):
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    def _model_optimizer(axis: int | None) -> nn.Module:
        return TensorQuantizer(QuantizerAttributeConfig(num_bits=4, axis=axis))

    ACTIVATION["Model-Optimizer TensorQuantizer"] = lambda: _model_optimizer(None)
    WEIGHT["Model-Optimizer TensorQuantizer"] = lambda: _model_optimizer(0)

with suppress(ImportError):
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    class _TorchAO(IntxFakeQuantizer):
        """Takes matrices only; offers no symmetric quantization per tensor."""

        def __init__(self) -> None:
            super().__init__(IntxFakeQuantizeConfig(torch.int4, "per_channel"))

        def forward(self, weight: Tensor) -> Tensor:
            return super().forward(weight.flatten(1)).view_as(weight)

    WEIGHT["torchao IntxFakeQuantizer"] = _TorchAO

    for peers, config in (
        (TOKEN, IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)),
        (GROUP, IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)),
    ):
        peers["torchao"] = lambda config=config: IntxFakeQuantizer(config)
        peers["torch.compile, torchao"] = lambda config=config: torch.compile(
            IntxFakeQuantizer(config)
        )
