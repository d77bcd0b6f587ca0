"""Declaration of an operator: its schema, checks, output shapes and gradient."""

from collections.abc import Callable
from typing import Any

import torch

from noisyq_fast.backends import reference, select
from noisyq_fast.grid import ODD, Grid
from noisyq_fast.operators import batching, checks, gradients
from noisyq_fast.operators.dispatch import is_below_autograd, may_bypass

_library = torch.library.Library("noisyq", "DEF")
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def declare(
    schema: str,
    *,
    prepare: Callable,
    shape: Callable,
    gradient: type[gradients.Gradient] | None,
    check_values: Callable | None = None,
) -> Callable:
    """Declares an operator. Backends implement it by a function of the same name.

    Args:
        schema: the operator's signature.
        prepare: checks the arguments; returns those that ``shape`` and the backends take.
        shape: returns empty outputs (for tracing).
        gradient: differentiates the operator; ``None`` if it is not differentiable.
        check_values: raises for bad values; not called while tracing, without values.

    Returns:
        A function that calls the operator, past the dispatcher where nothing else could see it.
    """
    name = _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.noisyq, name).default
    types = [(argument.name, str(argument.type)) for argument in operator._schema.arguments]
    has_grid = "grid" in dict(types)
    named = [(i, name) for i, (name, type_) in enumerate(types) if "Tensor" in type_]
    positions = [i for i, _ in named]
    floats = [i for i, (_, type_) in enumerate(types) if type_ == "float"]

    def compute(*arguments: Any) -> Any:
        arguments = prepare(*arguments)
        for i, argument in named:
            value = arguments[i]
            if value is not None and (type(value) is list or value.data_ptr() == 0):
                checks.has_memory(argument, value)
        if check_values is not None:
            check_values(*arguments)
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        if has_grid and any(isinstance(a, Grid) and a.kind == ODD for a in arguments):
            return reference.backend.functions[name](*arguments)
        return select(name, first.device.type)(*arguments)

    def fake(*arguments: Any) -> Any:
        return shape(*prepare(*arguments))

    def differentiate(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        keys &= _AFTER_AUTOGRAD
        if not gradients.wanted():
            return operator.redispatch(keys, *arguments)

        def below_autograd() -> Any:
            return operator.redispatch(keys, *arguments)

        return differentiated(below_autograd, arguments)

    def differentiated(below_autograd: Callable, arguments: tuple) -> Any:
        if gradient is None:
            return gradients.unrecorded(below_autograd)
        return gradient.apply(below_autograd, *arguments)

    def call(*arguments: Any) -> Any:
        if not may_bypass(arguments, positions):
            return operator(*arguments)
        for i in floats:
            if type(arguments[i]) is not float:  # the dispatcher converts it or refuses it
                return operator(*arguments)
        if not gradients.wanted() or is_below_autograd():
            return compute(*arguments)
        return differentiated(lambda: compute(*arguments), arguments)

    _library.impl(name, compute, "CompositeExplicitAutograd")
    _library.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_fake(f"noisyq::{name}", fake, lib=_library)
    torch.library.register_vmap(f"noisyq::{name}", batching.RULES[name], lib=_library)
    return call
