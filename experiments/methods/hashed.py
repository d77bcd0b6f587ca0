"""Weights that share values at random (HashedNets, Chen et al. 2015, arXiv 1504.04788)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from experiments.checks import require, require_whole
from experiments.methods.method import Method
from experiments.models.hashed import hash_weight_, layer_seed


@dataclass(frozen=True)
class Hashed(Method):
    """The weights of every convolution and linear layer share a few values:
    `W[i] = sign(i) w[bucket(i)]`, by two hashes (xxHash) of the index i and the layer's name. Only
    the values w are trained, and decayed.

    The paper's layers are fully connected: that convolutions are hashed by their whole index is a
    choice here. Biases stay. The values start as some of the weights would.
    """

    REPLACES: ClassVar[str] = "layers"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"compression": 8.0}
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "which removes filters, whose weights others share here"
    }

    compression: float | None = None
    """Weights for each value, from 1."""

    hash_seed: int = 0
    """Seed of the hashes, which do not depend on --seed."""

    def __post_init__(self) -> None:
        factor = self.compression
        require("compression", factor, factor is None or 1 <= factor < 1e9, "a number from 1")
        require_whole("hash_seed", self.hash_seed, 0, 2**63 - 1)

    @property
    def label(self) -> str:
        seed = f"-hash-seed{self.hash_seed}" if self.hash_seed else ""
        return f"hashed{self.compression:g}{seed}"

    def evaluation_options(self) -> dict[str, Any]:
        return {"hash_seed": self.hash_seed}

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if type(layer) in (nn.Conv2d, nn.Linear)
        }
        if not layers:
            raise ValueError(f"hashed: {type(model).__name__} has no convolution or linear layer")
        for name, layer in layers.items():
            try:
                hash_weight_(layer, self.compression, layer_seed(name, self.hash_seed))
            except ValueError as error:
                raise ValueError(f"hashed: layer {name}: {error}") from error
        return model
