"""Which layers a model calls, and who computes its multiply-accumulates (MACs)."""

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
"""Operators that compute nothing."""
_STATES = ("zeros", "new_zeros")
"""What recurrent layers start from, in place of something computed from the input."""


@dataclass
class Work:
    """What a forward has computed."""

    order: dict[str, None] = field(default_factory=dict)
    """The layers that were called or whose weights were read, in the order of execution."""
    calls: Counter[str] = field(default_factory=Counter)
    """Of layers by name."""
    macs: Counter[str] = field(default_factory=Counter)
    """Of a layer's weights, in its own call."""
    macs_outside: Counter[str] = field(default_factory=Counter)
    """Of a layer's weights, which other code has read and multiplied."""
    operators: Counter[str] = field(default_factory=Counter)
    """Calls of operators that belong to no layer, by name, in the order of execution."""
    operator_macs: Counter[str] = field(default_factory=Counter)


def count(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> Work:
    """Runs the model on an example, as float, in evaluation mode; it stays as it was.

    Args:
        model: any module.
        layers: those to count by name, modules with parameters or buffers of their own.
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
    """Without operators that compute a whole layer, of which it is not known how much that is:
    recurrent ones of the libraries, and PyTorch's fast path of attention."""
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
    """PyTorch's formulas, and some that it does not have."""
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
    """A difference whose absolute value is added counts as a product that is added."""
    return 2 * out_val.numel() * weight[0].numel()


def _flops_of_grouped_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of experts, such as those of a mixture: every row of ``a`` meets one matrix of ``b``."""
    products = len(a) if a.dim() == b.dim() == 3 else 1
    return 2 * products * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _flops_of_bilinear_layer(
    x: Tensor, weight: Tensor, y: Tensor, *expanded: list[int], **_: Any
) -> int:
    """A multiplication with every element of the weight for every sample."""
    shapes = []
    for operand, dims in zip((x, weight, y), expanded, strict=False):
        shape = list(operand.shape)
        for dim in dims:
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


class _Counter(TorchDispatchMode):
    """Follows what is computed from the input. All else comes from parameters alone: a matrix
    product with such an operand is that of a weight, one of two others a product of activations."""

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
            with self:  # in inference mode operators that consist of others arrive whole
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
    """A layer's own by name, also where `torch.nn.utils.parametrize` has moved them."""
    own = dict(layer.named_parameters(recurse=False))
    moved = getattr(layer, "parametrizations", nn.ModuleDict())
    return own | dict(moved.named_parameters())


def _memory(x: Tensor) -> int:
    """The same for views of the same memory."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def _name(func: Any) -> str:
    """As people call it, not as PyTorch does inside."""
    name = func._schema.name if hasattr(func, "_schema") else func.name()
    if "scaled_dot_product" in name:
        return "scaled_dot_product_attention"
    name = name.removeprefix("aten::").strip("_")
    return name.removeprefix("native_").removesuffix("_with_indices")
