"""A trace of a model on an example: which step computes and which steps read each tensor."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from noisyq_fast.integer.norm_classes import BatchNormCall
from noisyq_fast.running import arguments, in_evaluation, tensors_in


@dataclass(frozen=True)
class Value:
    """Stands for a tensor of the run among the arguments and outputs of steps."""

    number: int
    shape: torch.Size


@dataclass(frozen=True)
class Step:
    """A call of a function, or of a layer (calls inside a layer are not recorded).

    Attributes:
        layer: the name of the layer; None for a function.
        function: the function; None for a layer.
        args, kwargs: the arguments, with a `Value` in place of each tensor.
        outputs: the tensors among the outputs, in order.
    """

    layer: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]

    @property
    def layer_name(self) -> str:
        """The name, for a step that is a layer."""
        assert self.layer is not None
        return self.layer

    @property
    def inputs(self) -> list[Value]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Value)]


@dataclass
class Trace:
    """The steps of a run in order, the step that computes and the steps that read each value, and
    how often each layer is called. A value that the model returns has an additional reader,
    None."""

    layers: Mapping[str, nn.Module]
    steps: list[Step] = field(default_factory=list)
    maker: dict[Value, Step] = field(default_factory=dict)
    readers: dict[Value, list[Step | None]] = field(default_factory=lambda: defaultdict(list))
    calls: Counter[str] = field(default_factory=Counter)
    read_by_others: set[str] = field(default_factory=set)
    """Names of layers with a parameter that a function outside reads directly."""
    batch_norms: set[str] = field(default_factory=set)
    """Names of layers that did what `torch.nn.BatchNorm2d` does and nothing else, whatever their
    class."""

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> Trace:
        """Runs a model in evaluation mode and leaves it unchanged.

        Args:
            model: any module.
            layers: the modules, by name, whose calls are recorded as steps.
            example: a tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            ValueError: the model does not run on the example.
        """
        recorder = _Recorder(cls(layers))
        args, kwargs = arguments(example)
        hooks = [hook for item in layers.items() for hook in recorder.watch(*item)]
        try:
            with in_evaluation(model), recorder:
                output = model(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"inputs: the model does not run on them: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in tensors_in(output):
            recorder.trace.readers[recorder.value(tensor)].append(None)
        for name, layer in layers.items():
            values = [recorder.value(p) for p in layer.parameters(recurse=False)]
            if any(recorder.trace.readers.get(value) for value in values):
                recorder.trace.read_by_others.add(name)
        return recorder.trace

    def only_reader(self, value: Value) -> Step | None:
        """The one step that reads a value; None if there are more, or the model returns it."""
        readers = self.readers[value]
        return readers[0] if len(readers) == 1 else None

    def once(self, name: str | None) -> bool:
        """Whether the layer exists and is called exactly once."""
        return name is not None and self.calls[name] == 1

    def of_layers(self) -> Iterator[Step]:
        return (step for step in self.steps if step.layer is not None)


class _Recorder(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.count = 0
        self.inside: list[tuple[str, Any]] = []
        """The layers that are running, outermost first, with their arguments."""
        self.last: tuple[Callable | None, Any, Any, Any] = None, (), {}, None
        """The last function that a layer called, its arguments and its output."""

    def watch(self, name: str, layer: nn.Module) -> list[Any]:
        before = functools.partial(self._enter, name)
        return [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(self._leave),
        ]

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            output = function(*args, **kwargs)
            self.last = function, args, kwargs, output
            return output
        named = self._named((args, kwargs))  # before an operation in place gives them new values
        output = function(*args, **kwargs)
        self._record(None, function, named, output)
        return output

    def _enter(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.trace.calls[name] += 1
        self.inside.append((name, self._named((args, kwargs))))

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        name, named = self.inside.pop()
        function, of_function, named_too, last = self.last
        if function is F.batch_norm and output is last:
            call = BatchNormCall(*of_function, **named_too)
            if call.input is args[0] and call.is_own(layer):
                self.trace.batch_norms.add(name)
        if not self.inside:
            self._record(name, None, named, output)

    def _named(self, arguments: Any) -> Any:
        return pytree.tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, arguments)

    def _record(self, layer: str | None, function: Any, named: Any, output: Any) -> None:
        outputs = tuple(self._new(tensor) for tensor in tensors_in(output))
        if not outputs:
            return
        args, kwargs = named
        step = Step(layer, function, args, kwargs, outputs)
        self.trace.steps.append(step)
        for value in set(step.inputs):
            self.trace.readers[value].append(step)
        for value in outputs:
            self.trace.maker[value] = step

    def value(self, tensor: Tensor) -> Value:
        return self.values[tensor] if tensor in self.values else self._new(tensor)

    def _new(self, tensor: Tensor) -> Value:
        self.count += 1
        self.values[tensor] = value = Value(self.count, tensor.shape)
        return value
