"""Filters from a dictionary (LCNN, Bagherinezhad et al. 2016, arXiv 1611.06473)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Changed, Loss, total
from experiments.methods.method import Method
from experiments.models.lookup import LookupConv2d
from experiments.models.replacing import inner_convolutions


@dataclass(frozen=True)
class LCNN(Method):
    """Convolutions but the first and the last layer combine the vectors of a dictionary, in few
    lookups: `W[o, i, y, x] = sum_d P[o, d, y, x] D[d, i]` with a sparse P.

    Entries of P with `|p| <= e`, the threshold, become 0 and stay it; what is left is drawn to 0 by
    `l e sum |p|` in the loss. As in the authors' code e is so high that `--lcnn-sparsity` of P
    starts as 0. There l is 0 by default, with which P stays dense. Other than there, an entry that
    has gone is masked, so that no momentum brings it back, and the optimizer is Adam. The
    parameters and MACs of the result are those of a dense P; its lookups are the entries kept.
    """

    REPLACES: ClassVar[str] = "layers"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"lcnn_dictionary": 0.5}
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "which removes filters, and knows nothing of dictionaries"
    }

    lcnn_dictionary: float | None = None
    """Vectors of a layer's dictionary for each of its input channels, above 0."""

    lcnn_sparsity: float = 0.01
    """The share of each P that is below the threshold at the start, from 0 to below 1."""

    lcnn_lambda: float = 0.3
    """The factor l of the penalty, from 0."""

    def __post_init__(self) -> None:
        share, sparsity, factor = self.lcnn_dictionary, self.lcnn_sparsity, self.lcnn_lambda
        accepted = share is None or 0 < share <= 64
        require("lcnn_dictionary", share, accepted, "a number above 0, up to 64")
        require("lcnn_sparsity", sparsity, 0 <= sparsity < 1, "a share from 0 to below 1")
        require("lcnn_lambda", factor, 0 <= factor < 1e6, "a number from 0 to below 1,000,000")

    @property
    def label(self) -> str:
        parts = [f"lcnn{self.lcnn_dictionary:g}"]
        if self.lcnn_sparsity != 0.01:
            parts.append(f"sparsity{self.lcnn_sparsity:g}")
        if self.lcnn_lambda != 0.3:
            parts.append(f"lambda{self.lcnn_lambda:g}")
        return "-".join(parts)

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        layers = inner_convolutions(model, example)
        if not layers:
            raise ValueError(
                f"lcnn: {type(model).__name__} has no convolution between the first and the last "
                "layer"
            )
        for name, layer in layers.items():
            model.set_submodule(name, self._looking_up(name, layer))
        return model

    def _looking_up(self, name: str, layer: nn.Conv2d) -> LookupConv2d:
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        if not plain or isinstance(layer.padding, str):
            raise ValueError(f"lcnn: layer {name}: got {layer}, takes no groups and no dilation")
        geometry: Any = layer.kernel_size, layer.stride, layer.padding
        size, stride, padding = geometry
        return LookupConv2d(
            layer.in_channels,
            layer.out_channels,
            size,
            stride,
            padding,
            bias=layer.bias is not None,
            vectors=max(1, round(self.lcnn_dictionary * layer.in_channels)),
            sparsity=self.lcnn_sparsity,
        )

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        if self.lcnn_lambda == 0:
            return loss

        def added() -> Tensor:
            return self.lcnn_lambda * total(layer.threshold_penalty() for layer in lookups(model))

        return Changed(loss, added=added)

    def costs(self, model: nn.Module) -> dict[str, int]:
        return {"lookups": sum(layer.lookups() for layer in lookups(model))}

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str:
        layers = lookups(model)
        kept = sum(layer.lookups() for layer in layers)
        entries = sum(layer.entries.numel() for layer in layers)
        filters = sum(layer.combination.out_channels for layer in layers)
        return (
            f"{kept / filters:.1f} lookups a filter, {kept / entries:.1%} of {entries:,} entries; "
            f"{len(layers)} dictionaries"
        )


def lookups(model: nn.Module) -> list[LookupConv2d]:
    return [layer for layer in model.modules() if isinstance(layer, LookupConv2d)]
