"""Evaluation by onnxruntime, where it is installed: of a float network, in float32 and in its own 8
bits, and of ours, exported in both forms."""

from pathlib import Path

import torch
from comparison import Call
from torch import Tensor, nn

import noisyq_fast

try:
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it
    from onnxruntime import quantization
except ImportError:
    onnxruntime = None


def evaluations(model: nn.Module, seen: Tensor, images: Tensor, folder: Path) -> dict[str, Call]:
    """``model`` on ``images``, with ranges calibrated on ``seen``; empty without onnxruntime."""
    if onnxruntime is None:
        return {}
    exported, in_float, in_8_bits = (
        folder / name for name in ("model.onnx", "float.onnx", "int8.onnx")
    )
    torch.onnx.export(
        *(model, seen[:2].contiguous(), exported),
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        dynamo=True,
        external_data=False,
    )
    # Folds batch norms, as onnxruntime asks for before it quantizes.
    quantization.quant_pre_process(exported, in_float, skip_symbolic_shape=True)
    quantization.quantize_static(
        *(in_float, in_8_bits, _batches(seen)),
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    return {
        "onnxruntime, float": _evaluation(in_float, images),
        "onnxruntime, int8": _evaluation(in_8_bits, images),
    }


def exported(name: str, model: nn.Module, seen: Tensor, images: Tensor, folder: Path) -> dict:
    """A quantized ``model`` on ``images``, as `noisyq_fast.export_onnx` writes it."""
    if onnxruntime is None:
        return {}
    made = {}
    for form in ("qdq", "integer"):
        path = folder / f"{form}.onnx"
        noisyq_fast.export_onnx(model, seen[:2].contiguous(), path, form=form)
        made[f"{name}, in onnxruntime ({form})"] = _evaluation(path, images)
    return made


def _batches(images: Tensor):
    left = list(images.contiguous().split(32))

    class Batches(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return {"images": left.pop().numpy()} if left else None

    return Batches()


def _evaluation(path: Path, images: Tensor) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, given)
