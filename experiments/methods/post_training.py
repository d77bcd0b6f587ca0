"""Quantization of a network after its training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from experiments.checks import require_whole
from experiments.methods.method import Method
from experiments.seeds import CALIBRATION, mixed
from experiments.training.procedure import Parts, Passes, Procedure

_IMAGES = 256
_AT_ONCE = 32


@dataclass(frozen=True)
class PostTraining(Method):
    """Trains a float network, and quantizes it then, with 256 of the images that it was trained on
    (or all, if there are fewer) and without their labels.

    A subclass has an option `NAME_bits`, and says what `quantize` does. Both networks are scored.
    """

    REPLACES: ClassVar[str] = "procedure"
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "quant": "which trains a quantized network: there is none to quantize after it"
    }
    LEAST_BITS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        (name,) = self.DEFAULTS
        require_whole(name, getattr(self, name), self.LEAST_BITS, 8)

    @property
    def bits(self) -> int:
        (name,) = self.DEFAULTS
        return getattr(self, name)

    @property
    def label(self) -> str:
        (name,) = self.DEFAULTS
        return f"{name.removesuffix('_bits')}-w{self.bits}a{self.bits}"

    def quantize(self, model: nn.Module, inputs: list[Tensor]) -> nn.Module:
        """A quantized copy of a float network."""
        raise NotImplementedError

    def widths(self) -> dict[str, int]:
        """The options of `noisyq_fast.quantize_model_`."""
        return {"weight_bits": self.bits, "activation_bits": self.bits}

    def procedure(self, parts: Parts) -> Procedure:
        return QuantizedAfterwards(parts, self)

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str:
        return "scores are of the quantized network; model.safetensors holds the float one"


class QuantizedAfterwards(Procedure):
    """Trains as usual, and has a quantized network in the end."""

    DEPLOYS: ClassVar[bool] = True

    def __init__(self, parts: Parts, method: PostTraining) -> None:
        super().__init__(parts)
        self.method = method
        self.quantized: nn.Module | None = None

    def deploy(self) -> Passes:
        network, task = self.networks[0], self.parts.task
        count = task.count("trained")
        generator = torch.Generator().manual_seed(mixed(self.parts.config.seed, CALIBRATION))
        chosen = torch.randperm(count, generator=generator)[:_IMAGES]
        inputs = [task.inputs("trained", batch) for batch in chosen.split(_AT_ONCE)]
        seen = 0

        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if type(module) is type(network):
                seen += len(args[0])

        hook = register_module_forward_pre_hook(see)
        try:
            self.quantized = self.method.quantize(network, inputs)
        finally:
            hook.remove()
        return Passes(seen / count, 0)

    @property
    def judged(self) -> nn.Module:
        return self.networks[0] if self.quantized is None else self.quantized

    def predict(self, inputs: Tensor) -> Tensor:
        return self.judged(inputs)
