"""Quantizers that learn their range, each with the defaults of its paper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.checks import Choice, require, require_choice, require_whole
from experiments.methods.method import Method
from experiments.models.residual import Residual
from experiments.training.schedules import phases
from noisyq_fast import AQD, DSQ, LSQ, PACT, QIL, SAT, Quantizer
from noisyq_fast.layers.grouped import PER_GROUP
from noisyq_fast.quantizers.lsq import GRADIENTS
from noisyq_fast.quantizers.pact import GRADIENTS as PACT_GRADIENTS
from noisyq_fast.quantizers.sat import ROUNDINGS


class LearnedQuant(Method):
    """What they share. A subclass has the fields ``NAME_bits`` and, where it learns, ``NAME_rate``,
    and gives its quantizers."""

    REPLACES: ClassVar[str | None] = "quantizer"
    STARTS_FROM_FLOAT: ClassVar[bool] = True
    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        require_whole(f"{self.NAME}_bits", self.bits, 2, 8)
        rate = self.learned_rate
        require(f"{self.NAME}_rate", rate, 0 < rate <= 100, "a number above 0, up to 100")

    @property
    def bits(self) -> int | None:
        return getattr(self, f"{self.NAME}_bits")

    @property
    def learned_rate(self) -> float:
        return getattr(self, f"{self.NAME}_rate")

    @property
    def label(self) -> str:
        return f"{self.NAME}{self.bits}"

    def evaluation_options(self) -> dict[str, Any]:
        return {f"{self.NAME}_bits": self.bits}

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        """Of weights and of inputs."""
        raise NotImplementedError

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        weight, activation = self.quantizers()
        return noisyq_fast.quantize_model_(
            model,
            weight=weight,
            activation=activation,
            example=example,
            input_ranges=getattr(model, "input_ranges", PER_GROUP),
        )


@dataclass(frozen=True)
class LearnedSteps(LearnedQuant):
    """LSQ (Esser et al. 2019, arXiv 1902.08153): learns the step between codes, one for each weight
    and one for each input.

    The first and the last layer keep 8 bits. Steps begin at 2 mean|x| / sqrt(largest code), of the
    weights and of the first batch. Other than in the paper, the optimizer is Adam, which takes no
    notice of the factor of a step's gradient: a rate of its own stands for it. The paper starts
    from a trained float network (--weights), and has 8 bits at both ends (both unverified).
    """

    NAME: ClassVar[str] = "lsq"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"lsq_bits": 4}

    lsq_bits: int | None = None
    """Bits of weights and inputs, 2 to 8."""

    lsq_rate: float = 0.1
    """The learning rate of steps, as a part of that of weights."""

    lsq_symmetric: bool = False
    """As many codes of weights below 0 as above, as in popular implementations."""

    lsq_gradient: Choice[str, GRADIENTS] = "paper"
    """The factor of a step's gradient: the paper's; over all elements, the batch included; or
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("lsq_gradient", self.lsq_gradient, GRADIENTS)

    @property
    def label(self) -> str:
        return super().label + ("-symmetric" if self.lsq_symmetric else "")

    def evaluation_options(self) -> dict[str, Any]:
        return {"lsq_bits": self.lsq_bits, "lsq_symmetric": self.lsq_symmetric}

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        options: dict[str, Any] = {
            "symmetric": self.lsq_symmetric,
            "gradient": self.lsq_gradient,
        }
        return LSQ(self.bits, **options), LSQ(self.bits, **options)


@dataclass(frozen=True)
class ClippedActivations(LearnedQuant):
    """PACT (Choi et al. 2018, arXiv 1805.06085) with the weights and the gradient of scale-adjusted
    training, SAT (Jin et al. 2019, arXiv 1912.10207): learns where inputs are clipped; weights are
    tanh(w) / max|tanh w|, rounded and scaled to an expected size.

    The first and the last layer keep 8 bits; the input of the network is rounded as by quant, where
    the authors take the pixels' own 8 bits. Clipping begins at 8. Without a penalty on clipping
    levels, which SAT does not need.
    """

    NAME: ClassVar[str] = "pact"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"pact_bits": 4}

    pact_bits: int | None = None
    """Bits of weights and inputs, 2 to 8."""

    pact_rate: float = 10.0
    """The learning rate of clipping levels, as a part of that of weights. They are large, and Adam
    moves all parameters alike."""

    pact_start: float = 8.0
    """Where clipping begins; with few bits and short training a smaller one, such as 3."""

    pact_gradient: Choice[str, PACT_GRADIENTS] = "sat"
    """Of a clipping level, that of SAT or PACT's own."""

    pact_rounding: Choice[str, ROUNDINGS] = "modified"
    """Of weights: modified (the authors' default, biased, with a 0), centered (unbiased, without
    one) or original (that of DoReFa-Net)."""

    pact_rescale: bool = True
    """Whether weights are scaled to an expected size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.pact_start
        require("pact_start", start, 0 < start <= 1000, "a number above 0, up to 1,000")
        require_choice("pact_gradient", self.pact_gradient, PACT_GRADIENTS)
        require_choice("pact_rounding", self.pact_rounding, tuple(ROUNDINGS))

    @property
    def label(self) -> str:
        parts = [super().label]
        parts += [] if self.pact_rounding == "modified" else [self.pact_rounding]
        parts += [] if self.pact_start == 8 else [f"start{self.pact_start:g}"]
        return "-".join(parts)

    def evaluation_options(self) -> dict[str, Any]:
        names = ("pact_bits", "pact_rounding", "pact_rescale")
        return {name: getattr(self, name) for name in names}

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        weight = SAT(self.bits, rounding=self.pact_rounding, rescale=self.pact_rescale)
        return weight, PACT(self.bits, start=self.pact_start, gradient=self.pact_gradient)


@dataclass(frozen=True)
class LearnedIntervals(LearnedQuant):
    """QIL (Jung et al. 2018, arXiv 1808.05779): learns the interval outside of which weights and
    inputs are pruned or clipped and, of 2-bit weights, how values are spread inside.

    The first and the last layer are those of quant, 8 bits; in the paper they are float
    (unverified).
    Progressive training goes from float over 5 bits down to those asked for, with equal shares of
    --epochs.
    """

    NAME: ClassVar[str] = "qil"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"qil_bits": 4}

    qil_bits: int | None = None
    """Bits of weights and inputs, 2 to 8."""

    qil_rate: float = 0.1
    """The learning rate of intervals, as a part of that of weights."""

    qil_progressive: bool = False
    """Float first, then 5 bits, and so on down to those asked for, as in the paper."""

    @property
    def label(self) -> str:
        return super().label + ("-progressive" if self.qil_progressive else "")

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return QIL(self.bits), QIL(self.bits)

    def widths(self) -> list[int | None]:
        """Those of the phases; None is float."""
        return [None, *range(5, self.bits, -1), self.bits] if self.qil_progressive else [self.bits]

    def begin_epoch(
        self, model: nn.Module, state: dict[str, Any], epoch: int, epochs: int, example: Tensor
    ) -> bool:
        if not self.qil_progressive:
            return False
        widths = self.widths()[-max(epochs, 1) :]  # each phase takes an epoch
        starts = phases(epochs, [1] * len(widths))
        width = next(w for w, s in zip(widths[::-1], starts[::-1], strict=True) if s <= epoch)
        state["width"] = width
        _set_width(model, width)
        return False

    def shape(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"width": state["width"]} if "width" in state else {}

    def restore(self, model: nn.Module, shape: dict[str, Any], example: Tensor) -> None:
        if "width" in shape:
            _set_width(model, shape["width"])


def _set_width(model: nn.Module, width: int | None) -> None:
    for module in model.modules():
        if isinstance(module, QIL):
            module.set_bits(width)


@dataclass(frozen=True)
class SoftQuant(LearnedQuant):
    """DSQ (Gong et al. 2019, arXiv 1908.05033): learns the range of weights and inputs and how soft
    the steps between its values are in the gradient.

    The first and the last layer keep 8 bits; in the paper they are float (unverified).
    """

    NAME: ClassVar[str] = "dsq"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"dsq_bits": 4}

    dsq_bits: int | None = None
    """Bits of weights and inputs, 2 to 8."""

    dsq_rate: float = 0.1
    """The learning rate of ranges and softness, as a part of that of weights."""

    dsq_alpha: float = 0.2
    """Where the softness begins, 0.001 to 0.5, where it is nearly plain rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.dsq_alpha
        require("dsq_alpha", alpha, 0.001 <= alpha <= 0.5, "a number from 0.001 to 0.5")

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return DSQ(self.bits, alpha=self.dsq_alpha), DSQ(self.bits, alpha=self.dsq_alpha)


@dataclass(frozen=True)
class ClippedLevels(LearnedQuant):
    """AQD (Chen et al. 2020, arXiv 2007.06919): learns where inputs, and the weights of each output
    channel, are clipped; weights have no 0.

    The first and the last layer keep 8 bits. The paper, whose networks compute in integers alone,
    quantizes what skip connections add too: that is an option here, and so are standardized
    weights, which are one in its authors' code. What it does to batch norms is left out. It starts
    from a trained float network (--weights).
    """

    NAME: ClassVar[str] = "aqd"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"aqd_bits": 4}
    LEGACY: ClassVar[Mapping[str, Any]] = {"aqd_skips": False, "aqd_standardize": False}
    NOT_WITH: ClassVar[Mapping[str, str]] = {"prune": "which would take channels away, not levels"}

    aqd_bits: int | None = None
    """Bits of weights and inputs, 2 to 8."""

    aqd_rate: float = 0.1
    """The learning rate of clipping levels, as a part of that of weights."""

    aqd_skips: bool = False
    """Quantize what is added where a shortcut ends, both with one clipping level for each sum, to
    as many levels below 0 as above; as in the paper."""

    aqd_standardize: bool = False
    """Subtract the mean from weights and divide them by their deviation before they are clipped;
    not in the first and the last layer."""

    @property
    def label(self) -> str:
        skips = "-skips" if self.aqd_skips else ""
        return super().label + skips + ("-standardized" if self.aqd_standardize else "")

    def evaluation_options(self) -> dict[str, Any]:
        options = self.without_legacy()
        del options["aqd_rate"]
        return options

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return AQD(self.bits, standardize=self.aqd_standardize), AQD(self.bits)

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        model = super().network(model, example)
        if self.aqd_skips:
            blocks = [module for module in model.modules() if isinstance(module, Residual)]
            takes = "a network with shortcuts, such as --model resnet20"
            require("aqd_skips", type(model).__name__, bool(blocks), takes)
            for block in blocks:
                block.skip = AQD(self.bits, signed=True).for_input()
        return model
