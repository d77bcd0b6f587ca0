"""Writing quantized networks as ONNX files."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from noisyq_fast.exporting import comparison, operators
from noisyq_fast.exporting.prepare import FORMS, QDQ, Prepared, copied
from noisyq_fast.files import writing
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.running import arguments, tensors_in


@dataclass(frozen=True)
class Export:
    """What `export_onnx` wrote. Print it to read it.

    Attributes:
        path: of the file.
        form: ``"qdq"`` or ``"integer"``.
        size: of the file in bytes.
        weights: by name, the bits that each code of a weight has in the file.
        integers: names of layers whose products are in integers.
        floats: by names of layers, what of them is in float, and why.
        any_batch: whether it takes batches of any size; else, as the model reads the size of its
            batch, those of the example's.
        codes: how many codes of inputs of layers the model makes on the example.
        differing: how many of these are others in onnxruntime, end to end, where its products are
            in float (``session.disable_quant_qdq``, see docs/deploy.md).
        difference: the largest difference of an output. These three are ``None`` where
            onnxruntime does not run it.
        not_compared: why it does not.
    """

    path: Path
    form: str
    size: int
    weights: dict[str, int]
    integers: list[str]
    floats: dict[str, str]
    any_batch: bool
    codes: int | None = None
    differing: int | None = None
    difference: float | None = None
    not_compared: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.form}, {self.size:,} bytes, opset {operators.OPSET}",
            f"weights as integers: {len(self.weights)}",
        ]
        if self.form != QDQ:
            lines.append(f"products of integers: {len(self.integers)}")
        if not self.any_batch:
            lines.append("takes batches of the size of the example only")
        lines += [f"float, {name or 'the model'}: {why}" for name, why in self.floats.items()]
        if self.codes is None or self.differing is None:
            lines.append(f"not compared: {self.not_compared}")
        else:
            lines.append(
                f"onnxruntime, end to end: {self.differing:,} of {self.codes:,} codes differ "
                f"({self.differing / max(self.codes, 1):.2g}), outputs by up to "
                f"{self.difference:.2g}"
            )
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    form: str = QDQ,
    *,
    dynamic_shapes: Any = None,
) -> Export:
    """Writes a quantized network as an ONNX file, whose quantizers give the same codes.

    Weights are codes with their scales: of up to 4 bits as int4 or uint4, else as int8 or uint8.
    The batch may have another size than that of the example.

    *qdq*: ``QuantizeLinear`` and ``DequantizeLinear`` around float products, which are those of
    whatever runs the file. Widths without a type have a ``Clip`` before ``QuantizeLinear``. The
    odd grid, ranges for each token or channel of the input itself, and inputs of `QIL` and `DSQ`
    have no ``QuantizeLinear``; they are written as ``Div``, ``Round``, ``Clip`` and ``Mul``. For
    the same input all give the codes of ours, but a NaN in the input has no meaning, and -0 is 0.

    *integer*: layers that can multiply codes (`QuantLayer.why_float`) are ``ConvInteger`` and
    ``MatMulInteger``, whatever their ``arithmetic``; then the sum is multiplied by the scale and
    the bias is added, as `noisyq_fast.integer.products` does, to the bit. With
    ``arithmetic="integer"`` and `fuse_` what is between two convolutions is the same to the bit
    too; other layers (softmax, layer norm, batch norm without `fuse_`) are float. Codes that
    are signed are 128 more there, and uint8.

    Args:
        model: as from `quantize_model_` and trained or calibrated, or from a post-training method,
            also after `fuse_`. It stays as it is. It is written as it computes in evaluation.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments), with the samples along the first axis of each tensor.
        path: of the file, which is replaced if there is one.
        form: ``"qdq"`` or ``"integer"``.
        dynamic_shapes: as for ``torch.export.export``, where other sizes than that of the batch
            are to be free, such as the length of a text.

    Returns:
        what was written, and how it differs from the model on the example where onnxruntime is
        installed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a model without quantized layers, with a quantizer that has no range yet, or
            with a layer that cannot be traced or has no form in ONNX. The message names the layer.
        ImportError: onnx or onnxscript is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import noisyq_fast, os, tempfile, torch
        >>> from torch import nn
        >>> model = noisyq_fast.quantize_model_(nn.Sequential(nn.Linear(64, 64)), first_last_bits=4)
        >>> _ = noisyq_fast.calibrate(model, [torch.randn(8, 64)])
        >>> path = os.path.join(tempfile.mkdtemp(), "model.onnx")
        >>> made = noisyq_fast.export_onnx(model, torch.randn(2, 64), path)
        >>> made.weights, made.differing
        ({'0.weight': 4}, 0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, takes {' or '.join(map(repr, FORMS))}")
    if not any(isinstance(m, QuantLayer) for m in model.modules()):
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns; torch.onnx.export writes float networks"
        )
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"export_onnx needs {package}: pip install 'noisyq_fast[onnx]'")
    path = writing.checked(path)
    args, kwargs = arguments(example)
    args, kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
    with torch.autocast("cpu", enabled=False):
        prepared = Prepared(copied(model), args, kwargs, form)
        traced = _traced(prepared, args, kwargs, dynamic_shapes)
        program = _translated(traced, prepared.model)
    with _quiet():
        _name_and_pack(program.model, prepared)
    with_codes = _serialized(program.model)
    inputs = [str(value.name) for value in program.model.graph.inputs]
    _leave_codes_out(program.model, len(prepared.seen))
    blob = _serialized(program.model)
    compared = comparison.compare(prepared, blob, with_codes, inputs, (args, kwargs))
    writing.write(path, blob)
    return Export(
        path=path,
        form=form,
        size=len(blob),
        weights={name: weight.bits for name, weight in prepared.weights.items()},
        integers=prepared.integers,
        floats=prepared.floats,
        any_batch=dynamic_shapes is not None or _has_any_batch(traced),
        **compared,
    )


def _on_cpu(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else x


def _traced(
    prepared: Prepared, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """The graph, whose last outputs are the codes of inputs."""
    model, running = prepared.model, [""]
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: running.append(name))
        module.register_forward_hook(lambda _, __, ___: _end(running))

    def with_codes(_: nn.Module, __: tuple, outputs: Any) -> Any:
        return tensors_in(outputs), [codes for _, codes, _ in prepared.seen]

    model.register_forward_pre_hook(lambda _, __: prepared.start())
    model.register_forward_hook(with_codes)

    def traced(args: tuple, kwargs: dict[str, Any], shapes: Any) -> torch.export.ExportedProgram:
        try:
            with _quiet(), torch.no_grad(), prepared.means.again():
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            where = _where(model, running[-1])
            raise ValueError(f"{where} torch.export fails: {_short(error)}") from error

    if dynamic_shapes is not None:
        return traced(args, kwargs, dynamic_shapes)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(_any_batch, dict(bound))
    # Where the model reads the size of its batch, or has none, that of the example is the one.
    with contextlib.suppress(ValueError):
        two_args, two_kwargs = pytree.tree_map(_with_two_samples, (args, kwargs))
        several = traced(two_args, two_kwargs, shapes)
        if _has_any_batch(several):
            return several
    return traced(args, kwargs, None)


def _has_any_batch(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in names]
    sizes = [x.shape[0] for x in values if isinstance(x, Tensor) and x.dim()]
    return bool(sizes) and not any(is_concrete_int(size) for size in sizes)


def _any_batch(x: Any) -> Any:
    is_batch = isinstance(x, Tensor) and x.dim() > 0
    return {0: torch.export.Dim.AUTO} if is_batch else None


def _with_two_samples(x: Any) -> Any:
    """A batch of one would stay a batch of one."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.shape[:1] == (1,) else x


def _end(running: list[str]) -> None:
    running.pop()


def _where(model: nn.Module, name: str) -> str:
    return f"layer {name!r} ({type(model.get_submodule(name)).__name__}):" if name else "model:"


def _short(error: BaseException) -> str:
    first = str(error).strip().partition("\n\n")[0]
    return f"{type(error).__name__}: {first:.400}"


def _translated(program: torch.export.ExportedProgram, model: nn.Module) -> torch.onnx.ONNXProgram:
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                opset_version=operators.OPSET,
                custom_translation_table=operators.translations(),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        assert translated is not None  # with dynamo
        return translated
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        text = "\n".join(map(str, causes))
        found = re.search(r"translating node %(\w+)", text)
        nodes = {node.name: node for node in program.graph.nodes}
        node = nodes.get(found.group(1)) if found else None
        modules = node.meta.get("nn_module_stack", {}) if node is not None else {}
        name = [*modules.values()][-1][0] if modules else ""
        raise ValueError(f"{_where(model, name)} {_short(causes[-1])}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch says about packages that it could use and about its own parts."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(before)


# The model in ONNX.


def _name_and_pack(model: Any, prepared: Prepared) -> None:
    """Gives initializers the names of weights, and those of 4 bits a type of 4 bits; then merges
    and folds constants, but for codes."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants

    names = {
        id(buffer): (f"{name}.{part}", weight.bits)
        for name, weight in prepared.weights.items()
        for part, buffer in weight.named_buffers()
    }
    initializers = model.graph.initializers
    codes = set()
    for own, buffer in prepared.model.named_buffers(remove_duplicate=False):
        if id(buffer) not in names or own not in initializers:
            continue
        name, bits = names[id(buffer)]
        value = initializers.pop(own)
        value.name = name
        initializers[name] = value
        if name.endswith((".codes", ".zero_point")):
            codes |= {name, name + _BYTES}
            if bits == 4:
                _pack(model.graph, value)

    def should_fold(node: Any) -> bool | None:
        return False if any(x is not None and x.name in codes for x in node.inputs) else None

    # Not by rules that rewrite arithmetic, which would change bits.
    common.InlinePass()(model)
    fold_constants(model, should_fold=should_fold)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)
    for node in model.graph.all_nodes():  # lines of the code that was traced
        node.metadata_props.clear()


_BYTES = ".bytes"
_LARGEST_FILE = 2**31 - 2**20
"""Of a protobuf file, less what is in it beside the weights."""


def _pack(graph: Any, value: Any) -> None:
    """Makes an initializer one of 4 bits, and bytes of it for products, which take no others."""
    import onnx_ir as ir

    byte = value.dtype
    four = ir.DataType.INT4 if byte == ir.DataType.INT8 else ir.DataType.UINT4
    products = [use for use in value.uses() if use.node.op_type != "DequantizeLinear"]
    if products and value.name.endswith(".zero_point"):
        return
    array = value.const_value.numpy().astype(four.numpy())
    value.const_value, value.dtype = ir.Tensor(array, dtype=four, name=value.name), four
    if products:
        cast = ir.node("Cast", [value], {"to": byte.value})
        made = cast.outputs[0]
        made.name, made.dtype, made.shape = value.name + _BYTES, byte, value.shape
        graph.insert_before(graph[0], cast)
        for use in products:
            use.node.replace_input_with(use.idx, made)


def _leave_codes_out(model: Any, count: int) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if count:
        del model.graph.outputs[-count:]
    RemoveUnusedNodesPass()(model)


def _serialized(model: Any) -> bytes:
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > _LARGEST_FILE:
        raise ValueError(f"model: got {size:,} bytes of weights, takes up to {_LARGEST_FILE:,}")
    return ir.to_proto(model).SerializeToString()
