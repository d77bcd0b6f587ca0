"""Which layers a model calls, and which of them compute its multiply-accumulates (MACs)."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from noisyq_fast.quantizers import Quantizer
from noisyq_fast.ranges import disabled
from noisyq_fast.running import arguments, in_evaluation, tensors_in

aten = torch.ops.aten
_MOVES = re.compile(
    r"\w+_like|new_\w+|index(_select|_put)?|gather|alias|as_strided|cat|stack|clone|copy|to_copy|"
    r"detach|constant_pad_nd|embedding|fill|zero|repeat|roll|flip|lift_fresh|unsafe_view"
)
"""Operators that only move, copy or fill data."""
_STATES = ("zeros", "new_zeros")
"""Operators that make the initial states of recurrent layers; counted as computed from the
input."""


@dataclass
class Work:
    """What one forward has computed."""

    order: dict[str, None] = field(default_factory=dict)
    """The layers that were called or whose weights were read, in the order of execution."""
    calls: Counter[str] = field(default_factory=Counter)
    """The number of calls of each layer, by name."""
    macs: Counter[str] = field(default_factory=Counter)
    """MACs with a layer's weights, in its own call; by name."""
    macs_outside: Counter[str] = field(default_factory=Counter)
    """MACs with a layer's weights by code outside the layer; by name."""
    operators: Counter[str] = field(default_factory=Counter)
    """Calls of operators outside layers, by name, in the order of execution."""
    operator_macs: Counter[str] = field(default_factory=Counter)
    """The MACs of these operators."""


def count(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> Work:
    """Runs the model on an example, in float and in evaluation mode, and leaves it unchanged.

    Args:
        model: any module.
        layers: the layers to count, by name: modules with parameters or buffers of their own.
        example: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: the model does not run on the example.
    """
    counter = _Counter(layers)
    hooks = []
    any_quantizer = any(isinstance(module, Quantizer) for module in model.modules())
    float_layers = disabled(model) if any_quantizer else contextlib.nullcontext()
    try:
        for name, layer in layers.items():
            enter = functools.partial(counter.enter, name)
            hooks.append(layer.register_forward_pre_hook(enter))
            hooks.append(layer.register_forward_hook(counter.leave, always_call=True))
        with in_evaluation(model), float_layers, _plain_operators():
            args, kwargs = arguments(example)
            counter.see_input(args, kwargs)
            with counter:
                model(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"example: the model does not run on it: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return counter.work


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Disables operators that compute a whole layer, whose MACs are not known: the recurrent ones
    of oneDNN and cuDNN, and PyTorch's fast path for attention."""
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.enabled for library in libraries]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


def _flops_by_operator() -> dict[Any, Any]:
    """PyTorch's formulas, and some that it lacks."""
    from torch.utils.flop_counter import flop_registry  # slow to import

    return flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
            aten._scaled_dot_product_flash_attention
        ],
        aten.mv: lambda a, b, **_: 2 * a.numel(),
        aten.addmv: lambda c, a, b, **_: 2 * a.numel(),
        aten.dot: lambda a, b, **_: 2 * a.numel(),
        aten.vdot: lambda a, b, **_: 2 * a.numel(),
        aten.addr: lambda c, a, b, **_: 2 * a.numel() * b.numel(),
        aten.addbmm: lambda c, a, b, **_: 2 * a.numel() * b.shape[-1],
        aten._grouped_mm: _flops_of_grouped_product,
        aten._trilinear: _flops_of_bilinear_layer,
        torch.ops.noisyq.adder_conv2d: _flops_of_adder,
    }


def _flops_of_adder(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor) -> int:
    """Each added absolute difference counts as one multiply-accumulate."""
    return 2 * out_val.numel() * weight[0].numel()


def _flops_of_grouped_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Grouped product, as in a mixture of experts: each row of ``a`` is multiplied with one matrix
    of ``b``."""
    products = len(a) if a.dim() == b.dim() == 3 else 1
    return 2 * products * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _flops_of_bilinear_layer(
    x: Tensor, weight: Tensor, y: Tensor, *expanded: list[int], **_: Any
) -> int:
    """One multiplication with each element of the weight per sample."""
    shapes = []
    for operand, dims in zip((x, weight, y), expanded, strict=False):
        shape = list(operand.shape)
        for dim in dims:
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


class _Counter(TorchDispatchMode):
    """Tracks which tensors are computed from the input; all others come from parameters alone. A
    matrix product with one of the latter is a product with a weight, else one of activations."""

    supports_higher_order_operators = True

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.work = Work()
        self.flops_of = _flops_by_operator()
        self.running: list[str] = []
        self.from_input: set[int] = set()
        self.owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            for parameter in parameters_of(layer).values():
                self.owners.setdefault(_memory(parameter), []).append(name)
        inside = {id(m): name for name, m in layers.items()}
        self.containers = {
            name
            for name, layer in layers.items()
            if any(inside.get(id(m), name) != name for m in layer.modules())
        }

    def enter(self, name: str, *_: Any) -> None:
        self.work.order.setdefault(name)
        self.work.calls[name] += 1
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def see_input(self, *values: Any) -> None:
        self.from_input.update(map(_memory, tensors_in(values)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            with self:  # in inference mode composite operators arrive undecomposed
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = _name(func)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        from_input = any(_memory(x) in self.from_input for x in inputs) or name in _STATES
        change = self.from_input.update if from_input else self.from_input.difference_update
        change({_memory(x) for x in outputs} - self.owners.keys())
        if not from_input:
            return
        layer = self.running[-1] if self.running else None
        flops_of = self.flops_of.get(getattr(func, "_overloadpacket", func))
        if flops_of is not None:
            self._note_macs(layer, name, args, flops_of(*args, **kwargs, out_val=out) // 2)
        elif layer is None or layer in self.containers:
            computes = any(x.is_floating_point() for x in outputs) and not _MOVES.fullmatch(name)
            if computes and not getattr(func, "is_view", False):
                self.work.operators[name] += 1

    def _note_macs(self, layer: str | None, name: str, args: Any, macs: int) -> None:
        first = int(name.startswith(("add", "badd")))  # what the product is added to
        operands = [_memory(x) for x in args[first : first + 2]]
        weights = [memory for memory in operands if memory not in self.from_input]
        owners = [owner for memory in weights for owner in self.owners.get(memory, [])]
        if owners and layer not in owners:
            self.work.order.setdefault(owners[0])
            self.work.macs_outside[owners[0]] += macs
        elif weights and layer is not None:
            self.work.macs[layer] += macs
        else:
            self.work.operators[name] += 1
            self.work.operator_macs[name] += macs


def parameters_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's own parameters by name, also those moved by `torch.nn.utils.parametrize`."""
    own = dict(layer.named_parameters(recurse=False))
    moved = getattr(layer, "parametrizations", nn.ModuleDict())
    return own | dict(moved.named_parameters())


def _memory(x: Tensor) -> int:
    """A key that is equal for all views of the same memory."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def _name(func: Any) -> str:
    """The public name of an operator, without PyTorch's internal prefixes and suffixes."""
    name = func._schema.name if hasattr(func, "_schema") else func.name()
    if "scaled_dot_product" in name:
        return "scaled_dot_product_attention"
    name = name.removeprefix("aten::").strip("_")
    return name.removeprefix("native_").removesuffix("_with_indices")
