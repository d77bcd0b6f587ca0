"""What the operators of quantized networks are in ONNX.

``QuantizeLinear`` divides by the scale, rounds half to even, adds the zero point and saturates, as
`noisyq_fast.grid` does: its codes are ours. ``ConvInteger`` and ``MatMulInteger`` sum exactly. Both
factors are uint8: the kernels of some processors for other types saturate sums of two products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPSET = 21
"""The first with 4-bit integers and a scale for each group."""


def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    """The node, in a model that is traced. The codes have the dtype of the zero point; without one
    they are int8: onnxruntime 1.32 cannot move int8 codes with one past a Reshape."""
    attributes = {} if axis is None else {"axis": axis}
    if zero_point is None:
        attributes["output_dtype"] = _INT8
        return _node("QuantizeLinear", (x, scale), attributes, torch.int8)
    return _node("QuantizeLinear", (x, scale, zero_point), attributes, zero_point.dtype)


def dequantize_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    block_size: int | None = None,
) -> Tensor:
    """The node, in a model that is traced; float32."""
    attributes = {} if axis is None else {"axis": axis}
    attributes |= {} if block_size is None else {"block_size": block_size}
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    return _node("DequantizeLinear", inputs, attributes, torch.float32)


def _node(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    shape = inputs[0].shape
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET
    )


def translations() -> dict[Any, Callable]:
    """For ``torch.onnx.export``: the function that writes the nodes of each operator."""
    operators = torch.ops.noisyq
    return {
        operators.convolve_codes.default: _convolve_codes,
        operators.integer_convolution.default: _integer_convolution,
        operators.integer_linear.default: _integer_linear,
    }


def _convolve_codes(codes, zero_point, weight, weight_zero_point, *geometry):
    op = _opset()
    stride, padding, dilation, _, _, groups = geometry
    how = {
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }
    if weight_zero_point.shape.rank() == 0:
        return _float(op.ConvInteger(codes, weight, zero_point, weight_zero_point, **how))
    # One for each channel, of which there may be but one here: sum (c - z)(d - w) is
    # sum (c - z) d, less w sum (c - z).
    ones = op.ConstantOfShape(op.Shape(weight), value=_tensor(1))
    sums, plain = (op.ConvInteger(codes, w, zero_point, **how) for w in (weight, ones))
    offset = _along_channels(op.Cast(weight_zero_point, to=_INT32), len(stride))
    return _float(op.Sub(sums, op.Mul(plain, offset)))


def _integer_convolution(x, _, bias, *operands):
    op = _opset()
    codes, scale, zero_point, _, weight, weight_scale, weight_zero_point, _, *geometry = operands
    sums = _convolve_codes(codes, zero_point, weight, weight_zero_point, *geometry)
    axes = len(geometry[0])
    y = op.Mul(sums, _along_channels(op.Mul(scale, weight_scale), axes))
    if bias is not None:
        y = op.Add(y, _along_channels(_float(bias), axes))
    return _like(y, x)


def _integer_linear(x, _, bias, *operands):
    op = _opset()
    codes, scale, zero_point, _, weight, weight_scale, weight_zero_point, _ = operands
    last = [*range(weight.shape.rank())]
    turned = op.Transpose(weight, perm=[*last[:-2], last[-1], last[-2]])
    if zero_point.shape.rank() == 0:
        sums = op.MatMulInteger(codes, turned, zero_point, weight_zero_point)
    else:  # one for each token: sum (c - z)(d - w) is sum c (d - w), less z sum (d - w)
        steps = op.Sub(op.Cast(turned, to=_INT32), op.Cast(weight_zero_point, to=_INT32))
        of_channel = op.ReduceSum(steps, op.Constant(value_ints=[-2]), keepdims=1)
        offset = op.Unsqueeze(op.Cast(zero_point, to=_INT32), op.Constant(value_ints=[-1]))
        sums = op.MatMulInteger(codes, turned, None, weight_zero_point)
        sums = op.Sub(sums, op.Mul(offset, of_channel))
    if weight.shape.rank() > 2:  # a layer for each group
        weight_scale = op.Unsqueeze(weight_scale, op.Constant(value_ints=[-2]))
    missing = codes.shape.rank() - scale.shape.rank()
    if scale.shape.rank() and missing:
        axes = [-1 - i for i in range(missing)]
        scale = op.Unsqueeze(scale, op.Constant(value_ints=axes))
    # Scales are positive. onnxruntime 1.32 would make one node of the products, with wrong values
    # where each token has a scale.
    y = op.Mul(_float(sums), op.Abs(op.Mul(scale, weight_scale)))
    if bias is not None:
        bias = _float(bias)
        if weight.shape.rank() > 2:
            bias = op.Unsqueeze(bias, op.Constant(value_ints=[-2]))
        y = op.Add(y, bias)
    return _like(y, x)


_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6
"""Types by the numbers that ONNX gives them."""


def _opset() -> Any:
    import onnxscript

    return onnxscript.opset21


def _tensor(value: int) -> Any:
    import onnx

    return onnx.helper.make_tensor("value", _UINT8, [1], [value])


def _float(x: Any) -> Any:
    return x if x.dtype == _FLOAT else _opset().Cast(x, to=_FLOAT)


def _like(y: Any, x: Any) -> Any:
    return y if x.dtype == _FLOAT else _opset().CastLike(y, x)


def _along_channels(of_channel: Any, axes: int) -> Any:
    op = _opset()
    return op.Unsqueeze(of_channel, op.Constant(value_ints=[1 + i for i in range(axes)]))
