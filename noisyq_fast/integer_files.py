"""Files of quantized networks: weights as packed codes with their scales, all else as it is."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisyq_fast.calibration.folding import LINEAR, replace_module_, with_bias_
from noisyq_fast.calibration.ocs import SplitChannels, split_inputs_
from noisyq_fast.convert import _float_class, quantize_model_
from noisyq_fast.layers import QuantLayer
from noisyq_fast.ops import dequantize
from noisyq_fast.packing import pack_codes, unpack_codes
from noisyq_fast.quantizers import AbsMax, Fixed, MovingAbsMax, Quantizer

FORMAT = "noisyq_fast integers"
VERSION = 1
"""Of the format: larger in files that older versions would misread."""
_OF_LAYERS = {"arithmetic", "input_ranges"}
_WEIGHT = "weight_quantizer"
_EXTRA = "_extra_state"
_INPUTS: dict[str, tuple[type[Quantizer], tuple[str, ...]]] = {
    "MovingAbsMax": (MovingAbsMax, ("bits", "axis", "averaging_constant", "ste", "grid")),
    "AbsMax": (AbsMax, ("bits", "axis", "grid", "group_size")),
}
"""The quantizers of inputs that a file can name, with the arguments that make them."""


def save_integers(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes a quantized network into a file, with its weights as integers.

    The file is a safetensors file. Of each quantized weight it has, under the name of the weight,
    ``.codes``: bytes with the codes minus the least one, in steps of the grid, output channels
    first, packed (two codes of 4 bits to a byte); ``.scale`` and, on the affine grid,
    ``.zero_point``. All other parameters and buffers are there as they are, among them the range of
    each input. The metadata say which layers are quantized, with how many bits and on which grid,
    and which modules there are.

    What only training needs, such as the float weights, is not kept.

    Args:
        model: as from `quantize_model_` and trained, or from a post-training method.
        path: of the file, which is replaced if there is one.

    Returns:
        the size of the file in bytes.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a model without quantized layers; a layer whose weight is made by something else
            (pruning, weight norm), is shared with a layer that uses it otherwise, or is not
            finite, or whose quantizers are off or of a kind that files do not know.
        OSError: the file cannot be written.

    Example:
        >>> import noisyq_fast, os, tempfile, torch
        >>> from torch import nn
        >>> model = noisyq_fast.quantize_model_(nn.Sequential(nn.Linear(64, 64)), first_last_bits=4)
        >>> _ = noisyq_fast.calibrate(model, [torch.randn(8, 64)]).eval()
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> noisyq_fast.save_integers(model, path) < 64 * 64 * 4 / 4
        True
        >>> again = noisyq_fast.load_integers(nn.Sequential(nn.Linear(64, 64)), path)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(again(x), model(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns"
        )
    tensors, codes_of, described = {}, {}, {}
    for name, layer in layers.items():
        try:
            described[name] = _describe(name, layer, codes_of, tensors)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    _refuse_other_users(model, layers, codes_of)
    tensors |= _others(model, set(codes_of))
    content = {"layers": described, "modules": _classes(model)}
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _describe(
    name: str,
    layer: QuantLayer,
    codes_of: dict[int, tuple[str, Tensor]],
    tensors: dict[str, Tensor],
) -> dict[str, Any]:
    """What is said of a layer; its codes go to ``tensors``."""
    for quantizer in layer.quantizers().values():
        if not quantizer.enabled:
            raise ValueError("its quantizers are off; save it outside of noisyq_fast.disabled")
    inputs = {key: _describe_input(q) for key, q in layer.quantizers().items() if key != _WEIGHT}
    described = {"inputs": inputs, "weights": {}}
    described |= {option: vars(layer)[option] for option in _OF_LAYERS if option in vars(layer)}
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return described
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError("got an embedding with max_norm, which changes its weight as it is used")
    if not quantizer.gives_codes:
        raise ValueError(f"got {quantizer} for its weight, takes a quantizer that gives codes")
    own = {id(p): key for key, p in layer._parameters.items() if p is not None}
    for weight in layer.weights():
        if id(weight) not in own:
            raise ValueError(
                "its weight is made by another module, such as of pruning or weight norm; make it "
                "a parameter before, with torch.nn.utils.prune.remove or the like"
            )
        key = own[id(weight)]
        quantized = quantizer.codes(layer.by_channel(weight.detach()))
        values = layer.quantized_weight(weight).detach()
        if not bool(values.isfinite().all()):
            raise ValueError("got a weight with a NaN or an infinity")
        first, same = codes_of.setdefault(id(weight), (f"{name}.{key}".lstrip("."), values))
        if not torch.equal(same, values):
            raise ValueError(f"its weight is {first!r} too, which is quantized otherwise")
        tensors[f"{first}.codes"] = pack_codes(quantized.codes, quantizer.grid)
        tensors[f"{first}.scale"] = quantized.scale
        if quantized.zero_point is not None:
            tensors[f"{first}.zero_point"] = quantized.zero_point
        described["weights"][key] = {
            "tensor": first,
            "shape": list(quantized.codes.shape),
            "dtype": str(weight.dtype),
            "bits": quantizer.bits,
            "grid": quantizer.grid_kind,
            "axis": quantizer.axis,
            "group_size": quantizer.group_size,
        }
    return described


def _describe_input(quantizer: Quantizer) -> dict[str, Any]:
    kind = type(quantizer).__name__
    if kind not in _INPUTS or type(quantizer) is not _INPUTS[kind][0]:
        raise ValueError(f"got {quantizer} for its input, takes one of {', '.join(_INPUTS)}")
    attributes = vars(quantizer) | {"grid": quantizer.grid_kind}
    return {"kind": kind} | {name: attributes[name] for name in _INPUTS[kind][1]}


def _refuse_other_users(
    model: nn.Module, layers: Mapping[str, QuantLayer], codes_of: Mapping[int, tuple[str, Tensor]]
) -> None:
    """A weight of which only the codes are kept must not be read in float."""
    for name, module in model.named_modules():
        quantizes = name in layers and module.weight_quantizer is not None
        for key, parameter in module._parameters.items():
            if id(parameter) in codes_of and not quantizes:
                first = codes_of[id(parameter)][0]
                raise ValueError(
                    f"layer {name!r}: its {key} is {first!r} too, which is quantized; give it a "
                    "copy of its own, or quantize both"
                )


def _others(model: nn.Module, seen: set[int]) -> dict[str, Tensor]:
    """Parameters and buffers but for those that were ``seen`` and what quantizes weights, each
    once."""
    left_out = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
            left_out.append(f"{name}.{_WEIGHT}.".lstrip("."))
        if isinstance(module, Quantizer):
            left_out.append(f"{name}.{_EXTRA}".lstrip("."))
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(tuple(left_out)) or id(tensor) in seen:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}, files take tensors only")
        seen.add(id(tensor))
        found[name] = tensor.detach().clone()
    return found


def load_integers(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads what `save_integers` has written.

    Args:
        model: a float network, built as the saved one was before its conversion. It stays as it is.
            Where a post-training method has folded a batch norm, split a layer or made a ReLU6 a
            ReLU, so does this function.
        path: of the file.

    Returns:
        a quantized copy in evaluation mode, which computes what the saved one does in evaluation,
        to the bit. Its weights are the quantized values; they can be trained on, with the scales
        that they have.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a file that is damaged, of a newer version or something else, or that holds
            another network.
        OSError: the file cannot be read.

    Example:
        >>> import noisyq_fast, os, tempfile, torch
        >>> from torch import nn
        >>> model = noisyq_fast.bitsplit(nn.Sequential(nn.Linear(3, 2)), [torch.randn(8, 3)])
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = noisyq_fast.save_integers(model, path)
        >>> noisyq_fast.load_integers(nn.Sequential(nn.Linear(3, 2)), path)
        Sequential(
          (0): QuantLinear(in_features=3, out_features=2, bias=True, W8/A8)
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    path = Path(path)
    tensors, content = _read(path)
    model = copy.deepcopy(model)
    try:
        _change_as_saved_(model, content["modules"], tensors)
        _check_modules(model, content["modules"])
        _quantize_(model, content["layers"], tensors)
        _load_others_(model, tensors)
    except Exception as error:  # there can be anything in it
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: does not fit the model, or is damaged ({what:.500}); build the model as it "
            "was before quantize_model_ when the file was saved, or save the file again"
        ) from error
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: is not a regular file")
    blob = path.read_bytes()
    try:
        tensors = load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except Exception as error:  # a malformed file can raise almost anything
        raise ValueError(
            f"{path}: not a safetensors file, or only a part of one ({error!s:.200}); copy it "
            "again, or write it again with save_integers"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: was not written by save_integers; a state dict is loaded with "
            "load_state_dict, into a model converted with quantize_model_"
        )
    version = metadata.get("version", "")
    if version.isascii() and version.isdigit() and len(version) < 10 and int(version) > VERSION:
        raise ValueError(
            f"{path}: has version {version} of the format, this noisyq_fast reads up to {VERSION}; "
            "install a newer one"
        )
    try:
        content = json.loads(metadata["content"])
        if version != str(VERSION) or not all(
            isinstance(content[part], dict) for part in ("layers", "modules")
        ):
            raise ValueError("its metadata are not those of this version")
    except Exception as error:
        raise ValueError(f"{path}: is damaged ({error!s:.200}); save it again") from error
    return tensors, content


def _change_as_saved_(
    model: nn.Module, modules: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Does to a network what post-training methods have done to the saved one."""
    for name, module in list(model.named_modules()):
        kind = modules.get(name)
        if not name or kind is None:
            continue
        if kind == "Identity" and isinstance(module, _BatchNorm):
            replace_module_(model, module, nn.Identity())
        elif kind == "ReLU" and type(module) is nn.ReLU6:
            replace_module_(model, module, nn.ReLU())
        elif modules.get(f"{name}.0") == "SplitChannels" and isinstance(module, LINEAR):
            _add_bias_(module, f"{name}.1.bias" in tensors)
            parts = {part: tensors.get(f"{name}.0.{part}") for part in ("factor", "shift")}
            sources = tensors[f"{name}.0.sources"]
            channels = module.weight.shape[1]
            if sources.dtype != torch.int64 or not bool(
                ((sources >= 0) & (sources < channels)).all()
            ):
                raise ValueError(f"{name}.0.sources: takes channels from 0 to {channels - 1}")
            split = SplitChannels(sources, **parts)
            split_inputs_(model, module, split)
        elif isinstance(module, LINEAR):
            _add_bias_(module, f"{name}.bias" in tensors)


def _add_bias_(layer: nn.Module, wanted: bool) -> None:
    if wanted:
        with_bias_(layer)


def _check_modules(model: nn.Module, expected: Mapping[str, str]) -> None:
    own = _classes(model)
    differing = [
        f"{name or 'the model'}: {expected.get(name, 'nothing')} in the file, "
        f"{own.get(name, 'nothing')} in the model"
        for name in [*expected, *(own.keys() - expected.keys())]
        if expected.get(name) != own.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError("; ".join(differing[:3]) + more)


def _classes(model: nn.Module) -> dict[str, str]:
    """The names of the classes of all modules before quantization."""
    return {
        name: (_float_class(m) if isinstance(m, QuantLayer) else type(m)).__name__
        for name, m in model.named_modules()
        if not isinstance(m, Quantizer)
    }


def _quantize_(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], tensors: dict[str, Tensor]
) -> None:
    overrides = {}
    weights = {}
    for name, described in layers.items():
        found = {}
        for key, about in described["weights"].items():
            found[key] = _weight(about, tensors)
            weights[f"{name}.{key}".lstrip(".")] = *found[key], about
        only = next(iter(found.values()))[0] if len(found) == 1 else None
        overrides[name] = {"weight": only, "activation": _input(name, described, tensors)}
        overrides[name] |= {option: described[option] for option in _OF_LAYERS & described.keys()}
    quantize_model_(
        model, first_last_bits=None, overrides=overrides, filter=lambda name, _: name in layers
    )
    used = set()
    for name, (quantizer, packed, about) in weights.items():
        place, _, key = name.rpartition(".")
        layer = model.get_submodule(place)
        parameter = getattr(layer, key)
        like = layer.by_channel(parameter.detach())
        if list(like.shape) != about["shape"] or str(parameter.dtype) != about["dtype"]:
            raise ValueError(
                f"{name}: {about['dtype']} of shape {about['shape']} in the file, "
                f"{parameter.dtype} of shape {list(like.shape)} in the model"
            )
        codes = unpack_codes(packed, quantizer.grid, like.shape)
        values = dequantize(
            codes,
            quantizer.scale,
            quantizer.axis,
            zero_point=quantizer.zero_point,
            group_size=quantizer.group_size,
        )
        parameter.data.copy_(layer.from_channels(values, parameter.detach()))
        used |= {f"{about['tensor']}.{part}" for part in ("codes", "scale", "zero_point")}
    for name in used & tensors.keys():
        del tensors[name]


def _weight(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Fixed, Tensor]:
    codes, scale, zero_point = (
        tensors.get(f"{about['tensor']}.{part}") for part in ("codes", "scale", "zero_point")
    )
    options = {name: about[name] for name in ("bits", "axis", "grid", "group_size")}
    return Fixed(scale, zero_point=zero_point, **options), codes


def _input(
    name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Quantizer | None:
    """What all input quantizers of a layer are copies of."""
    about = described["inputs"].get("input_quantizer")
    if about is None:
        return None
    kind, names = _INPUTS[about["kind"]]
    options = {option: about[option] for option in names}
    if kind is MovingAbsMax and about["axis"] is not None:
        observed = tensors[f"{name}.input_quantizer.observed".lstrip(".")]
        options["ranges"] = observed.numel()
    return kind(**options)


def _load_others_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"{name}: in the file only")
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {list(tensor.shape)} in the file, "
                f"{own[name].dtype} of shape {list(own[name].shape)} in the model"
            )
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    expected = _others(model, {id(w) for layer in layers for w in layer.weights()})
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{', '.join(sorted(missing)[:3])}: in the model only")
    model.load_state_dict(tensors, strict=False)
