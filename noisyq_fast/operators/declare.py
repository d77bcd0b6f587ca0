"""Declaration of an operator: its schema, checks, output shapes and gradient."""

from collections.abc import Callable
from typing import Any

import torch

from noisyq_fast.backends import reference, select
from noisyq_fast.grid import ODD, Grid
from noisyq_fast.operators import batching, checks, gradients

_library = torch.library.Library("noisyq", "DEF")
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def declare(
    schema: str,
    *,
    prepare: Callable,
    shape: Callable,
    gradient: type[gradients.Gradient] | None,
    check_values: Callable | None = None,
) -> torch._ops.OpOverload:
    """Declares an operator. Backends implement it by a function of the same name.

    Args:
        schema: the operator's signature.
        prepare: checks the arguments; returns those that ``shape`` and the backends take.
        shape: returns empty outputs (for tracing).
        gradient: differentiates the operator; ``None`` if it is not differentiable.
        check_values: raises for bad values; not called while tracing, without values.
    """
    name = _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.noisyq, name).default
    has_grid = any(argument.name == "grid" for argument in operator._schema.arguments)
    named = [
        (i, argument.name)
        for i, argument in enumerate(operator._schema.arguments)
        if "Tensor" in str(argument.type)
    ]

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

        if gradient is None:
            return gradients.unrecorded(below_autograd)
        return gradient.apply(below_autograd, *arguments)

    _library.impl(name, compute, "CompositeExplicitAutograd")
    _library.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_fake(f"noisyq::{name}", fake, lib=_library)
    torch.library.register_vmap(f"noisyq::{name}", batching.RULES[name], lib=_library)
    return operator
