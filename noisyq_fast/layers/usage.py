"""Warns of converted layers that a model does not call, or calls several times in one forward.

A layer that is never called is not quantized: some models read ``layer.weight`` and multiply in
their own code, in float. Only the first two training forwards are watched. The records are kept in
this module, under weak references, so that they are not copied or saved with the model.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from types import FrameType

import torch
from torch import nn

_FORWARDS = 2
_NAME = "forward watched by noisyq_fast"
_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def watch(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Starts to record which of the layers the model calls in training."""
    layers = {name: layer for name, layer in layers.items() if layer is not model}
    noted = _Watch(model, layers)
    for layer in layers.values():
        _watches[layer] = noted


def called(layer: nn.Module) -> None:
    """Records a call of a layer; layers call this in their forward."""
    if torch.compiler.is_compiling() or not _watches or not layer.training:
        return
    with _lock:
        noted = _watches.get(layer)
        if noted is not None and torch._C._current_graph_task_id() == -1:
            noted.called(layer, sys._getframe(1))


class _Forward:
    """One call of a model. Only the frame in which it runs keeps this object alive."""

    def __init__(self) -> None:
        self.called: set[str] = set()


class _Watch:
    """The record of one model."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.model = weakref.ref(model)
        self.names = weakref.WeakKeyDictionary({layer: name for name, layer in layers.items()})
        self.forwards = 0
        self.ever: set[str] = set()
        self.several: set[str] = set()

    def called(self, layer: nn.Module, caller: FrameType) -> None:
        forward = self._forward(caller)
        if forward is None:  # a layer or a part of the model is called directly
            return
        name = self.names[layer]
        self.ever.add(name)
        if name in forward.called and name not in self.several:
            self.several.add(name)
            warnings.warn(
                f"layer {name!r} is called several times in one forward, and all calls share the "
                "range of one input quantizer: if their inputs differ in magnitude, evaluation "
                "differs from training. Give each call a layer of its own (they may share the "
                "weight), or keep the layer float with overrides",
                stacklevel=5,
            )
        forward.called.add(name)

    def _forward(self, frame: FrameType | None) -> _Forward | None:
        """The call of the model within which ``frame`` runs, if any."""
        model = self.model()
        while frame is not None and model is not None:
            if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is model:
                # An additional local variable of the frame lives as long as the frame.
                if _NAME not in frame.f_locals:
                    frame.f_locals[_NAME] = forward = _Forward()
                    weakref.finalize(forward, self._ended).atexit = False
                return frame.f_locals[_NAME]
            frame = frame.f_back
        return None

    def _ended(self) -> None:
        with _lock:
            self.forwards += 1
            if self.forwards < _FORWARDS:
                return
            for layer in list(self.names):
                _watches.pop(layer, None)
            missed = [name for name in self.names.values() if name not in self.ever]
        if missed and self.forwards == _FORWARDS:
            warnings.warn(
                f"quantized layers not called so far: {', '.join(missed)}. Their weights may be "
                "read directly, which computes in float, or they are not used yet",
                stacklevel=2,
            )
