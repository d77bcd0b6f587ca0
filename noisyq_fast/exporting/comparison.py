"""What onnxruntime computes of an exported network, against the network itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from noisyq_fast.exporting.prepare import Prepared
from noisyq_fast.running import tensors_in


def compare(
    prepared: Prepared, model: bytes, with_codes: bytes, inputs: list[str], example: Any
) -> tuple[int | None, int | None, float | None]:
    """How many codes of inputs there are, how many differ, and the largest difference of an output;
    each None without onnxruntime.

    Args:
        model, with_codes: the same, without and with the codes as outputs.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None, None, None
    tensors = [x for x in pytree.tree_leaves(example) if isinstance(x, Tensor)]
    feeds = dict(zip(inputs, (x.numpy() for x in tensors), strict=True))
    count = differing = 0
    made = run(with_codes, feeds)[-len(prepared.seen) :] if prepared.seen else []
    for (name, own), (other, _, offset), codes in zip(
        prepared.codes, prepared.seen, made, strict=True
    ):
        assert name == other
        own = own.numpy().astype(np.int32)
        differing += int((codes.astype(np.int32) - offset != own).sum())
        count += own.size
    outputs = [x for x in tensors_in(prepared.outputs) if x.is_floating_point()]
    ours = [x for x in run(model, feeds) if x.dtype.kind == "f"]
    largest = max(
        (
            float((torch.from_numpy(x).double() - y.double()).abs().max())
            for x, y in zip(ours, outputs, strict=True)
            if y.numel()
        ),
        default=0.0,
    )
    return count, differing, largest


def run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, options, providers).run(None, feeds)
