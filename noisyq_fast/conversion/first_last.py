"""The first and the last layers of a model: those that read its input, and those that compute its
outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from noisyq_fast.running import arguments, left_as_it_was, tensors_in

Call = tuple[str, int]
"""The name of a layer, and the number of the call, from 1."""
_INPUT = None
"""Stands for the model's input among calls."""
Sources = frozenset[Call | None]
"""The calls of layers, and the model's input, from which a tensor was computed directly: with no
other layer in between."""


@dataclass(frozen=True)
class FirstLast:
    """Names of layers."""

    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    """All layers that the model has called."""


def by_registration(layers: Mapping[str, nn.Module]) -> FirstLast:
    """The first and the last layer in the order of registration."""
    names = list(layers)
    return FirstLast({names[0]}, {names[-1]}, set(names))


def by_execution(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> FirstLast:
    """The layers that read the model's input and those that compute its outputs, on an example.

    A layer is first if its input, or a concatenated part of it, was computed from the model's
    input, or from no input, without any other of the layers. It is last if it is the last of the
    layers on a path to an output. So the residual stream of a network, to which all layers add,
    does not make all of them first or last.

    Args:
        model: is run in evaluation mode and, if it is in training mode, in that mode too, where
            some models have further heads. It is left unchanged.
        layers: the layers, by name.
        example: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: the model does not run on the example.
    """
    found = FirstLast()
    before: dict[Call, Sources] = {}
    count = dict.fromkeys(layers, 0)
    token = torch.ones((), requires_grad=True)  # attaches every marked tensor to the graph

    def marked(call: Call | None, values: Any) -> Any:
        done: dict[int, Tensor] = {}  # the same tensor twice stays the same

        def mark(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.is_floating_point()):
                return x
            if id(x) not in done:
                done[id(x)] = _Mark.apply(x, token.to(x.device), call)
            return done[id(x)]

        return pytree.tree_map(mark, values)

    def calls(name: str, has_layers: bool, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        found.called.add(name)
        count[name] += 1
        call = name, count[name]
        graph = _Graph()
        tensors = tensors_in((args, kwargs))
        # Integers count as input if there are no floats (indices); else they are masks or the like.
        tensors = [x for x in tensors if x.is_floating_point()] or tensors
        before[call] = frozenset().union(*map(graph.sources, tensors))
        if not before[call] or any(map(graph.sees_input, tensors)):
            found.first.add(name)
        # An attention's name means its input projections; its output projection is another layer.
        return marked(call, (args, kwargs)) if has_layers else None

    def name_output(name: str, layer: nn.Module, args: Any, output: Any) -> Any:
        return marked((name, count[name]), output)

    hooks = []
    outputs = []
    try:
        for name, layer in layers.items():
            others = [other for other in layer.modules() if other is not layer]
            has_layers = any(other in others for other in layers.values())
            before_call = functools.partial(calls, name, has_layers)
            hooks.append(layer.register_forward_pre_hook(before_call, with_kwargs=True))
            if not has_layers:
                hooks.append(layer.register_forward_hook(functools.partial(name_output, name)))
        for evaluating in (True, False) if model.training else (True,):
            with left_as_it_was(model), torch.enable_grad(), _RecordsAll():
                if evaluating:
                    model.eval()
                args, kwargs = marked(_INPUT, arguments(example))
                try:
                    outputs += tensors_in(model(*args, **kwargs))
                except Exception:
                    if evaluating:  # in training, batch norm for example needs more samples
                        raise
    except Exception as error:
        raise ValueError(f"example: the model does not run on it: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    for output in outputs:
        makers = _makers(_Graph().sources(output), before)
        found.last.update(name for name, _ in makers)
    return found


def _makers(sources: Sources, before: Mapping[Call, Sources]) -> set[Call]:
    """The sources of an output that precede no other layer on a path to it."""
    makers = _calls(sources)
    ways: set[Call] = set()
    nodes = list(makers)
    while nodes:
        node = nodes.pop()
        if node not in ways:
            ways.add(node)
            nodes += _calls(before[node])
    return makers.difference(*(before[node] for node in ways))


def _calls(sources: Sources) -> set[Call]:
    return {source for source in sources if source is not _INPUT}


class _Mark(torch.autograd.Function):
    """A copy whose node in autograd's graph names the call of a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, call: Call | None) -> Tensor:
        ctx.call_of_layer = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _RecordsAll(TorchFunctionMode):
    """Keeps autograd's graph connected across no_grad and detach."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch._C._set_grad_enabled:
            return None
        if function in (Tensor.detach, torch.detach) and args[0].grad_fn is not None:
            return args[0].view_as(args[0])
        return function(*args, **(kwargs or {}))


class _Graph:
    """Autograd's graph from tensors back to the marks."""

    def __init__(self) -> None:
        self.known: dict[Any, Sources] = {}

    def sources(self, x: Tensor) -> Sources:
        if x.grad_fn is None:  # indices, or a constant
            return frozenset() if x.is_floating_point() else frozenset([_INPUT])
        return self._sources_of(x.grad_fn)

    def sees_input(self, x: Tensor) -> bool:
        sources = self.sources(x)
        if sources == {_INPUT} or _INPUT not in sources:
            return sources == {_INPUT}
        node: Any = x.grad_fn
        parts = [node]
        while parts:
            node = parts.pop()
            sources = self._sources_of(node)
            if sources == {_INPUT}:
                return True
            if hasattr(node, "call_of_layer"):
                continue
            following = [n for n, _ in node.next_functions if n and self._sources_of(n)]
            if len(following) == 1 or node.name().startswith(("CatBackward", "StackBackward")):
                parts += following
        return False

    def _sources_of(self, node: Any) -> Sources:
        # Iterative, because graphs are deep.
        todo = [node]
        while todo:
            node = todo[-1]
            if node in self.known:
                todo.pop()
            elif hasattr(node, "call_of_layer"):
                self.known[todo.pop()] = frozenset([node.call_of_layer])
            else:
                following = [n for n, _ in node.next_functions if n is not None]
                waiting = [n for n in following if n not in self.known]
                todo += waiting
                if not waiting:
                    self.known[todo.pop()] = frozenset().union(*(self.known[n] for n in following))
        return self.known[node]
