"""Comparison of an exported network in onnxruntime with the network itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from noisyq_fast.exporting.prepare import Prepared
from noisyq_fast.running import tensors_in


def compare(
    prepared: Prepared, model: bytes, with_codes: bytes, inputs: list[str], example: Any
) -> dict[str, Any]:
    """The attributes of an `Export` from the comparison in onnxruntime.

    Args:
        model, with_codes: the same model, without and with the codes as outputs.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return {"not_compared": "onnxruntime is not installed"}
    tensors = [x for x in pytree.tree_leaves(example) if isinstance(x, Tensor)]
    try:
        feeds = dict(zip(inputs, (x.numpy() for x in tensors), strict=True))
        codes = _run(with_codes, feeds)[-len(prepared.seen) :] if prepared.seen else []
        outputs = _run(model, feeds)
    except Exception as error:  # such as an operator or a dtype that it does not have
        return {"not_compared": f"onnxruntime fails: {error!s:.300}"}
    count = differing = 0
    for (_, own), (_, _, offset), other in zip(prepared.codes, prepared.seen, codes, strict=True):
        count += own.numel()
        differing += int((other.astype(np.int32) - offset != own.numpy().astype(np.int32)).sum())
    ours = [
        x.detach().double().numpy() for x in tensors_in(prepared.outputs) if x.is_floating_point()
    ]
    theirs = [x for x in outputs if x.dtype.kind == "f"]
    largest = max(
        (float(np.abs(x - y).max()) for x, y in zip(ours, theirs, strict=True) if x.size),
        default=0.0,
    )
    return {"codes": count, "differing": differing, "difference": largest}


def _run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    # Otherwise it merges quantizers with products, and rounds biases and products.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, options, providers).run(None, feeds)
