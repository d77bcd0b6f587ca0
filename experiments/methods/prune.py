"""Structured magnitude pruning (Li et al. 2016, arXiv 1608.08710), by the library torch-pruning
(Fang et al. 2023, arXiv 2301.12900)."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from experiments.checks import require, require_choice, require_whole
from experiments.methods.method import Method
from noisyq_fast import GroupedLinear, QuantGroupedLinear, Quantizer

Scope = Literal["layer", "global"]
Order = Literal["lowest", "highest"]
Filters = dict[str, list[int]]
"""Filters by the name of their convolution."""


@dataclass(frozen=True)
class Prune(Method):
    """Removes filters, whole output channels of convolutions, from a network trained for a while;
    the rest of the epochs trains what is left.

    A filter `F` of a layer with filters `F_1 .. F_n` goes first if `||F||_1 / mean_i ||F_i||_1` is
    lowest. (The divisor matters between layers only. Batch-norm makes a network indifferent to the
    scale of a layer, and small layers have small norms.) Every layer keeps a filter at least.

    Only filters that no other layer's are added to can go: in ResNet-20 those of the first
    convolution of each block, 336 of 688, as in Li et al. The outputs of all other convolutions
    meet in the sums along the shortcuts, where channel i of a stage is channel 8 + i or 16 + i of
    the next one, with zeros around. torch-pruning takes the padding for an elementwise operation
    and i for i, which leaves a network that runs but computes something else.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"prune": 0.75}

    prune: float | None = None
    """The share of filters that goes, from 0 to below 1."""

    prune_after: float = 0.2
    """The share of the epochs before filters go, from 0 to below 1. By default they go while the
    learning rate is high, so that what is left can learn anew within the same epochs."""

    prune_steps: int = 1
    """Removes the filters in so many equal steps, up to 100, evenly over the first half of the
    epochs that are left."""

    prune_scope: Scope = "layer"
    """The share holds in each layer, or in all of them together (global)."""

    prune_order: Order = "lowest"
    """The filters of lowest L1 norm go, or those of highest, as the paper's text says."""

    def __post_init__(self) -> None:
        share, after = self.prune, self.prune_after
        require("prune", share, share is None or 0 <= share < 1, "a number from 0 to below 1")
        require("prune_after", after, 0 <= after < 1, "a number from 0 to below 1")
        require_whole("prune_steps", self.prune_steps, 1, 100)
        for name, choices in (("prune_scope", Scope), ("prune_order", Order)):
            require_choice(name, getattr(self, name), get_args(choices))

    @property
    def label(self) -> str:
        parts = [f"prune{self.prune:g}"]
        if self.prune_after != 0.2:
            parts.append(f"after{self.prune_after:g}")
        if self.prune_steps != 1:
            parts.append(f"steps{self.prune_steps}")
        if self.prune_scope != "layer":
            parts.append(self.prune_scope)
        if self.prune_order != "lowest":
            parts.append(self.prune_order)
        return "-".join(parts)

    def begin_epoch(
        self, model: nn.Module, state: dict[str, Any], epoch: int, epochs: int, example: Tensor
    ) -> bool:
        steps = state.setdefault("removed", [])
        before = len(steps)
        while len(steps) < self.prune_steps and epoch >= self.epoch_of(len(steps), epochs):
            filters = self._next(prunable(model, example), steps)
            remove_filters(model, filters, example)
            steps.append(filters)
        return any(steps[before:])

    def epoch_of(self, step: int, epochs: int) -> int:
        """The epoch before which a step happens; the last one still trains what is left."""
        first = min(round(self.prune_after * epochs), epochs - 1)
        return first + (epochs - first) * step // (2 * self.prune_steps)

    def _next(self, layers: dict[str, nn.Conv2d], steps: list[Filters]) -> Filters:
        share = self.prune * (len(steps) + 1) / self.prune_steps
        chosen: Filters = {}
        for names in [layers] if self.prune_scope == "global" else [[name] for name in layers]:
            gone = sum(len(filters.get(name, [])) for filters in steps for name in names)
            left = sum(layers[name].out_channels for name in names)
            count = round(share * (gone + left)) - gone
            for name, index in self._ranked({name: layers[name] for name in names})[:count]:
                chosen.setdefault(name, []).append(index)
        return chosen

    def _ranked(self, layers: dict[str, nn.Conv2d]) -> list[tuple[str, int]]:
        """The filters in the order in which they go, without the last one of each layer."""
        highest = self.prune_order == "highest"
        ranked = []
        for name, layer in layers.items():
            norms = layer.weight.detach().abs().sum((1, 2, 3))
            scores = enumerate((norms / norms.mean()).tolist())
            filters = sorted(scores, key=itemgetter(1), reverse=highest)
            ranked += [(score, name, index) for index, score in filters[:-1]]
        ranked.sort(key=itemgetter(0), reverse=highest)
        return [(name, index) for _, name, index in ranked]

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str | None:
        steps = state.get("removed", [])
        removed = sum(len(indices) for step in steps for indices in step.values())
        left = sum(parameter.numel() for parameter in model.parameters())
        return f"{removed} filters removed, {left:,} parameters left"

    def shape(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def restore(self, model: nn.Module, shape: dict[str, Any], example: Tensor) -> None:
        """Removes what `shape` tells, whatever the options here are."""
        for filters in shape.get("removed", []):
            remove_filters(model, filters, example)


def prunable(model: nn.Module, example: Tensor) -> dict[str, nn.Conv2d]:
    """The convolutions, by name, whose filters can go: each feeds other layers, and its output
    channels are tied to those of no other convolution or linear layer, nor to a `GroupedLinear`."""
    import torch_pruning

    graph = _dependencies(model, example)
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        channels = list(range(layer.out_channels))
        group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, channels)
        tied = [
            (dependency.layer, graph.is_out_channel_pruning_fn(dependency.handler))
            for dependency, _ in group
            if isinstance(dependency.layer, nn.Conv2d | nn.Linear | GroupedLinear)
        ]
        if [other for other, by_output in tied if by_output] == [layer] and len(tied) > 1:
            found[name] = layer
    if not found:
        raise ValueError(f"prune: {type(model).__name__} has no convolution whose filters can go")
    return found


def remove_filters(model: nn.Module, filters: Filters, example: Tensor) -> None:
    """Removes filters, and all that belongs to them in the layers after; replaces parameters."""
    import torch_pruning

    channels_last = all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
        if parameter.ndim == 4
    )
    graph = _dependencies(model, example)
    for name, indices in filters.items():
        layer = model.get_submodule(name)
        graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, indices).prune()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _dependencies(model: nn.Module, example: Tensor) -> Any:
    """torch-pruning's graph of the network, which is as it was before.

    The library runs the example in evaluation mode and follows autograd. Only the shapes count, so
    quantized layers run as float ones, which need no range of their input. Layers that it does not
    know stay as they are, and tie what they are connected with.
    """
    import torch_pruning

    unknown = dict.fromkeys((GroupedLinear, QuantGroupedLinear), torch_pruning.ops.DummyPruner())
    before = [(module, module.training) for module in model.modules()]
    quantizers = [m for m, _ in before if isinstance(m, Quantizer) and m.enabled]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        # In a tuple, or else the library tries the images one by one first.
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                model, (example,), customized_pruners=unknown
            )
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
        for module, training in before:
            module.training = training
