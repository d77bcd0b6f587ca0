"""A network on a sequence of frames, which computes what changed since the frame before."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.deepcache import matching
from experiments.deepcache.regions import Rectangle, Reuse, Window, of_blocks
from experiments.models.layers import LAYERS
from noisyq_fast import QuantConv2d, QuantLayer

_POINTWISE_MODULES = (_BatchNorm, nn.ReLU, nn.Identity, nn.Dropout, nn.Sigmoid)
_POINTWISE_FUNCTIONS = {F.relu, torch.relu, torch.sigmoid, F.dropout, torch.add, torch.mul}
_POINTWISE_FUNCTIONS |= {operator.add, operator.iadd, operator.mul, operator.imul}
_POINTWISE_METHODS = {"relu", "sigmoid", "add", "mul"}
_POOLS = {F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d}
_WINDOWS = {nn.Conv2d, QuantConv2d, nn.MaxPool2d, nn.AvgPool2d}
_WORTH = 0.75
"""The share of a convolution above which it is computed as a whole: in parts it takes longer."""


@dataclass
class Work:
    """Multiply-accumulates."""

    done: int = 0
    total: int = 0
    """What the network takes on whole frames."""

    @property
    def saved(self) -> float:
        """The share that was not computed."""
        return 1 - self.done / self.total if self.total else 0.0


class CachedInference:
    """Gives the network's output for one frame of a sequence after the other, and reuses the
    results of the frame before where blocks of it are the same, or nearly, up to one motion of the
    whole frame.

    A frame that equals the one before gives the same bits and computes nothing. One in which
    nothing matches gives those of the network itself. Between these, what is reused differs from
    what would be computed as blocks differ that match by `threshold`; at an infinite one nothing
    but equal frames matches.

    Convolutions are computed in part, with poolings and pointwise layers between them; a layer that
    sees the whole picture, such as a global pooling or a linear layer, is reused where all of its
    input is. A motion that is no multiple of the strides so far ends the reuse there.

    Args:
        model: one that `torch.fx` can trace; it is put into evaluation mode.
        prepare: makes the network's input from pictures uint8 `[1, H, W, C]`, each pixel from the
            same pixel; such as `Normalize`.
        block: the side of a block, in pixels.
        radius: how far motions are searched, in pixels.
        threshold: the ratio of peak signal to noise, in dB, above which a block is the same.
        expires: after so many frames that reuse something one is computed as a whole, which ends
            the drift of small differences.

    Attributes:
        work: of all frames.
        last: the work of the last frame.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        *,
        block: int = 8,
        radius: int = 4,
        threshold: float = 30.0,
        expires: int = 10,
    ) -> None:
        if block < 1 or radius < 0 or expires < 1:
            raise ValueError(
                f"block, radius, expires: got {block}, {radius}, {expires}; takes whole numbers "
                "from 1, 0 and 1"
            )
        self.model = model.eval()
        self.prepare = prepare
        self.block = block
        self.radius = radius
        self.threshold = threshold
        self.expires = expires
        self.graph = _traced(model)
        self.work = Work()
        self.reset()

    def reset(self) -> None:
        """Forgets the frame before."""
        self.previous: Tensor | None = None
        self.cache: dict[fx.Node, tuple[Tensor, int]] = {}
        self.age = 0
        self.last = Work()

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor:
        """The output `[1, ...]` for a picture uint8 `[H, W, C]`."""
        if frame.dtype != torch.uint8 or frame.ndim != 3:
            shape = list(frame.shape)
            raise ValueError(f"frame: got {frame.dtype} {shape}, takes uint8 [H, W, C]")
        same = self.previous is not None and torch.equal(frame, self.previous)
        reuse = Reuse.whole((frame.shape[0], frame.shape[1])) if same else self._matched(frame)
        if not same:
            self.age = 0 if reuse is None else self.age + 1
        inputs = self.prepare(frame[None])
        if inputs.shape[2:] != frame.shape[:2]:
            raise ValueError(
                f"prepare: got an input of {list(inputs.shape)} for a picture of "
                f"{list(frame.shape)}; takes [1, C, H, W] of the same height and width"
            )
        run = _Run(self.graph, self.cache, reuse)
        output = run.run(inputs)
        self.cache, self.last = run.values, run.work
        self.work = Work(self.work.done + run.work.done, self.work.total + run.work.total)
        self.previous = frame.clone()
        return output

    def _matched(self, frame: Tensor) -> Reuse | None:
        """What of a frame was in the one before, which is another."""
        if self.previous is None or self.previous.shape != frame.shape:
            return None
        size = frame.shape[0], frame.shape[1]
        if self.age >= self.expires or min(size) < self.block:
            return None
        before, now = (picture.permute(2, 0, 1).float() for picture in (self.previous, frame))
        grey_before, grey = (picture.mean(0, keepdim=True) for picture in (before, now))
        offsets, errors = matching.search(grey_before, grey, self.block, self.radius)
        offset = matching.global_offset(offsets, matching.psnr(errors), self.threshold)
        if offset is None:
            return None
        blocks = matching.reusable(before, now, self.block, offset, self.threshold)
        rectangles = of_blocks(blocks, self.block)
        return Reuse(size, offset, rectangles) if rectangles else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        has_modules = next(m.children(), None) is not None
        return (
            isinstance(m, QuantLayer)
            or not has_modules
            or super().is_leaf_module(m, module_qualified_name)
        )


def _traced(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # what the network does can raise anything
        raise ValueError(
            f"model: got {type(model).__name__}, which torch.fx cannot trace: {error}"
        ) from error


class _Run(fx.Interpreter):
    """One frame. `values` are the outputs of nodes, each with the version of its tensor, by which
    one that was changed in place is told; `regions` the parts of them that are as they were."""

    def __init__(
        self, graph: fx.GraphModule, cache: dict[fx.Node, tuple[Tensor, int]], reuse: Reuse | None
    ) -> None:
        super().__init__(graph)
        self.cache = cache
        self.reuse = reuse
        self.values: dict[fx.Node, tuple[Tensor, int]] = {}
        self.regions: dict[fx.Node, Reuse | None] = {}
        self.unchanged: set[fx.Node] = set()
        self.work = Work()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        if n.op == "placeholder":
            value, share = super().run_node(n), 1.0
            self.regions[n] = self.reuse
            if self.reuse is not None and self.reuse.is_whole:
                self.unchanged.add(n)
        elif self.unchanged.issuperset(n.all_input_nodes):
            self.unchanged.add(n)
            before = self._before(n)
            value = super().run_node(n) if before is None else before
            share = 1.0 if before is None else 0.0
        else:
            value, share = self._computed(n)
        if isinstance(value, Tensor):
            kept = value.clone() if any(map(self._is_in_place, n.users)) else value
            self.values[n] = kept, kept._version
            self._count(n, value, share)
        return value

    def _before(self, n: fx.Node) -> Tensor | None:
        """The output of a node for the frame before, unless it was changed since."""
        value, version = self.cache.get(n, (None, 0))
        return value if value is not None and value._version == version else None

    def _computed(self, n: fx.Node) -> tuple[Any, float]:
        """The output of a node, and the share of it that was computed."""
        layer = self._layer(n)
        window = _window(n, layer)
        known = self.cache.get(n)
        size = () if known is None else tuple(known[0].shape[2:])
        region = self.regions[n] = self._region(n, layer, window, size)
        before = self._before(n)
        if region is None or before is None or window is None or not isinstance(layer, nn.Conv2d):
            return super().run_node(n), 1.0
        (x,), _ = self.fetch_args_kwargs_from_env(n)
        return _convolved_in_part(layer, x, before, region, window)

    def _layer(self, n: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(n.target)) if n.op == "call_module" else None

    def _is_in_place(self, n: fx.Node) -> bool:
        """Whether a node changes its input."""
        if n.target in (operator.iadd, operator.imul) or n.kwargs.get("inplace"):
            return True
        return getattr(self._layer(n), "inplace", False) or str(n.target).endswith("_")

    def _region(
        self, n: fx.Node, layer: nn.Module | None, window: Window | None, size: tuple[int, ...]
    ) -> Reuse | None:
        """What of a node's output is as it was; `size` is that of its pictures."""
        regions = [self._input_region(node) for node in n.all_input_nodes]
        inputs = [region for region in regions if region is not None]
        if len(inputs) < len(regions) or len(size) != 2:
            return None
        if window is not None:
            return inputs[0].through(window, (size[0], size[1]))
        if not _is_pointwise(n, layer):
            return None
        region: Reuse | None = inputs[0]
        for other in inputs[1:]:
            region = region and region.and_(other)
        return region

    def _input_region(self, n: fx.Node) -> Reuse | None:
        if n not in self.unchanged:
            return self.regions[n]
        shape = self.values[n][0].shape if n in self.values else ()
        return Reuse.whole((shape[2], shape[3])) if len(shape) == 4 else None

    def _count(self, n: fx.Node, value: Tensor, share: float) -> None:
        layer = self._layer(n)
        if not isinstance(layer, LAYERS):
            return
        weight = layer.weight
        of_output = weight[0].numel() if isinstance(layer, nn.Conv2d) else weight.shape[-1]
        macs = value.numel() * of_output
        self.work.total += macs
        self.work.done += round(macs * share)


def _window(n: fx.Node, layer: nn.Module | None) -> Window | None:
    """What an output of a convolution, pooling or strided index sees; None of other nodes."""
    if n.op == "call_function" and n.target in _POOLS:
        given: Any = n.args[1:]
        named: Any = n.kwargs
        layer = _POOLS[n.target](*given, **named)
    if n.op == "call_function" and n.target is operator.getitem:
        return _strided(n.args[1])
    if type(layer) not in _WINDOWS:
        return None
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return None
    size, stride, padding, dilation = (
        _pair(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    height, width = ((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    return Window((height, width), stride, padding)


def _strided(index: Any) -> Window | None:
    """Of every so many rows and columns, from the first on."""
    if not isinstance(index, tuple) or len(index) != 4:
        return None
    if not all(isinstance(i, slice) and i.start in (None, 0) and i.stop is None for i in index):
        return None
    samples, channels, down, right = (i.step or 1 for i in index)
    return Window((1, 1), (down, right), (0, 0)) if samples == channels == 1 else None


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list):
        return value, value
    vertical, horizontal = value
    return vertical, horizontal


def _is_pointwise(n: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a pixel of the output depends on that pixel of each input alone."""
    if layer is not None:
        return isinstance(layer, _POINTWISE_MODULES)
    if n.op == "call_method":
        return n.target in _POINTWISE_METHODS
    if n.target is F.pad:
        widths = n.args[1] if len(n.args) == 2 and not n.kwargs else None
        return isinstance(widths, tuple) and widths[:4] == (0, 0, 0, 0)
    if n.target is torch.cat:
        return (*n.args[1:], *n.kwargs.values()) == (1,)
    return n.target in _POINTWISE_FUNCTIONS


def _convolved_in_part(
    layer: nn.Conv2d, x: Tensor, before: Tensor, region: Reuse, window: Window
) -> tuple[Tensor, float]:
    """The output of a convolution outside of a region, within which it is as it was before; and
    the share that was computed."""
    rest = region.rest()
    height, width = region.size
    share = sum(rectangle.area for rectangle in rest) / (height * width)
    if share > _WORTH:
        return layer(x), 1.0
    weight = layer.weight
    if isinstance(layer, QuantLayer):
        x, weight = layer.quantized_input(x), layer.quantized_weight()
    out = torch.empty_like(before)
    for rectangle in region.rectangles:
        there = rectangle.moved(region.offset)
        out[(..., *rectangle.slices)] = before[(..., *there.slices)]
    for rectangle in rest:
        seen = window.inputs(rectangle)
        there = seen.within(Rectangle(0, 0, x.shape[3] - 1, x.shape[2] - 1))
        around = (
            there.left - seen.left,
            seen.right - there.right,
            there.top - seen.top,
            seen.bottom - there.bottom,
        )
        if there.area:
            part = F.pad(x[(..., *there.slices)], around)
        else:  # padding alone
            part = x.new_zeros(*x.shape[:2], seen.bottom + 1 - seen.top, seen.right + 1 - seen.left)
        out[(..., *rectangle.slices)] = F.conv2d(
            part, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
        )
    return out, share
