"""The output of an integer layer before it is written as floats.

After `fuse_`, an integer layer returns its exact sums v as a `Deferred`, a tensor that records how
its values are to be computed::

    y = relu(v * factor + term + residual)

A batch norm sets factor and term, an addition the residual, and a ReLU the flag ``relu``. The
quantizer of the next layer then computes its codes from v in one pass, and their range from the
smallest and the largest v of each channel: rounding is monotone, so the line ``v * factor + term``
maps extremes to extremes. Any other reader gets the values, which are then computed and kept, so
that a model computes the same bits whatever reads its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback  # None: nothing is compiled
from torch.utils import _pytree as pytree

from noisyq_fast.backends.reference.composed import without_values
from noisyq_fast.backends.reference.masks import NEGATIVE, NOTHING
from noisyq_fast.backends.reference.sums import range_of_ends
from noisyq_fast.grid import Grid
from noisyq_fast.integer.chain import (
    Chain,
    ChainGradient,
    Norm,
    Sums,
    extremes,
    mapped,
    mean_of_pixels,
    record,
    record_read,
    records,
)
from noisyq_fast.operators import dispatch, gradients


def deferrable(x: Tensor) -> bool:
    """Whether a tensor has values, and no tracing or function transform is active."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return isinstance(x, Deferred) or dispatch.is_plain(x)


def outside_graphs(function: Callable) -> Callable:
    """Keeps a function out of the graphs of compiled parts of a model that get a deferred
    tensor."""
    made: list[Callable] = []  # at the first use of torch.compile, whose import takes long

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args)
        if not made:
            made.append(torch.compiler.disable(function))
        return made[0](*args)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


class _Written(torch.autograd.Function):
    """Returns the values of a deferred tensor, and passes their gradient on to it. The values are
    no input of the function, so that they may be changed in place."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, values: Callable[[], Tensor]) -> Tensor:
        return values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Deferred(Tensor):
    """A tensor whose values are computed when something reads them.

    After a reader outside of chains has got the values, they can change unnoticed (through a view
    or NumPy); so from then on the values are used instead of the chain.
    """

    _chain: Chain
    _carrier: Tensor  # gradients flow to it; it has no values
    _raw: Tensor | None = None  # the values, while only chains have read them
    _values: Tensor | None = None  # type: ignore[assignment]  # the values, after another reader
    _version_read: int
    _extremes: Tensor | None = None
    _format: torch.memory_format
    _instead: Deferred | None = None
    _has_hook: bool = False
    _is_passed: bool = False

    @staticmethod
    def of_sums(sums: Sums, format_: torch.memory_format) -> Deferred:
        for found in records:
            found.runs[sums.layer] += 1
        # No operation follows yet: the gradient is that of the product.
        return _deferred(sums.product, Chain(sums), format_)

    # What continues a chain.

    @property
    def chain(self) -> Chain:
        return self.current()._chain

    def current(self) -> Deferred:
        """The tensor that operations in place have replaced this one by."""
        found = self
        while found._instead is not None:
            found = found._instead
        with torch._C.DisableTorchFunctionSubclass():
            adopted = self.requires_grad and not found._carrier.requires_grad
            if adopted and (found._values is None or not found._values.requires_grad):
                # An autograd Function has returned a tensor that it computed without gradients.
                raw = found._written() if found._values is None else found._values.detach()
                with torch.enable_grad():
                    found._values = _Written.apply(self, lambda: raw)
                found._raw, found._version_read = None, _version(found._values)
                sums = found._chain.sums._replace(product=found._values)
                found._chain = found._chain._replace(sums=sums)
        return found

    def _goes_on(self) -> Chain | None:
        """The chain, if it can take another operation."""
        own = self.current()
        if own._values is not None or own._has_hook or own._chain.relu:
            return None
        return own._chain

    def is_sums(self) -> bool:
        """Whether no operation follows the product yet, and no reader has changed the values."""
        own = self.current()
        chain = own._chain
        if chain.norm is not None or chain.relu or chain.residual is not None:
            return False
        if own._values is None:
            return True
        if _version(own._values) != own._version_read:
            return False
        return torch.equal(own._values.detach(), mapped(chain, False)[0])

    def measured(self) -> Sums:
        """The sums, with the moments of each channel."""
        own = self.current()
        sums = own._chain.sums
        if sums.moments is None:
            values, *moments = own._chain.compute("moments")(sums.values, sums.bound)
            sums = sums._replace(values=values, moments=tuple(moments))
            own._chain = own._chain._replace(sums=sums)
        return sums

    def normalized(self, module: nn.Module, norm: Norm, factor: Tensor, term: Tensor) -> Deferred:
        own = self.current()
        record(own._chain, "batch norm")
        for found in records:
            found.norms.setdefault(own._chain.sums.layer, []).append(module)
        return _extended(own._chain._replace(norm=norm, line=(factor, term)), own._format)

    def rectified(self) -> Deferred | None:
        own = self.current()
        chain = self._goes_on()
        if chain is None:
            return None
        record(chain, "ReLU")
        record_read(chain)
        own._is_passed = chain.norm is not None
        chain = chain._replace(relu=True)
        if chain.residual is None:
            return _extended(chain, own._format)
        wants_zeros = torch.is_grad_enabled()
        values, zeros, range_ = mapped(chain, wants_zeros)
        made = _extended(chain, own._format, zeros)
        made._raw, made._extremes = values.contiguous(memory_format=own._format), range_
        return made

    def plus(self, other: Tensor) -> Deferred | None:
        own = self.current()
        chain = self._goes_on()
        if (
            chain is None
            or chain.residual is not None
            or not (isinstance(other, Deferred) or dispatch.is_plain(other))
            or other.shape != self.shape
            or other.dtype != torch.float32
            or other.device != self.device
        ):
            return None
        record(chain, "addition")
        record_read(chain)
        own._is_passed = chain.norm is not None
        source = other
        if isinstance(other, Deferred):
            source, other = other.source, other.written()
        chain = chain._replace(residual=other.detach(), residual_source=source)
        made = _extended(chain, own._format)
        if not records and "ReLU" not in chain.sums.layer.followed_by:
            made._written()  # before the residual can change
        return made

    # What ends one.

    def written(self) -> Tensor:
        """The values, for a reader that does not change them; without gradient history."""
        own = self.current()
        record_read(own._chain)
        return own._written() if own._values is None else own._values.detach()

    def _written(self) -> Tensor:
        if self._raw is None:
            raw, _, self._extremes = mapped(self._chain, False)
            self._raw = raw.contiguous(memory_format=self._format)
        return self._raw

    def values(self) -> Tensor:
        """The values, as an ordinary tensor."""
        own = self.current()
        if own._values is None:
            record_read(own._chain)
            own._write()
        return _known(own._values)

    def _write(self) -> None:
        raw, self._raw = self._written(), None
        with torch._C.DisableTorchFunctionSubclass():
            if self._carrier.requires_grad:
                with torch.enable_grad():  # also if the first reader needs no gradient
                    raw = _Written.apply(self._carrier, lambda: raw)
        self._values, self._version_read = raw, _version(raw)

    def range_on(self, grid: Grid) -> Tensor | None:
        """As `reference.levels.range_of`, with one range; None if it has to be computed from the
        values."""
        ends = self.ends()
        return None if ends is None else range_of_ends(ends, grid)

    def ends(self) -> Tensor | None:
        """As `reference.sums.ends`; None if it has to be computed from the values."""
        own = self.current()
        if own._values is not None:
            return None
        if own._extremes is None and own._chain.residual is not None:
            own._written()
        elif own._extremes is None:
            own.measured()
            own._extremes = extremes(own._chain)
        return own._extremes

    def masks_none(self, masked: str) -> bool:
        """Whether every element has a gradient when quantized with the tensor's own range."""
        return masked == NOTHING or (masked == NEGATIVE and self.chain.relu)

    def extremes_found(self) -> Tensor | None:
        """min(y, 0) and max(y, 0), if they were computed along with the values; else None."""
        own = self.current()
        return own._extremes if own._raw is not None else None

    def codes_within(self, range_: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, scale and zero point for a range; None if values exist and should be quantized."""
        own = self.current()
        chain = own._chain
        record(chain, "quantizer")
        record_read(chain)
        if own._values is not None or own._raw is not None or chain.residual is not None:
            return None
        return chain.compute("codes_of_sums")(
            chain.sums.values, chain.factor, chain.term, chain.relu, range_, grid
        )

    @property
    def source(self) -> Tensor:
        """The tensor that gradients of the values flow to."""
        own = self.current()
        return own._carrier if own._values is None else own._values

    def _watched(self) -> Tensor:
        """The tensor that all gradients of the values pass through, for a hook."""
        own = self.current()
        if own._is_passed:
            raise RuntimeError(
                "a hook or a gradient of a tensor that a chain of fuse_ has gone past: register "
                "it before the next operation, such as in a forward hook"
            )
        own._has_hook = True
        return _shown(own._carrier if own._is_as_written() else _known(own._values))

    def _is_as_written(self) -> bool:
        values = self._values
        if values is None:
            return True
        return self._carrier.requires_grad and _version(values) == self._version_read

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return cls._compute_function(func, args, kwargs or {})

    @staticmethod
    @outside_graphs
    def _compute_function(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        follow = _FOLLOWS.get(func)
        if follow is not None:
            made = follow(*args, **kwargs)
            if made is not None:
                return made
        if func in _OF_THE_SHELL:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _DTYPE:  # a new object at each access, so compared by value
            return torch.float32  # a carrier's gradient can have another dtype
        if func == _GRAD_FN:
            return func(_shown(args[0].source))
        if func in _OF_GRAPH:
            args = pytree.tree_map(lambda x: x.source if isinstance(x, Deferred) else x, args)
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        if func in _OF_GRADIENTS and args[0].requires_grad:
            return func(args[0]._watched(), *args[1:], **kwargs)
        return func(*map(_with_values, args), **{k: _with_values(v) for k, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """For callers that bypass `__torch_function__`, such as TorchScript functions."""
        args, kwargs = pytree.tree_map(
            lambda x: x.values().detach() if isinstance(x, Deferred) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


_torch_function: Any = Deferred.__torch_function__
_torch_function.__func__._torchdynamo_disable = True


def memory_format(x: Tensor) -> torch.memory_format:
    if isinstance(x, Deferred):
        return x.current()._format
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def _shown(x: Tensor) -> Tensor:
    """A tensor whose gradient something else than its layer may read from now on."""
    if getattr(x.grad_fn, "takes_deferred", False):
        x.grad_fn.takes_deferred = False  # type: ignore[union-attr]
    return x


def _with_values(argument: Any) -> Any:
    if isinstance(argument, tuple | list | dict):
        return pytree.tree_map(_as_values, argument)
    return _as_values(argument)


def _as_values(x: Any) -> Any:
    return x.values() if isinstance(x, Deferred) else x


def _deferred(carrier: Tensor, chain: Chain, format_: torch.memory_format) -> Deferred:
    with torch._C.DisableTorchFunctionSubclass():
        made = carrier.as_subclass(Deferred)
    made._carrier = carrier
    made._chain = chain
    made._format = format_
    return made


def _extended(chain: Chain, format_: torch.memory_format, zeros: Tensor | None = None) -> Deferred:
    sums, norm = chain.sums, chain.norm
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_grad_enabled():
            inputs = sums.product, weight, bias, chain.residual_source, chain, zeros
            carrier = gradients.apply_outside_transforms(ChainGradient, *inputs)
        else:
            carrier = without_values(sums.product)
    return _deferred(carrier, chain, format_)


# Operations that continue a chain. They return None if they cannot; then values are computed. Their
# parameters have PyTorch's names.


def _relu(input: Deferred, inplace: bool = False) -> Tensor | None:
    return _in_place(input, Deferred.rectified) if inplace else input.rectified()


def _add(input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Tensor | None:
    if alpha != 1 or out is not None:
        return None
    if isinstance(input, Deferred):
        made = input.plus(other)
        if made is not None:
            return made
    return other.plus(input) if isinstance(other, Deferred) and isinstance(input, Tensor) else None


def _add_in_place(input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    if alpha != 1 or not isinstance(input, Deferred):
        return None
    return _in_place(input, lambda x: x.plus(other))


def _in_place(x: Deferred, step: Callable) -> Deferred | None:
    if x.requires_grad and not torch.is_grad_enabled():
        return None  # PyTorch then changes the values but not the graph
    made = step(x)
    if made is not None:
        x.current()._instead = made
        with torch._C.DisableTorchFunctionSubclass():
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(_refuse_old_graph)
    return made


def _refuse_old_graph(_: Any) -> None:
    raise RuntimeError(
        "an autograd Function got a tensor that an operation in place had changed within a chain "
        "of fuse_: give it what the operation returns, such as x = relu_(x)"
    )


def _grad(outputs: Any, inputs: Any, *others: Any, **named: Any) -> tuple[Tensor, ...]:
    outputs = pytree.tree_map(_as_values, outputs)
    inputs = pytree.tree_map(lambda x: x._watched() if isinstance(x, Deferred) else x, inputs)
    return torch.autograd.grad(outputs, inputs, *others, **named)


def _mean(
    input: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
) -> Tensor | None:
    dim = axis if dim is None else dim
    if not isinstance(input, Deferred) or input.dim() != 4 or dtype is not None or out is not None:
        return None
    if not isinstance(dim, tuple | list) or sorted(d % 4 for d in dim) != [2, 3]:
        return None
    return mean_of_pixels(input.values(), keepdim)


def _pool(input: Any, output_size: Any) -> Tensor | None:
    if (
        not isinstance(input, Deferred)
        or input.dim() != 4
        or output_size not in (1, (1, 1), [1, 1])
    ):
        return None
    return mean_of_pixels(input.values(), keepdim=True)


_TENSOR: Any = Tensor
_DTYPE = _TENSOR.dtype.__get__
_FOLLOWS: dict[Callable, Callable] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: lambda input: _relu(input, True),
    Tensor.relu_: lambda input: _relu(input, True),
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.add_: _add_in_place,
    Tensor.__iadd__: _add_in_place,
    torch.mean: _mean,
    Tensor.mean: _mean,
    F.adaptive_avg_pool2d: _pool,
}
_OF_THE_SHELL = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "ndim", "device", "layout", "is_cuda"),
            *("is_sparse", "is_nested", "is_meta", "is_quantized"),
        )
    ),
}
_GRAD_FN = _TENSOR.grad_fn.__get__
_OF_GRAPH = {_TENSOR.requires_grad.__get__, _TENSOR.is_leaf.__get__}
_OF_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, _TENSOR.grad.__get__}
