"""Files of quantized networks: weights as packed codes with scales, all other tensors unchanged."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast.calibration.folding import LINEAR, replace_module_, with_bias_
from noisyq_fast.calibration.ocs import SplitChannels, split_inputs_
from noisyq_fast.conversion.classes import float_class
from noisyq_fast.conversion.convert import quantize_model_
from noisyq_fast.files import writing
from noisyq_fast.files.stored_quantizers import describe, make, restore, store, stored_values
from noisyq_fast.integer.fusing import fuse_as_, how_fused
from noisyq_fast.layers.grouped import GroupedLinear, QuantGroupedLinear
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.quantizers import LearnedQuantizer, Quantizer
from noisyq_fast.ranges import freeze_weights_
from noisyq_fast.running import check_has_values, copy_of

FORMAT = "noisyq_fast integers"
VERSION = 2
"""The version of the format; it is increased if older versions would misread a file."""
_OF_LAYERS = {"arithmetic", "input_ranges"}
_WEIGHT = "weight_quantizer"
_EXTRA = "_extra_state"
_PARTS = ("codes", "scale", "zero_point", "step", "offset")
"""The tensors of a stored weight."""


def save_integers(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes a quantized network into a file, with its weights as integers.

    The file is a safetensors file. For each quantized weight it holds, under the weight's name,
    ``.codes``: packed bytes with the codes minus the smallest one, in steps of the grid, output
    channels first (two 4-bit codes per byte); ``.scale`` and, on the affine grid, ``.zero_point``;
    or the arguments of `EvenlySpaced`. All other parameters and buffers are stored unchanged,
    among them the range of each input. The metadata list the quantized layers with bits and grids,
    all modules, and the chains of `fuse_`.

    Tensors that only training needs, such as the float weights, are not stored. But a weight that
    is not only read through its layer's own quantizer is stored in float: of a layer that the model
    does not call (it may read the weight directly), a weight that another layer uses differently,
    of a `GroupedLinear` called with ``parameters=``, and the three weights of an attention with
    other sizes of key and value.

    Args:
        model: a network from `quantize_model_`, trained, or from a post-training method.
        path: the path of the file. An existing file is replaced.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without quantized layers; a layer whose weight is computed by something
            else (pruning, weight norm) or is not finite, or whose quantizers are off or of a class
            that files do not support.
        OSError: the file cannot be written.

    Warns:
        UserWarning: layers whose weights are stored in float because the layers have seen no input,
            or share the weights.

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
    path = writing.checked(path)
    check_has_values(model)
    kept = {name: why for name, layer in layers.items() if (why := _why_kept(layer))}
    kept |= _of_several_uses(model, layers.keys() - kept.keys())
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    described: dict[str, Any] = {}
    for name, layer in layers.items():
        try:
            described[name] = _describe(name, layer, name in kept, names, tensors)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    _warn_of(kept)
    stored = {name for name, about in described.items() if about["weights"]}
    tensors |= _others(model, set(names), stored)
    content = {"layers": described, "modules": _classes(model), "fused": how_fused(model)}
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}
    blob = save({name: t.contiguous().cpu() for name, t in tensors.items()}, metadata)
    writing.write(path, blob)
    return len(blob)


def _describe(
    name: str, layer: QuantLayer, keep: bool, names: dict[int, str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The metadata of a layer; adds its codes to ``tensors``, once for each of the weights in
    ``names``."""
    for each in layer.quantizers().values():
        if not each.enabled:
            raise ValueError("its quantizers are off; save it outside of noisyq_fast.disabled")
    others = {key: q for key, q in layer.quantizers().items() if key != _WEIGHT}
    inputs = {key: describe(quantizer, "input") for key, quantizer in others.items()}
    described = {"inputs": inputs, "weights": {}}
    described |= {option: vars(layer)[option] for option in _OF_LAYERS if option in vars(layer)}
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return described
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError("got an embedding with max_norm, which changes its weight as it is used")
    own = {id(p): key for key, p in layer._parameters.items() if p is not None}
    if any(id(weight) not in own for weight in layer.weights()):
        removes = 'prune.remove(layer, "weight") for pruning'
        if is_parametrized(layer):
            removes = 'parametrize.remove_parametrizations(layer, "weight")'
        raise ValueError(
            "its weight is made by another module, such as of pruning or weight norm; make it "
            f"a parameter before, with torch.nn.utils.{removes}, also in the model that "
            "load_integers gets"
        )
    if keep:
        return described | {"kept": describe(quantizer, "weight")}
    (weight,) = layer.weights()
    key = own[id(weight)]
    by_channel = layer.by_channel(weight.detach())
    values = quantizer(by_channel).detach()
    if not bool(values.isfinite().all()):
        raise ValueError("got a weight with a NaN or an infinity")
    first = names.setdefault(id(weight), f"{name}.{key}".lstrip("."))
    about, parts = store(quantizer, by_channel, values)
    tensors |= {f"{first}.{part}": tensor for part, tensor in parts.items()}
    described["weights"][key] = {
        "tensor": first,
        "shape": list(values.shape),
        "dtype": str(weight.dtype),
    } | about
    return described


_UNCALLED = "has seen no input"
_OTHERWISE = "shares its weight with something that uses it otherwise"


def _why_kept(layer: QuantLayer) -> str:
    """Why the weight of a layer is stored in float; empty if it can be stored as codes."""
    if layer.weight_quantizer is None:
        return ""
    if len(layer.weights()) > 1:
        return "has several weights"
    if getattr(layer, "was_given_parameters", False):
        return "is called with parameters="
    quantizer = layer.input_quantizer
    unknown = quantizer is not None and quantizer.keeps_range and quantizer.range.isnan().all()
    return _UNCALLED if unknown else ""


def _of_several_uses(model: nn.Module, names: Set[str]) -> dict[str, str]:
    """The layers whose weight has another user too, which needs other codes or the float weight."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for of_weight in users.values():
        layers = [_quantized(model, name) for name in of_weight if name in names]
        if len(of_weight) == 1 or not layers:
            continue
        values = [layer.quantized_weight(*layer.weights()).detach() for layer in layers]
        if len(layers) < len(of_weight) or not all(torch.equal(values[0], v) for v in values):
            found |= {name: _OTHERWISE for name in of_weight if name in names}
    return found


def _warn_of(kept: Mapping[str, str]) -> None:
    told = [f"{name} {why}" for name, why in kept.items() if why in (_UNCALLED, _OTHERWISE)]
    if told:
        warnings.warn(
            f"layers whose weights are kept in float: {'; '.join(told)}. A model is saved after it "
            "was trained or calibrated; layers that share a weight share its codes where their "
            "quantizers are alike",
            stacklevel=3,
        )


def _others(model: nn.Module, seen: set[int], stored: set[str]) -> dict[str, Tensor]:
    """Parameters and buffers, each once, except those in ``seen`` and those of the weight
    quantizers of ``stored`` layers."""
    left_out = []
    for name, module in model.named_modules():
        if name in stored:
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
    """Reads a file that `save_integers` has written.

    Args:
        model: a float network, constructed like the saved one before its conversion. It is not
            changed. Folded batch norms, split layers and replaced ReLU6 of post-training methods
            are reproduced in the copy.
        path: the path of the file.

    Returns:
        A quantized copy in evaluation mode, with the same bits as the saved network in evaluation.
        Its weights are the quantized values, frozen (`freeze_weights_`) until ``model.train()``;
        they can be trained further, with fixed scales.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a file that is damaged, of a newer version or of another format, or that holds
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
    model = copy_of(model)
    try:
        _change_as_saved_(model, content["modules"], tensors)
        _check_modules(model, content["modules"])
        _quantize_(model, content["layers"], tensors)
        _load_others_(model, content["layers"], tensors)
        fuse_as_(model, content["fused"])
    except Exception as error:  # a damaged file can raise almost anything
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: does not fit the model, or is damaged ({what:.500}); build the model as it "
            "was before quantize_model_ when the file was saved, or save the file again"
        ) from error
    return freeze_weights_(model.eval())


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
        content = {"fused": {}} | content  # version 1 has none
        if version not in map(str, range(1, VERSION + 1)) or not all(
            isinstance(content[part], dict) for part in ("layers", "modules", "fused")
        ):
            raise ValueError("its metadata are not those of this version")
    except Exception as error:
        raise ValueError(f"{path}: is damaged ({error!s:.200}); save it again") from error
    return tensors, content


def _change_as_saved_(
    model: nn.Module, modules: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Repeats the changes of modules that post-training methods have made to the saved network."""
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
        name: float_class(m).__name__
        for name, m in model.named_modules()
        if not isinstance(m, Quantizer)
    }


def _quantize_(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], tensors: dict[str, Tensor]
) -> None:
    overrides, weights = {}, {}
    for name, described in layers.items():
        weight = None
        if "kept" in described:
            weight = make(described["kept"])
            layer = model.get_submodule(name)
            if isinstance(layer, GroupedLinear):
                vars(layer)["was_given_parameters"] = True
        for key, about in described["weights"].items():
            places = {part: f"{about['tensor']}.{part}" for part in _PARTS}
            parts = {part: tensors[at] for part, at in places.items() if at in tensors}
            weight = restore(about, parts)
            weights[f"{name}.{key}".lstrip(".")] = weight, parts["codes"], about
        if len(described["weights"]) > 1:  # of an attention in version 1: floats, rounded before
            weight = None
        overrides[name] = {"weight": weight, "activation": _input(name, described, tensors)}
        overrides[name] |= {option: described[option] for option in _OF_LAYERS & described.keys()}
    quantize_model_(
        model, first_last_bits=None, overrides=overrides, filter=lambda name, _: name in layers
    )
    used = set()
    for name, (quantizer, packed, about) in weights.items():
        place, _, key = name.rpartition(".")
        layer = _quantized(model, place)
        parameter = getattr(layer, key)
        like = layer.by_channel(parameter.detach())
        if list(like.shape) != about["shape"] or str(parameter.dtype) != about["dtype"]:
            raise ValueError(
                f"{name}: {about['dtype']} of shape {about['shape']} in the file, "
                f"{parameter.dtype} of shape {list(like.shape)} in the model"
            )
        values = stored_values(quantizer, packed, like.shape)
        parameter.data.copy_(layer.from_channels(values, parameter.detach()))
        if isinstance(layer, QuantGroupedLinear):
            layer.has_stored_weight = True
        used |= {f"{about['tensor']}.{part}" for part in _PARTS}
    for name in used & tensors.keys():
        del tensors[name]


def _quantized(model: nn.Module, name: str) -> QuantLayer:
    layer = model.get_submodule(name)
    if not isinstance(layer, QuantLayer):
        raise ValueError(f"{name}: got {type(layer).__name__}, takes a quantized layer")
    return layer


def _input(
    name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Quantizer | None:
    """A quantizer like all input quantizers of a layer."""
    about = described["inputs"].get("input_quantizer")
    if about is None:
        return None
    observed = tensors.get(f"{name}.input_quantizer.observed".lstrip("."))
    return make(about, None if observed is None else observed.numel())


def _load_others_(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    own = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"{name}: in the file only")
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {list(tensor.shape)} in the file, "
                f"{own[name].dtype} of shape {list(own[name].shape)} in the model"
            )
    stored = {name for name, described in layers.items() if described["weights"]}
    weights = {id(w) for name in stored for w in _quantized(model, name).weights()}
    if missing := _others(model, weights, stored).keys() - tensors.keys():
        raise ValueError(f"{', '.join(sorted(missing)[:3])}: in the model only")
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(own, "_metadata", None)  # versions by module: it fits this model
    model.load_state_dict(state, strict=False)
    for name, described in layers.items():
        quantizers = described["inputs"] | {_WEIGHT: described.get("kept", {})}
        for key, about in quantizers.items():
            quantizer = getattr(model.get_submodule(name), key)
            if isinstance(quantizer, LearnedQuantizer):
                quantizer.initialized = bool(about["initialized"])
