"""The operators of learned quantizers: one pass forward, one backward, by the rules of
`noisyq_fast.rules`.

Values, codes and gradients have the same bits in every backend. The backward needs only the input
and the parameters.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.declare import declare

_RULE = "str rule, int low, int high, int? axis"
_fake_quantize_learned = declare(
    f"fake_quantize_learned(Tensor x, Tensor parameters, {_RULE}, float gradient_scale) -> Tensor",
    prepare=checks.learned,
    shape=lambda x, *_: torch.empty_like(x),
    gradient=gradients.Learned,
)
_fake_quantize_learned_backward = declare(
    "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor parameters, "
    f"{_RULE}, float gradient_scale) -> (Tensor, Tensor)",
    prepare=checks.learned_backward,
    shape=lambda grad, x, parameters, *_: (
        torch.empty_like(x),
        parameters.new_empty(parameters.shape),
    ),
    gradient=None,
)
_quantize_learned = declare(
    f"quantize_learned(Tensor x, Tensor parameters, {_RULE}) -> Tensor",
    prepare=checks.learned_codes,
    shape=lambda x, *_: torch.empty_like(x, dtype=torch.int16),
    gradient=None,
)


def fake_quantize_learned(
    x: Tensor,
    parameters: Tensor,
    rule: str,
    low: int,
    high: int,
    axis: int | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Quantizes and dequantizes ``x`` by a rule; differentiable by its parameters too.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and strides.
        parameters: float32 ``[parameters]``, or with an ``axis`` ``[parameters, x.shape[axis]]``.
        rule: a name of `noisyq_fast.rules.NAMES`.
        low, high: the smallest and the largest code.
        axis: parameters for each index of this axis; ``None``: for the whole tensor.
        gradient_scale: a factor of the gradient of the parameters.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: an unknown rule, or sizes or devices that do not fit.

    Example:
        >>> import torch
        >>> from noisyq_fast.operators.learned import fake_quantize_learned
        >>> step = torch.tensor([0.5], requires_grad=True)
        >>> y = fake_quantize_learned(torch.tensor([0.3, -0.7, 9.0]), step, "lsq", -8, 7)
        >>> y.sum().backward()
        >>> y, step.grad
        (tensor([ 0.5000, -0.5000,  3.5000], grad_fn=<LearnedBackward>), tensor([7.8000]))
    """
    if has_torch_function_variadic(x, parameters):
        return handle_torch_function(
            fake_quantize_learned,
            (x, parameters),
            x,
            parameters,
            rule,
            low,
            high,
            axis,
            gradient_scale,
        )
    checks.tensors(x=x, parameters=parameters)
    return _fake_quantize_learned(x, parameters, rule, low, high, axis, gradient_scale)


def quantize_learned(
    x: Tensor, parameters: Tensor, rule: str, low: int, high: int, axis: int | None = None
) -> Tensor:
    """The codes of `fake_quantize_learned`, int16, 0 for NaN. Not differentiable."""
    checks.tensors(x=x, parameters=parameters)
    return _quantize_learned(x, parameters, rule, low, high, axis)
